FAMILY = "mlp"


def test_mlp(benchmark, step):
    benchmark(step)
