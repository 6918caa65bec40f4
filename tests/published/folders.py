"""Folders as other libraries write them, packed here from descriptions of their layouts, and the weights in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 15)[None]
Layer = Callable[[int, int], tuple[dict[str, Tensor], Tensor]]


def model(dtype: torch.dtype = torch.float16, kind: str = "Llama", **options) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    # `.to(dtype)` would round the angles of rotary embeddings too.
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=dtype).eval()


def write(folder: Path, layer: Layer, quantization: dict, plain: nn.Module | None = None) -> dict[str, Tensor]:
    """A model whose linear layers, but for the head, are what `layer` makes of (N, K): its tensors by their last parts,
    and the weight that these stand for.

    Returns:
        All weights of the model, by name.
    """
    plain = plain or model()
    plain.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    expected, said = dict(state), {"format": "pt"}
    for name, t in list(state.items()):
        if t.dim() == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name:
            tensors, weight = layer(*t.shape)
            path = name.removesuffix(".weight")
            del state[name]
            made = {f"{path}.{part}": value.contiguous() for part, value in tensors.items()}
            state |= made
            said |= header(path, made, quantization)
            expected[name] = weight
    save_file(state, folder / "model.safetensors", said)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return expected


def header(path: str, tensors: dict[str, Tensor], quantization: dict) -> dict[str, str]:
    """What torchao says in a file of a weight; nothing for other methods."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "torchao":
        return {}
    kind, size = quantization["kind"], quantization["size"]
    codes = tensors[f"{path}._weight_qdata"]
    about = {
        "block_size": [1, size if size > 0 else codes.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": "float16"},
    }
    if quantization.get("dynamic"):
        about["act_quant_kwargs"] = {
            "_type": "QuantizeTensorToInt8Kwargs",
            "_data": {
                "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
                "reduce_range": False,
                "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            },
        }
    return {f"{path}.weight": json.dumps({"_type": kind, "_data": about, "_tensor_data_names": ["qdata", "scale"]})}


def torchao(kind: str, size: int, bits: int = 8, zeros: bool = True) -> Layer:
    """`Int8Tensor`, `IntxUnpackedToInt8Tensor` or `Float8Tensor`, as their `dequantize` computes."""

    def layer(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        groups, half = (k // size if size > 0 else 1), 1 << bits - 1
        scale = torch.rand(n, groups) / 50 + 0.001
        scale = scale.half() if kind == "IntxUnpackedToInt8Tensor" else scale
        if kind == "Float8Tensor":
            codes = (torch.randn(n, k) * 20).to(torch.float8_e4m3fn)
            return {"_weight_qdata": codes, "_weight_scale": scale}, (codes.float() * scale).half()
        codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
        zero = (
            torch.randint(-half, half, (n, groups), dtype=torch.int8)
            if zeros
            else torch.zeros(n, groups).to(torch.int8)
        )
        each = (codes.half() - zero.half().repeat_interleave(k // groups, 1)) * scale.repeat_interleave(k // groups, 1)
        return {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}, each.half()

    return layer


def words(values: Tensor, bits: int) -> Tensor:
    """(m, n) values as (m * bits / 32, n) int32, a stream of bits down each column."""
    columns = []
    for column in values.T.tolist():
        stream = sum(v << bits * i for i, v in enumerate(column))
        columns.append(np.frombuffer(stream.to_bytes(len(column) * bits // 8, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(columns, 1).copy())


def gptq(
    bits: int, size: int, *, sym: bool = False, v2: bool = False, act_order: bool = False, zero_from: int = 1
) -> Layer:
    def layer(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        groups = k // size if size > 0 else 1
        codes = torch.randint(0, 1 << bits, (k, n))
        zero = torch.full((groups, n), 1 << bits - 1) if sym else torch.randint(zero_from, 1 << bits, (groups, n))
        scales = (torch.rand(groups, n) / 50 + 0.001).half()
        group = torch.arange(k) // (k // groups)
        if act_order:
            group = group[torch.randperm(k)]
        stored = zero if v2 else (zero - 1) & ((1 << bits) - 1)
        weight = scales[group] * (codes - zero[group]).half()  # in float16, as AutoGPTQ and GPTQModel compute it
        tensors = {
            "qweight": words(codes, bits),
            "qzeros": words(stored.T, bits).T,
            "scales": scales,
            "g_idx": group.int(),
        }
        return tensors, weight.T.contiguous()

    return layer


def awq(size: int, version: str) -> Layer:
    def layer(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, zero = torch.randint(0, 16, (n, k)), torch.randint(0, 16, (n, k // size))
        scales = (torch.rand(n, k // size) / 50 + 0.001).half()
        weight = (codes - zero.repeat_interleave(size, 1)).half() * scales.repeat_interleave(size, 1)
        if version == "gemm":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            along = lambda v: words(v.T.unflatten(1, (-1, 8))[..., order].flatten(1).T, 4).T  # noqa: E731
            return {"qweight": along(codes), "qzeros": along(zero), "scales": scales.T}, weight
        width = -(-(k // size) // 8)
        width = -(-width // {128: 1, 64: 2, 32: 4}[size]) * {128: 1, 64: 2, 32: 4}[size]
        padded = torch.zeros(n, width * 8, dtype=torch.int64)
        padded[:, : k // size] = zero
        wide = torch.zeros(n, width * 8, dtype=torch.float16)
        wide[:, : k // size] = scales
        return {"qweight": words(codes.T, 4).T, "qzeros": words(padded.T, 4).T, "scales": wide}, weight

    return layer


def int8_rows(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, most = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.01
    weight = codes * most[:, None] * 7.874015718698502e-3
    return {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}, weight


def dense(values: dict[str, Tensor]) -> nn.Module:
    made = model()
    made.load_state_dict(values, strict=False)
    return made


def hqq(bits: int, size: int) -> Layer:
    shifts = {8: (0,), 4: (4, 0), 2: (6, 4, 2, 0), 3: tuple(range(27, -1, -3))}[bits]

    def layer(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = n * k // size
        codes = torch.randint(0, 1 << bits, (rows, size))
        scale, zero = (torch.rand(rows, 1) / 40 + 0.001).half(), (torch.rand(rows, 1) * 2**bits).half()
        padded = torch.zeros(-(-rows // len(shifts)) * len(shifts), size, dtype=torch.int64)
        padded[:rows] = codes
        packed = sum(part << shift for part, shift in zip(padded.chunk(len(shifts)), shifts, strict=True))
        number = lambda v: torch.tensor(v, dtype=torch.int32)  # noqa: E731
        tensors = {
            "W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
            "scale": scale,
            "zero": zero,
            "nbits": number(bits),
            "group_size": number(size),
            "axis": number(1),
            "shape": torch.tensor([n, k]),
            "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        }
        return tensors, ((codes.float() - zero.float()) * scale.float()).view(n, k)

    return layer
