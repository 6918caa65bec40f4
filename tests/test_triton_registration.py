"""Importing bigkernels must neither import triton nor wake the driver; a CUDA tensor must still find its kernel."""

import importlib.util
import subprocess
import sys

import pytest


def python(snippet: str) -> str:
    return subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True).stdout.strip()


def test_import_leaves_triton_and_the_driver_alone():
    assert python("import sys, torch, bigkernels; print('triton' in sys.modules, torch.cuda.is_initialized())") == (
        "False False"
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("built", [True, False], ids=["torch with CUDA", "torch without CUDA"])
def test_a_torch_with_cuda_gets_every_launcher(built):
    snippet = f"""
import sys, torch
torch.backends.cuda.is_built = lambda: {built}
import bigkernels
from bigkernels.ops import OPERATORS
from bigkernels.triton import OPERATORS as kernels, launchers
names = [f"bigkernels::{{name}}" for name in launchers()]
found = [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names]
print(sorted(set(OPERATORS) - set(kernels)), all(found), any(found), "triton" in sys.modules)
"""
    # cuBLAS computes linear, and the products of linear_cross_entropy.
    assert python(snippet) == f"['linear', 'linear_cross_entropy'] {built} {built} False"
