"""Weights of other libraries' checkpoints, packed here by loops from the descriptions of their layouts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from bigkernels.functional import quantize_weight
from bigkernels.quantization import FP4, NF4, Int4, checkpoints
from bigkernels.quantization.book4 import DYNAMIC_CODEBOOK


def nibble(codes: Tensor, n: int, k: int) -> int:
    return int(codes[n, k // 2]) >> 4 * (k % 2) & 15


def word(values: list[int]) -> int:
    """Eight values below 16 as a signed 32-bit integer, the first in the lowest nibble."""
    found = sum(v << 4 * i for i, v in enumerate(values))
    return found - 2**32 if found >= 2**31 else found


def bitsandbytes_state(config: NF4, shape: tuple[int, int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    n, k = shape
    flat = [nibble(tensors["codes"], i, j) for i in range(n) for j in range(k)]
    described = {"quant_type": config.name, "blocksize": config.block_size, "dtype": "bfloat16", "shape": [n, k]}
    state = {
        "w": torch.tensor([[a << 4 | b] for a, b in zip(flat[::2], flat[1::2], strict=True)], dtype=torch.uint8),
        "w.quant_map": torch.tensor(config.values),
    }
    if config.double_quant:
        described |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": tensors["scale_offset"].item(),
        }
        state |= {
            "w.absmax": tensors["scale_codes"].flatten(),
            "w.nested_absmax": tensors["scale_scale"],
            "w.nested_quant_map": torch.tensor(DYNAMIC_CODEBOOK),
        }
    else:
        state["w.absmax"] = tensors["scale"].flatten()
    text = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return state | {f"w.quant_state.bitsandbytes__{config.name}": text}


@pytest.mark.parametrize("config", [NF4(), NF4(32, double_quant=False), FP4()], ids=str)
def test_bitsandbytes(config: NF4):
    ours = quantize_weight(torch.randn(6, 128).bfloat16(), config)
    found = checkpoints.from_bitsandbytes(bitsandbytes_state(config, (6, 128), ours.tensors), "w")
    assert (found.format, found.shape, found.dtype) == (config, (6, 128), torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in ours.tensors.items()
    }
    assert torch.equal(found.dequantize(), ours.dequantize())


def test_bitsandbytes_itself():
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    w = torch.randn(16, 256)
    for nested in (False, True):
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        tensors = {"w": packed} | {f"w.{name}": t for name, t in state.as_dict(packed=True).items()}
        found = checkpoints.from_bitsandbytes(tensors, "w")
        assert torch.equal(found.dequantize(), functional.dequantize_4bit(packed, state))
        ours = quantize_weight(w, NF4(double_quant=nested)).tensors
        assert all(torch.equal(t, ours[name]) for name, t in found.tensors.items())


def test_bitsandbytes_that_is_not_supported():
    state = bitsandbytes_state(NF4(), (6, 128), quantize_weight(torch.randn(6, 128), NF4()).tensors)
    key = "w.quant_state.bitsandbytes__nf4"
    described = json.loads(bytes(state[key].tolist()).decode())
    crossing = torch.tensor(list(json.dumps(described | {"shape": [8, 96]}).encode()), dtype=torch.uint8)
    for change, error, message in (
        ({key: crossing}, ValueError, "whole number of blocks"),
        ({"w.quant_map": torch.linspace(-1, 1, 16)}, ValueError, "the codebook of w"),
        ({"w.nested_quant_map": torch.linspace(-1, 1, 256)}, ValueError, "nested scales"),
    ):
        with pytest.raises(error, match=message):
            checkpoints.from_bitsandbytes(state | change, "w")
    with pytest.raises(KeyError, match="quant_state"):
        checkpoints.from_bitsandbytes({"w": state["w"]}, "w")


def integers(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes (N, K), zero (G, N), scales (G, N) and the weight that they stand for."""
    codes, zero = torch.randint(0, 16, (n, k)), torch.randint(1, 16, (k // group, n))
    scales = (torch.rand(k // group, n) / 50 + 0.001).half()
    weight = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            weight[i, j] = (codes[i, j] - zero[j // group, i]) * scales[j // group, i].float()
    return codes, zero, scales, weight


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_gptq(group: int, v2: bool):
    codes, zero, scales, weight = integers(16, 128, group)
    qweight = torch.tensor([[word(codes[n, k : k + 8].tolist()) for n in range(16)] for k in range(0, 128, 8)])
    stored = zero if v2 else zero - 1
    qzeros = torch.tensor([[word(stored[g, n : n + 8].tolist()) for n in (0, 8)] for g in range(128 // group)])
    g_idx = torch.arange(128) // group
    found = checkpoints.from_gptq(qweight.int(), qzeros.int(), scales, g_idx, v2=v2)
    assert found.format == Int4(group, "rtn") and found.shape == (16, 128)
    torch.testing.assert_close(found.dequantize(torch.float32), weight, rtol=1e-6, atol=0)
    order = torch.randperm(128)  # act-order: elements of a group lie anywhere
    found = checkpoints.from_gptq(qweight.int(), qzeros.int(), scales, g_idx[order], v2=v2)
    assert found.format == Int4(group, "rtn", act_order=True)
    wide = (codes - zero.T[:, g_idx[order]]) * scales.float().T[:, g_idx[order]]
    torch.testing.assert_close(found.dequantize(torch.float32), wide, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=f"not of {group} elements"):
        checkpoints.from_gptq(qweight.int(), qzeros.int(), scales, g_idx.clamp_min(1), v2=v2)


def test_awq():
    codes, zero, scales, weight = integers(24, 64, 32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    qweight = torch.tensor([[word([int(codes[n + i, k]) for i in order]) for n in (0, 8, 16)] for k in range(64)])
    qzeros = torch.tensor([[word([int(zero[g, n + i]) for i in order]) for n in (0, 8, 16)] for g in range(2)])
    found = checkpoints.from_awq(qweight.int(), qzeros.int(), scales)
    torch.testing.assert_close(found.dequantize(torch.float32), weight, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="groups of 32"):
        checkpoints.from_awq(qweight.int(), qzeros.int()[:1], scales[:1, :8])


@pytest.mark.parametrize("shape", [(16, 128), (13, 70)])
def test_compressed_tensors(shape: tuple[int, int]):
    n, k = shape
    ours = quantize_weight(torch.randn(shape), Int4(32, "rtn"))
    made = checkpoints.to_compressed_tensors(ours)
    assert made["weight_shape"].tolist() == [n, k]
    weight = torch.empty(shape)
    for i in range(n):
        for j in range(k):
            code = int(made["weight_packed"][i, j // 8]) >> 4 * (j % 8) & 15
            zero = int(made["weight_zero_point"][i // 8, j // 32]) >> 4 * (i % 8) & 15
            weight[i, j] = (code - zero) * made["weight_scale"][i, j // 32]
    torch.testing.assert_close(weight, ours.dequantize(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="no integers"):
        checkpoints.to_compressed_tensors(quantize_weight(torch.randn(8, 64), Int4(32, "hqq")))
    with pytest.raises(ValueError, match="accepted is int4"):
        checkpoints.to_compressed_tensors(quantize_weight(torch.randn(8, 64), "int8"))


def gptq_zeros(zero: Tensor, by: str) -> Tensor:
    """Zero points (G, N) as writers of the older GPTQ format store them, eight in an integer and one less."""
    nibbles = zero.long().view(len(zero), -1, 8)
    whole = sum(nibbles[..., i] << 4 * i for i in range(8))
    if by == "words":
        whole = (whole - 0x11111111) % 2**32
    else:
        whole = sum((nibbles[..., i] - 1 & 15) << 4 * i for i in range(8))
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


@pytest.mark.parametrize("by", ["nibbles", "words"])
@pytest.mark.parametrize("lowest", [0, 1])
def test_zero_points_of_the_older_gptq(lowest: int, by: str):
    torch.manual_seed(0)
    codes, zero = torch.randint(0, 16, (128, 32)), torch.randint(lowest, 16, (4, 32))
    scales = torch.rand(4, 32).half()
    nibbles = codes.view(16, 8, 32)
    words = sum(nibbles[:, i].long() << 4 * i for i in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    expected = ((codes - zero.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).T
    found = checkpoints.from_gptq(words, gptq_zeros(zero, by), scales, zeros=by)
    assert torch.equal(found.dequantize(torch.float32), expected)
    if lowest:  # all writers mean the same
        assert torch.equal(
            checkpoints.from_gptq(words, gptq_zeros(zero, by), scales).dequantize(torch.float32), expected
        )
    else:
        with pytest.raises(ValueError, match="say which by zeros="):
            checkpoints.from_gptq(words, gptq_zeros(zero, by), scales)
    with pytest.raises(ValueError, match="accepted are"):
        checkpoints.from_gptq(words, gptq_zeros(zero, by), scales, zeros="bytes")
