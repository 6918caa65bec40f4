FAMILY = "small"


def test_small(benchmark, step):
    benchmark(step)
