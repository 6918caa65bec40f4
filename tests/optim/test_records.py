"""The raw operators, handed records that are wrong: an error, and nothing is read or written by them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from bigkernels import optim
from bigkernels.ops import optimizer as ops
from bigkernels.optim._reference import RULES

N = 700
# Where they are in an `OptimizerTensor`.
WORDS = {
    "param": 0,
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "remainder": 7,
    "step": 9,
    "n": 10,
    "group": 11,
    "type": 12,
    "state type": 13,
}


def call():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(N))
    o = optim.AdamW([p])
    p.grad = torch.randn(N)
    o.step()
    plan = o._schedule.plans[0]
    grads, held = plan.gradients()
    arguments = list(o._arguments(plan, grads))
    return p, [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments], (o, held)


def words(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int64)


RECORDS = {
    **{f"{key} is missing": (0, WORDS[key], 0) for key in ("param", "exp_avg", "exp_avg_sq", "step")},
    "a remainder of float32": (0, WORDS["remainder"], 64),
    "more elements in a chunk than in its tensor": (0, WORDS["n"], N - 1),
    "fewer than no elements": (0, WORDS["n"], -5),
    "no such group": (0, WORDS["group"], 1),
    "a group before the first": (0, WORDS["group"], -1),
    "no such type": (0, WORDS["type"], 3),
    "no such state type": (0, WORDS["state type"], 7),
    "8 bits without scales": (0, WORDS["state type"], 2),
    "no such type of a gradient": (1, 1, 9),
    "no such tensor": (2, 0, 1),
    "a tensor before the first": (2, 0, -1),
    "a chunk that begins before its tensor": (2, 1, -256),
    "a chunk within a block": (2, 1, 100),
    "a chunk that ends before it begins": (2, 2, -1),
    "a chunk beyond its tensor": (2, 2, N + 1),
    "no such rounding": (3, 12, 5),
}


@pytest.mark.parametrize("wrong", RECORDS)
def test_numbers_in_records(wrong: str) -> None:
    p, arguments, held = call()
    before = p.detach().clone()
    argument, word, value = RECORDS[wrong]
    words(arguments[argument])[word] = value
    with pytest.raises(RuntimeError, match="optimizer_step"):
        ops.step(0, *arguments, None)
    with pytest.raises(RuntimeError, match="optimizer_step"):
        ops.measure(*arguments, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(p, before)


def test_lists_of_other_lengths_and_kinds() -> None:
    p, arguments, held = call()
    before = p.detach().clone()
    halves = [(i, lambda t: t[:-4]) for i in range(4)] + [(i, lambda t: words(t)[::2]) for i in range(4)]
    changes = [*halves, (0, lambda t: torch.cat([t, t])), (1, lambda t: torch.cat([t, t])), (3, lambda t: t[:0])]
    changes += [(i, lambda t: torch.ones((), dtype=torch.float16)) for i in (4, 5, 6, 7)]
    changes += [(i, lambda t: torch.ones(2)) for i in (4, 5, 6, 7)]
    for i, change in changes:
        wrong = list(arguments)
        wrong[i] = change(arguments[i])
        with pytest.raises(RuntimeError):
            ops.step(0, *wrong, None)
    for algorithm in (-1, 1 + max(rule.number for rule in RULES.values())):
        with pytest.raises(RuntimeError, match="algorithm"):
            ops.step(algorithm, *arguments, None)
    for trust in (torch.ones(2), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="trust"):
            ops.step(5, *arguments, trust)
    assert torch.equal(p, before)


def test_states_that_an_algorithm_does_not_know() -> None:
    p, arguments, held = call()
    for algorithm in (1, 3, 4, 6):  # of one state at most
        with pytest.raises(RuntimeError, match="no such state"):
            ops.step(algorithm, *arguments, None)


def test_a_thread_that_steps_when_the_interpreter_ends() -> None:
    code = """
        import threading, time, torch
        from bigkernels import optim
        params = [torch.nn.Parameter(torch.ones(20000)) for _ in range(8)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = optim.AdamW(params)
        began = threading.Event()

        def train():
            while True:
                optimizer.step()
                began.set()

        threading.Thread(target=train, daemon=True).start()
        began.wait()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
