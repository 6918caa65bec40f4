FAMILY = "layer_norm"


def test_layer_norm(benchmark, step):
    benchmark(step)
