FAMILY = "linear_cross_entropy"


def test_linear_cross_entropy(benchmark, step):
    benchmark(step)
