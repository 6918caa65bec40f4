"""The formats of GGUF files, bit for bit as the `gguf` package has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigkernels.functional import quantize_weight
from bigkernels.quantization import Q4_1, Q8_0, Format

gguf = pytest.importorskip("gguf")

TYPES = {Q4_1(): "Q4_1", Q8_0(): "Q8_0"}


def planes(config: Format, blocks: Tensor) -> dict[str, Tensor]:
    """What we store, from the bytes (N, K / 32, size) of blocks in a file, a code at a time."""
    n, count, _ = blocks.shape
    numbers = 2 if isinstance(config, Q4_1) else 1
    found = {
        name: blocks[..., 2 * i : 2 * i + 2].contiguous().view(torch.float16)[..., 0]
        for i, name in enumerate(("scale", "minimum")[:numbers])
    }
    codes = blocks[..., 2 * numbers :]
    if numbers == 1:
        return found | {"codes": codes.reshape(n, count * 32).view(torch.int8)}
    each = torch.empty(n, count, 32, dtype=torch.uint8)
    for i in range(16):
        each[..., i], each[..., 16 + i] = codes[..., i] & 15, codes[..., i] >> 4
    each = each.view(n, count * 32)
    return found | {"codes": each[:, ::2] | each[:, 1::2] << 4}


WEIGHTS = {
    "normal": lambda: torch.randn(70, 96),
    "of all sizes": lambda: torch.randn(70, 96) * torch.logspace(-12, 4, 70)[:, None],
    "halves": lambda: torch.arange(-160, 160).div(2).view(5, 64),
    "bfloat16": lambda: torch.randn(5, 64).bfloat16().float(),
    "constants": lambda: torch.tensor([0.0, -0.0, 3.0, -2.5, 1e-38, -1e-45])[:, None].repeat(1, 32),
    "one sign": lambda: torch.rand(8, 64) + 3,
    "sixteen steps": lambda: torch.randint(-8, 8, (40, 64)).float(),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where steps are below the normal numbers
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("config", TYPES, ids=str)
def test_codes_and_values_of_the_package(config: Format, name: str):
    w = WEIGHTS[name]()
    kind = gguf.GGMLQuantizationType[TYPES[config]]
    stored = gguf.quants.quantize(w.numpy(), kind)
    expected = planes(config, torch.from_numpy(stored).view(w.shape[0], w.shape[1] // 32, -1))
    found = quantize_weight(w, config)
    for name, t in expected.items():
        assert torch.equal(found.tensors[name].view(torch.uint8), t.contiguous().view(torch.uint8)), name
    values = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    assert torch.equal(found.dequantize(torch.float32), values)
    assert torch.equal(found.dequantize(torch.float64).float(), values)


@pytest.mark.parametrize("config", TYPES, ids=str)
def test_weights_beyond_float16_are_refused(config: Format):
    for large in (1e8, 3.4e38):
        w = torch.zeros(3, 40)
        w[1, 35], w[2, 0] = large, -large
        with pytest.raises(ValueError, match=f"beyond the range of {config.name}"):
            quantize_weight(w, config)
    assert quantize_weight(torch.full((2, 64), 6e4), config).dequantize().sub(6e4).abs().max() <= 300
    tiny = quantize_weight(torch.randn(4, 64) * 1e-39, config).dequantize()
    assert tiny.abs().max() <= 1e-7  # the steps are below the smallest number of float16


@pytest.mark.parametrize("config", TYPES, ids=str)
def test_a_short_last_block(config: Format):
    w = torch.randn(6, 75)
    found = quantize_weight(w, config)
    whole = quantize_weight(torch.cat((w, w[:, -1:].expand(-1, 21)), 1), config)
    assert found.tensors["scale"].shape == (6, 3)
    assert torch.equal(found.dequantize(), whole.dequantize()[:, :75])
