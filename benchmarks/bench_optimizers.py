FAMILY = "optimizers"


def test_optimizers(benchmark, step):
    benchmark(step)
