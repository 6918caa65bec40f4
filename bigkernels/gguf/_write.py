"""What a model holds as the tensors of a GGUF file, and metadata as the `gguf` package writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.quantized import Quantized
from ..quantization import GGUFBlocks
from ..quantization.ggml import BLOCK_TYPES
from ._codes import blocks_of
from ._file import ARRAY, SCALARS, STRING, Cursor, Pair
from ._source import Place, Source

_WHAT = "bigkernels.save_gguf"
_NUMBERS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BY_NUMBER = {row.number: row for row in BLOCK_TYPES.values()}


def add(writer: Any, types: Any, key: str, pair: Pair) -> None:
    if pair.kind != ARRAY:
        writer.add_key_value(key, pair.value, types(pair.kind))
        return
    cursor = Cursor(pair.raw)
    of, count = cursor.take("I"), cursor.take("Q")
    if of == ARRAY:
        raise ValueError(f"{_WHAT}: {key} is an array of arrays, which the gguf package does not write")
    values = [cursor.string() if of == STRING else cursor.take(SCALARS[of]) for _ in range(count)]
    if values:  # the writer has no empty arrays
        writer.add_key_value(key, values, types.ARRAY, types(of))


class Writing:
    def __init__(self, model: nn.Module, source: Source) -> None:
        self.model, self.source = model, source
        self._process: Any = None

    def blocks(self, place: Place) -> tuple[int, np.ndarray]:
        """The type and the bytes of a tensor, (..., bytes of a row)."""
        kind, found = self._coded(place) if place.coded else self._dense(place)
        row = _BY_NUMBER.get(place.kind)
        if not place.coded and place.raw is None and self.source.anew and row is not None and not row.is_numbers:
            import gguf

            kind, values = place.kind, found.float().numpy()
            return kind, gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
        rows = found.contiguous().view(torch.uint8).reshape(*place.shape[:-1], -1)
        return kind, rows.cpu().numpy()

    def _held(self, place: Place) -> Any:
        """The module with codes, or the tensor, where a tensor went."""
        try:
            held = self.model.get_submodule(place.target) if place.coded else None
        except AttributeError:
            held = None
        if isinstance(held, Quantized):
            return held
        owner, _, key = (f"{place.target}.weight" if held is not None else place.target).rpartition(".")
        try:
            held = getattr(self.model.get_submodule(owner), key)
        except AttributeError as error:
            raise ValueError(f"{_WHAT}: the model has no {place.target} anymore, which was {place.name}") from error
        if self.source.anew:
            return held.dequantize() if hasattr(held, "dequantize") and not _is_plain(held) else held
        if isinstance(held, Quantized) or isinstance(self.model.get_submodule(owner), Quantized):
            raise ValueError(
                f"{_WHAT}: {place.target} was quantized after it was loaded; {place.name} of a GGUF file "
                "cannot hold that"
            )
        return held

    def _coded(self, place: Place) -> tuple[int, Tensor]:
        held = self._held(place)
        if not isinstance(held, Quantized):
            return self._numbers(place, held)
        stored, config, row = held.qweight.tensors, held.weight_format, _BY_NUMBER[place.kind]
        made = stored["blocks"] if isinstance(config, GGUFBlocks) else blocks_of(row.name, stored)
        kind = place.kind
        if isinstance(config, GGUFBlocks) and config.type != row.name:
            kind = config.row.number
        elif not isinstance(config, GGUFBlocks) and config.name != row.ours:
            raise ValueError(f"{_WHAT}: {place.target} is {config.name}, which {place.name} ({row.name}) cannot hold")
        elif made is None:  # a Q4_1 in the place of a Q4_0
            kind, made = BLOCK_TYPES["Q4_1"].number, blocks_of("Q4_1", stored)
        assert made is not None  # Q4_1 holds all that Q4_0 does
        part, count = place.part
        if count > 1:
            made = made.unflatten(0, (place.shape[0], count, -1))[:, part].flatten(0, 1)
        return kind, _back(made, place.order)

    def _dense(self, place: Place) -> tuple[int, Tensor]:
        held = self._held(place).detach()
        row, part, count = _BY_NUMBER.get(place.kind), *place.part
        if count > 1:
            held = held.unflatten(1, (count, -1))[:, part]
        if place.raw is not None and row is not None:
            before = row.decode(place.raw.view(-1, row.nbytes)).view(place.shape)
            loaded = self._processed(place.name, before)
            if loaded.shape == held.shape and torch.equal(loaded.to(held.dtype), held.cpu()):
                return place.kind, place.raw
        return self._numbers(place, held)

    def _numbers(self, place: Place, held: Tensor) -> tuple[int, Tensor]:
        """The numbers of a tensor as the file has them: what transformers did to them, undone."""
        held = held.detach().cpu()
        if held.dim() == 2 and tuple(held.shape) == place.shape and (rows := self._rows(place)) is not None:
            return self._typed(place, torch.empty_like(held).index_copy_(0, rows, held))
        size = int(np.prod(place.shape))
        index: Any = np.arange(size, dtype=np.float64).reshape(place.shape)
        moved, zeros = self._processed(place.name, index), self._processed(place.name, np.zeros_like(index)).flatten()
        offset = zeros[0].item() if zeros.numel() and bool((zeros == zeros[0]).all()) else float("nan")
        where = (moved - offset).flatten()
        if where.numel() != held.numel() or not torch.equal(where.sort().values, torch.from_numpy(index).flatten()):
            raise ValueError(
                f"{_WHAT}: {place.name} was changed, and what transformers makes of such a tensor cannot be undone"
            )
        values = torch.empty_like(held).flatten()
        values[where.long()] = held.flatten() - offset if offset else held.flatten()
        return self._typed(place, values)

    def _rows(self, place: Place) -> Tensor | None:
        """The row of the file that becomes each row of the weight, where that is all that transformers does."""
        count = place.shape[0]
        try:
            found = self._processed(place.name, np.arange(count, dtype=np.int64)[:, None])
        except (ArithmeticError, LookupError, ValueError):  # it needs whole rows
            return None
        rows = torch.arange(count, dtype=torch.int64, device="cpu")
        return found[:, 0] if found.shape == (count, 1) and torch.equal(found[:, 0].sort().values, rows) else None

    def _typed(self, place: Place, values: Tensor) -> tuple[int, Tensor]:
        """In the type of a place, where that is one of numbers, else in the nearest one."""
        row = _BY_NUMBER.get(place.kind)
        name = row.name if row is not None and row.is_numbers else _NUMBERS.get(values.dtype, "F32")
        return BLOCK_TYPES[name].number, values.to(BLOCK_TYPES[name].dtype).view(place.shape)

    def _processed(self, name: str, values: Any) -> Tensor:
        if self._process is None:
            self._process = processor(self.model, self.source.architecture)
        return self._process(name, values)


def processor(model: Any, architecture: str) -> Callable[[str, Any], Tensor]:
    """What transformers makes of the values of a tensor of a file, by its name."""
    from transformers import modeling_gguf_pytorch_utils as known

    kind = known.TENSOR_PROCESSORS.get(architecture, known.TensorProcessor)
    process = kind(config=model.config.to_dict()).process

    def processed(name: str, values: Any) -> Tensor:
        if name.endswith("_exps.weight"):
            return values if isinstance(values, Tensor) else torch.from_numpy(values)
        values = values.numpy() if isinstance(values, Tensor) else values
        found = process(weights=values, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        return torch.from_numpy(np.ascontiguousarray(found.weights))

    return processed


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _back(rows: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return rows
    return torch.empty_like(rows).index_copy_(0, order.to(rows.device), rows)
