FAMILY = "group_norm"


def test_group_norm(benchmark, step):
    benchmark(step)
