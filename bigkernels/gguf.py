"""Language models out of GGUF files, with the file's own codes."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nn._quantized import Quantized
from .quantization import Q4_1, Q8_0, Format, quantize

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Types of tensors that stay codes; Q4_0 is a Q4_1 whose minimum is -8 times the scale, exactly.
_FORMATS: dict[str, Format] = {"Q4_0": Q4_1(), "Q4_1": Q4_1(), "Q8_0": Q8_0()}


def load_gguf(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model of transformers from a GGUF file, in evaluation mode on the CPU.

    Linear layers and embeddings of types Q4_0, Q4_1 and Q8_0 become `bigkernels.nn.QuantizedLinear` and
    `QuantizedEmbedding` with the codes of the file; a head that is tied to the embedding shares its codes. Everything
    else, other types included, becomes dense, in `dtype`. The values are those that transformers dequantizes.

    Args:
        path: of the file. What transformers reads of its metadata decides the model; the tokenizer is read by
            ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``.
        dtype: of the dense weights and of what the layers compute.

    Raises:
        ImportError: transformers or gguf is not installed.
        OSError: there is no such file.
        ValueError: the file is none of GGUF, ends too early, or is of an architecture that transformers does not read
            or that has experts; a tensor is missing, of another shape, or has no place in the model (its name is
            given).
    """
    try:
        import gguf
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as known
    except ImportError as error:
        raise ImportError(f"bigkernels.load_gguf needs transformers and gguf ({error}); pip install 'bigkernels[gguf]' "
                          "installs them") from error  # fmt: skip
    path = Path(path)
    file = _File.read(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    architecture = str(file.metadata.get("general.architecture"))
    if file.metadata.get(f"{architecture}.rope.scaling.type", "none") != "none" and architecture != "gpt-oss":
        raise ValueError(f"bigkernels.load_gguf: {path} scales its rotary embedding, which transformers does not read")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    with _Unfilled():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    processor = known.TENSOR_PROCESSORS.get(architecture, known.TensorProcessor)(config=config.to_dict())
    expected = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    names = _names(architecture, config.get_text_config().num_hidden_layers, expected)
    state: dict[str, Tensor] = {}
    formats: dict[str, Format] = {}

    def processed(tensor: _Info, values):
        return processor.process(weights=values, name=tensor.name, tensor_key_mapping=names,
                                 parsed_parameters={"tensors": {}}).weights  # fmt: skip

    for tensor in file.tensors:
        target = names.get(tensor.name)
        if target not in expected:
            raise ValueError(
                f"bigkernels.load_gguf: tensor {tensor.name} of {path} has no place in {type(model).__name__}"
            )
        if len(tensor.shape) > 2:
            raise ValueError(f"bigkernels.load_gguf: tensor {tensor.name} of {path} has {len(tensor.shape)} dimensions")
        raw, kind = file.data(tensor), gguf.GGMLQuantizationType(tensor.kind)
        layer, _, attribute = target.rpartition(".")
        codes = None
        if attribute == "weight" and kind.name in _FORMATS and len(tensor.shape) == 2:
            order = torch.arange(tensor.shape[0], dtype=torch.int64, device="cpu")[:, None]
            order = torch.from_numpy(processed(tensor, order.numpy()).copy())
            whole = type(model.get_submodule(layer)) in (nn.Linear, nn.Embedding) and expected[target] == tensor.shape
            if whole and order.shape == (tensor.shape[0], 1) and _is_order(order[:, 0]):
                codes = {
                    name: t.index_select(0, order[:, 0]) for name, t in _planes(kind.name, raw, tensor.shape).items()
                }
        if codes is not None:
            formats[layer] = _FORMATS[kind.name]
            state |= {f"{layer}.{name}": t for name, t in codes.items()}
            continue
        values = gguf.quants.dequantize(raw.view(*tensor.shape[:-1], -1).numpy(), kind)
        values = torch.from_numpy(processed(tensor, values.reshape(tensor.shape)).copy())
        if values.shape != expected[target]:
            raise ValueError(f"bigkernels.load_gguf: tensor {tensor.name} of {path} has shape {tuple(values.shape)}, "
                             f"expected {tuple(expected[target])}")  # fmt: skip
        state[target] = values.to(dtype)
    _fill(model, state, formats, path)
    return model


def _names(architecture: str, layers: int, parameters: Iterable[str]) -> dict[str, str]:
    """The parameters of a model by the names that their tensors have in a file."""
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    known = None if kind is None else gguf.get_tensor_name_map(kind, layers)
    found = {}
    for parameter in parameters if known else ():
        path, _, attribute = parameter.rpartition(".")
        parts = path.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))  # the file may be of a model inside of this one
        if name := next(filter(None, map(known.get_name, ends)), None):
            found.setdefault(f"{name}.{attribute}", parameter)
    return found


def _fill(model: nn.Module, state: dict[str, Tensor], formats: dict[str, Format], path: Path) -> None:
    tied = {id(p): [] for p in model.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        tied[id(p)].append(name.removesuffix(".weight"))
    for group in tied.values():  # the file has one tensor for all of them
        held = next((layer for layer in group if layer in formats), None)
        for layer in group if held else ():
            formats[layer] = formats[held]
    for config in set(formats.values()):
        chosen = {name for name, other in formats.items() if other == config}
        quantize(model, config, skip=(), embeddings=True, filter=lambda name, _, chosen=chosen: name in chosen)
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            state[f"{name}.format"] = module.description()
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    filled = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers())
             if t.is_meta or (isinstance(t, nn.Parameter) and id(t) not in filled)]  # fmt: skip
    if empty or found.unexpected_keys:
        raise ValueError(f"bigkernels.load_gguf: {path} has no tensor for {', '.join(empty or found.unexpected_keys)}")


class _Unfilled(TorchFunctionMode):
    """Tensors that nothing was written to yet are on the meta device: weights take no memory before they are read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _is_order(rows: Tensor) -> bool:
    return torch.equal(rows.sort().values, torch.arange(len(rows), dtype=rows.dtype, device=rows.device))


def _planes(kind: str, raw: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The blocks (bytes) of a weight (N, K) as the stored tensors of our format."""
    n, k = shape
    blocks = raw.view(n, k // 32, -1)
    numbers = 2 if kind == "Q4_1" else 1
    scale, minimum = (
        blocks[..., 2 * i : 2 * i + 2].contiguous().view(torch.float16).squeeze(-1) for i in (0, numbers - 1)
    )
    codes = blocks[..., 2 * numbers :]
    if kind == "Q8_0":
        return {"codes": codes.reshape(n, k).view(torch.int8), "scale": scale}
    if kind == "Q4_0":
        minimum = scale * -8
    each = torch.cat((codes & 15, codes >> 4), -1)  # element i of a block beside element 16 + i
    return {"codes": (each[..., ::2] | each[..., 1::2] << 4).view(n, k // 2), "scale": scale, "minimum": minimum}


# ---- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Info:
    """A tensor: its name, shape (the longest stride first), type, and where its bytes are in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


@dataclass(frozen=True)
class _File:
    """What a GGUF file holds (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): its metadata without arrays,
    its tensors, and its bytes.
    """

    metadata: dict[str, Any]
    tensors: list[_Info]
    bytes: Tensor

    def data(self, tensor: _Info) -> Tensor:
        return self.bytes[tensor.begin : tensor.begin + tensor.nbytes]

    @classmethod
    def read(cls, path: Path, sizes: dict[int, tuple[int, int]]) -> _File:
        """`sizes`: elements and bytes of a block of each type."""
        size = path.stat().st_size
        what = f"bigkernels.load_gguf: {path}"
        with path.open("rb") as stream:
            cursor = _Cursor(stream, size)
            try:
                if stream.read(4) != b"GGUF":
                    raise ValueError(f"{what} is no GGUF file")
                version, count, pairs = cursor.take("I"), 0, 0
                if version not in (2, 3):
                    raise ValueError(f"{what} is of version {version}; accepted are 2 and 3, little-endian")
                count, pairs = cursor.take("Q"), cursor.take("Q")
                metadata = {}
                for _ in range(pairs):
                    key = cursor.string()
                    metadata[key] = cursor.value(cursor.take("I"))
                headers = []
                for _ in range(count):
                    name = cursor.string()
                    dims = [cursor.take("Q") for _ in range(cursor.take("I"))]
                    headers.append((name, tuple(reversed(dims)), cursor.take("I"), cursor.take("Q")))
            except (EOFError, UnicodeDecodeError, KeyError) as error:
                raise ValueError(f"{what} ends in its header, or is damaged there") from error
            start = stream.tell()
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"{what} has an alignment of {alignment!r}")
        start += -start % alignment
        tensors, seen = [], set()
        for name, shape, kind, offset in headers:
            if kind not in sizes:
                raise ValueError(f"{what}: tensor {name} is of type {kind}, which the gguf package does not know")
            elements, nbytes = sizes[kind]
            if not 1 <= len(shape) <= 4 or shape[-1] % elements:
                raise ValueError(f"{what}: tensor {name} has shape {shape}")
            nbytes *= math.prod(shape) // elements
            if start + offset + nbytes > size:
                raise ValueError(f"{what} ends before tensor {name} does")
            if name in seen:
                raise ValueError(f"{what} has two tensors {name}")
            seen.add(name)
            tensors.append(_Info(name, shape, kind, start + offset, nbytes))
        # A private mapping: what nobody writes stays the page cache's.
        return cls(
            metadata, tensors, torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8, device="cpu")
        )


class _Cursor:
    """Reads values one after the other; EOFError where the file ends."""

    def __init__(self, stream, size: int) -> None:
        self.stream, self.left = stream, size

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError
        found = self.stream.read(count)
        if len(found) < count:
            raise EOFError
        return found

    def take(self, code: str):
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.bytes(self.take("Q")).decode()

    def value(self, kind: int) -> Any:
        """A scalar or a string; None for arrays, which are passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        of, count = self.take("I"), self.take("Q")
        if of in _SCALARS:
            self.bytes(count * struct.calcsize(_SCALARS[of]))
        else:
            for _ in range(count):
                self.value(of) if of == _ARRAY else self.bytes(self.take("Q"))
        return None
