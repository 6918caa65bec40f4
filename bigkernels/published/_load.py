"""A model of transformers out of a folder that another library quantized."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._methods import Method, method_of
from ._packed import Packed

_WHAT = "bigkernels.load_quantized"


def load_quantized(folder: str | os.PathLike, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of transformers from a folder of GPTQ, AWQ, bitsandbytes, compressed-tensors, HQQ or torchao, or of
    gpt-oss (MXFP4), in evaluation mode on the CPU.

    Its linear layers become `bigkernels.nn.QuantizedLinear` with the codes of the folder, experts that transformers
    joins become `QuantizedExperts`. The values are, bit for bit, those that the library itself dequantizes (of
    LLM.int8 up to a rounding in float32, of HQQ up to those in float16). Layers for
    which no format stands (8 bits with zero points in groups) become plain ones with these values;
    ``model.dense_layers`` names them. `save_pretrained` keeps the model in this package's files.

    Args:
        folder: with config.json, whose quantization_config says what it is, and safetensors files.
        dtype: of what the layers compute; that of config.json by default.

    Raises:
        ImportError: transformers or safetensors is not installed.
        OSError: there is no such folder, config or file.
        ValueError: the method is none of these, a file is damaged, or a tensor is missing, not finite, or of another
            shape or dtype; its name is given. No code of the folder is run.
    """
    try:
        import transformers
        from safetensors import SafetensorError, safe_open  # noqa: F401

        from ..integrations.transformers import Config
        from ..integrations.transformers._place import Placed
    except ImportError as error:
        raise ImportError(
            f"{_WHAT} needs transformers and safetensors ({error}); pip install "
            "'bigkernels[transformers]' installs them"
        ) from error
    folder = Path(folder)
    said = _json(folder / "config.json")
    quantization = said.get("quantization_config") or said.get("compression_config")
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{_WHAT}: {folder / 'config.json'} has no quantization_config")
    method = method_of(quantization)
    state = State(files_of(folder))
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    kind = _class(transformers, said.get("architectures"))
    placed = Placed(Config("int8"), weights(state, method))
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=placed.state,
            quantization_config=placed.config,
            output_loading_info=True,
            dtype=dtype or getattr(config, "dtype", None) or torch.float32,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:
        raise (placed.errors or [ValueError(f"{_WHAT}: {folder}: {error}")])[0] from error
    check(folder, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"])
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = str(folder)
    model.dense_layers = placed.dense
    return model.eval()


def _class(transformers: Any, names: Any) -> Any:
    for name in names if isinstance(names, list) else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return transformers.AutoModelForCausalLM


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{_WHAT}: {path} is no JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{_WHAT}: {path} is no object of JSON")
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
            raise ValueError(f"{_WHAT}: {folder} {what} {', '.join(sorted(map(str, names)))}")


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    files = sorted({str(file) for file in _json(index).get("weight_map", {}).values()})
    if any(Path(file).name != file for file in files):
        raise ValueError(f"{_WHAT}: {index} names files outside of the folder")
    return [folder / file for file in files]


class State:
    """The tensors of safetensors files, read when they are asked for, and what the files say beside them."""

    def __init__(self, files: Iterable[Path | str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.slices: dict[str, Any] = {}
        self.said: dict[str, str] = {}
        for file in map(Path, files):
            if file.suffix != ".safetensors":
                raise ValueError(f"{_WHAT}: {file} is no safetensors file")
            if not file.exists():
                raise FileNotFoundError(f"{_WHAT}: there is no file {file}")
            try:
                held = safe_open(file, framework="pt")
                self.slices |= {name: held.get_slice(name) for name in held.keys()}
                self.said |= held.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{_WHAT}: {file} is damaged: {error}") from error

    def read(self, name: str) -> Tensor:
        view = self.slices[name]
        t = view[...] if view.get_shape() else view[()]
        if t.is_floating_point() and t.itemsize > 1 and not t.isfinite().all():
            raise ValueError(f"{_WHAT}: {name} holds a value that is not finite")
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
            raise error if str(error).startswith("bigkernels") else ValueError(f"{_WHAT}: {error}") from error
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{_WHAT}: the tensors of {self.path} do not fit together: {error}") from error
        return weight


def weights(state: State, method: Method) -> dict[str, Any]:
    """What the model's weights are, by name: layers that are quantized, and views of files."""
    method.said = state.said
    found, used = {}, set()
    for path, weight, names in method.layers(state.slices.keys()):
        used |= set(names.values())
        found[weight] = Layer(state, method, path, names)
    if not found:
        raise ValueError(f"{_WHAT}: no tensor is named like one of {type(method).__name__} (*{method.mark})")
    return found | {name: view for name, view in state.slices.items() if name not in used}
