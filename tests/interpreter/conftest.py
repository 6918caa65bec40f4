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
    """The dispatcher hands CPU tensors to the Triton launchers, and bigkernels.use("triton") accepts them."""
    import torch

    from bigkernels.ops import OPERATORS
    from bigkernels.ops._registry import Implementation
    from bigkernels.ops.compress import OPERATOR as CODES
    from bigkernels.triton import OPERATORS as KERNELS
    from bigkernels.triton import launchers

    library = torch.library.Library("bigkernels", "IMPL")
    operators = OPERATORS | {CODES.name: CODES}
    before = {name: operator.implementations for name, operator in operators.items()}
    for name, launcher in launchers().items():
        library.impl(name, launcher, "CPU", allow_override=True)
    for name in KERNELS:
        # bfloat16 is left to real GPUs.
        operators[name].implementations = (Implementation("triton", "cpu", dtypes=(torch.float32, torch.float16)),)
        operators[name]._choices.clear()
    yield
    for name, operator in operators.items():
        operator.implementations = before[name]
        operator._choices.clear()
    library._destroy()
