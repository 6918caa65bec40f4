"""One object for `Trainer`, and for the trainers of TRL: kernels, optimizer, throughput and memory."""

# mypy: ignore-errors

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from ... import patch as patch_model
from ...program.suspend import RECORD
from ._optimizers import NAMES, can_be_taught, is_ours

_SPEED, _MEMORY = "tokens_per_second", "peak_memory_gib"
_WHAT = "bigkernels.integrations.transformers.TrainerCallback"


class TrainerCallback(transformers.TrainerCallback):
    """``Trainer(..., callbacks=[TrainerCallback(optim="bigkernels_adamw_8bit")])``: the model is patched, the optimizer
    is one of `bigkernels.optim`, and the logs say how many tokens a second there are and how much memory is taken.

    The model is patched when the trainer is made (or, where the trainer makes it, when training begins), before it is
    wrapped for several processes or compiled; one that is patched already stays as it is. It stays patched after
    training: `bigkernels.unpatch(model)` takes the kernels off again. In TRL's trainers the fused head becomes this
    package's (`bigkernels.integrations.trl.use_head`).

    Logs of training get "tokens_per_second", of all processes, in the time of the steps since the last log and not of
    evaluation and saving in between; and "peak_memory_gib", the most that this process has held: of the GPU, or
    resident where there is none. They go wherever the trainer's logs go.

    Args:
        patch: False leaves the model as it is; a mapping has options of `bigkernels.patch`.
        optim: a name of ``TrainingArguments(optim=...)``, "bigkernels_adamw_8bit" and the like (see
            `optimizer_cls_and_kwargs`); None leaves what the arguments say.
        optim_args: of that optimizer, as {"rounding": "kahan"} or as a text, "rounding=kahan".
        report: whether logs say more than the trainer's. For its sake the trainer counts tokens ("all" of
            `include_num_input_tokens_seen`, padding included) unless its arguments say how, or it is one of TRL's,
            which count.
        head: whether TRL's fused head is replaced.

    Attributes:
        report: of `bigkernels.patch`; None where nothing was patched.

    Raises:
        ValueError: there is no such optimizer, or, when training begins, the trainer was given another one by
            `optimizers` or `optimizer_cls_and_kwargs`.
    """

    def __init__(
        self,
        patch: bool | Mapping[str, Any] = True,
        *,
        optim: str | None = None,
        optim_args: str | Mapping[str, Any] | None = None,
        report: bool = True,
        head: bool = True,
    ) -> None:
        if optim is not None and optim not in NAMES:
            raise ValueError(f"{_WHAT}: optim is {optim!r}; accepted are {', '.join(NAMES)}")
        if optim is not None and not can_be_taught():
            raise ImportError(
                f"{_WHAT}: this version of transformers takes no names of others; give "
                "the trainer optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(name, args)"
            )
        if optim is None and optim_args is not None:
            raise ValueError(f"{_WHAT}: optim_args are given and optim is not")
        self.options = None if patch is False else {} if patch is True else dict(patch)
        self.optim, self.optim_args, self.reports, self.head = optim, optim_args, report, head
        self.report: Any = None
        self._clock = _Clock()
        if report:
            _teach_log()

    # ---- what happens when ---------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.optim is not None:
            args.optim = transformers.training_args.OptimizerNames(self.optim)
            if isinstance(self.optim_args, Mapping):
                args.optim_args = ",".join(f"{key}={value}" for key, value in self.optim_args.items())
            else:
                args.optim_args = self.optim_args
        if self.reports and not _counts(args) and args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "all"
        if model is not None:
            self._patch(model)

    def on_train_begin(
        self, args, state, control, model: nn.Module | None = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.optim is not None and not is_ours(optimizer):
            kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ValueError(
                f"{_WHAT}: optim is {self.optim!r}, and the trainer has a {kind}: it "
                "has optimizers, optimizer_cls_and_kwargs or a create_optimizer of its own"
            )
        if model is not None:
            self._patch(model)
            if self.head and "trl" in sys.modules:
                from ..trl import use_head

                use_head(model)
        self._clock.begin(state)

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        self._clock.step_begins()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._clock.step_ends()

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        self._clock.interrupted()

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        self._clock.interrupted()

    def on_epoch_begin(self, args, state, control, **kwargs: Any) -> None:
        self._clock.interrupted()

    def _patch(self, model: nn.Module) -> None:
        if self.options is None or any(RECORD in module.__dict__ for module in model.modules()):
            return
        if any(isinstance(p, DTensor) for p in model.parameters()):
            what = f"{_WHAT}: the model is sharded already and stays unpatched; patch it before"
            warnings.warn(what, stacklevel=3)
            return
        self.report = patch_model(model, **self.options)

    def figures(self, logs: Mapping[str, Any], state: transformers.TrainerState) -> dict[str, float]:
        """What is added to logs of training."""
        if not self.reports or "loss" not in logs:
            return {}
        found = {_MEMORY: peak_memory() / 2**30}
        speed = self._clock.speed(logs.get("num_tokens", state.num_input_tokens_seen))
        return found if speed is None else found | {_SPEED: speed}


class _Clock:
    """Tokens and the seconds of the steps that saw them."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.last = 0.0, 0.0, None

    def begin(self, state: transformers.TrainerState) -> None:
        self.seconds, self.tokens, self.last = 0.0, state.num_input_tokens_seen, None
        self.steps = 0

    def step_begins(self) -> None:
        if self.last is None:
            self.last = time.perf_counter()

    def step_ends(self) -> None:
        # From the end of the step before, which leaves the time in which batches are read to the steps.
        now = time.perf_counter()
        if self.last is not None:
            self.seconds += now - self.last
        self.last = now

    def interrupted(self) -> None:
        self.last = None

    def speed(self, tokens: float) -> float | None:
        seen, seconds = tokens - self.tokens, self.seconds
        self.tokens, self.seconds = tokens, 0.0
        return seen / seconds if seen > 0 and seconds > 0 else None


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU that it is on, or resident in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _counts(args: transformers.TrainingArguments) -> bool:
    """Whether it is of a trainer that says in its logs how many tokens it has seen."""
    return type(args).__module__.partition(".")[0] == "trl"


def _teach_log() -> None:
    """Let `Trainer.log` ask the callbacks of this module for figures.

    `on_log` comes after the logs went to the trainer's history and to the callbacks before this one, which write them
    to TensorBoard and other places.
    """
    log = transformers.Trainer.log
    if getattr(log, "_bigkernels", False):
        return

    @functools.wraps(log)
    def with_figures(self: transformers.Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainerCallback):
                logs.update(callback.figures(logs, self.state))
        return log(self, logs, *args, **kwargs)

    with_figures._bigkernels = True
    transformers.Trainer.log = with_figures
