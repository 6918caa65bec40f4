"""What the files of a folder that another library quantized hold: tensors read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ._methods import Method
from ._packed import Packed

WHAT = "bigkernels.load_quantized"


def read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{WHAT}: {path} is no JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{WHAT}: {path} is no object of JSON")
    return config


def check(folder: Any, missing: Iterable[Any], mismatched: Iterable[Any], unexpected: Iterable[Any]) -> None:
    """What transformers' loader says of tensors, as errors.

    Raises:
        ValueError: there are any.
    """
    wrong = {
        "has no tensor": missing,
        "has tensors of another shape:": [name for name, *_ in mismatched],
        "has tensors that the model has no place for:": unexpected,
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{WHAT}: {folder} {what} {', '.join(sorted(map(str, names)))}")


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    files = sorted({str(file) for file in read_json(index).get("weight_map", {}).values()})
    if any(Path(file).name != file for file in files):
        raise ValueError(f"{WHAT}: {index} names files outside of the folder")
    return [folder / file for file in files]


class State:
    """The tensors of safetensors files, read when they are asked for, and what the files say beside them."""

    def __init__(self, files: Iterable[Path | str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.slices: dict[str, Any] = {}
        self.said: dict[str, str] = {}
        for file in map(Path, files):
            if file.suffix != ".safetensors":
                raise ValueError(f"{WHAT}: {file} is no safetensors file")
            if not file.exists():
                raise FileNotFoundError(f"{WHAT}: there is no file {file}")
            try:
                held = safe_open(file, framework="pt")
                self.slices |= {name: held.get_slice(name) for name in held.keys()}
                self.said |= held.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{WHAT}: {file} is damaged: {error}") from error

    def read(self, name: str) -> Tensor:
        view = self.slices[name]
        t = view[...] if view.get_shape() else view[()]
        if t.is_floating_point() and t.itemsize > 1 and not t.isfinite().all():
            raise ValueError(f"{WHAT}: {name} holds a value that is not finite")
        return t


class Layer:
    """A weight of a quantized layer, decoded when transformers' loader reads it."""

    def __init__(self, state: State, method: Method, path: str, names: dict[str, str]) -> None:
        self.state, self.method, self.path, self.names = state, method, path, names

    def __getitem__(self, index: Any) -> Packed | Tensor:
        held = {part: self.state.read(name) for part, name in self.names.items()}
        try:
            weight = self.method.decode(self.path, held)
        except ValueError as error:
            raise error if str(error).startswith("bigkernels") else ValueError(f"{WHAT}: {error}") from error
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{WHAT}: the tensors of {self.path} do not fit together: {error}") from error
        return weight


def weights(state: State, method: Method) -> dict[str, Any]:
    """What the model's weights are, by name: layers that are quantized, and views of files."""
    method.said = state.said
    found, used = {}, set()
    for path, weight, names in method.layers(state.slices.keys()):
        used |= set(names.values())
        found[weight] = Layer(state, method, path, names)
    if not found:
        raise ValueError(f"{WHAT}: no tensor is named like one of {type(method).__name__} (*{method.mark})")
    return found | {name: view for name, view in state.slices.items() if name not in used}
