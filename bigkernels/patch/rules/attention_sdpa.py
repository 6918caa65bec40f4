"""Calls of `torch.nn.functional.scaled_dot_product_attention` in a module's forward."""

# mypy: ignore-errors

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch_private import scaled_dot_product_attention
from .._device import once_a_device, probe_device
from .._rule import Fit, Plan, Site, SourceRule
from .._source import Source, call
from .._verify import Probes, compare, doubled, gradients, outputs_only
from .attention import attend, log_fallback, refusal
from .attention_mask import dense

_ORIGINAL = scaled_dot_product_attention


def scaled_dot_product_attention(
    function: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Tensor:
    """As `function`, which is `torch.nn.functional.scaled_dot_product_attention` or what took its place since."""
    if function is _ORIGINAL:
        reason = "a causal mask beside another" if is_causal and attn_mask is not None else None
        q, k, v, mask = (query, key, value, attn_mask) if reason else _four(query, key, value, attn_mask)
        reason = reason or refusal(q, k, v, mask, dropout_p)
        if reason is None and not enable_gqa and k.shape[1] not in (1, q.shape[1]):
            reason = "the heads of query and key differ"
        if reason is None:
            out = attend(q, k, v, mask, dropout_p, is_causal, scale)
            return out.reshape(*query.shape[:-1], value.shape[-1])
        log_fallback("scaled_dot_product_attention", reason)
    return function(query, key, value, dense(attn_mask), dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _four(q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    """(batch, heads, length, size) of tensors with fewer or more dimensions; what does not fit stays as it is."""
    if not all(isinstance(t, Tensor) for t in (q, k, v)) or not q.dim() == k.dim() == v.dim() != 4:
        return q, k, v, mask
    if q.dim() == 3:
        mask = mask.unsqueeze(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask
    if q.dim() > 4 and q.shape[:-3] == k.shape[:-3] == v.shape[:-3] and (mask is None or mask.dim() == 2):
        return q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), mask
    return q, k, v, mask


def _sites(source: Source) -> Iterator[Site]:
    for node in source.body():
        if isinstance(node, ast.Call) and source.constant(node.func) is _ORIGINAL:
            new = call("_bigkernels_sdpa", node.func, *node.args)
            new.keywords = node.keywords
            yield Site(_check, {node: new}, {"_bigkernels_sdpa": scaled_dot_product_attention})


def _check(module: nn.Module, plan: Plan) -> Fit | None:
    return Fit("attention", _error(plan.verify))


_FEW, _MANY = 19, 33


@once_a_device
def _error(verify: bool) -> float:
    """The kernels against torch's function with every option."""
    seen = torch.ones(_FEW, _MANY, dtype=torch.bool, device=probe_device()).tril(2)
    seen[3] = False
    added = torch.zeros(2, 1, _FEW, _MANY, dtype=torch.float32, device=probe_device())
    calls: list[tuple[int, int, int, dict[str, Any]]] = [
        (_FEW, _MANY, 4, {}),
        (_FEW, _MANY, 4, {"is_causal": True}),
        (_MANY, _FEW, 4, {"is_causal": True, "scale": 0.3}),
        (_FEW, _MANY, 2, {"enable_gqa": True, "attn_mask": seen}),
        (_FEW, _MANY, 4, {"attn_mask": added.masked_fill(~seen, float("-inf"))}),
        (_FEW, _MANY, 4, {"attn_mask": Probes(seed=1)(4, _FEW, _MANY).detach()}),
    ]
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16) if verify else (torch.float32,):
        for queries, keys, groups, options in calls:
            probe = Probes(dtype=dtype)
            leaves = [probe(2, 4, queries, 32), probe(2, groups, keys, 32), probe(2, groups, keys, 32)]
            mask = options.get("attn_mask")
            if mask is not None and mask.is_floating_point():
                mask = mask.to(dtype)

            def ours(q, k, v, mask=mask, options=options):
                wide = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
                return attend(q, k, v, wide, 0.0, options.get("is_causal", False), options.get("scale"))

            def theirs(q, k, v, mask=mask, options=options):
                return _ORIGINAL(q, k, v, **(options if mask is None else options | {"attn_mask": mask}))

            observe = gradients if verify else outputs_only
            results = [observe(f, t) for f, t in ((ours, leaves), (theirs, leaves), (ours, doubled(leaves)))]
            worst = max(worst, compare(*results, "scaled_dot_product_attention"))
    return worst


RULE = SourceRule("attention", "sdpa", _sites)
