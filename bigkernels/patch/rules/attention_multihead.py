"""`torch.nn.MultiheadAttention`, where its attention weights are not asked for.

`nn.TransformerEncoderLayer` calls it in training; in evaluation without gradients that layer has a fused path of its
own, which does not look at its attention module and stays as it is.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._device import once_a_device, probe_device
from .._rule import Fit, ModuleRule, Plan, Skip, Write
from .._verify import Probes, compare, doubled, gradients, outputs_only, plain
from .attention import attend, log_fallback, unserved

_ORIGINAL = nn.MultiheadAttention.forward


def forward(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Takes the place of the class's forward, with its arguments and results."""
    reason = "attention weights are asked for" if need_weights else None
    reason = reason or _refusal(module, query, key, value, key_padding_mask, attn_mask, is_causal)
    if reason is not None:
        log_fallback("MultiheadAttention", reason)
        own = type(module).forward
        return own(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    return _compute(module, query, key, value, key_padding_mask, attn_mask, is_causal), None


forward.__signature__ = inspect.signature(_ORIGINAL)


def _refusal(
    module: nn.MultiheadAttention, q: Any, k: Any, v: Any, padding: Any, mask: Any, causal: bool
) -> str | None:
    """Why the class's own forward runs for a call, or has to say what is wrong with it."""
    if type(module).forward is not _ORIGINAL:
        return "the class's forward was replaced"
    masks = [m for m in (padding, mask) if m is not None]
    weights = [p for p in (*module._parameters.values(), *module.out_proj._parameters.values()) if p is not None]
    if not plain(q, k, v, *masks, *weights):
        return "the tensors are of a kind of their own"
    dims = q.dim()
    if dims not in (2, 3) or not dims == k.dim() == v.dim() or k.shape[:-1] != v.shape[:-1]:
        return "the shapes of query, key and value differ"
    sizes = (module.embed_dim, module.kdim, module.vdim)
    if tuple(t.shape[-1] for t in (q, k, v)) != sizes or not q.dtype == k.dtype == v.dtype == weights[0].dtype:
        return "the sizes or dtypes of query, key and value are not the module's"
    first = module.batch_first or dims == 2
    batch, queries, keys = _lengths(q, k, first)
    if dims == 3 and k.shape[0 if first else 1] != batch:
        return "the batches of query and key differ"
    if any(m.dtype not in (torch.bool, q.dtype) or m.device != q.device for m in masks):
        return "a mask has another dtype"
    if len(masks) == 2 and padding.dtype != mask.dtype:
        return "the masks have two dtypes"
    if padding is not None and tuple(padding.shape) != ((keys,) if dims == 2 else (batch, keys)):
        return "the padding mask has another shape"
    if mask is not None and tuple(mask.shape) not in ((queries, keys), (batch * module.num_heads, queries, keys)):
        return "the mask has another shape"
    if causal and mask is None:
        return "a causal mask is announced and not given"
    return unserved(module.dropout if module.training else 0.0, q, k, v, *masks)


def _lengths(q: Tensor, k: Tensor, batch_first: bool) -> tuple[int, int, int]:
    """(batch, queries, keys)."""
    if q.dim() == 2:
        return 1, q.shape[0], k.shape[0]
    return (q.shape[0], q.shape[1], k.shape[1]) if batch_first else (q.shape[1], q.shape[0], k.shape[0])


def _compute(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    batched = query.dim() == 3
    heads = []
    for t in _project(module, query, key, value):
        if not batched:
            t = t.unsqueeze(0)
        elif not module.batch_first:
            t = t.transpose(0, 1)
        heads.append(t.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2))
    q, k, v = heads
    if causal and padding is None:
        mask = None  # as the class does: the mask is taken to be what was announced
    else:
        causal = False
    bias = None
    if mask is not None:
        if mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], module.num_heads))
        mask = _seen(mask)
    if padding is not None:
        padding = padding.reshape(q.shape[0], 1, 1, k.shape[2])
        if mask is None:
            mask = _seen(padding)
        elif padding.dtype == torch.bool:
            # Added, because both masks in one would be as large as the scores.
            bias = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, float("-inf"))
        else:
            bias = padding
    out = attend(q, k, v, mask, module.dropout if module.training else 0.0, causal, bias=bias)
    out = F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if not batched:
        return out.squeeze(0)
    return out if module.batch_first else out.transpose(0, 1)


def _seen(mask: Tensor) -> Tensor:
    """True in the class's boolean masks hides a key."""
    return ~mask if mask.dtype == torch.bool else mask


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    weight, bias, size = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    elif key is value:
        one, two = (None, None) if bias is None else bias.split((size, 2 * size))
        of_query, of_both = weight.split((size, 2 * size))
        return F.linear(query, of_query, one), *F.linear(key, of_both, two).chunk(2, -1)
    else:
        weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))


def _plan(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not _ORIGINAL:
        return None
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise Skip("it adds keys of its own (add_bias_kv or add_zero_attn)")
    if any(p.is_meta for p in module.parameters()):
        raise Skip("its parameters are not materialised yet")
    return Write(module, "forward", functools.partial(forward, module)), Fit("attention", _error(plan.verify))


class _Ours(nn.MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None, is_causal=False):
        return _compute(self, query, key, value, key_padding_mask, attn_mask, is_causal), None


@once_a_device
def _error(verify: bool) -> float:
    """Small modules of every layout, with every kind of mask."""
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16) if verify else (torch.float32,):
        for layout in ({"batch_first": True}, {"bias": False}, {"kdim": 24, "vdim": 8}):
            for queries, keys, masks in _calls():
                worst = max(worst, _compare(layout, dtype, queries, keys, masks, gradients if verify else outputs_only))
    return worst


_SIZE, _HEADS, _BATCH, _QUERIES, _KEYS = 64, 2, 3, 19, 33


def _calls() -> list[tuple[int, int, dict[str, Any]]]:
    """(queries, keys, masks)."""
    hidden = torch.ones(_QUERIES, _KEYS, dtype=torch.bool, device=probe_device()).triu(3)
    causal = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=probe_device()).triu(1)
    padding = torch.zeros(_BATCH, _KEYS, dtype=torch.bool, device=probe_device())
    padding[1, 4:] = True
    bias = Probes(seed=1)(_BATCH * _HEADS, _QUERIES, _KEYS).detach()
    return [
        (_QUERIES, _KEYS, {}),
        (_QUERIES, _QUERIES, {"attn_mask": causal, "is_causal": True}),
        (_QUERIES, _KEYS, {"attn_mask": hidden, "key_padding_mask": padding}),
        (_QUERIES, _KEYS, {"key_padding_mask": padding}),
        (_QUERIES, _KEYS, {"attn_mask": bias}),
        (_QUERIES, _KEYS, {"attn_mask": bias, "key_padding_mask": bias[:_BATCH, 0]}),
    ]


def _compare(
    layout: dict[str, Any], dtype: torch.dtype, queries: int, keys: int, masks: dict[str, Any], observe: Any
) -> float:
    ours, theirs = (cls(_SIZE, _HEADS, **layout, device=probe_device()) for cls in (_Ours, nn.MultiheadAttention))
    probe = Probes(dtype=dtype)
    shapes = [(_BATCH, queries, _SIZE), (_BATCH, keys, ours.kdim), (_BATCH, keys, ours.vdim)]
    if not ours.batch_first:
        shapes = [(length, batch, size) for batch, length, size in shapes]
    parameters = dict(ours.named_parameters())
    leaves = [probe(*shape) for shape in shapes] + [probe(*p.shape, scale=0.3) for p in parameters.values()]

    def run(module, q, k, v, *values):
        given = {n: m.to(q.dtype) if isinstance(m, Tensor) and m.is_floating_point() else m for n, m in masks.items()}
        given["need_weights"] = False
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (q, k, v), given)[0]

    results = [
        observe(functools.partial(run, module), t)
        for module, t in ((ours, leaves), (theirs, leaves), (ours, doubled(leaves)))
    ]
    return compare(*results, "MultiheadAttention")


RULE = ModuleRule("attention", _plan)
