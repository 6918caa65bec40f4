"""The rows of traits in Python and in C++."""

from __future__ import annotations

import pytest
import torch

import bigkernels.quantization  # noqa: F401 - registers kinds
from bigkernels.ops.codes import FIRST_WITHOUT_KERNELS, KINDS

native = pytest.importorskip("bigkernels._native")


def test_rows_are_those_of_the_kernels():
    rows = native.codes()
    assert [row[0] for row in rows[:3]] == ["f32", "bf16", "f16"] and not any(row[3] for row in rows[:3])
    ours = {number: row for number, row in KINDS.items() if number < FIRST_WITHOUT_KERNELS}
    assert sorted(ours) == list(range(3, len(rows)))
    for number, row in ours.items():
        said = (
            row.name,
            row.bits,
            row.codes == torch.int8,
            row.scale_bytes,
            row.blocked,
            bool(row.zero),
            row.row_scale,
            row.book,
            row.block,
            row.block_bytes,
        )
        assert rows[number] == said
