FAMILY = "model"


def test_model(benchmark, step):
    benchmark(step)
