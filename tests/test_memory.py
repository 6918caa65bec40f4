"""`bigkernels.reuse_memory`, in processes of its own: it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

SNIPPET = """
import resource, sys, torch, bigkernels
if sys.argv[1] == "reuse":
    print(bigkernels.reuse_memory())
x = torch.ones(80 << 20, dtype=torch.uint8)  # beyond the largest block that glibc keeps by itself
for _ in range(4):
    x.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    x.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", SNIPPET, how], capture_output=True, text=True, check=True)
    *took, faults = done.stdout.split()
    return took == ["True"], int(faults)


def test_large_tensors_take_over_freed_pages():
    took, faults = page_faults("reuse")
    if not took:
        pytest.skip("the C library here is not glibc")
    _, fresh = page_faults("not")
    assert faults < fresh / 4, (faults, fresh)  # the heap may still grow once
