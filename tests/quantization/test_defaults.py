"""Other default dtypes and devices change no bit of what is quantized."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels.functional import quantize_weight
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear
from bigkernels.quantization import FP4, NF4, Int4, checkpoints, prepare_qat

FORMATS = {
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
    "fp8": "fp8",
    "int4": Int4(32),
    "rtn": Int4(64, "rtn"),
    "gptq": Int4(32, "gptq"),
    "awq": Int4(32, "awq"),
    "nf4": NF4(),
    "nf4 plain": NF4(32, double_quant=False),
    "fp4": FP4(),
    "fp4 plain": FP4(128, double_quant=False),
    "q4_1": "q4_1",
    "q8_0": "q8_0",
}
DEFAULTS = ("bfloat16", "float16", "float64", "meta")


@contextlib.contextmanager
def default(name: str):
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


def drawn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(300, 131, dtype=torch.float32)
    return {
        "w": torch.randn(37, 131, dtype=torch.float32),
        "hessian": inputs.T @ inputs,
        "x": inputs[:40].clone(),
        "bias": torch.randn(37, dtype=torch.float32),
        "grad": torch.randn(40, 37, dtype=torch.float32),
        "ids": torch.arange(36, dtype=torch.int64),
    }


def computed(config, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is made of a weight, in the defaults that are in force."""
    with torch.no_grad():
        q = quantize_weight(given["w"], config, given["hessian"])
    found = {f"stored {name}": t for name, t in q.tensors.items()}
    found |= {f"read {i}": t for i, t in enumerate(q.operands()) if isinstance(t, Tensor)}
    found["dequantized"] = q.dequantize()
    x = given["x"].clone().requires_grad_()
    for tokens in (1, 40):
        out = bigkernels.functional.quantized_linear(x[:tokens], q, given["bias"])
        found[f"out {tokens}"] = out
        (found[f"grad {tokens}"],) = torch.autograd.grad(out, x, given["grad"][:tokens])
    with bigkernels.use("reference"):
        found["reference"] = bigkernels.functional.quantized_linear(given["x"], q, given["bias"])
    layer = QuantizedLinear(q, given["bias"])
    found["format"] = layer.state_dict()["format"]
    found["weight"] = layer.weight.clone()
    table = QuantizedEmbedding(q)
    found["rows"] = table(given["ids"])
    adapted = LoRALinear(layer, rank=2)
    found["adapted"] = adapted(given["x"])
    assert adapted.lora_a.dtype == torch.float32 and adapted.lora_a.device.type == "cpu"
    return found


@functools.cache
def plainly(config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = drawn()
    return given, computed(config, given)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
def test_same_bits(config, name: str):
    given, expected = plainly(config)
    with default(name):
        found = computed(config, given)
    for key, t in expected.items():
        assert found[key].dtype == t.dtype and found[key].device == t.device, key
        assert torch.equal(found[key], t), key


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("config", ["int8", "nf4", Int4(32, "gptq")], ids=str)
def test_models(config, name: str):
    def run() -> Tensor:
        torch.manual_seed(0)
        made = {"device": "cpu", "dtype": torch.float32}
        model = nn.Sequential(nn.Embedding(50, 64, **made), nn.Linear(64, 96, **made), nn.Linear(96, 50, **made))
        ids = torch.arange(12, dtype=torch.int64, device="cpu")
        if not isinstance(config, Int4):
            assert len(prepare_qat(model, config, embeddings=True)) == 3
            model(ids).sum().backward()
        report = bigkernels.quantize(model, config, embeddings=True, calibration=[ids])
        assert len(report.quantized) == 3
        model.load_state_dict(model.state_dict())
        out = model(ids)
        bigkernels.dequantize(model)
        return torch.cat((out.flatten(), model(ids).flatten()))

    expected = run()
    with default(name):
        found = run()
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_checkpoints(name: str):
    w = drawn()["w"][:32, :128].contiguous()

    def run() -> dict[str, Tensor]:
        torch.manual_seed(1)
        exported = checkpoints.to_compressed_tensors(quantize_weight(w, Int4(32, "rtn")))
        words = torch.randint(-(2**31), 2**31, (16, 32), dtype=torch.int64, device="cpu").to(torch.int32)
        zeros, scales = words[:4, :4].contiguous(), w[:4, :32].abs().half()
        groups = torch.arange(128, dtype=torch.int32, device="cpu") // 32
        made = checkpoints.from_gptq(words, zeros, scales, groups, v2=True).dequantize(torch.float32)
        return exported | {"gptq": made}

    expected = run()
    with default(name):
        found = run()
    assert all(torch.equal(found[key], t) and found[key].dtype == t.dtype for key, t in expected.items())


def test_imported_inside_a_device():
    """All modules that need no other package, under defaults that are not those of the machine."""
    code = """
import importlib, pkgutil, torch
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    import bigkernels
    for module in pkgutil.walk_packages(bigkernels.__path__, "bigkernels."):
        last = module.name.rpartition(".")[2]
        if last != "__main__" and not last.startswith("lib") and "triton" not in module.name:
            try:
                importlib.import_module(module.name)
            except ImportError:
                pass
from bigkernels.quantization import book4
assert torch.get_default_dtype() == torch.bfloat16
print(len(book4.DYNAMIC_CODEBOOK), sum(book4.DYNAMIC_CODEBOOK).hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    book = bigkernels.quantization.book4.DYNAMIC_CODEBOOK
    assert done.stdout.split() == [str(len(book)), sum(book).hex()]


def test_optional_parts_are_there_by_name():
    code = """
import sys
import bigkernels
assert "peft" not in sys.modules and "transformers" not in sys.modules
assert bigkernels.quantization.checkpoints.from_gptq
assert not hasattr(bigkernels.quantization, "nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
