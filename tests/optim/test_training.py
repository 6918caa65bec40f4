"""A small language model, trained on the text of Python's help by each optimizer, format and rounding.

What is compared is the loss on text that was held out, with the same start and the same batches. Parameters of 16 bits
are computed with in float32: what is new to such a run is how its steps and gradients are rounded, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigkernels import optim

VOCABULARY = 128  # ASCII


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    steps: int
    batch: int
    length: int  # of a sample, in characters
    held_out: int  # samples for evaluation
    lr: float


SMALL = Size(width=64, layers=2, steps=100, batch=8, length=32, held_out=256, lr=4e-3)
LARGE = Size(width=384, layers=6, steps=200, batch=4, length=48, held_out=192, lr=1e-3)


@cache
def text() -> tuple[Tensor, Tensor]:
    """To train on, and held out."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    codes = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    codes = torch.frombuffer(bytearray(codes), dtype=torch.uint8).long()
    return codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]


# ---- the model -------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
    """Attention with rotary positions and a gated MLP, each after a norm and beside the residual, as in Llama."""

    def __init__(self, width: int, head: int = 32):
        super().__init__()
        hidden = width * 8 // 3 // 32 * 32
        self.head = head
        self.before_attention, self.before_mlp = Norm(width, eps=1e-5), Norm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (Linear(width, hidden, bias=False) for _ in range(2))
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        y = self.before_attention(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (
            t * turn[0] + torch.cat((-t[..., self.head // 2 :], t[..., : self.head // 2]), -1) * turn[1] for t in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, size: Size, head: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.ModuleList(Layer(size.width, head) for _ in range(size.layers))
        self.norm = Norm(size.width, eps=1e-5)
        self.output = Linear(size.width, VOCABULARY, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if p.shape[0] == VOCABULARY else p.shape[1] ** -0.5)
        for layer in self.layers:
            for p in (layer.o.weight, layer.down.weight):
                nn.init.normal_(p, std=(2 * size.layers * p.shape[1]) ** -0.5)
        angles = torch.arange(size.length)[:, None] * 1e4 ** -(torch.arange(0, head, 2) / head).repeat(2)
        self.turn = angles.cos(), angles.sin()

    def forward(self, samples: Tensor) -> Tensor:
        """The mean loss of (batch, length + 1) characters."""
        x = self.embedding(samples[:, :-1]).float()
        for layer in self.layers:
            x = layer(x, self.turn)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), samples[:, 1:].flatten())


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    make: Callable[[nn.Module, float], optim.Optimizer]
    dtype: torch.dtype = torch.float32
    in_backward: bool = False


def adamw(dtype: torch.dtype = torch.float32, in_backward: bool = False, **options) -> Run:
    def make(model: nn.Module, lr: float) -> optim.Optimizer:
        return optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0, **options)

    return Run(make, dtype, in_backward)


def _lion(model: nn.Module, lr: float) -> optim.Optimizer:
    return optim.Lion(model.parameters(), lr=lr / 3, betas=(0.9, 0.95), weight_decay=0.3, max_grad_norm=1.0)


def _muon(model: nn.Module, lr: float) -> optim.Optimizer:
    return optim.Muon(
        optim.muon_groups(model), lr=lr, adjust_lr_fn="match_rms_adamw", weight_decay=0.1, max_grad_norm=1.0
    )


RUNS = {
    "float32": adamw(),
    "bfloat16 states": adamw(state_dtype=torch.bfloat16),
    "int8 states": adamw(state_dtype="int8"),
    "stochastic": adamw(torch.bfloat16, rounding="stochastic"),
    "kahan": adamw(torch.bfloat16, rounding="kahan"),
    "int8 states, stochastic": adamw(torch.bfloat16, rounding="stochastic", state_dtype="int8"),
    "int8 states, kahan": adamw(torch.bfloat16, rounding="kahan", state_dtype="int8"),
    "nearest": adamw(torch.bfloat16, rounding="nearest"),
    "in backward": adamw(in_backward=True),
    "Lion": Run(_lion),
    "Muon": Run(_muon),
}
FORMATS = [name for name in RUNS if name not in ("float32", "nearest", "in backward", "Lion", "Muon")]


@cache
def loss_of(size: Size, name: str, seed: int = 0) -> float:
    """The loss on held-out text after training."""
    run, (known, held_out) = RUNS[name], text()
    torch.manual_seed(seed)
    model = Decoder(size).to(run.dtype)
    optimizer = run.make(model, size.lr)
    warm = size.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (size.steps - step) / (size.steps - warm))
    )
    if run.in_backward:
        optim.step_in_backward(model, optimizer, clip="previous")
    draw = torch.Generator().manual_seed(seed)
    window = torch.arange(size.length + 1)
    for _ in range(size.steps):
        begin = torch.randint(len(known) - size.length, (size.batch, 1), generator=draw)
        model(known[begin + window]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    begin = torch.linspace(0, len(held_out) - size.length - 1, size.held_out).long()[:, None]
    with torch.no_grad():
        return sum(float(model(part)) * len(part) for part in held_out[begin + window].split(32)) / size.held_out


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Two threads that share so short operations wait for each other where the machine is busy: up to ten times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trains(size: Size, name: str, margin: float) -> None:
    """No worse than AdamW in float32 by more than `margin`, as a part of the loss."""
    loss, reference = loss_of(size, name), loss_of(size, "float32")
    assert reference < 0.6 * math.log(VOCABULARY), "training has not got far enough to tell anything"
    assert loss <= reference * (1 + margin), f"{name}: {loss:.4f}, {loss / reference - 1:+.2%} to {reference:.4f}"


# Over four seeds formats were between -0.5 % and +0.3 %, which is chance in either direction, steps in backward between
# -0.5 % and +0.1 %, Lion between +2 % and +5 % at this rate, Muon between -5.5 % and -2.9 %. The text is of Python;
# that of Python 3.11.2 leaves Lion 10.8 % behind.
MARGINS = {"in backward": 0.01, "Lion": 0.15, "Muon": 0.0}


@pytest.mark.parametrize("name", [*FORMATS, *MARGINS])
def test_small(one_thread, name: str) -> None:
    trains(SMALL, name, MARGINS.get(name, 0.01))


def test_the_bar_tells_roundings_apart(one_thread) -> None:
    """What rounding to nearest costs 16-bit parameters (1.2 % to 2 % over four seeds) is more than what is allowed."""
    assert loss_of(SMALL, "nearest") > 1.01 * loss_of(SMALL, "float32")


@pytest.mark.slow  # one to two minutes each, Muon several times that
@pytest.mark.parametrize("name", [*FORMATS, *MARGINS])
def test_large(one_thread, name: str) -> None:
    # Clipping by the norm of the step before is another method: where norms jump, as with these few samples a step, it
    # was 1.6 % and 3.7 % behind over two seeds. Formats were between -0.1 % and +0.5 %.
    trains(LARGE, name, 0.06 if name == "in backward" else MARGINS.get(name, 0.01))
