"""In the place of a causal language model's forward: its program where that gives the same, else its own code."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _hooks

from .._replaced import Watched
from .._torch_private import dispatch_modes, function_modes, is_jit_tracing, transforms
from ..ops.registry import log
from ._cache import Description, describe
from ._padding import Refusal, starts_of
from ._panels import TOKENS
from ._program import Program
from ._state import KEY, Steps
from ._verify import new_cache

# Arguments that say how a call is answered; whoever gives another one gets the model's own code.
_KNOWN = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "cache_position",
}
# Tokens of a run: a weight is transposed once for all of them, and what layers make of them stays in the caches.
_ROWS, _CACHED = 512, 8 << 20
_GLOBAL_HOOKS = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
_forward_ad = torch.autograd.forward_ad
_is_compiling = torch.compiler.is_compiling


def forward(module: nn.Module, below: Callable | None, *args: Any, **kwargs: Any) -> Any:
    """`below` is the function that would be called without it, None for the class's own."""
    if not _is_compiling():
        steps = module.__dict__.get(KEY)
        if steps is not None:
            out = None if args or steps.quick is None else steps.quickly(kwargs)
            if out is None:
                out = _by_program(module, steps, args, kwargs)
            if out is not None:
                return out
    return (type(module).forward if below is None else below)(module, *args, **kwargs)


def apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """In the place of `_apply`, which moves and casts: the old memory is given back tensor by tensor."""
    steps = module.__dict__.get(KEY)
    if steps is not None:
        steps.release()
    return type(module)._apply(module, *args, **kwargs)


def _by_program(module: nn.Module, steps: Steps, args: tuple, kwargs: dict) -> Any:
    try:
        if args:
            kwargs = steps.resolve_arguments(module, args, kwargs)
        call = _Call(module, kwargs)
        with steps.lock:
            program = steps.ready(module)
            if program is None:
                raise Refusal(steps.reason)
            out = call.run(steps, program)
        steps.taken += 1
        return out
    except Refusal as refusal:
        steps.left, steps.why = steps.left + 1, str(refusal)
        if module.training and torch.is_grad_enabled():
            steps.rest()
        _log(type(module).__qualname__, steps.why)
        return None


@functools.lru_cache(maxsize=1024)
def _log(name: str, reason: str) -> None:
    """Once for each reason."""
    log.info("decode: %s runs its modules: %s", name, reason)


class _Call:
    """The arguments of a call that a program can answer.

    Raises:
        Refusal: it cannot.
    """

    def __init__(self, module: nn.Module, given: dict[str, Any]) -> None:
        get = given.get
        ids, embeds = get("input_ids"), get("inputs_embeds")
        x = embeds if ids is None else ids
        if (ids is None) == (embeds is None) or type(x) is not Tensor or x.dim() != (2 if embeds is None else 3):
            raise Refusal("neither tokens nor embeddings (B, S)")
        if not x.is_cpu:
            raise Refusal(f"tokens on {x.device.type}")
        self.batch, self.tokens = x.shape[:2]
        if not self.batch or not self.tokens:
            raise Refusal("no tokens")
        for key, value in given.items():
            if key not in _KNOWN and value is not None and value is not False:
                raise Refusal(f"{key} is given")
        _check_surroundings()
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
            raise Refusal("gradients are recorded")
        self.module, self.ids, self.embeds = module, ids, embeds
        self.cache = get("cache", get("past_key_values"))
        keep = get("logits_to_keep", 0)
        if type(keep) is not int or keep < 0:
            raise Refusal("logits_to_keep is no whole number")
        self.keep = min(keep, self.tokens) or self.tokens
        self.given, self.mask, self.positions = given, get("attention_mask"), get("position_ids")

    def run(self, steps: Steps, program: Program) -> Any:
        asks = steps.defaults.asks
        if asks is not None and self.given.get(asks) is None:
            raise Refusal(f"the configuration asks for {asks}")
        if not torch.is_grad_enabled():
            return self._run(steps, program)
        with torch.no_grad():
            return self._run(steps, program)

    def _run(self, steps: Steps, program: Program) -> Any:
        cache = self.cache
        if cache is None:
            cache = new_cache(self.module)
        described = describe(cache, program.shapes, self.batch, self.tokens, program.dtype)
        if isinstance(described, str):
            raise Refusal(described)
        past = described.past
        if past < 0:  # a cache of states alone does not count
            past = described.past = max(self.mask.shape[-1] - self.tokens, 0) if type(self.mask) is Tensor else 0
        if program.refresh(whole=past == 0 or self.tokens > TOKENS):
            steps.quick = None
        starts = starts_of(self.mask, self.batch, self.tokens, past, program.windows)
        positions, longest = self._positions(past)
        if self.positions is not None and not program.graph.position_ids:
            raise Refusal("position_ids are given, and the model takes none")
        if self.positions is None and not program.graph.counted[starts is not None]:
            raise Refusal("positions are not given, and the model counts them in another way")
        if not program.graph.padded and (
            starts is not None or int(positions.min()) != past or longest != past + self.tokens - 1
        ):
            raise Refusal("some of its layers cannot be told of padding, or of other positions")
        hidden = program.embed(self.ids, positions, self.embeds)
        if hidden.dtype != program.dtype or hidden.dim() != 3:
            raise Refusal(f"hidden states are {hidden.dtype}")
        logits = torch.empty(self.batch, self.keep, program.vocabulary, dtype=steps.output.dtype, device="cpu")
        self._fill(program, described, cache, hidden, positions, starts, longest, logits)
        if self.cache is not None:
            steps.prepare(described, cache)
        get, defaults = self.given.get, steps.defaults
        kept, as_tuple = get("use_cache"), get("return_dict")
        if self.cache is None and not (defaults.use_cache if kept is None else kept):
            cache = None
        return steps.output.make(logits, cache, defaults.as_tuple if as_tuple is None else not as_tuple)

    def _fill(
        self,
        program: Program,
        described: Description,
        cache: Any,
        hidden: Tensor,
        positions: Tensor,
        starts: Tensor | None,
        longest: int,
        logits: Tensor,
    ) -> None:
        """Keys and values of all tokens to the cache, and logits of the last ones."""
        most = _ROWS if program.widest * _ROWS * 4 <= _CACHED else _ROWS // 2
        size = self.tokens if program.graph.owned else max(1, most // self.batch)
        with described:
            if size >= self.tokens:
                program.run(hidden, positions, starts, longest, described.packed, described.past, logits, cache)
                described.advance(self.tokens)
                return
            for begin in range(0, self.tokens, size):
                end = min(begin + size, self.tokens)
                part = hidden[:, begin:end].contiguous(), positions[:, begin:end].contiguous()
                first = self.tokens - self.keep  # token of the first row of logits
                wanted = logits[:, max(begin - first, 0) : max(end - first, 0)]
                plain = wanted.is_contiguous()
                out = wanted if plain else torch.empty_like(wanted, memory_format=torch.contiguous_format)
                program.run(*part, starts, longest, described.packed, described.past, out, cache)
                described.advance(end - begin)
                if out is not wanted:
                    wanted.copy_(out)

    def _positions(self, past: int) -> tuple[Tensor, int]:
        given = self.positions
        if given is None:
            every = torch.arange(past, past + self.tokens, dtype=torch.int64, device="cpu")
            return every.expand(self.batch, -1).contiguous(), past + self.tokens - 1
        if type(given) is not Tensor or given.dim() != 2 or given.dtype != torch.int64 or not given.is_cpu:
            raise Refusal("position_ids are no whole numbers (B, S)")
        if given.shape[1] != self.tokens or given.shape[0] not in (1, self.batch):
            raise Refusal(f"position_ids are {tuple(given.shape)}")
        if given.numel() == 1:
            first = last = given.item()
        else:
            if self.mask is None and (given[:, 1:] - given[:, :-1] != 1).any():
                raise Refusal("position_ids are not consecutive")  # several sequences in one
            first, last = (int(t) for t in given.aminmax())
        if first < 0:
            raise Refusal("a position is negative")
        if given.shape[0] != self.batch or not given.is_contiguous():
            given = given.expand(self.batch, -1).contiguous()
        return given, last


_WATCHED = Watched(
    (nn.Linear, ("forward",)),
    (F, ("linear", "layer_norm", "rms_norm", "dropout", "softmax", "gelu", "silu", "relu")),
    (torch, ("layer_norm", "rms_norm", "rsqrt", "matmul", "softmax")),
)


def _check_surroundings() -> None:
    """Nothing looks at or changes the operators of a call."""
    if torch.is_autocast_enabled("cpu"):
        raise Refusal("autocast is on")
    if function_modes() or dispatch_modes() or is_jit_tracing():
        raise Refusal("something watches the operators")
    if transforms() is not None or _forward_ad._current_level >= 0:
        raise Refusal("a transform of torch.func is around it")
    if any(_GLOBAL_HOOKS):
        raise Refusal("there are hooks on all modules")
    if reason := _WATCHED.replaced():
        raise Refusal(reason)
