"""CPO and ORPO, whose trainers make all logits: their forward, with a fused head."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ... import losses
from ...losses._free import AVERAGED
from ...ops.linear_logprobs import linear_logprobs
from ._head import closure_of, quantized
from ._losses import Check


def cpo(trainer: Any, kind: type) -> dict[str, Callable]:
    _check_decoder(trainer)
    smooths = trainer.loss_type not in ("hinge", "ipo")
    options = {
        "loss_type": trainer.loss_type,
        "beta": trainer.beta,
        "alpha": trainer.alpha,
        "simpo_gamma": getattr(trainer, "simpo_gamma", 0.5),
        "label_smoothing": trainer.label_smoothing if smooths else 0.0,
    }
    check = Check(f"loss_type {trainer.loss_type!r}")

    def loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = losses.cpo_loss(chosen, rejected, cpo_alpha=0.0, **options)  # the trainer adds the likelihood
        check(found.loss, kind.cpo_loss(trainer, chosen.detach(), rejected.detach())[0].mean())
        return found.losses, found.chosen_rewards, found.rejected_rewards

    one = torch.full((2,), -1.0, dtype=torch.float32, device="cpu")
    losses.cpo_loss(one, one, cpo_alpha=0.0, **options)

    def forward(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        found = _Pairs(trainer, model, batch, trainer.pad_token_id, whole=False)
        nll = found.nll() if trainer.cpo_alpha else found.logps.new_zeros(())
        logps = found.means() if trainer.loss_type in AVERAGED else found.logps
        return *logps.chunk(2), *found.mean_logits.chunk(2), nll, *found.more

    return {"concatenated_forward": forward, "cpo_loss": loss}


def orpo(trainer: Any, kind: type) -> dict[str, Callable]:
    _check_decoder(trainer)
    check = Check("its loss")

    def loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        found = losses.orpo_loss(chosen, rejected, beta=trainer.beta, nll=chosen.new_zeros(()))
        theirs, *logged = kind.odds_ratio_loss(trainer, chosen.detach(), rejected.detach())
        check(-found.loss, theirs.mean())
        return -found.losses, *logged

    def forward(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        found = _Pairs(trainer, model, batch, trainer.padding_value, whole=True)
        return *found.means().chunk(2), *found.mean_logits[:, :-1].chunk(2), found.nll(), *found.more

    return {"concatenated_forward": forward, "odds_ratio_loss": loss}


class _Pairs:
    """One forward over the chosen and then the rejected completions.

    Args:
        whole: whether the likelihood of chosen completions is that of their prompts too.

    Attributes:
        logps: (2P,), of completions.
        mean_logits: (2P, S), over the vocabulary, which the trainers log.
        more: the loss of routers, where it is asked for.
    """

    def __init__(self, trainer: Any, model: nn.Module, batch: dict[str, Any], padding: int, whole: bool) -> None:
        inputs = trainer.concatenated_inputs(batch, padding_value=padding, device=trainer.accelerator.device)
        ids, mask, labels = (inputs[f"concatenated_{of}"] for of in ("input_ids", "attention_mask", "labels"))
        self.pairs = batch["chosen_labels"].shape[0]
        asked = labels
        if whole:
            asked = labels.clone()
            asked[: self.pairs] = torch.where(mask == 1, ids, -100)[: self.pairs]
        base = trainer.accelerator.unwrap_model(trainer.model)
        base = base.get_base_model() if hasattr(base, "peft_config") else base
        states: list[Tensor] = []
        hook = base.base_model.register_forward_hook(lambda _, args, out: states.append(out.last_hidden_state.detach()))
        options = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        try:
            found = model(input_ids=ids, attention_mask=mask, labels=asked, fused_lm_head=True, **options)
        finally:
            hook.remove()
        self.asked, self.counted, width = asked[:, 1:] != -100, labels[:, 1:] != -100, ids.shape[1]
        self.of_tokens = found.log_probs[:, 1 - width :]  # prompt tuning puts tokens before
        self.logps = losses.sequence_logprobs(self.of_tokens, self.counted)
        self.mean_logits = _mean_logits(base, states[0][:, -width:])
        self.more = (found.aux_loss,) if trainer.aux_loss_enabled else ()

    def means(self) -> Tensor:
        return self.logps / self.counted.sum(-1).clamp(min=1)

    def nll(self) -> Tensor:
        kept = self.asked[: self.pairs]
        return -torch.where(kept, self.of_tokens[: self.pairs], 0).sum() / kept.sum().clamp(min=1)


@torch.no_grad()
def _mean_logits(base: nn.Module, hidden: Tensor) -> Tensor:
    """(B, S), of hidden states (B, S, H): without a softcap, products with the mean of the weight's rows."""
    known = closure_of(base)
    scale, softcap = known["logit_scale"], known["final_logit_softcapping"]
    head = base.get_output_embeddings()
    weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (head.weight, head.bias))
    if softcap is not None:
        target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        stored = quantized(weight)
        weight = weight.to(hidden.dtype) if stored is None else stored
        return linear_logprobs(
            hidden, weight, target, bias, logit_scale=float(scale), softcap=softcap, reports=("mean_logits",)
        )[1]
    mean = weight.sum(0, dtype=torch.float32) / weight.shape[0]
    found = hidden.float() @ mean
    return scale * (found if bias is None else found + bias.float().mean())


def _check_decoder(trainer: Any) -> None:
    if trainer.is_encoder_decoder:
        raise ValueError("bigkernels.integrations.trl.fuse: the model has an encoder, for which TRL has no fused head")
