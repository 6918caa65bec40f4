"""Losses of trainers with a fused head: of what TRL's own computation has seen, which also makes the logs.

TRL's function runs as it is, and so keeps its metrics; its loss, of a few numbers a sequence or token, is left aside.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import losses
from ...losses._pairs import LOSSES

# Where TRL's DPO trainer reads `label_smoothing`.
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


class _Seen:
    """What models with a fused head return meanwhile, in order."""

    def __init__(self, *modules: nn.Module | None) -> None:
        self.modules = {id(module): module for module in modules if module is not None}.values()
        self.outputs: list[Any] = []
        self.depth = 0

    def __enter__(self) -> list[Any]:
        self.hooks = [module.register_forward_pre_hook(self._begin) for module in self.modules]
        self.hooks += [module.register_forward_hook(self._end) for module in self.modules]
        return self.outputs

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self.depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # A wrapper's own output is the one that may be differentiated.
        self.depth -= 1
        if self.depth == 0 and getattr(output, "log_probs", None) is not None:
            self.outputs.append(output)


class Check:
    """Compares the first losses with TRL's."""

    def __init__(self, what: str, wanted: bool = True) -> None:
        self.what, self.left = what, 2 if wanted else 0

    def __call__(self, ours: Tensor, theirs: Tensor) -> None:
        if not self.left:
            return
        self.left -= 1
        a, b = float(ours.detach()), float(theirs.detach())
        # Of very large ones TRL has lost the digits, or what an exponential has overflowed.
        if math.isfinite(b) and abs(b) < 1e6 and abs(a - b) > 2e-3 * max(1.0, abs(b)):
            raise RuntimeError(
                f"bigkernels.integrations.trl.fuse: the loss is {a:.6g}, and TRL's own {b:.6g}: this "
                f"version of TRL computes {self.what} in another way. Give loss=False to keep "
                "TRL's"
            )


# ---- DPO -------------------------------------------------------------------------------------------------------------


def dpo(
    trainer: Any,
    kind: type,
    *,
    label_smoothing: float | None = None,
    bco_shift: float | Tensor | losses.RewardShift = 0.0,
) -> dict[str, Callable]:
    names, factors = tuple(trainer.loss_types), tuple(trainer.loss_weights)
    smoothing = trainer.label_smoothing if label_smoothing is None else label_smoothing
    smoothed = _SMOOTHED if label_smoothing is None else tuple(name for name, row in LOSSES.items() if row.smooths)
    if smoothing and not set(names) & set(smoothed):
        raise ValueError(
            f"bigkernels.integrations.trl.fuse: label_smoothing is {smoothing}, which TRL ignores where "
            f"loss_type is {list(names)}; give it to fuse where it is meant"
        )
    if not (isinstance(bco_shift, (int, float)) and bco_shift == 0) and "bco_pair" not in names:
        raise ValueError("bigkernels.integrations.trl.fuse: bco_shift is given, and no loss_type is 'bco_pair'")
    alike = label_smoothing is None and isinstance(bco_shift, (int, float)) and bco_shift == 0
    options = {
        "beta": trainer.beta,
        "discopop_tau": trainer.args.discopop_tau,
        "f_divergence_type": trainer.f_divergence_type,
        "f_alpha_divergence_coef": trainer.f_alpha_divergence_coef,
    }

    def loss_of(logps, reference, tokens, weights) -> Tensor:
        total, shift = None, bco_shift
        if isinstance(shift, losses.RewardShift):
            rewards = [trainer.beta * (a - b).detach() for a, b in zip(logps, reference, strict=True)]
            rewards = [trainer.accelerator.gather(r) for r in rewards]
            shift = shift.update(*rewards) if trainer.model.training else shift.value
        for name, factor in zip(names, factors, strict=True):
            more = {"label_smoothing": smoothing} if name in smoothed else {}
            more |= {"bco_shift": shift} if name == "bco_pair" else {}
            found = losses.dpo_loss(
                *logps,
                *reference,
                loss_type=name,
                weights=weights,
                chosen_tokens=tokens[0],
                rejected_tokens=tokens[1],
                **options,
                **more,
            ).loss
            total = factor * found if total is None else total + factor * found
        return total

    one = torch.ones(2, dtype=torch.float32, device="cpu")
    if not isinstance(bco_shift, losses.RewardShift):
        loss_of((-one, -one), (-one, -one), (one, one), None)  # says what does not fit
    check = Check(f"loss_type {list(names)}", alike)

    def compute(model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        reference_of = trainer.model if trainer.ref_model is None else trainer.ref_model
        with _Seen(model, None if trainer.precompute_ref_logps else reference_of) as seen:
            theirs = kind._compute_loss(trainer, model, inputs, return_outputs)
        mask = inputs["completion_mask"]
        shifted = mask[..., 1:]

        def sums(output: Any) -> Tensor:
            of_tokens = output.log_probs[:, -shifted.shape[1] :]
            return losses.sequence_logprobs(of_tokens, shifted, ld_alpha=trainer.ld_alpha)

        logps = sums(seen[0]).chunk(2)
        if trainer.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = sums(seen[1]).detach().chunk(2)
        weights = None
        if trainer.use_weighting:
            of_tokens = (getattr(seen[0], name)[:, -shifted.shape[1] :] for name in ("log_probs", "log_sum_sq_probs"))
            weights = torch.mul(*losses.wpo_weights(*of_tokens, shifted).chunk(2))
        counted = shifted if "sft" in names else mask
        loss = loss_of(logps, reference, counted.sum(1).chunk(2), weights)
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * seen[0].aux_loss
        check(loss, theirs[0] if return_outputs else theirs)
        return (loss, theirs[1]) if return_outputs else loss

    return {"_compute_loss": compute}


# ---- KTO -------------------------------------------------------------------------------------------------------------


def kto(trainer: Any, kind: type) -> dict[str, Callable]:
    options = {
        "loss_type": trainer.loss_type,
        "beta": trainer.beta,
        "desirable_weight": trainer.desirable_weight,
        "undesirable_weight": trainer.undesirable_weight,
    }
    one = torch.ones(2, dtype=torch.float32, device="cpu")
    losses.kto_loss(one, one, one, None, **options)
    check = Check(f"loss_type {trainer.loss_type!r}")

    def compute(model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        reference_of = trainer.model if trainer.ref_model is None else trainer.ref_model
        with _Seen(model, None if trainer.precompute_ref_logps else reference_of) as seen:
            theirs = kind._compute_loss(trainer, model, inputs, return_outputs)
        masks = [inputs["completion_mask"][:, 1:]]
        if trainer.calculate_KL:
            masks.insert(0, inputs["KL_completion_mask"][:, 1:])
        sums = [
            losses.sequence_logprobs(output.log_probs[:, -mask.shape[1] :], mask)
            for output, mask in zip(seen, masks * 2, strict=False)
        ]
        ours, reference = sums[: len(masks)], sums[len(masks) : 2 * len(masks)]
        if trainer.precompute_ref_logps:
            reference = [inputs["ref_KL_logps"], inputs["ref_logps"]][-len(masks) :]
        ratios = None
        if trainer.calculate_KL:
            ratios = trainer.accelerator.gather_for_metrics((ours[0] - reference[0]).mean().detach()).view(-1)
        desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=ours[-1].device)
        loss = losses.kto_loss(ours[-1], reference[-1].detach(), desirable, ratios, **options).loss
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * seen[len(masks) - 1].aux_loss
        check(loss, theirs[0] if return_outputs else theirs)
        return (loss, theirs[1]) if return_outputs else loss

    return {"_compute_loss": compute}


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def grpo(trainer: Any, kind: type) -> dict[str, Callable]:
    args, name = trainer.args, trainer.loss_type
    options = {
        "loss_type": name,
        "importance": trainer.importance_sampling_level,
        "beta": trainer.beta,
        "sapo_temperature_pos": args.sapo_temperature_pos,
        "sapo_temperature_neg": args.sapo_temperature_neg,
        "vespo_k_pos": args.vespo_k_pos,
        "vespo_lambda_pos": args.vespo_lambda_pos,
        "vespo_k_neg": args.vespo_k_neg,
        "vespo_lambda_neg": args.vespo_lambda_neg,
        "bias_correction_kl": bool(args.use_bias_correction_kl and trainer.beta),
    }
    if name == "cispo":
        options["cispo_max"] = trainer.epsilon_high
    elif name not in ("sapo", "vespo"):
        options |= {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "delta": args.delta}
    if name == "dr_grpo":
        options["max_length"] = trainer.max_completion_length
    of_step = name in ("cispo", "dapo", "vespo")
    one = torch.ones(1, 2, dtype=torch.float32, device="cpu")
    losses.grpo_loss(one, one, one[:, 0], ref_logprobs=one if trainer.beta else None, **options)
    check = Check(f"loss_type {name!r}")

    def compute(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        train = trainer.model.training
        factor = _entropy_factor(trainer)
        of_tokens: list[Any] = []

        def recorded(*a: Any, **k: Any) -> Any:
            of_tokens.append(kind._get_per_token_logps_and_entropies(trainer, *a, **k))
            return of_tokens[-1]

        trainer._get_per_token_logps_and_entropies = recorded
        try:
            theirs = kind._compute_loss(trainer, model, inputs)
        finally:
            del trainer._get_per_token_logps_and_entropies
        logprobs, entropies, aux_loss = of_tokens[0]
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        old = inputs.get("old_per_token_logps")
        # What is not to be learned from has an advantage of 0.
        advantages, uncertain = inputs["advantages"], None
        advantages = advantages if advantages.dim() == 2 else advantages[:, None]
        if trainer.off_policy_mask_threshold is not None:
            sampler = inputs.get("sampling_per_token_logps", logprobs.detach() if old is None else old)
            advantages = advantages * kind.get_off_policy_mask(
                advantages, logprobs, sampler, mask, trainer.off_policy_mask_threshold
            )
        if trainer.top_entropy_quantile < 1.0:
            uncertain = trainer.get_high_entropy_mask(entropies, mask, 1 - trainer.top_entropy_quantile)
            advantages = advantages * uncertain
        steps = trainer.current_gradient_accumulation_steps if train else 1.0
        more = {}
        if of_step:
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
            more["num_tokens"] = tokens * steps / args.steps_per_generation if train else tokens
        ratio = inputs.get("importance_sampling_ratio")
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        if ratio is not None and (corrects or name == "vespo"):
            more["sampler_ratio"] = ratio[:, 0] if ratio.shape[1] == 1 else ratio
        loss = losses.grpo_loss(
            logprobs,
            old,
            advantages.expand_as(logprobs),
            mask,
            ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta else None,
            **options,
            **more,
        ).loss
        loss = loss if of_step else loss / steps
        if factor is not None:
            counted = mask if uncertain is None else mask * uncertain
            loss = loss - factor * (entropies * counted).sum() / counted.sum().clamp(min=1.0) / steps
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * aux_loss / steps
        check(loss, theirs)
        return loss

    return {"_compute_loss": compute}


def _entropy_factor(trainer: Any) -> float | None:
    """Of the entropy in this step's loss, which TRL changes while it computes; None without one."""
    if not trainer._entropy_bonus_enabled:
        return None
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef
