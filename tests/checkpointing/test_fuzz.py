"""Random programs in segments of random policies, against plain autograd."""

from __future__ import annotations

import random

import pytest
import torch
from segments import ALL, gradients, relative
from torch import Tensor
from torch.nn import functional as F

import bigkernels.functional as BF
from bigkernels import checkpoint, saved_activations

ROWS, WIDTH = 96, 64  # above what is worth a code


def _in_place(a: Tensor) -> Tensor:
    y = a * 0.5  # saves nothing of its result
    y += 0.1
    return y


# From one or two tensors (ROWS, WIDTH), of about one, another. `w`: a weight (WIDTH, WIDTH).
UNARY = [
    lambda a, w: a.tanh(),
    lambda a, w: F.silu(a),
    lambda a, w: F.gelu(a),
    lambda a, w: a.sin(),
    lambda a, w: a @ w,
    lambda a, w: F.linear(a, w, w[0]),
    lambda a, w: F.layer_norm(a, (WIDTH,), w[0], w[1]),
    lambda a, w: BF.rms_norm(a, w[0]),
    lambda a, w: BF.layer_norm(a, w[0], w[1]),
    lambda a, w: a.T.reshape(WIDTH, ROWS).T,
    lambda a, w: a.view(8, 12, WIDTH).transpose(0, 1).reshape(ROWS, WIDTH),
    lambda a, w: torch.cat(a.chunk(4, dim=-1)[::-1], -1),
    lambda a, w: (a @ torch.cat((w, w), 1)).chunk(2, -1)[1],
    lambda a, w: a.softmax(-1) * 8,
    lambda a, w: F.dropout(a, 0.2),
    lambda a, w: a.detach() * 0.3 + a,
    lambda a, w: _in_place(a),
    lambda a, w: a.masked_fill(a > 2, 0.0),
    lambda a, w: a[:, None].expand(ROWS, 3, WIDTH).mean(1) + a.mean(-1, keepdim=True).sigmoid(),
    lambda a, w: a[torch.arange(ROWS - 1, -1, -1)],
]
BINARY = [
    lambda a, b, w: a + b,
    lambda a, b, w: a * b,
    lambda a, b, w: F.silu(a) * b,
    lambda a, b, w: BF.glu(a, b),
    lambda a, b, w: (a @ b.T / WIDTH).softmax(-1) @ b,
    lambda a, b, w: torch.where(a > b, a, b.sin()),
    lambda a, b, w: a.lerp(b.to(a.dtype), 0.3),
]


def program(seed: int):
    """A function of three tensors: x with a gradient, c without, and w."""
    draw = random.Random(seed)
    lines = []
    for i in range(draw.randint(2, 10)):
        known = i + 2
        if draw.random() < 0.6:
            lines.append((draw.choice(UNARY), (draw.randrange(known),)))
        else:
            lines.append((draw.choice(BINARY), (draw.randrange(known), draw.randrange(known))))
    several = draw.random() < 0.3
    inner = draw.choice(list(ALL)) if draw.random() < 0.3 else None
    begin, end = sorted((draw.randrange(len(lines)), len(lines)))

    def run(lines, values, w):
        for f, at in lines:
            values = [*values, f(*(values[i] for i in at), w)]
        return values

    def fn(x, c, *, w):
        values = run(lines[:begin], [x, c], w)
        if inner is None:
            values = run(lines[begin:end], values, w)
        else:
            values = checkpoint(run, lines[begin:end], values, w, policy=ALL[inner])
        out = values[-1] + 0.1 * x
        return {"out": out, "more": values[len(values) // 2]} if several else out

    return fn, inner


def flat(out) -> Tensor:
    return out["out"] + out["more"] if isinstance(out, dict) else out


@pytest.mark.parametrize("part", range(8))
def test_programs(part: int) -> None:
    for seed in range(part * 40, part * 40 + 40):
        fn, inner = program(seed)
        name = random.Random(-seed).choice(list(ALL))
        torch.manual_seed(seed)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        c, w = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH).div_(8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 5 == 0):
            torch.manual_seed(seed + 1)
            plain = flat(fn(x, c, w=w))
            torch.manual_seed(seed + 1)
            if ALL[name].keep is None and seed % 2:
                with saved_activations(ALL[name]):
                    out = flat(fn(x, c, w=w))
            else:
                out = flat(checkpoint(fn, x, c, policy=ALL[name], w=w))
        label = f"seed {seed}, {name}, {inner}"
        assert torch.equal(out, plain), label
        expected = gradients(plain, [x, w], retain_graph=True, allow_unused=True)
        for twice in (True, False):
            found = gradients(out, [x, w], retain_graph=twice, allow_unused=True)
            for f, e in zip(found, expected, strict=True):
                assert (f is None) == (e is None), label
                if e is None:
                    continue
                exact = ALL[name].code is None and (inner is None or ALL[inner].code is None)
                assert relative(f, e) <= (0.0 if exact else 0.3), label
