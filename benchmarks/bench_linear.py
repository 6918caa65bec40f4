FAMILY = "linear"


def test_linear(benchmark, step):
    benchmark(step)
