"""Which results a segment keeps: by operator, by measured time and a budget, and how they are handed out."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from segments import compare, gradients, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bigkernels.functional as BF
from bigkernels import apply_checkpointing, checkpoint
from bigkernels.checkpointing import _select, int8, selective
from bigkernels.checkpointing._select import Plan
from bigkernels.memory import peak


class Count(TorchDispatchMode):
    """Calls of each operator that is really computed: below every segment's modes."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def block(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (x @ w, x @ w.T, x @ (w + 1)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + F.silu(y.transpose(1, 2).flatten(2) @ w).exp().sin()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 64, 64, requires_grad=True)


@pytest.fixture
def w() -> Tensor:
    return torch.randn(64, 64).div_(8).requires_grad_()


def computed(fn, args, tensors, policy) -> Counter:
    """What backward computes beyond that of a plain call."""
    counts = []
    for run in (fn, lambda *a: checkpoint(fn, *a, policy=policy)):
        out = run(*args)
        with Count() as count:
            gradients(out, tensors)
        counts.append(count.calls)
    return counts[1] - counts[0]


def test_products_and_attention_are_not_run_again(x, w) -> None:
    assert compare(block, (x, w), [x, w], selective(budget=None)) == [0, 0]
    more = computed(block, (x, w), [x, w], selective(budget=None))
    assert not set(more) & (_select.PRODUCTS | _select.ATTENTION)
    assert (
        more["aten::silu"] == more["aten::exp"] == 1 and more["aten::sin"] == 0
    )  # sin is after the last that is saved
    everything = computed(block, (x, w), [x, w], "recompute")
    assert everything["aten::mm"] + everything["aten::bmm"] == 4


def test_our_operators() -> None:
    q = torch.randn(2, 4, 64, 16, requires_grad=True)

    def fn(q):
        return BF.attention(q.sin(), q.cos(), q, causal=True).exp().sin()

    for policy in (selective(budget=None), selective(["bigkernels::attention_fwd"])):
        assert compare(fn, (q,), [q], policy) == [0]
        assert computed(fn, (q,), [q], policy)["bigkernels::attention_fwd"] == 0
    assert computed(fn, (q,), [q], "recompute")["bigkernels::attention_fwd"] == 1


def test_named_operators(x, w) -> None:
    policy = selective(["aten::exp", torch.ops.aten.silu.default])
    assert compare(block, (x, w), [x, w], policy) == [0, 0]
    more = computed(block, (x, w), [x, w], policy)
    assert more["aten::exp"] == more["aten::silu"] == 0 and more["aten::mm"] + more["aten::bmm"] > 0


def test_any_kind_of_result(x) -> None:
    """Tuples with and without tensors, lists, and operators of several tensors."""

    def fn(x):
        values, index = x.topk(16)
        a = torch._foreach_exp([x, values])
        y = torch.native_layer_norm(a[0], [64], None, None, 1e-5)[0]
        return (y.sum(-1, keepdim=True) * a[1].sin() * index).tanh() + torch.var_mean(values, -1, keepdim=True)[0]

    names = ["aten::topk", "aten::_foreach_exp", "aten::native_layer_norm", "aten::var_mean"]
    assert compare(fn, (x,), [x], selective(names)) == [0]
    assert compare(fn, (x,), [x], selective(budget=1.0)) == [0]


def test_results_that_are_no_tensors() -> None:
    """CUDA's attention returns integers and nothing beside its tensors."""
    library = torch.library.Library("bigkernels_test", "DEF")
    library.define("mixed(Tensor x) -> (Tensor, int, Tensor, float)")
    library.impl("mixed", lambda x: (x.exp(), 3, x + 1, 0.5), "CPU")
    op = torch.ops.bigkernels_test.mixed

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, three, more, half = op(x)
            assert (three, half) == (3, 0.5)
            ctx.save_for_backward(y, more)
            return y

        @staticmethod
        def backward(ctx, g):
            y, more = ctx.saved_tensors
            return g * y * more

    x = torch.randn(8, 8, requires_grad=True)
    assert compare(lambda x: Mixed.apply(x).sin(), (x,), [x], selective([op])) == [0]
    assert computed(lambda x: Mixed.apply(x).sin(), (x,), [x], selective([op]))["bigkernels_test::mixed"] == 0
    library._destroy()


@pytest.mark.parametrize("names", [["aten::native_dropout"], ["aten::bernoulli", "aten::rand_like", "aten::rand"]])
def test_random_results(names, x) -> None:
    """Numbers drawn by what is kept are drawn again, or those after it would be others."""

    def fn(x):
        y = torch.native_dropout(x, 0.3, True)[0].exp()
        y = y * torch.bernoulli(torch.full_like(x, 0.5)) * torch.rand_like(x) + torch.rand(64)
        return F.dropout(y.sin(), 0.5).exp().sin()

    for policy in (selective(names), selective(budget=1.0)):
        for _ in range(2):
            assert compare(fn, (x,), [x], policy) == [0]


def test_conversions_that_autocast_remembers(w) -> None:
    """The second call finds the weight converted, its second run does not, and the other way round."""
    x = torch.randn(64, 64, requires_grad=True)

    def fn(x):
        return (x @ w).exp().sin() @ w

    def run(call, inside):
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            outs = [call(x * i).float() for i in (1, 2)]
            if inside:
                found = [g for o in outs for g in gradients(o, [x, w])]
        return found or [g for o in outs for g in gradients(o, [x, w])]

    for policy in (
        selective(["aten::exp"]),
        selective(["aten::_to_copy"]),
        selective(budget=None),
        selective(budget=1.0),
    ):
        for inside in (True, False):
            found = run(lambda x, policy=policy: checkpoint(fn, x, policy=policy), inside)
            assert all(map(torch.equal, found, run(fn, inside)))


def test_segments_of_different_policies_in_one_another(x, w) -> None:
    inner = lambda x: checkpoint(block, x, w, policy=selective(["aten::exp"]))  # noqa: E731
    fn = lambda x: block(inner(x).tanh(), w).sin()  # noqa: E731
    assert compare(fn, (x,), [x, w], selective(budget=None)) == [0, 0]


# ---- budgets ---------------------------------------------------------------------------------------------------------


def wide(x: Tensor, w: Tensor) -> Tensor:
    """Each line keeps one tensor of x's size: two for products, which take longest, and others."""
    for _ in range(4):
        x = (x @ w).sin()
        x = x.exp().cos() + 1
    return x


def saved(policy, x: Tensor, w: Tensor, runs: int = 3) -> int:
    """Bytes that a segment holds, beside its input and its output."""
    for _ in range(runs):
        y = x * 1
        with peak() as p:
            out = wide(y, w) if policy is None else checkpoint(wide, y, w, policy=policy)
        nbytes = out.nbytes
        gradients(out, [x, w])
        del out
    return p.end - nbytes


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6, 1.0])
def test_a_fraction_is_kept(budget: float) -> None:
    x, w = torch.randn(1024, 128, requires_grad=True), torch.randn(128, 128).div_(12).requires_grad_()
    everything = saved(None, x, w) + x.nbytes  # with the input
    kept = saved(selective(budget=budget), x, w)
    assert kept <= budget * everything * 1.01
    assert kept + 2 * x.nbytes >= min(budget, 0.6) * everything, "it has not made use of what it may keep"


def test_bytes_are_kept() -> None:
    x, w = torch.randn(1024, 128, requires_grad=True), torch.randn(128, 128).div_(12).requires_grad_()
    for tensors in (1, 3):
        assert (
            tensors * x.nbytes * 0.99 <= saved(selective(budget=tensors * x.nbytes), x, w) <= tensors * x.nbytes * 1.01
        )
    assert saved(selective(budget=100), x, w) <= 4096


def test_what_takes_longest_a_byte_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread's own time: another process may take the core in the middle of an operator.
    monkeypatch.setattr(_select, "time", SimpleNamespace(perf_counter=time.thread_time))
    x, w = torch.randn(16, 4096, requires_grad=True), torch.randn(4096, 4096).div_(64).requires_grad_()
    policy = selective(budget=4 * x.nbytes)
    for _ in range(2):
        checkpoint(wide, x, w, policy=policy).sum().backward()
    more = computed(wide, (x, w), [x, w], policy)
    assert more["aten::mm"] == 0 and more["aten::exp"] == 4


def test_chosen_by_time_a_byte() -> None:
    calls = {
        ("a", 0): (4.0, 4),
        ("b", 0): (3.0, 1),
        ("c", 0): (0.5, 1),
        ("d", 0): (100.0, 50),
        ("a", 1): (9.0, 3),
        ("a", 2): (99.0, 1),
        ("v", 0): (1.0, 0),
    }
    plan = Plan(selective(budget=8).keep)
    plan.calls = {key: _select._Call(*c) for key, c in calls.items()}
    plan.learn({"a": 2, "b": 1, "c": 1, "d": 1})
    assert plan.chosen == {("a", 0), ("b", 0), ("a", 1)}  # the third "a" is not reached, "d" does not fit
    named = Plan(selective(["c", "d", "b"], budget=50).keep)
    named.calls = {key: _select._Call(*c) for key, c in calls.items()}
    named.learn({"a": 3, "b": 1, "c": 1, "d": 1})
    assert named.chosen == {("b", 0), ("c", 0)}
    assert [key for key in calls if named.keeps(key)] == [("b", 0), ("c", 0)]


class Once:
    """Does something in the first run of a segment that it does not do in the second."""

    def __init__(self, what):
        self.what, self.runs = what, 0

    def __call__(self):
        self.runs += 1
        return self.what() if self.runs % 2 else None


@pytest.mark.parametrize("policy", [selective(budget=None), selective(budget=1.0), selective(["aten::mm"])], ids=str)
def test_operators_of_only_one_run(x, w, policy) -> None:
    """As hooks that gather parameters: whatever they call, results go to where they belong."""
    other = torch.randn(64, 64)
    flat = x.flatten(0, 1)
    extras = {
        "others": lambda: (torch.empty(3), torch.exp(other), torch.cat([other, other])),
        "of another shape": lambda: other[:3] @ other,
        "the same": lambda: other.repeat(2, 1) @ w.detach(),
    }
    for extra in extras.values():

        def fn(x, once):
            y = (flat @ w).sin()
            once()
            return (y @ w.T).exp().sin() @ w

        for _ in range(3):
            once = Once(extra)
            expected = gradients(fn(x, lambda: None), [x, w])
            found = gradients(checkpoint(fn, x, once, policy=policy), [x, w])
            assert all(map(torch.equal, found, expected)) and once.runs >= 2


def test_blocks_learn(x) -> None:
    layer = lambda: nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)  # noqa: E731
    model = nn.Sequential(nn.ModuleList([layer() for _ in range(3)]))
    blocks = model[0]

    def run(x):
        for b in blocks:
            x = b(x)
        return gradients(x, blocks.parameters())

    expected = run(x)
    apply_checkpointing(model, selective(budget=0.4))
    for _ in range(3):
        assert all(map(torch.equal, run(x), expected))


def test_kept_in_8_bits(x, w) -> None:
    exact, coded = (
        sum(
            v.tensor.nbytes if isinstance(v, _select.Exact) else v.kept.values.nbytes + v.kept.scale.nbytes
            for k in results.kept.values()
            for v in k.values
            if isinstance(v, (_select.Exact, _select.Packed))
        )
        for results in (_results(x, w, None), _results(x, w, int8()))
    )
    assert coded < 0.3 * exact
    errors = compare(block, (x, w), [x, w], selective(budget=None) + int8())
    assert 0 < max(errors) < 0.02


def _results(x, w, code):
    results = _select.Results(Plan(selective(budget=None).keep), None if code is None else _select.Saver(code))
    with results.forward():
        block(x, w)
    return results


def test_a_failed_run_teaches_nothing(x, w) -> None:
    plan = []

    def fn(x):
        y = block(x, w)
        if not plan:
            plan.append(1)
            raise KeyError
        return y

    policy = selective(budget=0.5)
    with pytest.raises(KeyError):
        checkpoint(fn, x, policy=policy)
    for _ in range(3):
        assert relative(*gradients(checkpoint(fn, x, policy=policy), [x]), *gradients(block(x, w), [x])) == 0
