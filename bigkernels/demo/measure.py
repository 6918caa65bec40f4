"""What the demo measures: the same model eager and patched, side by side in one process."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.memory import extra_peak

VARIANTS = ("eager", "patched")


@dataclass
class Training:
    """A fine-tuning run of both variants: one entry a step, and the memory that a step needs."""

    dtype: torch.dtype
    tokens: int  # in one step
    losses: dict[str, list[float]] = field(default_factory=lambda: {v: [] for v in VARIANTS})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {v: [] for v in VARIANTS})
    resting: int = 0  # bytes: weights and optimizer state
    working: dict[str, int] = field(default_factory=dict)  # bytes: the peak of a step above that

    @property
    def difference(self) -> float:
        """The largest distance of the two loss curves; nan if a loss is."""
        eager, patched = (torch.tensor(losses, dtype=torch.float64, device="cpu") for losses in self.losses.values())
        return (eager - patched).abs().max().item()

    @property
    def speed(self) -> dict[str, float]:
        """Tokens per second in the fastest step: what another load on the machine disturbs least."""
        return {name: self.tokens / min(seconds) for name, seconds in self.seconds.items()}


@dataclass
class Generation:
    """Greedy generation by both variants: the new tokens, and the best of the tokens per second seen."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)


def ratio(values: Mapping[str, float]) -> float:
    return values["patched"] / values["eager"]


def windows(ids: Tensor, count: int, length: int) -> Tensor:
    """`count` consecutive windows (count, length) from the start of `ids` (N,); fewer if the text is shorter."""
    count = min(count, len(ids) // length)
    return ids[: count * length].view(count, length)


def random_batches(ids: Tensor, steps: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random windows (steps, batch, length) of `ids` (N,); the seed decides them."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        0, len(ids) - length + 1, (steps, batch, 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    return ids[starts + torch.arange(length, dtype=torch.int64, device="cpu")]


@torch.inference_mode()
def perplexity(model: nn.Module, batches: Tensor, at_once: int | None = None) -> float:
    """exp of the mean loss a token over windows (N, S), one window at a time.

    Args:
        at_once: tokens of a call: a window then goes through the model and its cache in parts, as a prompt does and,
            with few tokens, as in decoding; by default a window is one call without a cache.
    """
    device = next(model.parameters()).device
    losses = []
    held = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    for ids in batches.to(device).split(1):
        if at_once is None:
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
            continue
        cache, total = None, 0.0
        for begin in range(0, ids.shape[1] - 1, at_once):
            part = ids[:, begin : min(begin + at_once, ids.shape[1] - 1)]
            out = model(input_ids=part, use_cache=True, **{held: cache})
            cache = getattr(out, held)
            target = ids[0, begin + 1 : begin + 1 + part.shape[1]]
            total += nn.functional.cross_entropy(out.logits[0].float(), target, reduction="sum").item()
        losses.append(total / (ids.shape[1] - 1))
    return math.exp(math.fsum(losses) / len(losses))


def generate(models: dict[str, nn.Module], prompt: Tensor, new_tokens: int, rounds: int = 3) -> Generation:
    """Greedy generation of exactly `new_tokens` after `prompt` (1, S), the variants alternating."""
    result = Generation()
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for _ in range(rounds):
        model: Any
        for name, model in models.items():
            ids = prompt.to(next(model.parameters()).device)
            start = _now(ids.device)
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            speed = new_tokens / (_now(ids.device) - start)
            result.tokens[name] = out[0, ids.shape[1] :].tolist()
            result.speed[name] = max(speed, result.speed.get(name, 0.0))
    return result


def train(models: dict[str, nn.Module], batches: Tensor, *, lr: float, deadline: float) -> Iterator[Training]:
    """Fine-tune both variants on the same batches (steps, B, S) and yield the growing record after every step.

    The variants alternate step by step, and so does which one goes first, so that another load on the machine slows
    both alike. Stops early, after at least three steps, when `time.perf_counter()` passes the deadline. The last record
    yielded holds the memory too.
    """
    first = next(iter(models.values()))
    device = next(first.parameters()).device
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=lr) for name, model in models.items()}
    record = Training(next(first.parameters()).dtype, batches[0].numel())
    for model in models.values():
        model.train()
    for step, ids in enumerate(batches.to(device)):
        for name in VARIANTS if step % 2 == 0 else VARIANTS[::-1]:
            start = _now(device)
            loss = _backward(models[name], ids)
            optimizers[name].step()
            optimizers[name].zero_grad()
            record.seconds[name].append(_now(device) - start)
            record.losses[name].append(loss)
        last = step + 1 == len(batches) or (step >= 2 and time.perf_counter() > deadline)
        if last:
            record.resting = _resting_bytes(first, optimizers["eager"])
            for name, model in models.items():
                record.working[name] = extra_peak(functools.partial(_backward, model, ids), device.type)
                optimizers[name].zero_grad()
        yield record
        if last:
            return


def _backward(model: nn.Module, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def _resting_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *state])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
