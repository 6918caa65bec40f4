FAMILY = "attention"


def test_attention(benchmark, step):
    benchmark(step)
