"""Recording a model's step: a few tokens of two sequences, after a few others."""

# mypy: ignore-errors

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.quantized_embedding import QuantizedEmbedding
from . import _layers
from ._ir import Stored
from ._trace import ModuleCall, Recorder, Ref, Refused, exact, leaves, mapped
from .suspend import suspended, wrapped

BATCH, PAST = 2, 3


@dataclass
class Update:
    """A call of the cache: what went in, and the step whose outputs are all keys and values."""

    layer: int
    step: int


@dataclass
class Trace:
    """A recorded call: `tokens` is what was given, `logits` what came out."""

    model: nn.Module
    recorder: Recorder
    tokens: Tensor
    positions: Tensor
    logits: Ref
    updates: list[Update]
    stored: dict[int, Stored]  # by id of a parameter or buffer
    dtype: torch.dtype
    past: int
    vocabulary: int = 0
    cache: Any = None
    own_cache: bool = False  # whether it is of the kind that the model's configuration asks for
    paths: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.tokens.numel()


def arguments(model: nn.Module) -> dict[str, str]:
    """How a model calls what it is given: "ids", "cache", "positions"."""
    names = inspect.signature(model.forward).parameters
    found = {"ids": "input_ids"}
    if "input_ids" not in names:
        raise Refused("(model): forward takes no input_ids")
    cache = next((name for name in ("cache", "past_key_values") if name in names), None)
    if cache is None:
        raise Refused("(model): forward takes no cache")
    found["cache"] = cache
    if "position_ids" in names:
        found["positions"] = "position_ids"
    if "attention_mask" in names:
        found["mask"] = "attention_mask"
    return found


def stored_of(model: nn.Module) -> dict[int, Stored]:
    found: dict[int, Stored] = {}
    for module in model.modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                found.setdefault(id(t), Stored(module, name))
        for name, t in vars(module).items():
            if isinstance(t, Tensor):
                found.setdefault(id(t), Stored(module, name))
    return found


def length_for(model: nn.Module) -> int:
    """A number of tokens that is no number of heads or the like."""
    config = getattr(model, "config", None)
    numbers = {v for v in leaves(config.to_dict()) if isinstance(v, int)} if hasattr(config, "to_dict") else set()
    return next(n for n in (5, 7, 11, 13, 17, 19, 23) if n not in numbers)


def record(model: nn.Module, tokens: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None) -> Trace:
    """The model's own code on (B, S) tokens, in evaluation; the cache is written to."""
    names = arguments(model)
    recorder = Recorder()
    recorder.give(tokens)
    given = {names["ids"]: tokens, names["cache"]: cache, "use_cache": True}
    if "positions" in names and positions is not None:
        given[names["positions"]] = positions
    if "mask" in names and mask is not None:
        given[names["mask"]] = mask
    updates: list[Update] = []
    stored = stored_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager_experts(model))
        stack.enter_context(suspended(model))
        stack.enter_context(_noted(cache, recorder, updates))
        stack.enter_context(wrapped(model, functools.partial(_wrap, recorder)))
        stack.enter_context(recorder)
        try:
            out = model(**given)
        except Refused:
            raise
        except Exception as error:
            where = recorder.path or "(model)"
            message = (str(error).splitlines() or [""])[0][:120]
            raise Refused(f"{where}: does not run in float64: {type(error).__name__}: {message}") from error
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    ref = recorder.where.get(id(logits))
    if ref is None or not recorder.steps[ref.step].depends:
        raise Refused("(model): its logits are not computed from the tokens by PyTorch functions")
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    paths = {module: path for path, module in model.named_modules()}
    return Trace(model, recorder, tokens, positions, ref, updates, stored, dtype, 0, 0, cache, paths=paths)


def _wrap(recorder: Recorder, module: nn.Module, path: str) -> Callable:
    original = module.forward
    if _layers.is_linear(module):
        return functools.partial(_linear, recorder, module, original)
    if stacked(module):
        return functools.partial(_experts, recorder, module, path, original)
    if type(module) is QuantizedEmbedding:
        original = functools.partial(_rows, recorder, original)
    return functools.partial(_call, recorder, module, path, original)


def _linear(recorder: Recorder, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not recorder._depends(args[0]):
        return original(*args, **kwargs)
    return recorder.leaf(functools.partial(_layers.apply, module), args, {}, module, quiet=True)


def _rows(recorder: Recorder, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Codes that are decoded are one step from tokens to numbers."""
    tensors = []

    def decode(*args: Any, **kwargs: Any) -> Tensor:
        tensors.append(original(*args, **kwargs))
        return exact(tensors[-1])

    out = recorder.leaf(decode, args, kwargs, None, quiet=True)
    if recorder._depends(out):
        recorder.seeming[id(out)] = tensors[-1].dtype
    return out


def _call(recorder: Recorder, module: nn.Module, path: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
    call = ModuleCall(module, path, args, kwargs, len(recorder.steps))
    recorder.calls.append(call)
    recorder.stack.append(call)
    try:
        out = original(*args, **kwargs)
    finally:
        recorder.stack.pop()
    call.end = len(recorder.steps)
    call.args, call.kwargs = _noted_arguments(recorder, args, kwargs)
    call.outs = tuple(recorder.ref(t) for t in leaves(out) if isinstance(t, Tensor))
    return out


def _noted_arguments(recorder: Recorder, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return mapped(recorder.ref, args), mapped(recorder.ref, kwargs)


def stacked(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts one behind the other: three dimensions, twice or more."""
    from ..nn.quantized_experts import QuantizedExperts

    held = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    held += [m for m in module._modules.values() if type(m) is QuantizedExperts]
    return len(held) >= 2


def _experts(recorder: Recorder, module: nn.Module, path: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
    call = ModuleCall(module, path, args, kwargs, len(recorder.steps))
    recorder.stack.append(call)
    try:
        return recorder.leaf(original, args, kwargs, module, quiet=False)
    finally:
        recorder.stack.pop()


@contextmanager
def _eager_experts(model: nn.Module):
    """Experts one by one: grouped products know no float64."""
    changed = []
    for module in model.modules():
        config = vars(module).get("config")
        name = "_experts_implementation_internal"
        if config is not None and getattr(config, name, None) not in (None, "eager"):
            changed.append((config, name, getattr(config, name)))
            setattr(config, name, "eager")
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


@contextmanager
def _noted(cache: Any, recorder: Recorder, updates: list[Update]):
    """Inside, each `cache.update` is a step of the record."""
    original = cache.update

    def update(k, v, layer, *args, **kwargs):
        def append(k, v):
            return original(k, v, layer, *args, **kwargs)

        out = recorder.leaf(append, (k, v), {}, None, quiet=True)
        updates.append(Update(layer, len(recorder.steps) - 1))
        return out

    cache.update = update
    try:
        yield
    finally:
        del cache.update


def traced(model: nn.Module) -> Trace:
    """A call of a few tokens after a few others."""
    length = length_for(model)
    vocabulary = _vocabulary(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator("cpu").manual_seed(5)
    low = min(8, vocabulary // 2)  # the first tokens are often those of padding
    tokens = torch.randint(
        low, vocabulary, (BATCH, PAST + length), generator=generator, dtype=torch.int64, device="cpu"
    )
    tokens = tokens.to(device)
    every = torch.arange(PAST + length, dtype=torch.int64, device=device).expand(BATCH, -1)
    for own in (False, True):
        cache = new_cache(model if own else None)
        try:
            record(model, tokens[:, :PAST].clone(), every[:, :PAST], cache)
            recorder = record(model, tokens[:, PAST:].clone(), every[:, PAST:].clone(), cache)
            break
        except Refused:
            if own:
                raise
    recorder.past, recorder.vocabulary, recorder.own_cache = PAST, vocabulary, own
    return recorder


def new_cache(model: nn.Module | None = None) -> Any:
    """With layers as the model's configuration asks for, or plain ones."""
    from transformers import DynamicCache

    return DynamicCache() if model is None else DynamicCache(config=model.config)


def _vocabulary(model: nn.Module) -> int:
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(tokens, "weight", None)
    if weight is not None:
        return weight.shape[0]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise Refused("(model): has no embedding of tokens")
