"""The benchmark engine behind `bigkernels bench` and `benchmarks/`.

The machine's limits are measured first, in the same run (`limits`); a family lists its cases (`families`); the engine
checks what every candidate of a case computes, then times the candidates in turn, and reports rows (`engine`).
"""
