"""How attention for training is tiled, by the kind of GPU: one table a compute capability, nothing tuned at run time.

The matrix units do almost all the work, so tiles are as large as registers and shared memory allow. Hopper's units take
64 rows at a time for each group of four warps, and are fast where the other side is wide: with fewer rows a product is
computed twice, once a group. float32 has no matrix unit that keeps its digits, and takes small tiles everywhere.
`benchmarks/results/gpu-tiles.md` has what the compiler makes of each tile.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass

from ._launch import since

LARGEST = 640  # elements of a query and its value together: tiles of more do not fit the registers


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a program's tile, warps, pipeline stages, and registers a thread, where the assembler would
    take fewer and spill to fit one more program.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def constants(self) -> dict[str, int | None]:
        return {
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "STAGES": self.stages,
            "maxnreg": self.registers,
        }


# Of each kernel, (largest head, tiles, tiles of calls with more in their registers: dropout, or dense tensors).
# What fits 99 KB of shared memory: Ampere, Ada and the small Blackwells.
_AMPERE = {
    "attend": (
        (64, Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)),
        (128, Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 2)),
        (192, Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 1)),
        (256, Tiles(64, 64, 8, 1), Tiles(32, 64, 8, 1)),
        (LARGEST, Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
    ),
    "queries": (
        (64, Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)),
        (96, Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2)),
        (128, Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
        (192, Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 1)),
        (256, Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
        (LARGEST, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    "keys": (
        (64, Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 2)),
        (96, Tiles(32, 128, 8, 2), Tiles(32, 32, 4, 2)),
        (128, Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 2)),
        (192, Tiles(64, 32, 8, 2), Tiles(32, 16, 4, 1)),
        (256, Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1)),
        (LARGEST, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    # "keys" that adds up the gradient of the queries too; None where two kernels take less time.
    "sum": ((64, Tiles(64, 64, 4, 2), None), (LARGEST, None, None)),
    "bias": ((128, Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)), (LARGEST, Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1))),
}
# float32: the same tiles in all kernels, so that backward finds the scores that forward had, to the last bit.
_WIDE = (
    (64, Tiles(32, 16, 4, 1, 208), Tiles(32, 16, 4, 1, 208)),
    (128, Tiles(32, 16, 8, 1, 240), Tiles(16, 16, 4, 1, 208)),
    (256, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1, 168)),
    (LARGEST, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
)
# 227 KB, and matrix units that take operands from there: Hopper. With more than 192 elements the gradients of 64 keys
# fill the registers of a group of warps, and the older instructions have to do.
_HOPPER = {
    "attend": (
        (64, Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)),
        (96, Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
        (128, Tiles(128, 128, 8, 2), Tiles(128, 32, 8, 2)),
        (256, Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
        (LARGEST, Tiles(16, 64, 8, 1), Tiles(16, 64, 8, 1)),
    ),
    "queries": (
        (64, Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
        (128, Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
        (256, Tiles(128, 32, 8, 2), Tiles(128, 16, 8, 2)),
        (LARGEST, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    "keys": (
        (64, Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2)),
        (128, Tiles(32, 128, 8, 2), Tiles(16, 128, 8, 2)),
        (256, Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)),
        (LARGEST, Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    "sum": (
        (64, Tiles(64, 128, 8, 2), None),
        (96, None, None),
        (128, Tiles(32, 128, 8, 2), None),
        (LARGEST, None, None),
    ),
    "bias": (
        (128, Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
        (256, Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1)),
        (LARGEST, Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    ),
}
if since(3, 8):  # which keeps more in registers: spills, of these tiles with 64 keys, 32 to 272 bytes
    _NARROW, _WIDER = Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1)
    _HOPPER["bias"] = ((64, _NARROW, _NARROW), (128, _WIDER, _WIDER), *_HOPPER["bias"][1:])
    _AMPERE["queries"] = tuple(
        (most, Tiles(128, 32, 8, 2), heavy) if most == 96 else (most, plain, heavy)
        for most, plain, heavy in _AMPERE["queries"]
    )
    _AMPERE["keys"] = ((64, Tiles(64, 128, 8, 2), Tiles(32, 32, 4, 2)), *_AMPERE["keys"][1:])
    _WIDE = ((64, Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1)), *_WIDE[1:])
# The same memory, and units that keep their results in a memory of their own: nothing is computed twice whatever the
# warps are, and threads hold what they read from there, of wide tiles too much.
_BLACKWELL = _HOPPER | {
    "attend": (
        (64, Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
        (96, Tiles(128, 64, 8, 2, None if since(3, 8) else 168), Tiles(128, 32, 8, 2)),
        (128, Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
        *_HOPPER["attend"][3:],
    ),
    "keys": (
        (64, Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2)),
        (128, Tiles(32, 128, 8, 2, 168), Tiles(16, 128, 8, 2, 168)),
        (256, Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1)),
        _HOPPER["keys"][3],
    ),
    "bias": tuple(
        (most, Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)) if most == 256 else (most, plain, heavy)
        for most, plain, heavy in _HOPPER["bias"]
    ),
}
_TABLES = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _AMPERE}  # from this compute capability on


@functools.cache
def tiles(kernel: str, size: int, wide: bool, heavy: bool, capability: int) -> Tiles | None:
    """For heads of `size` elements (the larger of keys and values), on GPUs of a compute capability, 90 for 9.0."""
    since = max((c for c in _TABLES if c <= capability), default=80)
    table = _WIDE if wide else _TABLES[since][kernel]
    return next(found[heavy] for most, *found in table if size <= most)
