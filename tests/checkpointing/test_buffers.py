"""Buffers that are written in a segment end as they do without one, and gradients are those of what they were."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from segments import RECOMPUTED, gradients
from torch import nn

from bigkernels import apply_checkpointing, checkpoint


class Running(nn.Module):
    """Statistics of its own, written in place and replaced, which its output depends on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("decayed", torch.ones(16))
        self.register_buffer("still", torch.ones(16))

    def forward(self, x):
        y = self.layer(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
            self.count += 1
            self.decayed = self.decayed * 0.5 + y.std(0)
        return torch.tanh((y - self.mean) / self.decayed * self.still) * self.count


class Late(nn.Module):
    """Writes a buffer only where it is told to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x, write):
        if write:
            self.total += x.detach().sum()
        return self.layer(x).sin().exp()


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 16))


def old_spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 16))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.BatchNorm1d(16, momentum=None), nn.Tanh())


def shared() -> nn.Module:
    norm = nn.BatchNorm1d(16)
    return nn.Sequential(nn.Linear(16, 16), norm, nn.Tanh(), norm)


MODULES = {f.__name__: f for f in (Running, spectral, old_spectral, batch_norm, shared)}
CALLS = {
    "module": lambda m, x, policy: checkpoint(m, x, policy=policy),
    "method": lambda m, x, policy: checkpoint(m.forward, x, policy=policy) if not m._forward_pre_hooks else m(x),
    "closure": lambda m, x, policy: checkpoint(lambda x: m(x), x, policy=policy),
    "argument": lambda m, x, policy: checkpoint(lambda m, x: m(x), m, x, policy=policy),
    "partial": lambda m, x, policy: checkpoint(functools.partial(m.__call__), x, policy=policy),
    "segments": lambda m, x, policy: checkpoint(lambda x: checkpoint(m, x, policy=policy).sin(), x, policy=policy),
}


def run(module: nn.Module, call, steps: int = 3):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        out = call(module, x)
        found += gradients(out, [p for p in module.parameters() if p.requires_grad], retain_graph=True)
        found += [b.clone() for b in module.buffers()]
        found += gradients(out, [p for p in module.parameters() if p.requires_grad])  # runs again once more
    return found + [b.clone() for b in module.buffers()]


@pytest.mark.parametrize("policy", [name for name in RECOMPUTED if "int8" not in name])
@pytest.mark.parametrize("name", MODULES)
def test_buffers_move_once(name: str, policy: str) -> None:
    module = MODULES[name]()
    plain = copy.deepcopy(module)
    expected = run(plain, lambda m, x: m(x))
    found = run(module, lambda m, x: checkpoint(m, x, policy=RECOMPUTED[policy]))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("call", CALLS)
def test_ways_to_call(call: str) -> None:
    for make in (Running, batch_norm):
        module = make()
        plain = copy.deepcopy(module)
        fn = CALLS[call]
        after = (lambda m, x: m(x).sin()) if call == "segments" else (lambda m, x: m(x))
        assert all(map(torch.equal, run(module, lambda m, x, fn=fn: fn(m, x, "recompute")), run(plain, after)))


def test_blocks_of_a_model() -> None:
    model = nn.Sequential(*(batch_norm() for _ in range(3)))
    plain = copy.deepcopy(model)
    apply_checkpointing(model, "recompute")
    expected = run(plain, lambda m, x: m(x))
    assert all(map(torch.equal, run(model, lambda m, x: m(x)), expected))
    assert [int(b) for name, b in model.named_buffers() if "tracked" in name] == [3] * 6


def test_one_that_is_written_later() -> None:
    """It had not been copied: it moves once all the same."""
    module = Late()
    plain = copy.deepcopy(module)
    for step in range(4):
        x = torch.randn(32, 16)
        expected = gradients(plain(x, step > 1), plain.parameters())
        out = checkpoint(module, x, step > 1)
        assert all(map(torch.equal, gradients(out, module.parameters()), expected))
        assert torch.equal(module.total, plain.total)


def test_buffers_are_restored_after_an_error() -> None:
    module, calls = batch_norm(), []

    def fails(x):
        calls.append(1)
        out = module(x)
        if len(calls) == 2:
            raise KeyError
        return out.sin()

    out = checkpoint(fails, torch.randn(32, 16))
    kept = list(module.buffers())
    values = [b.clone() for b in kept]
    with pytest.raises(KeyError):
        gradients(out, module.parameters())
    assert all(a is b for a, b in zip(module.buffers(), kept, strict=True))
    assert all(map(torch.equal, kept, values))
