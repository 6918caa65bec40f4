FAMILY = "checkpointing"


def test_checkpointing(benchmark, step):
    benchmark(step)
