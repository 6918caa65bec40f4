FAMILY = "rms_norm"


def test_rms_norm(benchmark, step):
    benchmark(step)
