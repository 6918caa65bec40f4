FAMILY = "generation"


def test_generation(benchmark, step):
    benchmark(step)
