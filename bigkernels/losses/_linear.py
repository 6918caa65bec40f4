"""The losses from hidden states and a head in one call: log probabilities by `linear_logprobs`, without logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.linear_logprobs import linear_logprobs
from ._free import AVERAGED, cpo_loss, orpo_loss, simpo_loss
from ._pairs import dpo_loss
from ._policy import GRPOLoss, grpo_loss
from ._sequences import sequence_logprobs
from ._shared import PreferenceLoss, check_range, kept_of, sums
from ._unpaired import KTOLoss, kto_loss

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_IGNORED = -100


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | QuantizedWeight | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = _IGNORED,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> PreferenceLoss:
    """`dpo_loss` of pairs from hidden states, of the model and of its reference.

    Args:
        hidden: (2P, S, H), the chosen completions first, then the rejected ones; or packed (T, H) with `cu_seqlens`.
        weight: (V, H), the head, or a `QuantizedWeight`.
        labels: (2P, S), or (T,): the token that each position predicts (``labels[:, 1:]`` beside ``hidden[:, :-1]``),
            or `ignore_index` in prompts and padding.
        bias: (V,) or None.
        ref_hidden: of the shape of `hidden`, by the reference; its head may have another H.
        ref_weight, ref_bias: the head of the reference; None takes `weight` and `bias`, as with adapters switched off.
        ref_logps: (2P,), summed log probabilities by the reference, in the place of `ref_hidden`.
        cu_seqlens: (2P + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last.
        ignore_index, logit_scale, softcap: as in `linear_logprobs`, for both heads.
        options: of `dpo_loss`; the numbers of tokens are counted here.

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `dpo_loss`, or there are not two completions a pair, or not one
            of `ref_hidden` and `ref_logps`.
    """
    op = "linear_dpo_loss"
    head = {"ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap}
    logps, tokens = _logps(op, hidden, weight, labels, bias, cu_seqlens, head)
    reference = (ref_hidden, ref_weight, ref_bias, ref_logps)
    ref_logps = _ref_logps(op, logps, weight, labels, bias, cu_seqlens, head, *reference)
    chosen, rejected = tokens.chunk(2)
    return dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), chosen_tokens=chosen, rejected_tokens=rejected,
                    **options)  # fmt: skip


def linear_orpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = _IGNORED,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> PreferenceLoss:
    """`orpo_loss` of pairs from hidden states. Arguments as those of `linear_dpo_loss`, and those of `orpo_loss`."""
    head = {"ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap}
    logps, tokens = _logps("linear_orpo_loss", hidden, weight, labels, bias, cu_seqlens, head)
    return orpo_loss(*(logps / tokens.clamp_min(1)).chunk(2), **options)


def linear_simpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = _IGNORED,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> PreferenceLoss:
    """`simpo_loss` of pairs from hidden states. Arguments as those of `linear_dpo_loss`, and those of `simpo_loss`."""
    head = {"ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap}
    logps, tokens = _logps("linear_simpo_loss", hidden, weight, labels, bias, cu_seqlens, head)
    return simpo_loss(*(logps / tokens.clamp_min(1)).chunk(2), **options)


def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = _IGNORED,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_type: str = "sigmoid",
    **options: Any,
) -> PreferenceLoss:
    """`cpo_loss` of pairs from hidden states. Log probabilities are averaged over tokens for "ipo", "simpo" and
    "alphapo", and summed otherwise; the nll is the mean over all tokens of chosen completions. Both are as in TRL.

    Arguments as those of `linear_dpo_loss`, and those of `cpo_loss` but for `nll`.
    """
    op = "linear_cpo_loss"
    check_range(op, "nll", "given", "nothing: it is computed here", "nll" not in options)
    head = {"ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap}
    logps, tokens = _logps(op, hidden, weight, labels, bias, cu_seqlens, head)
    pairs = logps.shape[0] // 2
    nll = None if loss_type == "alphapo" else -logps[:pairs].sum() / tokens[:pairs].sum().clamp_min(1)
    if loss_type in AVERAGED:
        logps = logps / tokens.clamp_min(1)
    return cpo_loss(*logps.chunk(2), loss_type=loss_type, nll=nll, **options)


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    desirable: Tensor,
    kl_logratios: Tensor | None,
    bias: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | QuantizedWeight | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = _IGNORED,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> KTOLoss:
    """`kto_loss` of completions from hidden states (B, S, H), or packed (T, H) with `cu_seqlens`.

    Arguments as those of `linear_dpo_loss`, without pairs, and those of `kto_loss`.
    """
    op = "linear_kto_loss"
    head = {"ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap}
    logps = sequence_logprobs(linear_logprobs(hidden, weight, labels, bias, **head), cu_seqlens=cu_seqlens)
    reference = (ref_hidden, ref_weight, ref_bias, ref_logps)
    ref_logps = _ref_logps(op, logps, weight, labels, bias, cu_seqlens, head, *reference)
    return kto_loss(logps, ref_logps, desirable, kl_logratios, **options)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | QuantizedWeight | None = None,
    ref_bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> GRPOLoss:
    """`grpo_loss` of completions from hidden states, of the policy and of its reference.

    Args:
        hidden: (B, S, H), or packed (T, H) with `cu_seqlens`.
        weight: (V, H), the head, or a `QuantizedWeight`.
        tokens: (B, S), or (T,): the token that was drawn at each position.
        old_logprobs, advantages, mask, cu_seqlens: as in `grpo_loss`. What `tokens` holds where `mask` is 0 does not
            matter, and costs nothing on CPU.
        bias: (V,) or None.
        ref_hidden: of the shape of `hidden`, by the reference; its head may have another H.
        ref_weight, ref_bias: the head of the reference; None takes `weight` and `bias`, as with adapters switched off.
        ref_logprobs: of the shape of `tokens`, in the place of `ref_hidden`.
        temperature, logit_scale, softcap: as in `linear_logprobs`, for both heads.
        options: of `grpo_loss`.

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `grpo_loss`, or both of `ref_hidden` and `ref_logprobs` are
            given.
    """
    op = "linear_grpo_loss"
    check_range(op, "ref_logprobs", "given", "None beside ref_hidden", ref_hidden is None or ref_logprobs is None)
    _check_ref_head(op, ref_hidden, ref_weight, ref_bias)
    if mask is not None:
        check_range(op, "mask", f"of shape {tuple(mask.shape)}", tuple(tokens.shape), mask.shape == tokens.shape)
        tokens = torch.where(kept_of(mask, tokens), tokens, _IGNORED)
    head = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    logprobs = linear_logprobs(hidden, weight, tokens, bias, **head)
    if ref_hidden is not None:
        ref_logprobs = _of_reference(ref_hidden, weight, bias, ref_weight, ref_bias, tokens, head)
    return grpo_loss(logprobs, old_logprobs, advantages, mask, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
                     **options)  # fmt: skip


def _logps(op, hidden, weight, labels, bias, cu_seqlens, head) -> tuple[Tensor, Tensor]:
    """(log probabilities of completions (2P,), how many tokens they have)"""
    logprobs = linear_logprobs(hidden, weight, labels, bias, **head)
    logps = sequence_logprobs(logprobs, cu_seqlens=cu_seqlens)
    check_range(op, "labels", f"of {logps.shape[0]} completions", "two a pair", logps.shape[0] % 2 == 0)
    return logps, sums((labels != head["ignore_index"]).to(logps.dtype), cu_seqlens)


def _ref_logps(op, logps, weight, labels, bias, cu_seqlens, head, ref_hidden, ref_weight, ref_bias, ref_logps):
    given = [name for name, t in (("ref_hidden", ref_hidden), ("ref_logps", ref_logps)) if t is not None]
    check_range(op, "the reference", " and ".join(given) or None, "one of ref_hidden and ref_logps", len(given) == 1)
    _check_ref_head(op, ref_hidden, ref_weight, ref_bias)
    if ref_hidden is not None:
        ref_logps = _of_reference(ref_hidden, weight, bias, ref_weight, ref_bias, labels, head)
        ref_logps = sequence_logprobs(ref_logps, cu_seqlens=cu_seqlens)
    check_range(op, "ref_logps", f"of shape {tuple(ref_logps.shape)}", tuple(logps.shape),
                ref_logps.shape == logps.shape)  # fmt: skip
    return ref_logps.detach()


def _check_ref_head(op, ref_hidden, ref_weight, ref_bias):
    for name, t in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        check_range(op, name, "given", "None without ref_hidden", t is None or ref_hidden is not None)


@torch.no_grad()
def _of_reference(hidden, weight, bias, ref_weight, ref_bias, labels, head) -> Tensor:
    if ref_weight is not None:
        weight, bias = ref_weight, ref_bias
    elif ref_bias is not None:
        bias = ref_bias
    return linear_logprobs(hidden, weight, labels, bias, **head)
