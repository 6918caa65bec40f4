"""A model's structure without its weights, from an instance, a configuration or a folder, and its copies of fakes.

Matrices of a structure lie on the meta device. Vectors are real: `patch` finds out what norms compute by trying them.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

Model = Any  # a module, a configuration of transformers, or the path of a folder with one


def structure(model: Model, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model that has no weights; nothing of an instance's is copied but its vectors.

    Args:
        dtype: of floating parameters and buffers; None leaves them as they are.

    Raises:
        TypeError: it is nothing that a structure can be made of.
        ValueError: there is no such folder, or transformers has no model for the configuration.
        ImportError: transformers is needed and not installed.
    """
    if isinstance(model, nn.Module):
        structure = _emptied(model)
    elif isinstance(model, (str, os.PathLike)):
        structure = _from_config(_read_config(os.fspath(model)))
    elif hasattr(model, "model_type") and hasattr(model, "to_dict"):
        structure = _from_config(model)
    else:
        raise TypeError(
            f"bigkernels.plan: model is a {type(model).__name__}; accepted are torch.nn.Module, a "
            "configuration of transformers, and the path of a folder with a config.json"
        )
    if dtype is not None:
        for slots in _slots(structure):
            for t in slots.values():
                if t is not None and t.is_floating_point():
                    t.data = t.data.to(dtype)
    for parameter in structure.parameters():
        parameter.grad = None
    return structure


def name_of(model: Model) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        return os.path.basename(os.path.normpath(os.fspath(model)))
    return str(model.model_type)


def copied(made: nn.Module) -> nn.Module:
    """Another structure, that may be patched and run; no memory is taken."""
    return copy.deepcopy(made)


def faked(made: nn.Module, device: torch.device) -> nn.Module:
    """Give a structure fake tensors on `device` for all its own, in place; runs inside of a `FakeTensorMode`."""
    fakes: dict[int, Tensor] = {}
    for slots in _slots(made):
        for name, t in slots.items():
            if t is None:
                continue
            if id(t) not in fakes:
                fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                if isinstance(t, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=t.requires_grad)
                fakes[id(t)] = fake
            slots[name] = fakes[id(t)]
    return made


def _slots(module: nn.Module) -> list[dict[str, Tensor | None]]:
    return [cast(dict[str, Tensor | None], slots) for m in module.modules() for slots in (m._parameters, m._buffers)]


def _emptied(model: nn.Module) -> nn.Module:
    # What deepcopy finds in its memo it takes as the copy.
    memo: dict[int, Any] = {}
    for slots in _slots(model):
        for t in slots.values():
            if t is not None and id(t) not in memo:
                memo[id(t)] = _without_memory(t)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"bigkernels.plan: this {type(model).__name__} cannot be copied ({type(error).__name__}: {error})"
        ) from error


def _without_memory(t: Tensor) -> Tensor:
    if isinstance(t, UninitializedTensorMixin):
        raise ValueError("bigkernels.plan: the model has parameters whose shapes a first call would decide")
    if t.dim() < 2:
        copied = torch.ones(t.shape, dtype=t.dtype, device="cpu") if t.is_meta else t.detach().to("cpu", copy=True)
    else:
        copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return nn.Parameter(copied, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else copied


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("bigkernels.plan: a configuration needs transformers (pip install transformers)") from error
    return transformers


def _read_config(path: str) -> Any:
    if not Path(path).is_dir():
        raise ValueError(f"bigkernels.plan: there is no folder {path!r}; a model is the folder of its config.json")
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"bigkernels.plan: the folder {path!r} has no config.json")
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"bigkernels.plan: {path!r} holds no configuration of a model: {first}") from error


def _from_config(config: Any) -> nn.Module:
    transformers = _transformers()
    config = copy.deepcopy(config)
    with torch.device("meta"):
        built = _model_class(transformers, config)(config)
    return _emptied(built)


def _model_class(transformers: Any, config: Any) -> type[nn.Module]:
    """The class that the configuration names, else that of the kind's usual task."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    auto = transformers.models.auto.modeling_auto
    masked, causal = auto.MODEL_FOR_MASKED_LM_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING
    mappings = [causal, masked, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, auto.MODEL_MAPPING]
    if getattr(config, "is_encoder_decoder", False):
        mappings.insert(0, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    elif type(config) in masked and not getattr(config, "is_decoder", False):
        mappings.insert(0, masked)
    for mapping in mappings:
        if type(config) in mapping:
            kind = mapping[type(config)]
            return kind[0] if isinstance(kind, tuple) else kind
    raise ValueError(f"bigkernels.plan: transformers has no model for a {type(config).__name__}")
