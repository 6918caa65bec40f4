"""Where checks compute, and what a patched model asks of a GPU: on CPU tensors that say they are on one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
import transformers
from driver_without_device import without_device
from pretend_gpu import PretendGpu, Waits, on_gpu, pretend, put, put_module

import bigkernels
from bigkernels.patch import _verify


def _model(implementation: str = "sdpa", **options) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.fixture
def probes(monkeypatch):
    """The devices of all probes that checks make."""
    made, make = [], _verify.Probes.__call__

    def call(self, *shape, **options):
        t = make(self, *shape, **options)
        if self.device.type == "cuda":
            put(t)
        made.append(self.device.type)
        return t

    monkeypatch.setattr(_verify.Probes, "__call__", call)
    return made


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_probes_are_on_the_models_device(implementation: str, probes, monkeypatch):
    expected = bigkernels.patch(_model(implementation), linear=False, loss=False, decode=False)
    assert set(probes) <= {"cpu"}
    probes.clear()
    pretend(monkeypatch)
    with PretendGpu():
        report = bigkernels.patch(put_module(_model(implementation)), linear=False, loss=False, decode=False)
    assert [row.what for row in report.skipped] == [row.what for row in expected.skipped]
    assert [(r.path, r.what) for r in report.patched] == [(r.path, r.what) for r in expected.patched]
    assert set(probes) == {"cuda"} and len(probes) > 50


@pytest.mark.parametrize("format", [None, "int4", "nf4", "int8-dynamic", "fp8"])
def test_a_forward_never_waits(format: str | None, monkeypatch):
    """A patched and quantized model with a mask of padding runs inside a CUDA graph: nothing waits for the device, and
    nothing is copied from memory of the host. The kernels are compiled and launch nothing.
    """
    model = _model().bfloat16()
    bigkernels.patch(model, linear=False, decode=False)
    ids, mask = torch.randint(3, 199, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    put(ids, mask)
    pretend(monkeypatch)
    with without_device() as driver, torch.no_grad():
        with PretendGpu():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        if format is not None:
            bigkernels.quantize(model, format)
        put_module(model)
        pretend(monkeypatch, capturing=True)
        driver.launches.clear()
        with PretendGpu(waits="refused"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert on_gpu(logits)
    kernels = {launch.kernel for launch in driver.launches}
    assert kernels >= {"forward_rows", "attend", "rotate", "activate"}
    assert ("multiply" in kernels or "multiply_integers" in kernels) == (format is not None)


def test_waits_are_noticed(monkeypatch):
    """The pretence itself."""
    pretend(monkeypatch)
    x, bits, home = torch.randn(4), torch.ones(4, dtype=torch.bool), torch.randn(4)
    put(x, bits)
    with PretendGpu(waits="refused"):
        assert on_gpu(x + 1) and (x + 1).device.type == "cuda" and torch.zeros(2, device="cuda").is_cuda
        waits = (
            lambda: x.sum().item(),
            lambda: bool(bits.all()),
            lambda: bits.nonzero(),
            lambda: x[bits],
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: x.tolist(),
            lambda: x.copy_(home),
        )
        for wait in waits:
            with pytest.raises(Waits):
                wait()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(4, device="cpu")


def test_quantized_experts_never_wait(monkeypatch):
    """One launch for all experts, whose tokens end where the device alone knows; chosen experts are gathered there."""
    from bigkernels.nn import QuantizedExperts

    weights = QuantizedExperts.from_parameter(torch.randn(8, 64, 96), "int4", transposed=True)
    x, offs = torch.randn(24, 64), torch.tensor([2, 2, 9, 9, 9, 20, 22, 24], dtype=torch.int32)
    chosen, expected = torch.tensor([3, 0, 3, -1]), weights.dequantize()[[3, 0, 3, -1]]
    put_module(weights)
    put(x, offs, chosen)
    pretend(monkeypatch, capturing=True)
    with without_device() as driver, torch.no_grad(), PretendGpu(waits="refused"):
        out = torch.nn.functional.grouped_mm(x, weights, offs=offs)
        batched = torch.bmm(x[:16].unflatten(0, (8, 2)), weights)
        picked = weights[chosen]
    assert [launch.kernel for launch in driver.launches] == ["multiply_groups"] * 2
    assert out.shape == (24, 96) and batched.shape == (8, 2, 96) and all(map(on_gpu, (out, batched, picked)))
    assert torch.equal(picked, expected)
