FAMILY = "quantized"


def test_quantized_linear(benchmark, step):
    benchmark(step)
