"""How many operations and bytes a call of an operator takes, by the shapes of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from .._torch_private import tree_iter

_aten = torch.ops.aten
# These read as many elements of their first argument as they give.
_GATHERS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.take}
_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Operations of matrix products, convolutions and attention, a multiplication and an addition counted as two."""
    packet = func._overloadpacket
    own = _OWN.get(func.name().split(".")[0])
    if own is not None:
        return own(*args, **kwargs)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def moved_bytes(func: Any, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    """Bytes that a call reads and writes; 0 for views and for what only allocates."""
    packet = func._overloadpacket
    if func.is_view or packet in _UNWRITTEN:
        return 0
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if packet in _GATHERS:
        return sum(2 * _size(t) for t in made) + sum(_size(t) for t in given[1:])
    read = sum(map(_size, given))
    if not func._schema.is_mutable:
        sources = {t.untyped_storage()._cdata for t in given}
        if made and all(t.untyped_storage()._cdata in sources for t in made):
            return 0  # a view by another name
        return read + sum(map(_size, made))
    written = 0
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += sum(_size(t) for t in tree_iter(value) if isinstance(t, Tensor))
    if packet in (_aten.copy_, _aten.zero_, _aten.fill_):
        read -= _size(args[0])
    return read + written


def _size(t: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one count once."""
    if t.layout != torch.strided:
        return 0
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


@functools.lru_cache(maxsize=256)
def pairs(queries: int, keys: int, left: int, right: int) -> int:
    """How many (query, key) pairs a window leaves, the last query aligned to the last key; -1 is no end."""
    shift = keys - queries
    if left < 0 and right < 0:
        return queries * keys
    total = 0
    for i in range(queries):
        at = i + shift
        first = 0 if left < 0 else max(at - left, 0)
        last = keys - 1 if right < 0 else min(at + right, keys - 1)
        total += max(last - first + 1, 0)
    return total


def _attention(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, products: int) -> int:
    """`products` of the two kinds that attention has: with the head size of q and k, and with that of v."""
    seen = q.shape[0] * q.shape[1] * pairs(q.shape[2], k.shape[2], left, right)
    forward = 2 * seen * (q.shape[3] + v.shape[3])
    # Backward makes the scores again, and dq and dk with them; dv and the gradient of the weights with v.
    return forward if products == 2 else 2 * seen * (3 * q.shape[3] + 2 * v.shape[3])


def _attention_fwd(q, k, v, bias, mask, alibi, sinks, prefix, seed, left, right, *rest) -> int:
    return _attention(q, k, v, left, right, 2)


def _attention_bwd(grad, grad_lse, q, k, v, out, lse, bias, mask, alibi, sinks, prefix, seed, left, right, *rest):
    return _attention(q, k, v, left, right, 5)


def _packed(q: Tensor, k: Tensor, v: Tensor, longest: tuple[int, int], left: int, right: int, products: int) -> int:
    """As if the sequences were all as long as the longest: how long they are is data."""
    sequences = q.shape[0] / max(longest[0], 1)
    seen = sequences * q.shape[1] * pairs(*longest, left, right)
    sizes = q.shape[2] + v.shape[2] if products == 2 else 3 * q.shape[2] + 2 * v.shape[2]
    return int(2 * seen * sizes)


def _varlen_fwd(q, k, v, ends_q, ends_k, alibi, sinks, prefix, seed, longest_q, longest_k, left, right, *rest) -> int:
    return _packed(q, k, v, (longest_q, longest_k), left, right, 2)


def _varlen_bwd(
    grad,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    ends_q,
    ends_k,
    alibi,
    sinks,
    prefix,
    seed,
    longest_q,
    longest_k,
    left,
    right,
    *rest,
) -> int:
    return _packed(q, k, v, (longest_q, longest_k), left, right, 5)


def _sdpa_cpu(q, k, v, dropout_p=0.0, is_causal=False, **options) -> int:
    # Its causal mask begins at the first key.
    keys = min(q.shape[2], k.shape[2]) if is_causal else k.shape[2]
    k = k[:, :, :keys]
    return _attention(q, k, v, -1, 0 if is_causal else -1, 2)


def _sdpa_cpu_bwd(grad, q, k, v, out, lse, dropout_p, is_causal, **options) -> int:
    keys = min(q.shape[2], k.shape[2]) if is_causal else k.shape[2]
    return _attention(q, k[:, :, :keys], v, -1, 0 if is_causal else -1, 5)


def _grouped_mm(a, b, *rest, **options) -> int:
    # Of a matrix that is cut into groups each part meets one matrix of the other argument.
    return 2 * a.numel() * b.shape[-1] if a.dim() == 2 or b.dim() == 3 else 2 * a[0].numel() * b.shape[-1]


def _linear_loss_fwd(hidden, weight, *rest) -> int:
    *_, backward, of_hidden, of_weight, report = rest
    # On CPUs the gradient of the hidden states is a product of the same pass.
    products = 1 + (hidden.device.type == "cpu" and backward and of_hidden)
    return 2 * products * hidden.numel() * weight.shape[0]


def _linear_loss_bwd(grad, hidden, weight, *rest) -> int:
    *_, of_hidden, of_weight, of_bias = rest
    product = 2 * hidden.numel() * weight.shape[0]
    if hidden.device.type != "cpu":  # the logits again, and from them both gradients
        return product * (1 + of_hidden + of_weight)
    # The weight's, from the exponentials that forward left in its memory: of as many tokens as there are features.
    tokens, features = hidden.shape
    again = max(0, tokens - features) / max(tokens, 1)
    return int(product * (1 + again)) if of_weight or of_bias else 0


# What a kernel does, where that is not what the registered formula counts: attention leaves out what its window hides,
# and backward computes scores and logits once more.
_OWN: dict[str, Callable[..., int]] = {
    "bigkernels::attention": _attention_fwd,
    "bigkernels::attention_fwd": _attention_fwd,
    "bigkernels::attention_bwd": _attention_bwd,
    "bigkernels::varlen_attention": _varlen_fwd,
    "bigkernels::varlen_attention_fwd": _varlen_fwd,
    "bigkernels::varlen_attention_bwd": _varlen_bwd,
    "bigkernels::linear_cross_entropy_fwd": _linear_loss_fwd,
    "bigkernels::linear_cross_entropy_bwd": _linear_loss_bwd,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_cpu_bwd,
}
