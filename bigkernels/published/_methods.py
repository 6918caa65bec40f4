"""How libraries store the weight of a layer: for each method, the tensors that it has and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import quantization
from ..quantization.checkpoints import _AWQ_ORDER, _nibbles, from_bitsandbytes
from ._integers import in_order, integers, unpack
from ._method import Method, floats
from ._packed import Packed
from ._torchao import TorchAO


class GPTQ(Method):
    """AutoGPTQ, GPTQModel: integers along K in words of 32 bits, zero points stored less one in the older version."""

    mark, parts = "qweight", ("qweight", "qzeros", "scales", "g_idx")

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        bits = self.integer("bits", accepted=(2, 3, 4, 8))
        qweight, qzeros, scales = _take(name, held, qweight=torch.int32, qzeros=torch.int32, scales=None)
        n = qweight.shape[1]
        if qweight.shape[0] * 32 % bits:
            raise ValueError(f"{name}.qweight has {qweight.shape[0]} rows of words, no whole number of {bits} bits")
        k, groups = qweight.shape[0] * 32 // bits, scales.shape[0]
        _shape(name, "scales", scales, (groups, n))
        _shape(name, "qzeros", qzeros, (groups, -(-n * bits // 32)))
        size = self.integer("group_size", 128)
        size = k if size < 1 else size
        if groups != -(-k // size):
            raise ValueError(f"{name}.scales has {groups} groups, expected {-(-k // size)} of {size} of {k} elements")
        codes = unpack(qweight, bits).T
        zero = self._zeros(name, qzeros, bits)[:, :n]
        order = held.get("g_idx")
        if order is not None and order.numel():
            _shape(name, "g_idx", order, (k,))
            group = order.long() % max(groups, 1) if bool((order < 0).any()) else order.long()
            if group.numel() and int(group.max()) >= groups:
                raise ValueError(f"{name}.g_idx names group {int(group.max())} of {groups}")
            if not torch.equal(group, torch.arange(k, dtype=torch.int64, device=group.device) // size):
                return in_order(codes, zero.T, scales.T.contiguous(), group, size)
        return integers(codes, zero.T, scales.T.contiguous())

    def _zeros(self, name: str, qzeros: Tensor, bits: int) -> Tensor:
        """(G, N)."""
        stored = unpack(qzeros.T.contiguous(), bits).T
        if str(self.config.get("checkpoint_format", "gptq")) == "gptq_v2":
            return stored
        one_more = (stored + 1) & (1 << bits) - 1
        if self.config.get("sym", True) or not bool((stored == (1 << bits) - 1).any()):
            return one_more
        meta = self.config.get("meta")
        writers = str(meta.get("quantizer") if isinstance(meta, Mapping) else meta).lower()
        if "gptqmodel" not in writers:
            return one_more  # each number alone, as AutoGPTQ writes them
        if bits == 3:
            raise ValueError(f"{name}.qzeros: GPTQModel stored zero points that are 0 in a way that cannot be told")
        ones = sum(1 << i for i in range(0, 32, bits))
        words = (qzeros.long() + ones) & 0xFFFFFFFF  # taken away from a whole word at once, where 0 borrows
        return unpack(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).T.contiguous(), bits).T


class AWQ(Method):
    """AutoAWQ: "gemm" packs columns of W.T in the order 0, 2, 4, 6, 1, 3, 5, 7, "gemv" elements of rows in theirs."""

    mark, parts = "qweight", ("qweight", "qzeros", "scales")

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        self.integer("bits", 4, (4,))
        size = self.integer("group_size", 128)
        qweight, qzeros, scales = _take(name, held, qweight=torch.int32, qzeros=torch.int32, scales=None)
        version = str(self.config.get("version", "gemm")).lower()
        if version == "gemm":
            k, n = qweight.shape[0], qweight.shape[1] * 8
            size = k if size < 1 else size
            _shape(name, "scales", scales, (-(-k // size), n))
            _shape(name, "qzeros", qzeros, (-(-k // size), n // 8))
            codes = _nibbles(qweight, _AWQ_ORDER).flatten(1).T
            zero = _nibbles(qzeros, _AWQ_ORDER).flatten(1).T
            return integers(codes, zero, scales.T.contiguous())
        if version != "gemv":
            raise ValueError(f"bigkernels.load_quantized: the AWQ version {version!r}; accepted are gemm and gemv")
        n, k = qweight.shape[0], qweight.shape[1] * 8
        size = k if size < 1 else size
        groups = -(-k // size)
        if scales.shape[0] != n or scales.shape[1] < groups or qzeros.shape[0] != n or qzeros.shape[1] * 8 < groups:
            raise ValueError(
                f"{name}.scales and .qzeros have shapes {tuple(scales.shape)} and {tuple(qzeros.shape)}, "
                f"expected room for {groups} groups of {n} rows"
            )
        codes = _nibbles(qweight, range(8)).flatten(1)
        zero = _nibbles(qzeros, range(8)).flatten(1)[:, :groups]
        return integers(codes, zero, scales[:, :groups].contiguous())


class BitsAndBytes4(Method):
    """bitsandbytes, 4 bits."""

    mark = "weight.absmax"
    parts = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    )

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        try:
            return Packed.of(from_bitsandbytes(held))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error


class BitsAndBytes8(Method):
    """LLM.int8 (Dettmers et al. 2022): rows of signed bytes, each with its largest magnitude."""

    mark, parts = "SCB", ("weight", "SCB", "weight_format")

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        weight, most = _take(name, held, weight=torch.int8, SCB=None)
        _shape(name, "SCB", most, (weight.shape[0],))
        layout = held.get("weight_format")
        if layout is not None and layout.numel() and int(layout.flatten()[0]):
            raise ValueError(f"{name}.weight_format is {int(layout.flatten()[0])}, expected 0 (rows)")
        # `int8_vectorwise_dequant` multiplies by this number, which is no power of two.
        return integers(weight, None, (most.float() * 7.874015718698502e-3)[:, None])


class CompressedTensors(Method):
    """compressed-tensors (llm-compressor, vLLM): a weight, its scales and zero points under their names."""

    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "output_scale",
        "input_zero_point",
    )
    mark = "weight_scale"

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        scheme = self._scheme(name)
        weights = scheme.get("weights") or {}
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        scale = held["weight_scale"]
        acts = scheme.get("input_activations") or {}
        dynamic = acts.get("num_bits") == 8 and acts.get("type", "int") == "int" and bool(acts.get("dynamic"))
        dynamic = dynamic and acts.get("strategy") == "token" and acts.get("symmetric", True)
        if kind == "float":
            (weight,) = _take(name, held, weight=torch.float8_e4m3fn)
            return floats(name, weight, scale)
        if not isinstance(bits, int) or not 1 <= bits <= 8 or kind != "int":
            raise ValueError(
                f"bigkernels.load_quantized: {name} is of {bits!r} bits of {kind!r}; accepted are 1 to 8 "
                "bits of integers, and floats of 8 bits"
            )
        zero = held.get("weight_zero_point")
        if "weight_packed" in held:
            (packed,) = _take(name, held, weight_packed=torch.int32)
            n, k = (int(v) for v in held["weight_shape"].flatten()) if "weight_shape" in held else (0, 0)
            if n != packed.shape[0] or -(-k * bits // 32) != packed.shape[1]:
                raise ValueError(
                    f"{name}.weight_packed has shape {tuple(packed.shape)} for a weight ({n}, {k}) of {bits} bits"
                )
            half = 1 << bits - 1
            codes = unpack(packed.T.contiguous(), bits).T[:, :k] - half
            if zero is not None and zero.dtype == torch.int32 and zero.shape != scale.shape:
                zero = unpack(zero, bits)[:n] - half
        else:
            (codes,) = _take(name, held, weight=torch.int8)
            n, k = codes.shape
        scale = scale.reshape(1, 1).expand(n, 1) if scale.numel() == 1 else scale
        if scale.dim() != 2 or scale.shape[0] != n or not scale.shape[1]:
            raise ValueError(f"{name}.weight_scale has shape {tuple(scale.shape)} for a weight ({n}, {k})")
        if zero is not None:
            zero = zero.reshape(1, 1).expand(n, 1) if zero.numel() == 1 else zero
            _shape(name, "weight_zero_point", zero, tuple(scale.shape))
        order = held.get("weight_g_idx")
        if order is not None and bool((order >= 0).all()):
            _shape(name, "weight_g_idx", order, (k,))
            size = -(-k // scale.shape[1])
            if int(order.max()) >= scale.shape[1]:
                raise ValueError(f"{name}.weight_g_idx names group {int(order.max())} of {scale.shape[1]}")
            if not torch.equal(order.long(), torch.arange(k, dtype=torch.int64, device=order.device) // size):
                zero = torch.zeros_like(scale) if zero is None else zero
                return in_order(codes, zero, scale.contiguous(), order.long(), size)
        return integers(codes, zero, scale.contiguous(), dynamic=dynamic)

    def _scheme(self, name: str) -> Mapping[str, Any]:
        groups = self.config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
            raise ValueError("bigkernels.load_quantized: the quantization_config has no config_groups")
        for group in groups.values():  # the first whose target is the layer's name; else by class, which is linear
            if any(_matches(name, target) for target in group.get("targets") or ()):
                return group
        return next((g for g in groups.values() if "Linear" in (g.get("targets") or ())), next(iter(groups.values())))


class HQQ(Method):
    """HQQ (Badri and Shaji 2023): groups of neighbours in rows, whose zero points are floats. The values are computed
    in float32 here and rounded once, where HQQ rounds in float16 twice.
    """

    mark = "W_q"
    parts = ("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype",
             "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
             "stores_quant_config", "channel_wise", "optimize", "round_zero")  # fmt: skip
    _shifts = {8: (0,), 4: (4, 0), 2: (6, 4, 2, 0), 1: (7, 6, 5, 4, 3, 2, 1, 0), 3: tuple(range(27, -1, -3))}

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        bits, axis = _number(name, held, "nbits", 4), _number(name, held, "axis", 1)
        if bits not in self._shifts or axis != 1:
            raise ValueError(f"{name} has {bits} bits along axis {axis}; accepted are 1, 2, 3, 4 and 8 along axis 1")
        if any(_number(name, held, part, 0) for part in ("quant_scale", "quant_zero", "view_as_float")):
            raise ValueError(f"{name} has quantized scales or zero points, or codes stored as floats")
        packed, scale, zero = _take(name, held, W_q=torch.int32 if bits == 3 else torch.uint8, scale=None, zero=None)
        shape = held.get("shape")
        n, k = (int(v) for v in shape.flatten()) if shape is not None and shape.numel() == 2 else (0, 0)
        rows, size = scale.numel(), packed.shape[1]
        if scale.shape != (rows, 1) or zero.shape != scale.shape or min(n, k) < 1 or rows * size != n * k or k % size:
            raise ValueError(
                f"{name}.W_q, .scale and .zero have shapes {tuple(packed.shape)}, {tuple(scale.shape)} "
                f"and {tuple(zero.shape)} for a weight ({n}, {k})"
            )
        parts = [packed >> shift & (1 << bits) - 1 for shift in self._shifts[bits]]
        codes = torch.cat(parts)[:rows]
        if len(codes) != rows:
            raise ValueError(f"{name}.W_q has {len(codes)} rows of codes, expected {rows}")
        codes = codes.to(torch.int16).reshape(n, k)
        return integers(codes, zero.view(n, -1), scale.view(n, -1))


class MXFP4(Method):
    """Blocks of 32 floats of 4 bits with a power of two (OCP microscaling), as gpt-oss stores its experts: its
    bytes are those of the format here.
    """

    mark, parts = "_blocks", ("blocks", "scales")

    def layers(self, names: Collection[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
        for name in names:
            path = name.removesuffix(self.mark)
            if path != name:
                yield path, path, {part: f"{path}_{part}" for part in self.parts if f"{path}_{part}" in names}

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        blocks, scales = held["blocks"], held.get("scales")
        if scales is None:
            raise ValueError(f"the folder has no tensor {name}_scales")
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, 16):
            raise ValueError(
                f"{name}_blocks is {blocks.dtype} of shape {tuple(blocks.shape)} and {name}_scales "
                f"{scales.dtype} of shape {tuple(scales.shape)}; expected bytes, 16 a scale"
            )
        if scales.dim() < 2:
            raise ValueError(f"{name}_scales has shape {tuple(scales.shape)}")
        if bool((scales > 252).any()):  # 255 is none, and of 253 and 254 not all codes are numbers of float32
            raise ValueError(f"{name}_scales holds a value that is not finite")
        shape = (*scales.shape[:-1], scales.shape[-1] * 32)
        codes, exponent = blocks.flatten(0, -3).flatten(1), scales.flatten(0, -2)
        return Packed(quantization.MXFP4(), shape, {"codes": codes.contiguous(), "exponent": exponent.contiguous()})


def _number(name: str, held: Mapping[str, Tensor], part: str, default: int) -> int:
    t = held.get(part)
    if t is None:
        return default
    if t.numel() != 1 or t.is_floating_point():
        raise ValueError(f"{name}.{part} is no number")
    return int(t)


def _take(name: str, held: dict[str, Tensor], **kinds: torch.dtype | None) -> list[Tensor]:
    """Tensors by their last parts, of dtypes; None for any floating one."""
    found = []
    for part, dtype in kinds.items():
        t = held.get(part)
        if t is None:
            raise ValueError(f"bigkernels.load_quantized: the folder has no tensor {name}.{part}")
        if t.dtype != dtype if dtype is not None else not t.is_floating_point():
            raise ValueError(f"bigkernels.load_quantized: {name}.{part} is {t.dtype}, expected {dtype or 'floats'}")
        if t.dim() != (1 if part == "SCB" else 2):
            raise ValueError(f"bigkernels.load_quantized: {name}.{part} has shape {tuple(t.shape)}")
        found.append(t)
    return found


def _shape(name: str, part: str, t: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(t.shape) != expected:
        raise ValueError(f"bigkernels.load_quantized: {name}.{part} has shape {tuple(t.shape)}, expected {expected}")


def _matches(name: str, target: str) -> bool:
    if not target.startswith("re:"):
        return name == target
    try:
        return re.match(target[3:], name) is not None
    except re.error as error:
        raise ValueError(f"bigkernels.load_quantized: the target {target!r} is no pattern") from error


def method_of(config: Mapping[str, Any]) -> Method:
    """The method of a quantization_config.

    Raises:
        ValueError: there is none that is known.
    """
    kind = str(config.get("quant_method") or "").lower()
    if kind == "bitsandbytes" or config.get("load_in_4bit") or config.get("load_in_8bit"):
        return (BitsAndBytes4 if config.get("load_in_4bit") or config.get("_load_in_4bit") else BitsAndBytes8)(config)
    known = {
        "gptq": GPTQ,
        "awq": AWQ,
        "compressed-tensors": CompressedTensors,
        "hqq": HQQ,
        "mxfp4": MXFP4,
        "torchao": TorchAO,
    }
    if kind == "gptq" and "marlin" in str(config.get("checkpoint_format", "")):
        raise ValueError("bigkernels.load_quantized: GPTQ weights packed for Marlin kernels are not read")
    if kind not in known:
        raise ValueError(
            f"bigkernels.load_quantized: the quantization method {kind!r}; accepted are bitsandbytes, "
            f"{', '.join(known)}"
        )
    return known[kind](config)
