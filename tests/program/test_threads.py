"""Programs on a team of threads: the same bits as on one, whatever becomes of the threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from step_programs import Maker, no_records, run

from bigkernels._load import cpu_library
from bigkernels.ops import program as raw

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    raw.delays(0)


def model(layers: int, width: int, inner: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, Maker]:
    """Norms, products with epilogues, sums and activations, small and large enough to be divided."""
    g = torch.Generator().manual_seed(seed)
    m = Maker(width)

    def weight(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=g) / k**0.5

    x = m.hidden
    for layer in range(layers):
        y = m.norm(x, weight=torch.rand(width, generator=g) + 0.5)
        (a, b) = m.product(y, weight(width, width), weight(32, width))
        (c,) = m.product(m.activate(a, "tanh"), weight(width, width), residual=x)
        d = m.norm(c, residual=x if layer % 2 else -1)
        (h,) = m.product(d, weight(inner, width), weight(inner, width), act="silu", gated=True)
        (x,) = m.product(h, weight(width, inner), residual=c, bias=[torch.randn(width, generator=g)])
        (e,) = m.product(b, weight(width, 32))
        x = m.combine((x, 1.0, None), (e, 0.5, None))
    (logits,) = m.product(m.norm(m.keep(x)), weight(vocabulary, width))
    return m.program(logits), m


SHAPES = ((1, 1, 1), (2, 3, 1), (1, 64, 64), (3, 150, 2))  # batch, tokens, kept: with help, and without


@pytest.fixture(scope="module")
def programs():
    made = [(*model(3, 48, 96, 200, 1), 200), (*model(2, 160, 80, 130, 2), 130)]
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(3)
    cases = []
    for program, m, width in made:
        for batch, tokens, keep in SHAPES:
            x = torch.randn(batch, tokens, m.widths[0], generator=g)
            cases.append((program, m, x, width, keep, run(program, x, width, keep=keep)))
    return cases


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_give_the_bits_of_one(programs, threads):
    torch.set_num_threads(threads)
    for _ in range(20):
        for program, _m, x, width, keep, expected in programs:
            assert torch.equal(run(program, x, width, keep=keep), expected)


def test_threads_that_lose_their_cores(programs):
    """Pauses at random wherever a thread could be stopped: chunks are taken over, and made again by others."""
    torch.set_num_threads(4)
    raw.delays(40)
    counts = torch.zeros(2, dtype=torch.int64)
    for i in range(1200):
        program, _m, x, width, keep, expected = programs[(0, 4, 0, 1, 5, 2)[i % 6]]
        assert torch.equal(run(program, x, width, keep=keep), expected), i
        if i % 50 == 0:
            raw.settle()
            counts += torch.tensor(raw.delays(40))
    taken_over, made_again = counts.tolist()
    assert taken_over > 100 and made_again > 20


def test_callers_that_meet(programs):
    """The second of two callers works alone, and neither sees the other's values."""
    torch.set_num_threads(2)
    wrong: list[int] = []

    def call(first: int) -> None:
        for i in range(150):
            program, _m, x, width, keep, expected = programs[(first + i) % len(programs)]
            if not torch.equal(run(program, x, width, keep=keep), expected):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_number_of_threads_changes_between_calls(programs):
    program, _m, x, width, keep, expected = programs[0]
    for threads in (1, 5, 2, 9, 1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(program, x, width, keep=keep), expected)


def _in_child(programs, queue) -> None:
    torch.set_num_threads(3)
    queue.put(all(torch.equal(run(p, x, width, keep=keep), e) for p, _m, x, width, keep, e in programs))


def test_a_forked_child_has_a_team_of_its_own(programs):
    torch.set_num_threads(3)
    program, _m, x, width, keep, expected = programs[0]
    run(program, x, width, keep=keep)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(programs, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get()
    assert torch.equal(run(program, x, width, keep=keep), expected)


def test_the_models_own_code_runs_between_threads(programs):
    torch.set_num_threads(4)
    g = torch.Generator().manual_seed(6)
    m = Maker(40)
    w1, w2, w3 = (torch.randn(40, 40, generator=g) / 6 for _ in range(3))
    (a,) = m.product(m.norm(m.hidden), w1, residual=m.hidden)
    (b,) = m.call([a], [40])
    (c,) = m.product(b, w2, residual=a)
    (d,) = m.call([c, b], [40])
    (logits,) = m.product(m.combine((d, 1.0, None), (m.hidden, 1.0, None)), w3)
    program = m.program(logits)
    x = torch.randn(1, 2, 40, generator=g)
    positions = torch.zeros(1, 2, dtype=torch.int64)

    def call() -> torch.Tensor:
        number = raw.start(program, x, positions, None, no_records(15), no_records(), 2, 0)
        try:
            u, v, w, out = (torch.empty(1, 2, 40) for _ in range(4))
            assert raw.step(number) == 2
            raw.read(number, a, u)
            raw.write(number, b, u.sin())
            assert raw.step(number) == 4
            raw.read(number, c, v)
            raw.read(number, b, w)
            raw.write(number, d, v * w)
            assert raw.step(number) == -1
            raw.read(number, logits, out)
            return out
        finally:
            raw.finish(number)

    torch.set_num_threads(1)
    expected = call()
    torch.set_num_threads(4)
    raw.delays(20)
    for _ in range(200):
        assert torch.equal(call(), expected)
    h = x.double()
    a64 = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) @ w1.double().T + h
    d64 = (a64.sin() @ w2.double().T + a64) * a64.sin()
    torch.testing.assert_close(expected.double(), (d64 + h) @ w3.double().T, rtol=1e-4, atol=1e-4)


def decoder(
    layers: int,
    width: int,
    heads: int,
    d: int,
    capacity: int,
    dtype: torch.dtype,
    batch: int = 1,
    norm: torch.Tensor | None = None,
):
    """A program with a cache of `capacity` slots: (program, its caches, what keeps them alive, its rotary table)."""
    g = torch.Generator().manual_seed(8)
    m = Maker(width)

    def weight(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=g) / k**0.5).to(dtype)

    angle = torch.arange(capacity)[:, None] * torch.rand(1, d, generator=g)
    table = [angle.cos(), angle.sin()]
    angles = torch.tensor([[table[0].data_ptr(), table[1].data_ptr(), 0, d, capacity]])
    x = m.hidden
    for layer in range(layers):
        q, k, v = m.product(m.norm(x), weight(heads * d, width), weight(d, width), weight(d, width))
        q = m.heads(q, k, v, heads, 1, d, layer, norm)
        (y,) = m.product(m.attend(q, layer, heads, 1, d), weight(width, heads * d))
        x = m.combine((x, 1.0, None), (y, 1.0, None))
    (logits,) = m.product(m.keep(x), weight(64, width))
    caches, kept = torch.zeros(layers, 15, dtype=torch.int64), []
    for layer in range(layers):
        k, v = (torch.zeros(batch, 1, capacity, d, dtype=dtype) for _ in range(2))
        kept.append((k, v))
        strides = [capacity * d, capacity * d, d]
        caches[layer, :11] = torch.tensor([k.data_ptr(), v.data_ptr(), *strides, *strides, 0, capacity, 0])
        caches[layer, 10] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    return m.program(logits, angles=1), caches, kept, (angles, table, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_cached_and_cropped(dtype):
    """Keys long enough to be cut, several tokens at once, and a cache that is cropped and written again."""
    program, caches, kept, (angles, _table, _m) = decoder(3, 48, 6, 64, 1400, dtype)
    g = torch.Generator().manual_seed(9)
    inputs = [torch.randn(1, n, 48, generator=g) for n in (1200, *[1] * 30, 5, 1, 1, 3, 1)]

    def generate(crops: bool) -> list[torch.Tensor]:
        out, past = [], 0
        for i, x in enumerate(inputs):
            caches[:, 8] = past
            out.append(run(program, x, 64, past=past, caches=caches, angles=angles))
            past += x.shape[1]
            if crops and i % 7 == 6:
                raw.settle()
                for k, v in kept:
                    k[:, :, past - 1 :], v[:, :, past - 1 :] = -1.0, -1.0
                past -= 1
        return out + [t[:, :, :past].clone() for pair in kept for t in pair]

    torch.set_num_threads(1)
    expected = {crops: generate(crops) for crops in (False, True)}
    torch.set_num_threads(4)
    raw.delays(30)
    for crops in (False, True) * 3:
        for a, b in zip(generate(crops), expected[crops], strict=True):
            assert torch.equal(a, b)
        raw.settle()


def test_late_threads_and_a_norm_that_is_edited():
    """Once a call has returned its weights may change, whoever is still inside it: the cache has the call's keys."""
    weight = torch.linspace(0.5, 1.5, 64)
    program, caches, kept, (angles, _table, _m) = decoder(2, 48, 6, 64, 64, torch.float32, norm=weight)
    g = torch.Generator().manual_seed(9)
    inputs = [torch.randn(1, 1, 48, generator=g) for _ in range(8)]

    def call(x: torch.Tensor, **options) -> torch.Tensor:
        for k, v in kept:
            k[:], v[:] = 0, 0
        return run(program, x, 64, caches=caches, angles=angles, **options)

    torch.set_num_threads(1)
    expected = [(call(x), [t.clone() for pair in kept for t in pair]) for x in inputs]
    torch.set_num_threads(4)
    raw.delays(8)
    for _ in range(25):
        for x, (logits, keys) in zip(inputs, expected, strict=True):
            assert torch.equal(call(x, settle=False), logits)
            weight.neg_()
            raw.settle()
            weight.neg_()
            assert all(map(torch.equal, [t for pair in kept for t in pair], keys))


_SPINNING = """
import time, torch
from step_programs import Maker, run
torch.set_num_threads({threads})
m = Maker(16)
program = m.program(m.keep(m.combine((m.hidden, 2.0, None))))
x, logits = torch.randn(1, 1, 16), torch.randn(1, 1 << 16, dtype=torch.bfloat16)
def token():
    run(program, x, 16)
    logits.float()
    time.sleep(0.004)
for _ in range(20):
    token()
start = time.process_time()
for _ in range(50):
    token()
print((time.process_time() - start) / 50)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of GNU's OpenMP")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: OpenMP's threads do not spin")
def test_torchs_threads_do_not_spin_between_tokens():
    """They would take the team's cores: milliseconds after each operator that torch divides."""
    cores = len(os.sched_getaffinity(0))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = _SPINNING.format(threads=cores)
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(out.stdout) < 0.0015 * cores / 2
