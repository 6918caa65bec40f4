"""One step on fake tensors: what it holds, phase by phase."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._torch_private import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from . import _models, _optimizers
from ._optimizers import Factory
from ._steps import Inputs, Loss, call, default_loss, make_inputs, one_sequence_a_row, takes
from ._trace import Phase, Recorder, work_of

if TYPE_CHECKING:
    from ..bench.limits import Limits

PARAMETERS, BUFFERS, INPUTS = "parameters", "buffers", "inputs"
GRADIENTS, STATE = "gradients", "optimizer state"
ACTIVATIONS, LOGITS, CACHE, TEMPORARY = "activations", "logits", "kv cache", "temporary"
PROGRAM = "program"
TAGS = (PARAMETERS, BUFFERS, GRADIENTS, STATE, ACTIVATIONS, LOGITS, CACHE, INPUTS, PROGRAM, TEMPORARY)


# What `patch` of a plan may be beside a dictionary of the arguments of `bigkernels.patch`.
PATCHES: dict[str, dict[str, bool] | None] = {
    "no": None,
    "loss": {"attention": False, "norm": False, "rope": False, "mlp": False, "loss": True},
    "yes": {},
}
# Raised by operators of which values, and not only shapes, decide what they give.
_NO_VALUES = (DynamicOutputShapeException, DataDependentOutputException)


@dataclass(frozen=True)
class Setting:
    """What is run, and how."""

    mode: str
    batch: int
    seq: int
    device: torch.device
    new_tokens: int = 0
    autocast: torch.dtype | None = None
    checkpointing: Any = None  # a name or a `bigkernels.checkpointing.Policy`
    every: int = 1
    patch: dict[str, Any] | None = None  # the arguments of `bigkernels.patch`; None for a model as it is
    inputs: Any = None
    loss: Loss = default_loss
    machine: Limits | None = None  # by whose limits "selective" policies choose


@dataclass
class Result:
    """Bytes by what they are: `held` at the end of the phase that makes them, `at_peak` where most are held at once."""

    phases: list[Phase]
    held: dict[str, int]
    peaks: dict[str, int]  # by phase
    at_peak: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def run(made: nn.Module, setting: Setting, optimizers: Sequence[Factory | None]) -> list[Result]:
    """
    Raises:
        RuntimeError: the model's code depends on values.
    """
    try:
        return train(made, setting, optimizers) if setting.mode == "train" else [infer(made, setting)]
    except _NO_VALUES as error:
        raise RuntimeError(
            f"bigkernels.plan: {type(made).__name__} cannot be planned: its code depends on values, "
            f"which fake tensors have not ({type(error).__name__}: {error})"
        ) from error


def seconds_of(phase: Phase, machine: Limits) -> float:
    return sum(machine.least_seconds(bytes=w.bytes, flops=w.flops, dtype=w.dtype) for w in phase.work)


def train(made: nn.Module, setting: Setting, optimizers: Sequence[Factory | None]) -> list[Result]:
    """Forward, backward and an optimizer's step, with the states of an earlier step and without its gradients.

    One result for each optimizer: what comes before their steps is run once.
    """
    with _fake(made, setting) as (model, inputs, recorder, held):
        if _learns(setting.checkpointing):  # what to keep, from its first step
            with _autocast(setting), _estimated(setting.machine):
                loss = setting.loss(model, inputs)
            loss.backward()
            model.zero_grad(set_to_none=True)
            del loss
            gc.collect()  # what segments left in cycles
        with recorder.phase("forward") as forward, _autocast(setting), _logits(model, recorder) as vocabulary:
            loss = setting.loss(model, inputs)
        held[LOGITS] = recorder.tag_shape(*vocabulary[0], LOGITS) if vocabulary else 0
        held[ACTIVATIONS] = recorder.tag_alive(ACTIVATIONS)
        with recorder.phase("backward") as backward:
            loss.backward()
        del loss
        trained = [p for p in model.parameters() if p.requires_grad]
        held[GRADIENTS] = recorder.hold([p.grad for p in trained], GRADIENTS, again=True)
        if vocabulary:
            recorder.tag_shape(*vocabulary[0], LOGITS)
        steps = [_optimizers.step(f, trained, recorder) if f is not None and trained else (0, None) for f in optimizers]
    # The states come into the log after the phases that they live through.
    return [
        _result(
            recorder,
            [forward, backward, *filter(None, [phase])],
            {**held, STATE: state},
            {"forward": state, "backward": state},
            STATE,
        )
        for state, phase in steps
    ]


def infer(made: nn.Module, setting: Setting) -> Result:
    """A forward pass that fills a cache, and the first and the last of the new tokens after it."""
    with torch.no_grad(), _fake(made, setting) as (model, inputs, recorder, held):
        with recorder.phase("prefill") as prefill, _autocast(setting):
            out = _prefill(model, inputs)
        held[LOGITS] = recorder.hold(getattr(out, "logits", None), LOGITS)
        held[CACHE] = recorder.hold(_cache(out), CACHE)
        phases = [prefill]
        if setting.new_tokens and held[CACHE]:
            with recorder.phase("first token") as first, _autocast(setting):
                out = _next(model, out, setting)
            recorder.hold(getattr(out, "logits", None), LOGITS)
            del out
            with _autocast(setting):
                out = _prefill(model, *_grown(model, inputs, setting))
            out = _only_cache(out)
            with recorder.phase("last token") as last, _autocast(setting):
                out = _next(model, out, setting)
            recorder.hold(getattr(out, "logits", None), LOGITS)
            held[CACHE] = recorder.hold(_cache(out), CACHE, again=True)
            phases += [first, last]
        del out
        size = _program(model, setting) if held[CACHE] else 0
    if size:
        held[PROGRAM] = size
    return _result(recorder, phases, held, {phase.name: size for phase in phases}, PROGRAM)


def _program(model: nn.Module, setting: Setting) -> int:
    """What a step program takes, where `patch` would look for one. Its calls leave modules out, whose temporary tensors
    are counted all the same: they are what a model takes that turns out to have none.
    """
    from ..patch._decode import candidates
    from ..program._size import panels, workspace

    if setting.patch is None or not setting.patch.get("decode", True) or setting.device.type != "cpu":
        return 0
    norm = next((module for _, module in candidates(model)), None)
    if norm is None:
        return 0
    copied = 0 if setting.patch.get("decode") == "stored" else panels(norm)
    return copied + workspace(norm, setting.batch, setting.seq, 1, setting.seq + setting.new_tokens)


def _learns(checkpointing: Any) -> bool:
    if checkpointing is None:
        return False
    from ..checkpointing._policy import Selection, resolve_policy

    return isinstance(resolve_policy(checkpointing).keep, Selection)


@contextmanager
def _fake(made: nn.Module, setting: Setting) -> Iterator[tuple[nn.Module, Inputs, Recorder, dict[str, int]]]:
    model = _models.copied(made)
    model.train(setting.mode == "train")
    if setting.patch is not None:
        from ..patch import patch

        patch(model, verify=False, **setting.patch)
    if setting.checkpointing is not None:
        from ..checkpointing import apply_checkpointing

        apply_checkpointing(model, setting.checkpointing, every=setting.every)
    recorder = Recorder(setting.device)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, one_sequence_a_row():
        _models.faked(model, setting.device)
        held = {PARAMETERS: recorder.hold(list(model.parameters()), PARAMETERS)}
        held[BUFFERS] = recorder.hold(list(model.buffers()), BUFFERS)
        training = setting.mode == "train"
        inputs = make_inputs(model, setting.inputs, setting.batch, setting.seq, setting.device, labels=training)
        held[INPUTS] = recorder.hold(inputs, INPUTS)
        yield model, inputs, recorder, held


def _result(recorder: Recorder, phases: list[Phase], held: dict[str, int], before: dict[str, int], tag: str) -> Result:
    """`before`: what is held in a phase that the recorder has not seen, and what it is."""
    trace = recorder.trace
    found = {phase.name: trace.peak(phase) for phase in phases}
    peaks = {name: size + before.get(name, 0) for name, (size, _) in found.items()}
    highest = max(peaks, key=peaks.__getitem__)
    at_peak = trace.by_tag(found[highest][1])
    if before.get(highest):
        at_peak[tag] += before[highest]
    return Result(phases, held, peaks, {tag: at_peak[tag] for tag in TAGS if at_peak[tag]})


def _estimated(machine: Limits | None) -> Any:
    """Operators on fake tensors take no time that means anything."""
    from ..checkpointing._select import times_estimated_by

    def seconds(func: Any, args: tuple, kwargs: dict, out: Any) -> float:
        work = work_of(func, args, kwargs, out)
        if machine is None:
            return float(work.bytes)
        return machine.least_seconds(bytes=work.bytes, flops=work.flops, dtype=work.dtype)

    return times_estimated_by(seconds)


def _autocast(setting: Setting) -> Any:
    return torch.autocast(setting.device.type, setting.autocast or torch.bfloat16, enabled=setting.autocast is not None)


@contextmanager
def _logits(model: nn.Module, recorder: Recorder) -> Iterator[list[tuple[int, int]]]:
    """The size of the vocabulary and the least number of logits, once the model has given some; else nothing."""
    sizes: list[tuple[int, int]] = []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        logits = getattr(out, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.dim():
            # Of each sequence one token may be left out: it has no next one.
            sizes[:] = [(logits.shape[-1], logits.numel() // 2)]

    handle = model.register_forward_hook(see)
    try:
        yield sizes
    finally:
        handle.remove()


def _prefill(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    if takes(model, "use_cache"):
        options["use_cache"] = True
    if takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    return call(model, inputs, **options)


def _next(model: nn.Module, out: Any, setting: Setting) -> Any:
    """One more token after what is cached."""
    token = torch.zeros(setting.batch, 1, dtype=torch.int64, device=setting.device)
    options = {"cache" if takes(model, "cache") else "past_key_values": _cache(out), "use_cache": True}
    encoded = getattr(out, "encoder_last_hidden_state", None)
    if encoded is not None:
        return model(encoder_outputs=(encoded,), decoder_input_ids=token, **options)
    return model(input_ids=token, **options)


def _grown(model: nn.Module, inputs: Inputs, setting: Setting) -> tuple[Inputs]:
    """Inputs after which one token is left to be made."""
    inputs = dict(inputs)
    # Of an encoder and a decoder the cache of the latter grows.
    name, length = ("decoder_input_ids", 1) if "decoder_input_ids" in inputs else ("input_ids", setting.seq)
    length += setting.new_tokens - 1
    inputs[name] = torch.zeros(setting.batch, length, dtype=torch.int64, device=setting.device)
    return (inputs,)


def _only_cache(out: Any) -> Any:
    return types.SimpleNamespace(
        cache=_cache(out), encoder_last_hidden_state=getattr(out, "encoder_last_hidden_state", None)
    )


def _cache(out: Any) -> Any:
    """By either of the names that it has in transformers."""
    cache = getattr(out, "cache", None)
    return getattr(out, "past_key_values", None) if cache is None else cache
