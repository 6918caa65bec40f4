FAMILY = "batch_norm"


def test_batch_norm(benchmark, step):
    benchmark(step)
