"""Attention over sequences that are cut over ranks: outputs, gradients and bytes, against one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import Checks
from torch import Tensor

import bigkernels
from bigkernels._compare import compare
from bigkernels.distributed import (
    all_to_all_attention,
    count_traffic,
    gather_sequence,
    ring_attention,
    shard_positions,
    shard_sequence,
)
from bigkernels.distributed._layout import blocks, runs
from bigkernels.functional import attention, varlen_attention

checks = Checks(__file__, ranks=4)
outcomes = checks.fixture()

FUNCTIONS = {"ring": ring_attention, "all_to_all": all_to_all_attention}
S, B, H, HK, D, DV = 53, 2, 8, 2, 16, 24


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def options() -> dict[str, dict]:
    bias, slopes, sinks = draw(B, H, S, S), draw(H).abs(), draw(H)
    mask = draw(B, 1, S, S, seed=4) > 0
    ends = torch.tensor([0, 5, 5, 9, 40, 43, 51])
    return {
        "all": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (7, 3)},
        "both sides": {"window": (9, 4)},
        "narrow": {"window": (2, 0)},
        "softcap": {"causal": True, "softcap": 1.5, "scale": 0.7},
        "bias": {"bias": bias},
        "bias of keys": {"bias": draw(1, H, 1, S), "causal": True},
        "bias of queries": {"bias": draw(S, 1)},
        "mask": {"mask": mask},
        "padding": {"mask": draw(B, 1, 1, S) > -0.5, "causal": True},
        "alibi": {"alibi_slopes": slopes, "causal": True},
        "alibi, both sides": {"alibi_slopes": slopes},
        "alibi and bias": {"alibi_slopes": slopes, "bias": bias, "causal": True},
        "sinks": {"sinks": sinks, "causal": True, "window": (5, 0)},
        "prefix": {"prefix_lengths": torch.tensor([20, 3]), "causal": True},
        "dropout": {"dropout_p": 0.3, "causal": True},
        "dropout, bias, sinks": {"dropout_p": 0.3, "bias": bias, "window": (11, 30), "sinks": sinks},
        "packed": {"causal": True, "cu_seqlens": ends},
        "packed, window": {"window": (4, 2), "cu_seqlens": ends},
        "packed, dropout, sinks": {"dropout_p": 0.4, "causal": True, "sinks": sinks, "cu_seqlens": ends},
        "packed, alibi": {"alibi_slopes": slopes, "cu_seqlens": ends},
        "packed, prefix": {"causal": True, "prefix_lengths": torch.tensor([3, 0, 0, 9, 2, 5]), "cu_seqlens": ends},
    }


class Case:
    """One call: of one process in some dtype, and of the ranks of a group."""

    def __init__(self, given: dict, length: int = S, heads: int = H, groups: int = HK, of_lse: bool = True):
        self.given, self.packed, self.of_lse = given, "cu_seqlens" in given, of_lse
        batch = 1 if self.packed else B
        self.q, self.k = draw(batch, heads, length, D, seed=5), draw(batch, groups, length, D, seed=6)
        self.v, self.grad = draw(batch, groups, length, DV, seed=7), draw(batch, heads, length, DV, seed=8)
        self.grad_lse = draw(batch, heads, length, seed=9)

    def _run(self, function, dtype, q, k, v, grad, grad_lse, given):
        q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in (q, k, v))
        given = {
            n: t.to(dtype, copy=True) if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in given.items()
        }
        leaves = [given[n].requires_grad_() for n in ("bias", "sinks") if n in given]
        torch.manual_seed(11)
        if self.packed:
            out, lse = function(*(t[0].transpose(0, 1) for t in (q, k, v)), return_lse=True, **given)
            out, lse = out.transpose(0, 1)[None], lse[None]
        else:
            out, lse = function(q, k, v, return_lse=True, **given)
        lse = torch.where(lse.isfinite(), lse, 0.0)
        wide = torch.promote_types(dtype, torch.float32)
        loss = (out.to(wide) * grad.to(dtype).to(wide)).sum()
        if self.of_lse:
            loss = loss + (lse * grad_lse.to(wide)).sum()
        loss.backward()
        return [t.detach() for t in (out, lse, q.grad, k.grad, v.grad, *(leaf.grad for leaf in leaves))]

    def whole(self, dtype: torch.dtype) -> list[Tensor]:
        given, function = dict(self.given), attention
        if self.packed:
            ends = given.pop("cu_seqlens")

            def function(q, k, v, **options):
                return varlen_attention(q, k, v, ends, ends, S, S, **options)

        return self._run(function, dtype, self.q, self.k, self.v, self.grad, self.grad_lse, given)

    def cut(self, function, dtype: torch.dtype, **where) -> list[Tensor]:
        """The results of all ranks together."""
        at = {n: where[n] for n in ("group", "placement") if n in where}

        def part(t, dim):
            return shard_sequence(t, dim=dim, **at)

        given = dict(self.given) | where
        for name in ("bias", "mask"):
            t = given.get(name)
            if t is not None and t.shape[-2] > 1:
                given[name] = part(t, t.dim() - 2)
        mine = self._run(
            function, dtype, *(part(t, 2) for t in (self.q, self.k, self.v, self.grad, self.grad_lse)), given
        )
        found = [gather_sequence(t, dim=2, **at) for t in mine[:5]]
        for name, grad in zip([n for n in ("bias", "sinks") if n in self.given], mine[5:], strict=True):
            if name == "bias" and grad.shape[-2] > 1:
                found.append(gather_sequence(grad, dim=grad.dim() - 2, **at))
            else:
                total = grad.float()
                dist.all_reduce(total, group=where.get("group"))
                found.append(total.to(grad.dtype))
        return found


def judge(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Parts are added up in float32, each rounded to the dtype: two roundings at the scale of rows, but of gradients of
    scores, which cancel in rows of few keys.
    """
    for i, (a, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        comparison = compare(a, p.to(a.dtype), e, roundings=2.0, scale="row" if i < 5 else "tensor")
        assert comparison.ok, f"result {i}: {comparison}"


@checks(*(f"{name}: {function}" for name in options() for function in FUNCTIONS))
def as_one_process(case: str) -> None:
    name, function = case.split(": ")
    at = list(options()).index(name)
    made = Case(options()[name], of_lse=at % 3 == 0 or name == "bias of queries")
    dtype = (torch.float32, torch.bfloat16)[at % 2]
    exact = made.whole(torch.float64)
    with bigkernels.use("reference"):
        plain = made.whole(dtype)
    for placement in ("contiguous", "zigzag"):
        judge(made.cut(FUNCTIONS[function], dtype, placement=placement), plain, exact)


@checks("ring", "all_to_all")
def in_float64(function: str) -> None:
    for name in ("window", "bias", "dropout", "packed, dropout, sinks", "prefix"):
        made = Case(options()[name])
        for a, e in zip(made.cut(FUNCTIONS[function], torch.float64), made.whole(torch.float64), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6 if e.dim() == 1 else 1e-9)


@checks()
def other_shapes() -> None:
    """Fewer tokens than runs, heads that do not divide, a head a query head, groups of two ranks."""
    for length, heads, groups in ((5, 4, 4), (2, 4, 1), (53, 6, 3), (18, 5, 5)):
        for function in FUNCTIONS.values():
            made = Case({"causal": True}, length, heads, groups, of_lse=False)
            exact, plain = made.whole(torch.float64), made.whole(torch.float32)
            judge(made.cut(function, torch.float32, placement="zigzag"), plain, exact)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[dist.get_rank() // 2]
    for function in FUNCTIONS.values():
        made = Case({"causal": True})
        judge(made.cut(function, torch.float32, group=mine), made.whole(torch.float32), made.whole(torch.float64))


@checks()
def unequal_parts() -> None:
    """Ranks that hold other numbers of tokens than `shard_sequence` gives them, one of them none."""
    lengths = [7, 0, 25, 21]
    begin = sum(lengths[: dist.get_rank()])
    end = begin + lengths[dist.get_rank()]
    made = Case({})
    whole = made.whole(torch.float64)
    for function in FUNCTIONS.values():
        for told in (None, lengths):
            q, k, v = (t[:, :, begin:end].clone().requires_grad_() for t in (made.q, made.k, made.v))
            out = function(q, k, v, causal=False, lengths=told)
            out, lse = function(q, k, v, return_lse=True, lengths=told)
            ((out * made.grad[:, :, begin:end]).sum() + (lse * made.grad_lse[:, :, begin:end]).sum()).backward()
            for a, e in zip((out, lse, q.grad, k.grad, v.grad), whole, strict=False):
                torch.testing.assert_close(a, e[:, :, begin:end].float(), rtol=1e-4, atol=1e-5)


@checks()
def bytes_sent() -> None:
    """What the docstrings say; less with a causal mask and with a window."""
    rank, ranks, length = dist.get_rank(), 4, 64
    made = Case({}, length)
    mine = length // ranks
    keys = B * mine * HK * (D + DV) * 4
    for given, forward in (
        ({}, 3 * keys),
        ({"causal": True}, (3 - rank) * keys),  # later ranks need this rank's keys
        ({"causal": True, "window": (3, 0)}, keys // mine * 3 if rank < 3 else 0),
    ):
        q, k, v = (shard_sequence(t, dim=2).requires_grad_() for t in (made.q, made.k, made.v))
        with count_traffic() as traffic:
            out = ring_attention(q, k, v, **given)
        assert traffic.nbytes == forward, (given, traffic)
        with count_traffic() as traffic:
            out.sum().backward()
        if not given:
            assert traffic.nbytes == 2 * forward and traffic.messages == 6
        total = torch.tensor([traffic.nbytes])
        dist.all_reduce(total)
        once = torch.tensor([forward])
        dist.all_reduce(once)
        assert total == 2 * once, given
    q, k, v = (shard_sequence(t, dim=2).requires_grad_() for t in (made.q, made.k, made.v))
    with count_traffic() as traffic:
        out = all_to_all_attention(q, k, v, causal=True)
    expected = 3 * B * mine * (H // ranks * (D + DV) + 1 * (D + DV)) * 4
    assert traffic.nbytes == expected
    with count_traffic() as traffic:
        out.sum().backward()
    assert traffic.nbytes == expected


@checks()
def memory_of_a_rank() -> None:
    """What forward leaves for backward is of this rank's tokens alone."""
    made = Case({}, 64)
    saved = []
    q, k, v = (shard_sequence(t, dim=2).requires_grad_() for t in (made.q, made.k, made.v))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ring_attention(q, k, v, causal=True)
    assert sum(saved) == sum(t.numel() for t in (q, k, v)) + B * H * 16 * (DV + 1)


@checks()
def heads_are_those_of_one_process() -> None:
    """All-to-all gives each head to one rank, which computes what one process does: the same bits forward."""
    made = Case({"causal": True})
    whole = attention(made.q, made.k, made.v, causal=True)
    parts = (shard_sequence(t, dim=2) for t in (made.q, made.k, made.v))
    assert torch.equal(gather_sequence(all_to_all_attention(*parts, causal=True), dim=2), whole)


@checks()
def what_ranks_differ_in_is_refused() -> None:
    q, k, v = (draw(1, 4, 6, 16) for _ in range(3))
    for function in FUNCTIONS.values():
        path = f"bigkernels.distributed.{function.__name__}"
        with pytest.raises(ValueError, match=f"{path}: ranks differ in causal or window: right: 0, -1, -1, -1"):
            function(q, k, v, causal=dist.get_rank() == 0)
        with pytest.raises(ValueError, match=f"{path}: ranks differ in the dtype"):
            function(*(t.bfloat16() if dist.get_rank() == 2 else t for t in (q, k, v)))
        out = function(q, k, v.requires_grad_())
        if function is ring_attention:
            with pytest.raises(RuntimeError, match="derivatives of its gradients"):
                torch.autograd.grad(out.sum(), v, create_graph=True)
        v = v.detach()
        for given, message in (
            ({"placement": "middle"}, "placement is 'middle'"),
            ({"window": (-2, 0)}, "window is"),
            ({"dropout_p": 1.0}, "dropout_p is 1.0"),
            ({"lengths": [6, 6]}, "lengths are"),
            ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes get no gradient"),
            ({"bias": torch.zeros(6, 6)}, "S of all ranks"),
        ):
            with pytest.raises(ValueError, match=f"{path}: .*{message}" if "S of" in message else f"{path}: {message}"):
                function(q, k, v, **given)
        ends = torch.tensor([0, 24])
        tokens = [t[0].transpose(0, 1) for t in (q, k, v)]
        with pytest.raises(ValueError, match="bias does not go with cu_seqlens"):
            function(*tokens, cu_seqlens=ends, bias=torch.zeros(6, 24))
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            function(*tokens, cu_seqlens=torch.tensor([0, 25]))
    with pytest.raises(ValueError, match="3 heads for 4 ranks"):
        all_to_all_attention(*(draw(1, 3, 6, 16) for _ in range(3)))


@checks()
def parts_and_wholes() -> None:
    t = draw(3, 11, 2, 5)
    for placement in ("contiguous", "zigzag"):
        leaf = t.clone().requires_grad_()
        part = shard_sequence(leaf, dim=1, placement=placement)
        assert torch.equal(part, t[:, shard_positions(11, placement=placement)])
        whole = gather_sequence(part, dim=1, placement=placement)
        assert torch.equal(whole, t)
        (whole * t).sum().backward()
        part = shard_positions(11, placement=placement)
        assert torch.equal(leaf.grad[:, part], 4 * t[:, part]) and leaf.grad.count_nonzero() == part.numel() * 30


@pytest.mark.parametrize("name", checks.names)
def test_four_processes(name: str, outcomes: dict) -> None:
    checks.judge(outcomes[name])


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 4, 4], [1, 0, 7], [3, 2, 2, 2, 2]])
def test_runs_hold_each_token_once(placement: str, lengths: list[int]) -> None:
    held = runs(lengths, placement)
    assert [sum(run.length for run in of) for of in held] == lengths
    assert sorted(at for of in held for run in of for at in range(run.at, run.at + run.length)) == [
        *range(sum(lengths))
    ]


def test_a_zigzag_is_as_much_work_for_each_rank() -> None:
    lengths = [64] * 8
    for placement, most in (("contiguous", 15.0), ("zigzag", 1.01)):
        held = runs(lengths, placement)
        pairs = []
        for of in held:
            seen = 0
            for other in held:
                for block in blocks(of, other, -1, 0, None):
                    at = torch.arange(block.q_at, block.q_at + block.queries)[:, None]
                    seen += int((torch.arange(block.k_at, block.k_at + block.keys) <= at).sum())
            pairs.append(seen)
        assert sum(pairs) == math.comb(513, 2)
        assert max(pairs) / min(pairs) <= most and (placement == "zigzag" or max(pairs) / min(pairs) > 10)


if __name__ == "__main__":
    checks.main()
