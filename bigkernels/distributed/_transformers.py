"""Attention of Hugging Face models whose sequences are cut over ranks, under a name of the attention interface."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ._context import ContextParallel

NAME = "bigkernels_context_parallel"
_OP = "distributed.context_parallel"

_states: weakref.WeakKeyDictionary[nn.Module, ContextParallel] = weakref.WeakKeyDictionary()
_current = threading.local()  # `number`: of the forward whose masks are asked for
_LAYERS = {"full_attention", "sliding_attention"}


def find_model(model: nn.Module) -> nn.Module | None:
    """The outermost Hugging Face model in `model`, inside of whichever wrappers; None where there is none."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and hasattr(module, "config"):
            return module
    return None


def check_model(model: Any) -> None:
    """Refuse what would be computed wrongly from a part of the tokens."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"bigkernels.{_OP}: {name} is an encoder and a decoder, whose sequences are two")
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        raise ValueError(f"bigkernels.{_OP}: {name} has layers of the kinds {sorted(kinds)}, accepted are {_LAYERS}")
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"bigkernels.{_OP}: the router's loss is of all tokens; set config.output_router_logits=False")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and max(module.kernel_size) > 1:
            raise ValueError(f"bigkernels.{_OP}: {path} of {name} is a convolution over the sequence")


def attach(model: Any, state: ContextParallel) -> Any:
    """Send the attention of a model here; returns what `detach` needs. The config is copied: models may share one."""
    register()
    old = model.config
    new = copy.deepcopy(old)
    changed = [m for m in model.modules() if getattr(m, "config", None) is old]
    for module in changed:
        module.config = new
    model.set_attn_implementation(NAME)
    if new._attn_implementation != NAME:
        detach(model, (old, changed))
        raise ValueError(f"bigkernels.{_OP}: the attention of {type(model).__name__} cannot be replaced by name")
    for module in model.modules():
        _states[module] = state
    return old, changed


def detach(model: Any, attached: Any) -> None:
    old, changed = attached
    for module in changed:
        module.config = old
    for module in model.modules():
        _states.pop(module, None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """With the arguments of transformers' attention functions; the mask is what `window_of_mask` made, or None."""
    state = _states.get(module)
    if state is None:
        raise RuntimeError(
            f"bigkernels.{_OP}: {type(module).__name__} belongs to a copy of a model that is context parallel; call "
            "context_parallel on it, or set_attn_implementation('sdpa')"
        )
    for name in ("output_attentions", "position_bias", "head_mask"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"bigkernels.{_OP}: {name} of {type(module).__name__} is not supported")
    window: tuple[int, int] | None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        sliding = kwargs.get("sliding_window")
        window = (sliding - 1 if sliding else -1, 0) if causal else None
        number = None
    elif attention_mask.dtype == torch.int64 and attention_mask.shape == (1, 1, 3, 1):
        left, right, number = attention_mask.flatten().tolist()
        window = (left, right)
    else:
        raise ValueError(f"bigkernels.{_OP}: {type(module).__name__} makes a mask of its own")
    out = state.attend(
        query,
        key,
        value,
        number,
        window=window,
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        sinks=s_aux if s_aux is not None else getattr(module, "sinks", None),
    )
    return out.transpose(1, 2).contiguous(), None


def window_of_mask(
    q_length: int, mask_function: Any = None, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor:
    """In the place of a mask: the window (left, right) that its function describes, and the number of the forward.

    (1, 1, 3, 1), on the CPU; layers that are recomputed get it again.

    Raises:
        ValueError: it describes none.
    """
    near = [] if local_size is None else [(local_size - 1, 0), (local_size, local_size)]
    if not use_vmap:
        for window in [(-1, 0), (-1, -1), *near]:
            if _is_window(mask_function, *window, local_size or 1):
                numbers = (*window, getattr(_current, "number", -1))
                return torch.tensor(numbers, dtype=torch.int64, device="cpu").view(1, 1, 3, 1)
    raise ValueError(f"bigkernels.{_OP}: the model asks for a mask that is neither causal nor a window")


def _is_window(mask_function: Any, left: int, right: int, local: int) -> bool:
    edges = [0, 1, local - 1, local, local + 1, 2 * local, 2 * local + 3]
    at = torch.tensor(sorted({max(e, 0) for e in edges}), dtype=torch.int64, device="cpu")
    q, k = at[:, None], at[None, :]
    try:
        found = torch.as_tensor(mask_function(0, 0, q, k), dtype=torch.bool, device="cpu").expand(len(at), len(at))
    except Exception:  # noqa: BLE001  of the model's own, it may read what these places are not in
        return False
    seen = torch.ones(len(at), len(at), dtype=torch.bool, device="cpu")
    if left >= 0:
        seen &= k >= q - left
    if right >= 0:
        seen &= k <= q + right
    return torch.equal(found, seen)


def begin(number: int) -> None:
    """Forward `number` of the model that this thread is about to call."""
    _current.number = number


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, window_of_mask)
