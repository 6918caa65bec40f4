"""What is done to a trainer, by what it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from torch import Tensor
from trl.trainer import utils

from ...losses import RewardShift
from . import _free, _losses
from ._head import has_head, use_head


class Fused(NamedTuple):
    """What `fuse` has done.

    Attributes:
        heads: how many models compute log probabilities by this package: the one that is trained, and its reference.
        loss: the function of `bigkernels.losses` that the trainer's loss comes from; None where it is TRL's.
    """

    heads: int
    loss: str | None


class _Family(NamedTuple):
    """Trainers of one method: the members of TRL's class that are replaced, and by what."""

    loss: str
    members: tuple[str, ...]
    make: Callable[..., dict[str, Callable]]
    options: tuple[str, ...] = ()
    head: bool = True  # whether TRL has given the model a fused head


_FAMILIES = {
    "DPOTrainer": _Family("dpo_loss", ("_compute_loss",), _losses.dpo, ("label_smoothing", "bco_shift")),
    "KTOTrainer": _Family("kto_loss", ("_compute_loss", "_compute_kl_logps"), _losses.kto),
    "GRPOTrainer": _Family("grpo_loss", ("_compute_loss", "_get_per_token_logps_and_entropies"), _losses.grpo),
    "CPOTrainer": _Family(
        "cpo_loss", ("get_batch_loss_metrics", "concatenated_forward", "cpo_loss"), _free.cpo, head=False
    ),
    "ORPOTrainer": _Family(
        "orpo_loss", ("get_batch_loss_metrics", "concatenated_forward", "odds_ratio_loss"), _free.orpo, head=False
    ),
}


def fuse(
    trainer: transformers.Trainer,
    *,
    loss: bool = True,
    label_smoothing: float | None = None,
    bco_shift: float | Tensor | RewardShift | None = None,
) -> Fused:
    """Let a trainer of TRL compute without logits over the vocabulary, and by `bigkernels.losses`::

        trainer = trl.DPOTrainer(model, args=args, train_dataset=data, callbacks=[TrainerCallback()])
        bigkernels.integrations.trl.fuse(trainer)
        trainer.train()

    The DPO, KTO, GRPO, CPO and ORPO trainers get a loss of `bigkernels.losses`, with the same value and the same logs
    as before. What the arguments of the trainer say holds; the reference may be a model, adapters that are switched off
    or log probabilities computed before. Others, such as the SFT and RLOO trainers, keep their loss. Models get this
    package's head (`use_head`), the reference too; those of CPO and ORPO, for which TRL makes all logits, get TRL's
    fused forward first.

    When a trainer computes its first loss, TRL's own is compared, so that a version of TRL that means something else by
    its arguments is refused.

    Args:
        trainer: as it was made, before `train`.
        loss: False leaves the loss to TRL, for what `bigkernels.losses` does not have.
        label_smoothing: for DPO: the part of the labels that is taken to be wrong, also for losses where TRL reads over
            its own argument, such as "sigmoid" (conservative DPO). None is what the trainer's arguments say.
        bco_shift: for DPO with "bco_pair": the shift of its paper, which TRL's trainer leaves out. A
            `bigkernels.losses.RewardShift` follows the rewards of all processes.

    Raises:
        TypeError: it is not a trainer of TRL.
        ValueError: the trainer has a loss of its own, an argument is not covered, or an adapter is on the output layer,
            which TRL's head would ignore.
    """
    if not isinstance(trainer, transformers.Trainer) or not _of_trl(trainer):
        raise TypeError(f"bigkernels.integrations.trl.fuse: expected a trainer of TRL, got {type(trainer).__name__}")
    options = {"label_smoothing": label_smoothing, "bco_shift": bco_shift}
    options = {name: value for name, value in options.items() if value is not None}
    family, kind = _family(trainer)
    known = family.options if family is not None and loss else ()
    for name in options:
        if name not in known:
            raise ValueError(
                f"bigkernels.integrations.trl.fuse: {name} is given, which means nothing for "
                f"{type(trainer).__name__}{'' if loss else ' with its own loss'}"
            )
    made = {}
    if family is not None and loss:
        for name in family.members:
            if getattr(type(trainer), name, None) is not getattr(kind, name):
                raise ValueError(
                    f"bigkernels.integrations.trl.fuse: {type(trainer).__name__} has its own {name}; give "
                    "loss=False to keep its loss, with this package's head"
                )
        made = {name: _held(trainer, value) for name, value in family.make(trainer, kind, **options).items()}
    model = trainer.accelerator.unwrap_model(trainer.model)
    if family is not None and not family.head and loss and not has_head(model):
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        utils.add_fused_lm_head(base, outputs=("log_probs",))
    heads = use_head(model) + (getattr(trainer, "ref_model", None) is not None and use_head(trainer.ref_model))
    trainer.__dict__.update(made)
    return Fused(heads, family.loss if made and family is not None else None)


# What losses are made of: their options were read when they were made.
_SETTINGS = (
    "beta", "loss_type", "loss_types", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting",
    "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "reference_free", "desirable_weight",
    "undesirable_weight", "cpo_alpha", "simpo_gamma", "alpha", "epsilon_low", "epsilon_high", "delta",
    "importance_sampling_level", "max_completion_length", "mask_truncated_completions", "top_entropy_quantile",
)  # fmt: skip


def _settings(trainer: Any) -> dict[str, Any]:
    of_args = {name: getattr(trainer.args, name, None) for name in _SETTINGS}
    return {name: (getattr(trainer, name, None), value) for name, value in of_args.items()}


def _held(trainer: Any, value: Any) -> Any:
    """A function of a trainer that raises where what it was made of has changed."""
    if not callable(value):
        return value
    before = copy.deepcopy(_settings(trainer))

    @functools.wraps(value)
    def held(*args: Any, **kwargs: Any) -> Any:
        now = _settings(trainer)
        changed = [name for name, setting in now.items() if setting != before[name]]
        if changed:
            raise RuntimeError(
                f"bigkernels.integrations.trl.fuse: {', '.join(changed)} of the trainer changed after fuse: "
                "call fuse again"
            )
        return value(*args, **kwargs)

    return held


def _of_trl(trainer: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)


def _family(trainer: Any) -> tuple[_Family | None, type | None]:
    """(the family, TRL's class of it)"""
    for kind in type(trainer).__mro__:
        if kind.__module__.partition(".")[0] == "trl" and kind.__name__ in _FAMILIES:
            return _FAMILIES[kind.__name__], kind
    return None, None
