FAMILY = "glu"


def test_glu(benchmark, step):
    benchmark(step)
