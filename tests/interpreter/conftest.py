"""Runs the Triton kernels on CPU tensors, in Triton's interpreter, behind the public functions.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own: run them with
`TRITON_INTERPRET=1 pytest tests/interpreter`, as tests/test_interpreter.py does.
"""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def _scalars_can_bound_loops() -> None:
    """Triton 3.6 turns arrays of one element into integers, in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if not collect_ignore_glob:
    _scalars_can_bound_loops()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """BIGKERNELS_TEST_PART=i/n runs every n-th test, from the i-th."""
    first, step = map(int, os.environ.get("BIGKERNELS_TEST_PART", "0/1").split("/"))
    items[:] = items[first::step]


@pytest.fixture(scope="module")
def launchers_serve_cpu_tensors():
    import torch
    from kernels_on_cpu import launchers_take_cpu_tensors

    with launchers_take_cpu_tensors((torch.float32, torch.float16)):  # bfloat16 is left to real GPUs
        yield
