"""Other default dtypes and devices change nothing: every tensor that the package makes says what it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import bigkernels
from bigkernels._samples import SAMPLES, Sample

PACKAGE = Path(bigkernels.__file__).parent
# What makes a tensor from numbers alone; the `*_like` and `new_*` take after another tensor.
FACTORIES = {
    "arange", "asarray", "as_tensor", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices",
    "zeros",
}  # fmt: skip
# Old constructors, which know no dtype but the default.
UNTYPED = {"Tensor", "FloatTensor"}
DEFAULTS = ["bfloat16", "float16", "float64", "meta"]
ALL = [sample for samples in SAMPLES.values() for sample in samples]


def named(sample: Sample) -> str:
    return f"{sample.operator}: {sample.name}"


def untyped_calls(source: str) -> list[tuple[int, str]]:
    """(line, what is missing) of factory calls that leave the dtype or the device to the defaults of the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, given = node.func.attr, {k.arg for k in node.keywords}
        missing = [f"{k}=" for k in ("dtype", "device") if k not in given and None not in given]
        if name in UNTYPED or name in FACTORIES and missing:
            found.append((node.lineno, f"torch.{name} without {' and '.join(missing)}"))
    return found


def test_every_factory_names_dtype_and_device():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in untyped_calls(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_finds_what_it_should():
    source = "torch.zeros(3)\ntorch.ones(2, dtype=d)\ntorch.rand(1, device=d)\ntorch.tensor(1, dtype=d, device=e)\n"
    source += "torch.empty_like(x)\nx.new_zeros(3)\ntorch.full((), 1, **same)\ntorch.Tensor(3)\nmath.ones(3)\n"
    assert untyped_calls(source) == [
        (1, "torch.zeros without dtype= and device="),
        (2, "torch.ones without device="),
        (3, "torch.rand without dtype="),
        (8, "torch.Tensor without dtype= and device="),
    ]


@contextmanager
def default(name: str) -> Iterator[None]:
    """Another default dtype, or device."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("sample", ALL, ids=named)
def test_samples_under_other_defaults(sample: Sample, library):
    """Inputs, outputs and gradients: the same bits, by kernels and by references."""
    # In a dtype that is none of the defaults, so that none can pass for it.
    inputs = sample.inputs(torch.float32)
    expected = {backend: sample.results(inputs, backend=backend) for backend in ("cpu", "reference")}
    for name in DEFAULTS:
        with default(name):
            for key, value in sample.inputs(torch.float32).items():
                assert torch.equal(value, inputs[key]) and value.dtype == inputs[key].dtype, (name, key)
            found = {backend: sample.results(inputs, backend=backend) for backend in expected}
        for backend, values in expected.items():
            for key, value in values.items():
                other = found[backend][key]
                assert other.dtype == value.dtype and other.device == value.device, (name, backend, key)
                assert torch.equal(other.nan_to_num(7.0), value.nan_to_num(7.0)), (name, backend, key)


IMPORT = """
import importlib, pkgutil, torch
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    import bigkernels
    for module in pkgutil.walk_packages(bigkernels.__path__, "bigkernels."):
        if not module.name.endswith(("__main__", "_native")) and "libbigkernels" not in module.name:
            try:
                importlib.import_module(module.name)
            except ImportError as error:  # an extra that is not installed
                assert "bigkernels" not in str(error), error
torch.set_default_dtype(torch.float32)
x = torch.randn(3, 64)
torch.testing.assert_close(bigkernels.functional.rms_norm(x), torch.nn.functional.rms_norm(x, (64,)))
"""


def test_import_under_other_defaults():
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
