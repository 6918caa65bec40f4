"""Losses of preference and reinforcement learning, on log probabilities of tokens and of sequences.

They take log probabilities from anywhere; from `bigkernels.functional.linear_logprobs` they come without the logits::

    import bigkernels.functional as B
    from bigkernels import losses

    # DPO: prompts and completions (2P, S), the chosen ones first; labels are -100 in prompts and padding
    logprobs = losses.sequence_logprobs(B.linear_logprobs(hidden[:, :-1], head.weight, labels[:, 1:]))
    with torch.no_grad():
        before = losses.sequence_logprobs(B.linear_logprobs(ref_hidden[:, :-1], ref_head.weight, labels[:, 1:]))
    result = losses.dpo_loss(*logprobs.chunk(2), *before.chunk(2), beta=0.1)
    result.loss.backward()
    print(result.accuracy, result.margins.mean())

    # GRPO: completions (B, S) with their advantages (B,)
    logprobs = B.linear_logprobs(hidden[:, :-1], head.weight, tokens[:, 1:], temperature=temperature)
    losses.grpo_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, beta=0.04).loss.backward()

Each function has the relatives of its method as `loss_type`, by the names that TRL gives them. `linear_dpo_loss`,
`linear_grpo_loss` and the like are the two steps in one call, from hidden states.

Sequences lie in rows (B, S), or packed one after the other (T,) with `cu_seqlens` (B + 1,), where each begins and the
last ends. Everything is computed in float32, or in float64 where that is given. Metrics carry no gradient.
"""

from ._free import cpo_loss, orpo_loss, simpo_loss
from ._linear import (
    linear_bco_loss,
    linear_cpo_loss,
    linear_dpo_loss,
    linear_grpo_loss,
    linear_kto_loss,
    linear_orpo_loss,
    linear_simpo_loss,
)
from ._pairs import dpo_loss, ipo_loss
from ._policy import GRPOLoss, grpo_loss
from ._sampler import off_policy_mask, sampler_ratios
from ._sequences import sequence_logprobs, wpo_weights
from ._shared import PreferenceLoss
from ._unpaired import BCOLoss, KTOLoss, RewardShift, bco_loss, kto_loss

__all__ = [
    "BCOLoss",
    "GRPOLoss",
    "KTOLoss",
    "PreferenceLoss",
    "RewardShift",
    "bco_loss",
    "cpo_loss",
    "dpo_loss",
    "grpo_loss",
    "ipo_loss",
    "kto_loss",
    "linear_bco_loss",
    "linear_cpo_loss",
    "linear_dpo_loss",
    "linear_grpo_loss",
    "linear_kto_loss",
    "linear_orpo_loss",
    "linear_simpo_loss",
    "off_policy_mask",
    "orpo_loss",
    "sampler_ratios",
    "sequence_logprobs",
    "simpo_loss",
    "wpo_weights",
]
