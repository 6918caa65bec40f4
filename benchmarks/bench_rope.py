FAMILY = "rope"


def test_rope(benchmark, step):
    benchmark(step)
