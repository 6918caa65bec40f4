FAMILY = "decode"


def test_decode_attention(benchmark, step):
    benchmark(step)
