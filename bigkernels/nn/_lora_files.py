"""Adapters of `LoRALinear` in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..quantization._owners import note
from ..quantization.layers import is_transposed
from ..quantization.select import places, put

if TYPE_CHECKING:
    from .lora import LoRALinear

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Of PEFT's options, those that change what an adapter computes, and their values that say it does not.
_PLAIN = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}


def save(model: nn.Module, folder: str | Path, kind: type[LoRALinear]) -> None:
    from safetensors.torch import save_file

    adapters = {path: module for path, module in model.named_modules() if isinstance(module, kind)}
    if not adapters:
        raise ValueError("bigkernels.nn.LoRALinear.save: the model has no adapters")
    first = next(iter(adapters.values()))
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": list(adapters),
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": all(is_transposed(_kind(module)) for module in adapters.values()),
        "rank_pattern": {_exactly(path): m.rank for path, m in adapters.items() if m.rank != first.rank},
        "alpha_pattern": {_exactly(path): m.alpha for path, m in adapters.items() if m.alpha != first.alpha},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    }
    state = {}
    for path, module in adapters.items():
        for name, p in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
            state[f"{_PREFIX}{path}.{name}.weight"] = p.detach().cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(state, folder / _WEIGHTS, {"format": "pt"})


def load(
    model: nn.Module,
    folder: str | Path,
    kind: type[LoRALinear],
    fits: Callable[[Any], bool],
    size: Callable[[nn.Module], tuple[int, int]],
) -> list[str]:
    """`fits` says whether a module can be a base, and `size` its (N, K)."""
    folder = Path(folder)
    what = f"bigkernels.nn.LoRALinear.load: {folder}"
    config, pairs = _config(folder, what), _pairs(folder, what)
    at = {path: (module, paths) for module, paths in places(model).items() for path in paths}
    for path, (a, b) in pairs.items():
        module = at.get(path, (None, []))[0]
        if isinstance(module, kind) and module.merged:
            raise ValueError(f"{what}: the adapter of {path} is merged; `unmerge` it first")
        if not isinstance(module, kind) and not fits(module):
            raise ValueError(f"{what} has an adapter of {path}, and the model no such linear layer")
        n, k = size(cast(Any, module).base if isinstance(module, kind) else cast(nn.Module, module))
        if a.shape[1] != k or b.shape != (n, a.shape[0]) or not len(a):
            raise ValueError(
                f"{what}: {_PREFIX}{path}.lora_A.weight and lora_B.weight have shapes {tuple(a.shape)} "
                f"and {tuple(b.shape)}; expected (rank, {k}) and ({n}, rank)"
            )
    for module in model.modules():
        module.requires_grad_(False)
    for path, (a, b) in pairs.items():
        module, paths = at[path]
        rank, alpha = a.shape[0], _of(config.get("alpha_pattern"), path, config["lora_alpha"])
        adapter = kind(
            module.base if isinstance(module, kind) else module,
            rank,
            alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
            float(config.get("lora_dropout") or 0.0),
            dtype=a.dtype,
        )
        with torch.no_grad():
            adapter.lora_a.copy_(a)
            adapter.lora_b.copy_(b)
        put(model, paths, adapter.train(module.training))
    note(model)
    return list(pairs)


def _config(folder: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: {_CONFIG} is no JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{what} holds no adapters of LoRA")
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise ValueError(f"{what}: {key} is {config[key]!r}, which LoRALinear does not compute; load it by PEFT")
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    for value in (alpha, *(patterns.values() if isinstance(patterns, dict) else [None])):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{what}: an alpha is {value!r}")
    return config


def _pairs(folder: Path, what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The two matrices of each layer."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        if not (folder / _WEIGHTS).exists():
            raise FileNotFoundError(f"{what} has no {_WEIGHTS}") from error
        raise ValueError(f"{what}: {_WEIGHTS} is damaged: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, t in state.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or t.dim() != 2 or not t.is_floating_point():
            raise ValueError(f"{what}: {name} is no matrix of an adapter of a linear layer")
        if not t.isfinite().all():
            raise ValueError(f"{what}: {name} holds a value that is not finite")
        halves.setdefault(match[1], {})[match[2]] = t
    for path, pair in halves.items():
        if len(pair) != 2:
            missing = "AB".replace(next(iter(pair)), "")
            raise ValueError(f"{what} has no tensor {_PREFIX}{path}.lora_{missing}.weight")
    return {path: (pair["A"], pair["B"]) for path, pair in halves.items()}


def _kind(module: LoRALinear) -> type:
    shell = getattr(module.base, "_shell", None)
    return type(module.base) if shell is None else shell.kind


def _exactly(path: str) -> str:
    """The pattern of one layer, as PEFT matches them."""
    return "^" + re.escape(path)


def _of(patterns: dict[str, float] | None, path: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
