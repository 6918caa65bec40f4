"""The launchers and kernels of bigkernels.triton against the references, by the criterion of the package.

bfloat16 is left to real GPUs: the interpreter's arithmetic on it is wrong.
"""

import importlib

import pytest
import torch

from bigkernels._compare import compare_all, worst
from bigkernels._samples import SAMPLES, Sample, _norm_inputs, widen
from bigkernels.ops import OPERATORS
from bigkernels.ops._registry import Implementation
from bigkernels.triton import OPERATORS as KERNELS

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def launchers_serve_cpu_tensors():
    """The dispatcher hands CPU tensors to the Triton launchers, and bigkernels.use("triton") accepts them."""
    library = torch.library.Library("bigkernels", "IMPL")
    before = {name: operator.implementations for name, operator in OPERATORS.items()}
    for name in KERNELS:
        module = importlib.import_module(f"bigkernels.triton.{name}")
        library.impl(f"{name}_fwd", module.forward, "CPU", allow_override=True)
        library.impl(f"{name}_bwd", module.backward, "CPU", allow_override=True)
        OPERATORS[name].implementations = (Implementation("triton", "cpu", dtypes=DTYPES),)
        OPERATORS[name]._choices.clear()
    yield
    for name, operator in OPERATORS.items():
        operator.implementations = before[name]
        operator._choices.clear()
    library._destroy()


def _long_norms(operator: str, parameters: str) -> list[Sample]:
    """Rows that no longer fit the registers: of the backward pass, and of the forward pass too."""
    names = f"x {parameters}"
    return [
        Sample(operator, f"{size} columns{', residual' * bool(extra)}", _norm_inputs(names + extra, (3, size)), {},
               tuple((names + extra).split()))
        for size, extra in ((8200, ""), (4099, ""), (16999, " residual"), (16999, ""))
    ]  # fmt: skip


MORE = {
    "rms_norm": _long_norms("rms_norm", "weight"),
    "layer_norm": _long_norms("layer_norm", "weight bias"),
}
CASES = [sample for name in KERNELS for sample in SAMPLES[name] + MORE.get(name, [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
@pytest.mark.parametrize("sample", CASES, ids=lambda s: f"{s.operator}: {s.name}")
def test_matches_the_reference(sample, dtype):
    inputs = sample.inputs(dtype)
    ours = sample.results(inputs, backend="triton")
    plain = sample.results(inputs, backend="reference")
    exact = sample.results(widen(inputs), backend="reference")
    name, comparison = worst(compare_all(ours, plain, exact))
    assert comparison.ok, f"{name}: {comparison}"
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in plain.items()}
