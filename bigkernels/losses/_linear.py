"""The losses from hidden states and a head in one call: log probabilities by `linear_logprobs`, without logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._deprecated import renamed_arguments
from ..ops.linear_logprobs import linear_logprobs
from ._free import AVERAGED, cpo_loss, orpo_loss, simpo_loss
from ._pairs import dpo_loss
from ._policy import GRPOLoss, grpo_loss
from ._sequences import sequence_logprobs, wpo_weights
from ._shared import PreferenceLoss, check_range, kept_of, sums
from ._unpaired import BCOLoss, KTOLoss, bco_loss, kto_loss

if TYPE_CHECKING:
    from ..quantization import QuantizedWeight

_IGNORED = -100


@dataclass
class _Head:
    """What all heads take beside hidden states, weight and bias."""

    ignore_index: int = _IGNORED
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, hidden, weight, targets, bias, **more: Any):
        return linear_logprobs(hidden, weight, targets, bias, **self.__dict__, **more)


@dataclass
class _Reference:
    """What is known of the model before."""

    ref_hidden: Tensor | None = None
    ref_weight: Tensor | QuantizedWeight | None = None
    ref_bias: Tensor | None = None

    def check(self, op: str) -> None:
        for name, t in (("ref_weight", self.ref_weight), ("ref_bias", self.ref_bias)):
            check_range(op, name, "given", "None without ref_hidden", t is None or self.ref_hidden is not None)

    @torch.no_grad()
    def logprobs(self, head: _Head, weight, targets, bias) -> Tensor:
        if self.ref_weight is not None:
            weight, bias = self.ref_weight, self.ref_bias
        elif self.ref_bias is not None:
            bias = self.ref_bias
        return head(self.ref_hidden, weight, targets, bias)


def _taken(kind: type, options: dict[str, Any]):
    """An instance of what is in the options, which it is taken from."""
    return kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})


class _Completions:
    """Completions, from hidden states; options of the head are taken from those of a loss."""

    def __init__(self, op: str, hidden, weight, labels, bias, options: dict[str, Any], reports: tuple = (), pairs=True):
        check_range(op, "temperature", "given", "nothing", "temperature" not in options)
        self.op, self.weight, self.labels, self.bias = op, weight, labels, bias
        self.cu_seqlens, self.head = options.pop("cu_seqlens", None), _taken(_Head, options)
        self.mask = labels != self.head.ignore_index
        results = self.head(hidden, weight, labels, bias, reports=reports)
        self.reports: list[Tensor]
        self.logprobs, *self.reports = results if reports else (results,)
        self.tokens = sums(self.mask.to(self.logprobs.dtype), self.cu_seqlens)
        count = self.tokens.shape[0]
        check_range(op, "labels", f"of {count} completions", "two a pair", not pairs or count % 2 == 0)

    def sums(self, logprobs: Tensor | None = None, ld_alpha: float | None = None) -> Tensor:
        of = self.logprobs if logprobs is None else logprobs
        return sequence_logprobs(of, self.mask, cu_seqlens=self.cu_seqlens, ld_alpha=ld_alpha)

    def means(self) -> Tensor:
        return self.sums() / self.tokens.clamp_min(1)

    def ref_logprobs(self, options: dict[str, Any], ld_alpha: float | None = None) -> Tensor | None:
        """None where the options say that there is no reference."""
        reference, given = _taken(_Reference, options), options.pop("ref_logprobs", None)
        free = options.pop("reference_free", False)
        all_ways = (("ref_hidden", reference.ref_hidden), ("ref_logprobs", given), ("reference_free", free or None))
        named = [name for name, t in all_ways if t is not None]
        check_range(
            self.op, "the reference", " and ".join(named) or None, "one of ref_hidden and ref_logprobs", len(named) == 1
        )
        reference.check(self.op)
        if free:
            return None
        if given is None:
            given = self.sums(reference.logprobs(self.head, self.weight, self.labels, self.bias), ld_alpha)
        check_range(
            self.op,
            "ref_logprobs",
            f"of shape {tuple(given.shape)}",
            tuple(self.tokens.shape),
            given.shape == self.tokens.shape,
        )
        return given.detach()


@renamed_arguments("bigkernels.losses.linear_dpo_loss", ref_logps="ref_logprobs")
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    **options: Any,
) -> PreferenceLoss:
    """`dpo_loss` of pairs from hidden states, of the model and of its reference.

    Args:
        hidden: (2P, S, H), the chosen completions first, then the rejected ones; or packed (T, H) with `cu_seqlens`.
        weight: (V, H), the head, or a `QuantizedWeight`.
        labels: (2P, S), or (T,): the token that each position predicts (``labels[:, 1:]`` beside ``hidden[:, :-1]``),
            or `ignore_index` in prompts and padding.
        bias: (V,) or None.
        ld_alpha: how much tokens count by which a completion is longer than the other one of its pair, as in
            `sequence_logprobs`, for the model and for the reference.
        use_weighting: multiply each pair's loss by how much like the model's own its completions are: `wpo_weights`.
        options: of the head, of the reference, and of `dpo_loss`, where numbers of tokens are counted here. Of the
            head, for the model and for the reference alike::

                cu_seqlens     (2P + 1,), int32 or int64: the begin of each sequence in (T,), and the end of the last
                ignore_index   -100
                logit_scale    1.0, as in `linear_logprobs`
                softcap        None, as in `linear_logprobs`

            Of the reference, one of the first three::

                ref_hidden     of the shape of `hidden`; its head may have another H
                ref_logprobs      (2P,), summed log probabilities, in the place of `ref_hidden`
                reference_free True: there is none, as in `dpo_loss`
                ref_weight,    the head beside `ref_hidden`; None takes `weight` and `bias`, as with adapters that are
                ref_bias       switched off

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `dpo_loss`, or there are not two completions a pair, or not one
            reference.
    """
    reports = ("log_sum_sq_probs",) if use_weighting else ()
    completions = _Completions("linear_dpo_loss", hidden, weight, labels, bias, options, reports)
    logprobs, reference = completions.sums(ld_alpha=ld_alpha), completions.ref_logprobs(options, ld_alpha)
    if use_weighting:
        check_range(completions.op, "weights", "given", "None, as use_weighting is", "weights" not in options)
        (squares,) = completions.reports
        weights = wpo_weights(completions.logprobs, squares, completions.mask, cu_seqlens=completions.cu_seqlens)
        options["weights"] = torch.mul(*weights.chunk(2))
    references = (None, None) if reference is None else reference.chunk(2)
    chosen, rejected = completions.tokens.chunk(2)
    return dpo_loss(*logprobs.chunk(2), *references, chosen_tokens=chosen, rejected_tokens=rejected, **options)


def linear_orpo_loss(
    hidden: Tensor, weight: Tensor | QuantizedWeight, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> PreferenceLoss:
    """`orpo_loss` of pairs from hidden states. Arguments and options of the head as those of `linear_dpo_loss`, and
    options of `orpo_loss`.
    """
    completions = _Completions("linear_orpo_loss", hidden, weight, labels, bias, options)
    return orpo_loss(*completions.means().chunk(2), **options)


def linear_simpo_loss(
    hidden: Tensor, weight: Tensor | QuantizedWeight, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> PreferenceLoss:
    """`simpo_loss` of pairs from hidden states. Arguments and options of the head as those of `linear_dpo_loss`, and
    options of `simpo_loss`.
    """
    completions = _Completions("linear_simpo_loss", hidden, weight, labels, bias, options)
    return simpo_loss(*completions.means().chunk(2), **options)


def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    **options: Any,
) -> PreferenceLoss:
    """`cpo_loss` of pairs from hidden states. Log probabilities are averaged over tokens for "ipo", "simpo" and
    "alphapo", and summed otherwise; the nll is the mean over all tokens of chosen completions. Both are as in TRL.

    Arguments and options of the head as those of `linear_dpo_loss`, and options of `cpo_loss` but for `nll`.
    """
    op = "linear_cpo_loss"
    check_range(op, "nll", "given", "nothing: it is computed here", "nll" not in options)
    completions = _Completions(op, hidden, weight, labels, bias, options)
    logprobs, pairs = completions.sums(), completions.tokens.shape[0] // 2
    nll = None if loss_type == "alphapo" else -logprobs[:pairs].sum() / completions.tokens[:pairs].sum().clamp_min(1)
    logprobs = completions.means() if loss_type in AVERAGED else logprobs
    return cpo_loss(*logprobs.chunk(2), loss_type=loss_type, nll=nll, **options)


@renamed_arguments("bigkernels.losses.linear_kto_loss", ref_logps="ref_logprobs")
def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    desirable: Tensor,
    kl_logratios: Tensor | None,
    bias: Tensor | None = None,
    **options: Any,
) -> KTOLoss:
    """`kto_loss` of completions from hidden states (B, S, H), or packed (T, H) with `cu_seqlens`.

    Arguments and options of the head and of the reference as those of `linear_dpo_loss`, without pairs, and options of
    `kto_loss`.
    """
    completions = _Completions("linear_kto_loss", hidden, weight, labels, bias, options, pairs=False)
    return kto_loss(completions.sums(), _of_a_reference(completions, options), desirable, kl_logratios, **options)


def linear_bco_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    desirable: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> BCOLoss:
    """`bco_loss` of completions from hidden states (B, S, H), or packed (T, H) with `cu_seqlens`.

    Arguments and options of the head and of the reference as those of `linear_dpo_loss`, without pairs, and options of
    `bco_loss`.
    """
    completions = _Completions("linear_bco_loss", hidden, weight, labels, bias, options, pairs=False)
    return bco_loss(completions.sums(), _of_a_reference(completions, options), desirable, **options)


def _of_a_reference(found: _Completions, options: dict[str, Any]) -> Any:
    check_range(found.op, "reference_free", "given", "nothing", "reference_free" not in options)
    return found.ref_logprobs(options)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> GRPOLoss:
    """`grpo_loss` of completions from hidden states, of the policy and of its reference.

    Args:
        hidden: (B, S, H), or packed (T, H) with `cu_seqlens`.
        weight: (V, H), the head, or a `QuantizedWeight`.
        tokens: (B, S), or (T,): the token that was drawn at each position.
        old_logprobs, advantages, mask: as in `grpo_loss`. What `tokens` holds where `mask` is 0 does not matter, and
            costs nothing on CPU.
        bias: (V,) or None.
        options: of the head, of the reference, and of `grpo_loss`, `cu_seqlens` among them. Of the head, for the model
            and for the reference alike::

                temperature    1.0, as in `linear_logprobs`
                logit_scale    1.0, as in `linear_logprobs`
                softcap        None, as in `linear_logprobs`

            Of the reference, where `beta` is not 0::

                ref_hidden     of the shape of `hidden`; its head may have another H
                ref_logprobs   of the shape of `tokens`, in the place of `ref_hidden`
                ref_weight,    the head beside `ref_hidden`; None takes `weight` and `bias`, as with adapters that are
                ref_bias       switched off

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `grpo_loss`, or both of `ref_hidden` and `ref_logprobs` are
            given.
    """
    op = "linear_grpo_loss"
    check_range(op, "ignore_index", "given", "nothing: mask says which tokens count", "ignore_index" not in options)
    head, reference = _taken(_Head, options), _taken(_Reference, options)
    given = reference.ref_hidden is not None
    check_range(op, "ref_logprobs", "given", "None beside ref_hidden", not given or options.get("ref_logprobs") is None)
    reference.check(op)
    if mask is not None:
        check_range(op, "mask", f"of shape {tuple(mask.shape)}", tuple(tokens.shape), mask.shape == tokens.shape)
        tokens = torch.where(kept_of(mask, tokens), tokens, _IGNORED)
    logprobs = head(hidden, weight, tokens, bias)
    if given:
        options["ref_logprobs"] = reference.logprobs(head, weight, tokens, bias)
    return grpo_loss(logprobs, old_logprobs, advantages, mask, **options)
