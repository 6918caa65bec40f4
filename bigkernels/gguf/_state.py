"""The tensors of a file as the state dict of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..quantization import Format, GGUFBlocks, resolve_format
from ..quantization.layers import is_transposed
from ._codes import planes
from ._file import File, Info
from ._source import SMALL, Contents, Place, Source

_EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)")


def read_contents(file: File, model: nn.Module, config: Any, dtype: torch.dtype, mmap: bool) -> Contents:
    """What a file holds of a model without values.

    Raises:
        ValueError: as `load_gguf`.
    """
    return _Reading(file, model, config, dtype, mmap).read()


class _Reading:
    def __init__(self, file: File, model: nn.Module, config: Any, dtype: torch.dtype, mmap: bool) -> None:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as known

        self.file, self.model, self.dtype, self.mmap = file, model, dtype, mmap
        architecture = file.architecture
        kind = known.TENSOR_PROCESSORS.get(architecture, known.TensorProcessor)
        self._process, self._dequantize = kind(config=config.to_dict()).process, gguf.quants.dequantize
        self._kind = gguf.GGMLQuantizationType
        self.expected = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.names = _names(architecture, config.get_text_config().num_hidden_layers, self.expected)
        self.parts: dict[str, tuple[int, int]] = {}
        if hasattr(kind, "HF_MOE_W13_PATTERN"):
            self._name_experts()
        self.made = Contents(Source(architecture, dict(file.metadata)))
        self._halves: dict[str, dict[int, tuple[Format, dict[str, Tensor]] | Tensor]] = {}

    def _name_experts(self) -> None:
        for parameter, places in expert_places(self.expected).items():
            for name, part in places:
                self.names[name], self.parts[name] = parameter, part

    def read(self) -> Contents:
        for tensor in self.file.tensors:
            target = self.names.get(tensor.name)
            if target not in self.expected:
                raise ValueError(
                    f"bigkernels.load_gguf: tensor {tensor.name} of {self.file.path} has no place in "
                    f"{type(self.model).__name__}"
                )
            self.file.check_finite(tensor)
            three = _EXPERTS.fullmatch(target) is not None
            if len(tensor.shape) > 2 and not three:
                raise ValueError(
                    f"bigkernels.load_gguf: tensor {tensor.name} of {self.file.path} has {len(tensor.shape)} dimensions"
                )
            codes = self._experts(tensor, target) if three else self._codes(tensor, target)
            if not codes:
                self._dense(tensor, target)
            self.file.forget(tensor)
        self._join()
        return self.made

    def _processed(self, tensor: Info, values: np.ndarray) -> Tensor:
        """What transformers makes of values for a tensor's place."""
        try:
            processed = self._process(
                weights=values, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
            ).weights
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self.file.fail(f"tensor {tensor.name} of shape {tensor.shape} does not fit: {error}") from error
        processed = np.ascontiguousarray(processed)
        return torch.from_numpy(processed if processed.flags.writeable else processed.copy())

    # ---- codes -----------------------------------------------------------------------------------------------------

    def _planes(self, tensor: Info, order: Tensor | None) -> tuple[Format, dict[str, Tensor]] | None:
        """The blocks of a weight as stored tensors of a format; None of types without one."""
        row, n, k = tensor.row, int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
        if row is None or row.is_numbers:
            return None
        raw = self.file.data(tensor).view(n, -1)
        pick = (lambda t: t) if order is None else (lambda t: t.index_select(0, order))
        if row.ours and (made := planes(row, raw, (n, k))) is not None:
            return resolve_format(row.ours), {name: pick(t) for name, t in made.items()}
        blocks = pick(raw)
        return GGUFBlocks(row.name), {"blocks": blocks if self.mmap or order is not None else blocks.clone()}

    def _codes(self, tensor: Info, target: str) -> bool:
        layer, _, attribute = target.rpartition(".")
        if attribute != "weight" or len(tensor.shape) != 2 or tensor.row is None or tensor.row.is_numbers:
            return False
        kind = type(self.model.get_submodule(layer))
        transposed = is_transposed(kind)
        shape = tensor.shape[::-1] if transposed else tensor.shape
        if kind not in (nn.Linear, nn.Embedding) and not transposed or tuple(self.expected[target]) != shape:
            return False
        n = tensor.shape[0]
        rows = self._processed(tensor, np.arange(n, dtype=np.int64)[:, None])
        rows = rows.T if transposed else rows
        if rows.shape != (n, 1) or not _is_order(rows := rows[:, 0]):
            return False
        order = None if torch.equal(rows, torch.arange(n, dtype=torch.int64, device="cpu")) else rows
        planes = self._planes(tensor, order)
        assert planes is not None  # of a matrix in codes
        config, stored = planes
        self.made.formats[layer] = config
        self.made.state |= {f"{layer}.{name}": t for name, t in stored.items()}
        self.made.source.places.append(Place(tensor.name, tensor.shape, tensor.kind, layer, True, order))
        return True

    def _experts(self, tensor: Info, target: str) -> bool:
        """Weights (E, N, K), of which gate and up are one parameter of the model."""
        part, count = self.parts.get(tensor.name, (0, 1))
        e, n, k = self.expected[target]
        if tensor.shape != (e, n // count, k):
            raise self.file.fail(f"tensor {tensor.name} has shape {tensor.shape}, expected {(e, n // count, k)}")
        planes: Any = self._planes(tensor, None)
        if planes is None:
            planes = self._values(tensor).to(self.dtype)
        place = Place(
            tensor.name, tensor.shape, tensor.kind, target, not isinstance(planes, Tensor), None, (part, count)
        )
        self._halves.setdefault(target, {})[part] = planes
        self.made.source.places.append(place)
        return True

    def _join(self) -> None:
        for target, halves in self._halves.items():
            count = 1 if target.endswith("down_proj") else 2
            if len(halves) < count:
                raise ValueError(f"bigkernels.load_gguf: {self.file.path} has no tensor for {target}")
            held: list[Any] = [halves[i] for i in range(count)]
            e = self.expected[target][0]
            coded = [half for half in held if not isinstance(half, Tensor)]
            if len(coded) == len(held) and len({config for config, _ in coded}) == 1:
                self.made.formats[target] = coded[0][0]
                for name in coded[0][1]:
                    parts = [stored[name].unflatten(0, (e, -1)) for _, stored in coded]
                    self.made.state[f"{target}.{name}"] = torch.cat(parts, 1).flatten(0, 1)
                continue
            if coded:
                raise self.file.fail(f"gate and up of {target} are of different types")
            self.made.state[target] = torch.cat(held, 1)

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _values(self, tensor: Info) -> Tensor:
        """Dequantized, in float32."""
        raw, row = self.file.data(tensor), tensor.row
        if row is not None:
            return row.decode(raw.view(-1, row.nbytes)).view(tensor.shape)
        try:
            values = self._dequantize(raw.view(*tensor.shape[:-1], -1).numpy(), self._kind(tensor.kind))
        except NotImplementedError as error:
            raise self.file.fail(f"tensor {tensor.name}: {error}") from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(tensor.shape)

    def _dense(self, tensor: Info, target: str) -> None:
        raw, row = self.file.data(tensor), tensor.row
        before = self._values(tensor)
        values = self._processed(tensor, before.numpy())
        if values.shape != self.expected[target]:
            raise ValueError(
                f"bigkernels.load_gguf: tensor {tensor.name} of {self.file.path} has shape "
                f"{tuple(values.shape)}, expected {tuple(self.expected[target])}"
            )
        moved = values.data_ptr() != before.data_ptr()
        if not moved and row is not None and row.dtype == self.dtype:
            values = raw.view(row.dtype).view(values.shape)  # as it is in the file
            values = values if self.mmap and raw.nbytes > SMALL else values.clone()
        self.made.state[target] = values.to(self.dtype)
        kept = raw.clone() if raw.nbytes <= SMALL else raw if self.mmap else None
        place = Place(tensor.name, tensor.shape, tensor.kind, target, False, raw=kept)
        self.made.source.places.append(place)


def expert_places(parameters: Iterable[str]) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """The tensors of a file that the weights of experts are, and which part of several each is, by parameter."""
    places: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for parameter in parameters:
        if m := _EXPERTS.fullmatch(parameter):
            kinds = ("down",) if m[2] == "down_proj" else ("gate", "up")
            places[parameter] = [
                (f"blk.{m[1]}.ffn_{kind}_exps.weight", (i, len(kinds))) for i, kind in enumerate(kinds)
            ]
    return places


def _names(architecture: str, layers: int, parameters: Iterable[str]) -> dict[str, str]:
    """The parameters of a model by the names that their tensors have in a file."""
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    known: Any = None if kind is None else gguf.get_tensor_name_map(kind, layers)
    names: dict[str, str] = {}
    for parameter in parameters if known else ():
        path, _, attribute = parameter.rpartition(".")
        parts = path.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))  # the file may be of a model inside of this one
        if name := next(filter(None, map(known.get_name, ends)), None):
            names.setdefault(f"{name}.{attribute}", parameter)
    return names


def _is_order(rows: Tensor) -> bool:
    return torch.equal(rows.sort().values, torch.arange(len(rows), dtype=rows.dtype, device=rows.device))
