"""Which keys a token sees far into a text: a model's masks, after more tokens than anybody wants to compute with.

Masks depend on positions and on the cache's length alone. So the model runs on two tokens with a cache that says that
it holds many and gives numbers without memory, and what attention functions are told to leave out is looked at.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._record import arguments, new_cache
from ._trace import Refused, leaves
from .suspend import suspended

_NAMES = ("window", "chunk", "local", "sliding", "block", "span", "stride")
_MOST = 2**30  # bytes of a layer's keys, if they were copied
_NEW = 2


def hints(model: nn.Module) -> int:
    """The largest number that may be a window: of tokens, by the name of what holds it."""
    found = [0]
    held = [vars(m).get("config") for m in model.modules()]
    configs = {id(config): config for config in held if config is not None}
    for config in configs.values():
        held = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        found += _numbers(held)
    for module in model.modules():
        found += _numbers({k: v for k, v in vars(module).items() if not k.startswith("_")})
    return max(found)


def _numbers(held: dict, named: bool = False) -> list[int]:
    masks = []
    for key, value in held.items():
        if isinstance(value, dict):
            masks += _numbers(value)
        elif named or any(part in str(key).lower() for part in _NAMES):
            values = list(leaves(value)) if isinstance(value, (list, tuple)) else [value]
            masks += [v for v in values if type(v) is int and v < 2**24]
    return masks


def far_windows(model: nn.Module, vocabulary: int, past: int, own_cache: bool = False) -> list[int]:
    """The window of each attention, in the order in which they are called, after `past` tokens; 0: all is seen.

    Raises:
        Refused: what is seen is no window, or the model does not run so.
    """
    names = arguments(model)
    device = next(p.device for p in model.parameters())
    tokens = torch.full((1, _NEW), vocabulary - 1, dtype=torch.int64, device=device)
    most = _positions(model)
    first = min(past, most - _NEW)
    positions = torch.arange(first, first + _NEW, dtype=torch.int64, device=device)[None]
    given = {names["ids"]: tokens, names["cache"]: _long_cache(past, model if own_cache else None), "use_cache": True}
    if "positions" in names:
        given[names["positions"]] = positions
    watcher = _Watcher(past + _NEW)
    try:
        with torch.no_grad(), suspended(model), watcher:
            model(**given)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"(model): its masks after {past} tokens cannot be seen ({type(error).__name__})") from error
    return watcher.windows


def _positions(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > _NEW:
            return value
    return 2**24


def _long_cache(past: int, model: nn.Module | None) -> Any:
    kind = type(new_cache())

    class Long(kind):
        def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if k.shape[1] * k.shape[3] * (past + _NEW) * k.element_size() > _MOST:
                raise Refused(f"(model): its masks after {past} tokens take too much memory to look at")
            return tuple(t[:, :, :1].expand(-1, -1, past + _NEW, -1) for t in (k, v))

        def get_seq_length(self, *args: Any) -> int:
            return past

        def get_query_offset(self, *args: Any) -> int:
            return past

        def get_mask_sizes(self, length: Any, *args: Any) -> tuple[int, int]:
            return past + _NEW, 0

    return Long() if model is None else Long(config=model.config)


def is_softmax(name: str, args: tuple, total: int) -> bool:
    """Whether a call is the softmax of an attention over so many keys, or with sinks beside them."""
    return name in ("softmax", "_softmax") and args[0].dim() > 2 and args[0].shape[-1] in (total, total + 1)


class _Watcher(TorchFunctionMode):
    def __init__(self, total: int):
        super().__init__()
        self.total, self.windows = total, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            q, _, v = args[:3]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self._see(mask, q)
            return v[:, :1, : q.shape[2]].expand(-1, q.shape[1], -1, -1).clone()
        if is_softmax(name, args, self.total):
            self._see(args[0][..., : self.total], args[0])
        return func(*args, **kwargs)

    def _see(self, mask: Tensor | None, q: Tensor) -> None:
        if mask is None:
            self.windows.append(0)
            return
        seen = mask if mask.dtype == torch.bool else mask > -1e4 * max(1.0, math.log2(self.total))
        seen = seen.reshape(-1, *seen.shape[-2:])
        last = seen[0, -1]
        if not torch.equal(seen, seen[:1].expand_as(seen)) or not bool(last[-1]):
            raise Refused("(model): its masks differ between heads")
        key = torch.arange(self.total, dtype=torch.int64, device=mask.device)
        window = int(last.sum())
        if not torch.equal(last, key > self.total - 1 - window):
            raise Refused("(model): far into a text, its masks are no windows")
        self.windows.append(0 if window == self.total else window)
