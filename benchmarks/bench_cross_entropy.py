FAMILY = "cross_entropy"


def test_cross_entropy(benchmark, step):
    benchmark(step)
