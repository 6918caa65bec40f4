"""Optimizers in two processes: replicated and sharded parameters, checkpoints of them, and steps inside backward.

This file is also the program that the two processes run: each of them goes through all checks, so that starting them,
which takes longest, happens once. Gradients are mostly integers over powers of two, which no order of summation rounds:
what two processes make of half a batch each then has to be the same to the last bit as what one makes of all of it.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Checks
from torch import Tensor, nn

from bigkernels import optim
from bigkernels.optim import _orthogonal

RANKS = 2
checks = Checks(__file__, RANKS)
outcomes = checks.fixture()


# ---- models and optimizers -------------------------------------------------------------------------------------------


class Dyadic(nn.Module):
    """Parameters whose gradients are given by the batch: means of small integers over a power of two of samples.

    In two shards none of the first dimensions divides evenly, and the second shard of `row` is empty. Those of `blocks`
    begin and end where blocks of 8-bit states do.
    """

    shapes = {"table": (67, 65), "blocks": (3, 2048), "row": (1, 9), "stack": (3, 8, 6), "bias": (5,)}

    def __init__(self, seed: int = 1, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, shape in self.shapes.items():
            # Later rows are longer: the norm of a shard is far from that of the whole.
            grows = torch.linspace(0.1, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
            setattr(self, name, nn.Parameter((torch.randn(shape, generator=draw) * grows).to(dtype)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        count = len(batch["bias"])
        return sum((p * batch[name].to(p.dtype)).sum() / count for name, p in self.named_parameters())


class Network(nn.Module):
    """One whose gradients depend on its parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Linear(12, 67), nn.LayerNorm(67), nn.GELU(), nn.Linear(67, 65, bias=False), nn.GELU(), nn.Linear(65, 5)
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch["x"]), batch["y"])


def integers(steps: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches of four for `Dyadic`."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randint(-8, 9, (4, *shape), generator=draw).float() for name, shape in Dyadic.shapes.items()}
        for _ in range(steps)
    ]


def samples(steps: int) -> list[dict[str, Tensor]]:
    """Batches of 16 for `Network`."""
    draw = torch.Generator().manual_seed(4)
    return [
        {"x": torch.randn(16, 12, generator=draw), "y": torch.randint(5, (16,), generator=draw)} for _ in range(steps)
    ]


def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's half."""
    return {name: t.chunk(RANKS)[dist.get_rank()] for name, t in batch.items()}


BF16 = ("kahan", "stochastic")  # have parameters of that dtype


def build(case: str, params) -> optim.Optimizer:
    match case:
        case "adamw":
            return optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=1e-4)
        case "bf16":
            return optim.AdamW(params, lr=1e-2, weight_decay=0.1, state_dtype=torch.bfloat16)
        case "int8":
            return optim.AdamW(params, lr=1e-2, weight_decay=0.1, state_dtype="int8", max_grad_norm=0.5, ema_decay=0.75)
        case "kahan":
            return optim.AdamW(params, lr=1e-3, weight_decay=0.1, rounding="kahan", ema_decay=0.75)
        case "stochastic":
            torch.manual_seed(5)  # the optimizer draws its seed
            return optim.AdamW(params, lr=1e-3, weight_decay=0.1, rounding="stochastic")
        case "sgd":
            return optim.SGD(params, lr=5e-2, momentum=0.9, weight_decay=0.1, max_grad_norm=5.0)
        case "lion":
            return optim.Lion(params, lr=1e-2, weight_decay=0.1)
        case "lamb":
            return optim.LAMB(params, lr=1e-2, max_grad_norm=0.5)
        case "muon":
            # Small singular values grow 500-fold in five steps: rounded to bfloat16, a difference in the last bit of
            # float32 would show.
            _orthogonal._MULTIPLY_BF16 = ()
            return optim.Muon(params, lr=1e-2, adamw_lr=5e-3, max_grad_norm=0.5, ema_decay=0.75)


def dtype_of(case: str) -> torch.dtype:
    return torch.bfloat16 if case in BF16 else torch.float32


def train(model: nn.Module, optimizer: optim.Optimizer, batches: list[dict[str, Tensor]]) -> list[float]:
    """The norms that it clipped by."""
    norms = []
    for batch in batches:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        norms.append(float("nan") if optimizer.grad_norm is None else float(optimizer.grad_norm))
    return norms


def alone(case: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[optim.Optimizer, list[float]]:
    optimizer = build(case, model.parameters())
    return optimizer, train(model, optimizer, batches)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in getattr(model, "layers", []):
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}


def decoded(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """All states of an optimizer as floats, whole."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        for key in state:
            if not key.endswith("_scale"):
                value = optimizer._read(key, state)
                # No backend gathers int16.
                found[f"{name}.{key}"] = whole(value.int() if value.dtype == torch.int16 else value).clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    for name in a:
        if name not in but:
            assert a[name].dtype == b[name].dtype, name
            different = int((a[name] != b[name]).sum())
            assert torch.equal(a[name], b[name]), f"{name}: {different} of {a[name].numel()} elements differ"


def close(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor], error: float) -> None:
    """To within `error` of how far training went from `start`, and of rounding."""
    assert a.keys() == b.keys() == start.keys()
    for name in a:
        moved = float((b[name] - start[name]).abs().max())
        assert moved > 1e-3, name
        limit = error * moved + 2**-23 * float(b[name].abs().max())
        worst = float((a[name] - b[name]).abs().max())
        assert worst <= limit, f"{name}: off by {worst}, {limit} allowed"


FLOAT32_ROUNDING = 1e-4  # what sums in another order may come to, as a part of a few steps


def agree(model: nn.Module) -> None:
    """All ranks have the same parameters."""
    together = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    of_all = [torch.empty_like(together) for _ in range(RANKS)]
    dist.all_gather(of_all, together)
    assert torch.equal(*of_all)


# ---- replicated parameters -------------------------------------------------------------------------------------------


@checks("adamw", "int8", "kahan", "stochastic", "sgd", "lion", "lamb", "muon")
def ddp(case: str) -> None:
    batches = integers(4)
    one, two = (Dyadic(dtype=dtype_of(case)) for _ in range(2))
    reference, norms = alone(case, one, batches)
    model = nn.parallel.DistributedDataParallel(two)
    optimizer = build(case, model.parameters())
    assert train(model, optimizer, map(mine, batches)) == pytest.approx(norms, rel=1e-6, nan_ok=True)
    agree(model)
    same(values(model), values(one))
    same(decoded(two, optimizer), decoded(one, reference))
    if case in ("int8", "muon"):
        with optimizer.averaged(), reference.averaged():
            same(values(model), values(one))
        assert not torch.equal(reference.state[one.table]["ema"], one.table)


@checks("adamw", "sgd", "lamb", "muon")
def ddp_of_a_network(case: str) -> None:
    batches = samples(4)
    one, two, start = Network(), Network(), values(Network())
    _, norms = alone(case, one, batches)
    model = nn.parallel.DistributedDataParallel(two)
    optimizer = build(case, model.parameters())
    assert train(model, optimizer, map(mine, batches)) == pytest.approx(norms, rel=1e-5, nan_ok=True)
    agree(model)
    close(values(model), values(one), start, FLOAT32_ROUNDING)


@checks()
def ddp_cannot_step_in_backward() -> None:
    model = nn.parallel.DistributedDataParallel(Dyadic())
    with pytest.raises(ValueError, match="fully_shard"):
        optim.step_in_backward(model, build("adamw", model.parameters()))


# ---- sharded parameters ----------------------------------------------------------------------------------------------


@checks("adamw", "bf16", "int8", "kahan", "sgd", "lion", "lamb", "muon")
def fsdp(case: str) -> None:
    from torch.distributed.tensor import DTensor

    batches = integers(4)
    one, model = Dyadic(dtype=dtype_of(case)), sharded(Dyadic(dtype=dtype_of(case)))
    reference, norms = alone(case, one, batches)
    assert model.row.to_local().numel() == (9, 0)[dist.get_rank()]
    optimizer = build(case, model.parameters())
    assert train(model, optimizer, map(mine, batches)) == pytest.approx(norms, rel=1e-6, nan_ok=True)
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            if key == "step":
                assert value.item() == 4, "an empty shard counts its steps as well"
            elif not key.endswith("_scale"):
                assert isinstance(value, DTensor) and value.placements == p.placements, key
                assert value.shape == p.shape and value.to_local().shape == p.to_local().shape, key
    start = values(Dyadic())
    if case in ("lamb", "muon"):  # norms and products of the whole, added up in another order
        close(values(model), values(one), start, FLOAT32_ROUNDING)
    elif case == "int8":
        # The blocks of a shard begin with it: those of this matrix are not those of one process.
        same(values(model), values(one), but=("table",))
        close({"table": values(model)["table"]}, {"table": values(one)["table"]}, {"table": start["table"]}, 0.1)
        assert optimizer.state[model.table]["exp_avg"].dtype == torch.int8
    else:
        same(values(model), values(one))
        same(decoded(model, optimizer), decoded(one, reference))
    if case in ("int8", "kahan", "muon"):
        before = values(model)
        averages = {name: whole(optimizer.state[p]["ema"]) for name, p in model.named_parameters()}
        with optimizer.averaged():
            same(values(model), {name: t.to(dtype_of(case)) for name, t in averages.items()})
            assert not torch.equal(values(model)["table"], before["table"])
        same(values(model), before)
        for name in ("row", "bias"):  # nothing of which is 8-bit
            torch.testing.assert_close(averages[name], reference.state[getattr(one, name)]["ema"], rtol=1e-5, atol=1e-6)


@checks("adamw", "sgd", "lamb", "muon")
def fsdp_of_a_network(case: str) -> None:
    batches = samples(4)
    one, start = Network(), values(Network())
    _, norms = alone(case, one, batches)
    model = sharded(Network())
    optimizer = build(case, model.parameters())
    assert train(model, optimizer, map(mine, batches)) == pytest.approx(norms, rel=1e-5, nan_ok=True)
    close(values(model), values(one), start, FLOAT32_ROUNDING)


@checks()
def fsdp_by_the_reference() -> None:
    """The plain PyTorch step sees shards as the kernels do."""
    import bigkernels

    batches = integers(3)
    for case in ("int8", "lamb", "muon"):
        models = [sharded(Dyadic()) for _ in range(2)]
        kernel, reference = (build(case, model.parameters()) for model in models)
        norms = train(models[0], kernel, map(mine, batches))
        with bigkernels.use("reference"):
            assert train(models[1], reference, map(mine, batches)) == pytest.approx(norms, rel=1e-6), case
        # What rounds to another code of 8 bits, or in products of bfloat16, is off by more than float32's rounding.
        close(values(models[1]), values(models[0]), values(Dyadic()), {"int8": 2**-5, "muon": 2**-6}.get(case, 1e-4))


@checks()
def norms_of_shards() -> None:
    batch = integers(1)[0]
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 1.0, 2.0, 3.0, math.inf, -math.inf):
            model = sharded(Dyadic(dtype=dtype))
            model(mine(batch)).backward()
            grads = [q.grad for q in model.parameters()]
            before = [whole(g).clone() for g in grads]
            flat = torch.cat([g.double().flatten() for g in before])
            expected = torch.linalg.vector_norm(flat, p).item()
            found = optim.get_total_norm(grads, p)
            assert type(found) is Tensor and found.dtype == torch.float32
            assert found.item() == pytest.approx(expected, rel=1e-6), (dtype, p)
            mixed = optim.get_total_norm([grads[0], *before[1:]], p)  # with tensors that every rank has whole
            assert mixed.item() == pytest.approx(expected, rel=1e-6), (dtype, p)
            if p < 1:
                continue
            assert expected > 4
            clipped = optim.clip_grad_norm_(model.parameters(), 2.0, norm_type=p)
            assert clipped.item() == found.item()
            tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 0.0}
            for g, old in zip(grads, before, strict=True):
                torch.testing.assert_close(whole(g), old * (2.0 / expected), check_dtype=False, **tolerance)
        optim.clip_grad_value_(model.parameters(), 0.25)
        model(mine(batch)).backward()  # on top
        optim.clip_grad_value_(model.parameters(), 0.25)
        assert all(whole(q.grad).abs().max() == 0.25 for q in model.parameters())


@checks("adamw", "int8", "muon")
def fsdp_steps_in_backward(case: str) -> None:
    """Plain steps, and those of one process where the norm of the step before clips."""
    batches = integers(4)
    clips = case != "adamw"
    one, model = Dyadic(), sharded(Dyadic())
    reference, optimizer = build(case, one.parameters()), build(case, model.parameters())
    handles = [optim.step_in_backward(optimizer=optimizer, model=model, clip="previous" if clips else None)]
    if clips:
        handles.append(optim.step_in_backward(one, reference, clip="previous"))
    norms = [[], []]
    for step, batch in enumerate(batches):
        parts = [batch] if step < 2 else [batch, batches[0]]
        divisor = 1.0 if step < 2 else 2.0
        for i, (m, o) in enumerate(((model, optimizer), (one, reference))):
            halves = map(mine, parts) if i == 0 else parts
            if i < len(handles):
                handles[i].divisor = divisor
                *early, last = halves
                with handles[i].accumulate():
                    for part in early:
                        m(part).backward()
                        assert all(p.grad is not None for p in m.parameters())
                m(last).backward()
                if step or not clips:
                    assert all(p.grad is None for p in m.parameters())
                o.step()
            else:
                for part in halves:
                    m(part).backward()
                o.step(divisor=divisor)
            o.zero_grad()
            norms[i].append(math.nan if o.grad_norm is None else float(o.grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6, nan_ok=True)
    if case == "muon":
        close(values(model), values(one), values(Dyadic()), FLOAT32_ROUNDING)
    else:
        same(values(model), values(one), but=("table",) if case == "int8" else ())
    handles[0].remove()
    before = values(model)
    model(mine(batches[0])).backward()
    same(values(model), before)
    assert all(p.grad is not None for p in model.parameters())


# ---- other placements ------------------------------------------------------------------------------------------------


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (RANKS,))


@checks("adamw", "lamb", "muon")
def parallel_layers(case: str) -> None:
    """Matrices of one shape that are cut by rows, by columns or not at all, and not where the gradients are cut."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = _mesh()
    draw = torch.Generator().manual_seed(6)
    placed = (
        (Shard(0), Shard(0)),
        (Shard(1), Shard(1)),
        (Replicate(), Replicate()),
        (Shard(0), Replicate()),
        (Replicate(), Partial()),
        (Replicate(), Shard(1)),
    )
    starts = [torch.randn(9, 9, generator=draw) * torch.linspace(0.1, 2.0, 9) for _ in (*placed, None)]
    ones = [nn.Parameter(t.clone()) for t in starts]
    cut = [nn.Parameter(distribute_tensor(t.clone(), mesh, [of])) for t, (of, _) in zip(starts, placed, strict=False)]
    cut.append(nn.Parameter(starts[-1].clone()))  # in no mesh
    one, two = build(case, ones), build(case, cut)
    for _ in range(3):
        for p, q, of in zip(ones, cut, [*placed, None], strict=True):
            g = p.grad = torch.randint(-8, 9, (9, 9), generator=draw).float()
            if of is None:
                q.grad = g.clone()
            elif of[1] == Partial():
                parts = torch.randint(-8, 9, (9, 9), generator=draw).float()
                q.grad = DTensor.from_local(parts if dist.get_rank() else g - parts, mesh, [Partial()])
            else:
                q.grad = distribute_tensor(g, mesh, [of[1]])
        expected = optim.get_total_norm([p.grad for p in ones]).item()
        assert optim.get_total_norm([q.grad for q in cut]).item() == pytest.approx(expected, rel=1e-6)
        one.step()
        two.step()
    if one.grad_norm is not None:
        assert two.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-6)
    numbered = [{str(i): whole(p) for i, p in enumerate(params)} for params in (cut, ones, starts)]
    close(*numbered, FLOAT32_ROUNDING)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SAVED = ("adamw", "bf16", "int8", "kahan", "sgd", "lamb", "muon")


def _folder() -> str:
    """One for all ranks."""
    name = [tempfile.mkdtemp(dir=os.environ["FOLDER"]) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return name[0]


def _goes_on(case: str, model: nn.Module, optimizer: optim.Optimizer, wrap, save, load) -> None:
    """What a run that was saved and loaded into fresh objects goes on to is what it would have gone on to itself."""
    batches = integers(6)
    train(model, optimizer, map(mine, batches[:3]))
    saved = save(model, optimizer)
    train(model, optimizer, map(mine, batches[3:]))

    fresh = wrap(Dyadic(seed=9, dtype=dtype_of(case)))
    other = build(case, fresh.parameters())
    for group in other.param_groups:
        group["lr"], group["seed"] = 0.5, 1  # which the checkpoint knows better
    load(fresh, other, saved)
    for key in ("lr", "seed"):
        assert [g[key] for g in other.param_groups] == [g[key] for g in optimizer.param_groups]
    train(fresh, other, map(mine, batches[3:]))
    same(values(fresh), values(model))
    same(decoded(fresh, other), decoded(model, optimizer))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        ours, theirs = optimizer.state[p], other.state[q]
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
        for key in ours:
            if key.endswith("_scale"):
                assert torch.equal(ours[key], theirs[key]), key


def _save(model: nn.Module, optimizer: optim.Optimizer, **options: bool) -> str:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    folder = _folder()
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    return folder


def _load(model: nn.Module, optimizer: optim.Optimizer, folder: str, **options: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=states, options=StateDictOptions(**options)
    )


@checks(*SAVED)
def checkpoints(case: str) -> None:
    model = sharded(Dyadic(dtype=dtype_of(case)))
    _goes_on(case, model, build(case, model.parameters()), sharded, _save, _load)


@checks("int8", "kahan", "muon")
def flat_checkpoints(case: str) -> None:
    """By the names of parameters, as pipelines need them."""
    flat = {"flatten_optimizer_state_dict": True}
    model = sharded(Dyadic(dtype=dtype_of(case)))
    save, load = partial(_save, **flat), partial(_load, **flat)
    _goes_on(case, model, build(case, model.parameters()), sharded, save, load)


@checks("int8", "kahan", "stochastic", "muon")
def checkpoints_of_replicas(case: str) -> None:
    wrap = nn.parallel.DistributedDataParallel
    model = wrap(Dyadic(dtype=dtype_of(case)))
    _goes_on(case, model, build(case, model.parameters()), wrap, _save, _load)


@checks(*SAVED)
def full_checkpoints(case: str) -> None:
    """Gathered on the first rank, and handed out by it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def save(model, optimizer):
        weights, states = get_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank():
            assert not weights
        else:
            assert all(type(t) is Tensor and t.shape == Dyadic.shapes[name] for name, t in weights.items())
            for name, state in states["state"].items():
                assert all(type(t) is Tensor for t in state.values())
                assert all(t.shape == Dyadic.shapes[name] for key, t in state.items() if key != "step"), name
        return copy.deepcopy((weights, states))  # what was on the CPU before, steps for one, is the optimizer's own

    def load(model, optimizer, saved):
        weights, states = saved
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # Not by `set_state_dict`, which leaves the model out on ranks that have nothing for it.
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer, states, options=options)

    model = sharded(Dyadic(dtype=dtype_of(case)))
    _goes_on(case, model, build(case, model.parameters()), sharded, save, load)


@checks("adamw", "kahan", "int8")
def full_checkpoints_go_on_alone(case: str) -> None:
    """From two shards to one process: with 8-bit states exactly where blocks stay what they were."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    batches = integers(6)
    model, one = (Dyadic(dtype=dtype_of(case)) for _ in range(2))
    sharded(model)
    optimizer = build(case, model.parameters())
    train(model, optimizer, map(mine, batches[:3]))
    saved = [get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))]
    dist.broadcast_object_list(saved)
    saved = copy.deepcopy(saved)
    train(model, optimizer, map(mine, batches[3:]))
    other = build(case, one.parameters())
    weights, states = saved[0]
    set_state_dict(one, other, model_state_dict=weights, optim_state_dict=states)
    train(one, other, batches[3:])
    same(values(one), values(model), but=("table",) if case == "int8" else ())


@checks()
def unsharded_states_do_not_fit_shards() -> None:
    """A state_dict of one process, given to an optimizer of shards as it is: refused, and nothing has changed."""
    one, model = Dyadic(), sharded(Dyadic())
    reference, _ = alone("adamw", one, integers(2))
    optimizer = build("adamw", model.parameters())
    train(model, optimizer, map(mine, integers(2, seed=8)))
    before = decoded(model, optimizer)
    with pytest.raises(ValueError, match="distributed"):
        optimizer.load_state_dict(reference.state_dict())
    same(decoded(model, optimizer), before)


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checks.names)
def test_two_processes(name: str, outcomes: dict[str, str | None]) -> None:
    checks.judge(outcomes[name])


if __name__ == "__main__":
    checks.main()
