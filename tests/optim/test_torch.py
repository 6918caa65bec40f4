"""What torch's own tests ask of an optimizer, asked of ours: its inputs, errors, schedulers, scalers, hooks."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import bigkernels
from bigkernels import optim

INFOS = [i for i in optim_db if hasattr(optim, i.optim_cls.__name__)]
NAMES = [i.optim_cls.__name__ for i in INFOS]


def inputs():
    for info in INFOS:
        for given in info.optim_inputs_func(device="cpu", dtype=torch.float32):
            yield pytest.param(info, given, id=f"{info.optim_cls.__name__} {given.desc}")


def test_torchs_classes_are_covered() -> None:
    assert set(NAMES) >= {"Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Muon"}


@pytest.mark.parametrize("name", NAMES)
def test_signatures_begin_as_torchs(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name).__init__).parameters for m in (optim, torch.optim))
    for parameter in theirs.values():
        assert ours[parameter.name].default == parameter.default
        assert ours[parameter.name].kind == parameter.kind
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


def pair(cls_name: str, kwargs: dict, shapes=((10, 5), (5,), (3, 40), (4097,))):
    generator = torch.Generator().manual_seed(0)
    if cls_name == "Muon":
        shapes = [s for s in shapes if len(s) == 2]
    for module in (optim, torch.optim):
        generator.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        yield params, getattr(module, cls_name)(params, **copy.deepcopy(kwargs))


def closure_of(params, optimizer, step: int):
    generator = torch.Generator().manual_seed(step)
    targets = [torch.randn(p.shape, generator=generator) for p in params]

    def closure():
        optimizer.zero_grad()
        loss = sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("info", "given"), inputs())
def test_inputs_of_torchs_tests(info, given) -> None:
    name = info.optim_cls.__name__
    (ours, mine), (theirs, reference) = pair(name, given.kwargs)
    loose = {"rtol": 1e-2, "atol": 1e-2} if name == "Muon" else {}  # torch multiplies in bfloat16
    for step in range(7):
        losses = [o.step(closure_of(p, o, step)) for p, o in ((ours, mine), (theirs, reference))]
        torch.testing.assert_close(*losses, **loose)
        torch.testing.assert_close(ours, theirs, **loose)
    for p, q in zip(ours, theirs, strict=True):
        for key, value in reference.state[q].items():
            torch.testing.assert_close(mine.state[p][key].float(), value, **loose)


@pytest.mark.parametrize(("info", "given"), inputs())
def test_state_dicts_load_in_both_directions(info, given) -> None:
    name = info.optim_cls.__name__
    pairs = list(pair(name, given.kwargs))
    for params, optimizer in pairs:
        for step in range(3):
            optimizer.step(closure_of(params, optimizer, step))
    (ours, mine), (theirs, reference) = pairs
    loose = {"rtol": 1e-2, "atol": 1e-2} if name == "Muon" else {}
    crossed = list(pair(name, given.kwargs))
    for (params, optimizer), (start, source) in zip(crossed, ((theirs, reference), (ours, mine)), strict=True):
        for p, q in zip(params, start, strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        for step in range(3, 6):
            for these, those in ((params, optimizer), (start, source)):
                those.step(closure_of(these, those, step))
            torch.testing.assert_close(params, start, **loose)


# What torch refuses and these can do.
LIMITS_OF_TORCH = ("foreach", "betas must be either both floats or both Tensors", "only support 2D parameters")


@pytest.mark.parametrize("info", INFOS, ids=NAMES)
def test_errors_of_torchs_tests(info) -> None:
    name = info.optim_cls.__name__
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        if any(limit in given.desc for limit in LIMITS_OF_TORCH):
            continue
        params = given.params if given.params is not None else [torch.nn.Parameter(torch.zeros(3, 3))]
        if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            expects = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
            with expects(case.error_type):
                getattr(optim, name)(params, **given.kwargs)


@pytest.mark.parametrize(
    ("info", "schedulers"),
    [pytest.param(i, s, id=f"{i.optim_cls.__name__} {n}") for i in INFOS for n, s in enumerate(i.scheduler_inputs)],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(info, schedulers, tensor: bool) -> None:
    name = info.optim_cls.__name__
    lr = torch.tensor(0.01) if tensor and name != "Muon" else 0.01
    pairs = [
        (params, optimizer, [make(optimizer) for make in schedulers]) for params, optimizer in pair(name, {"lr": lr})
    ]
    for step in range(12):
        for params, optimizer, made in pairs:
            loss = optimizer.step(closure_of(params, optimizer, step))
            for scheduler in made:
                scheduler.step(*([loss.detach()] if "Plateau" in type(scheduler).__name__ else []))
    (ours, mine, _), (theirs, reference, _) = pairs
    assert float(mine.param_groups[0]["lr"]) == pytest.approx(float(reference.param_groups[0]["lr"]))
    loose = {"rtol": 1e-2, "atol": 1e-2} if name == "Muon" else {}
    torch.testing.assert_close(ours, theirs, **loose)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "Muon"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(name: str, dtype) -> None:
    made = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)))
        optimizer = getattr(module, name)([p], lr=0.05)
        for step in range(5):
            p.grad = torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        made.append(p.detach())
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name: str) -> None:
    made = []
    for module in (optim, torch.optim):
        table = torch.nn.Embedding(20, 6, sparse=True)
        torch.manual_seed(0)
        torch.nn.init.normal_(table.weight)
        optimizer = getattr(module, name)(table.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3, step])).square().sum().backward()
            assert table.weight.grad.is_sparse
            optimizer.step()
        made.append(table.weight.detach())
    torch.testing.assert_close(*made)


def test_sparse_gradients_are_refused_where_there_is_no_rule() -> None:
    table = torch.nn.Embedding(20, 6, sparse=True)
    optimizer = optim.AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "LAMB", "Muon"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler(name: str, clip: float | None) -> None:
    """Scaled gradients give the unscaled step, and one with an infinity gives none."""
    plain, scaled = (torch.nn.Linear(12, 12) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    options = {"lr": 1e-2, "max_grad_norm": clip, "ema_decay": 0.9}
    mine, other = (getattr(optim, name)(m.parameters(), **options) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    x = torch.randn(5, 12)
    for _ in range(4):
        for model, optimizer in ((scaled, mine), (plain, other)):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            (scaler.scale(loss) if model is scaled else loss).backward()
        scaler.step(mine)
        scaler.update()
        other.step()
        torch.testing.assert_close(list(scaled.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-6)
        if clip is not None:
            torch.testing.assert_close(mine.grad_norm, other.grad_norm)
    kept = copy.deepcopy((scaled.state_dict(), mine.state_dict()["state"]))
    mine.zero_grad()
    (scaler.scale(scaled(x).square().sum()) * float("inf")).backward()
    scaler.step(mine)
    scaler.update()
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close((scaled.state_dict(), mine.state_dict()["state"]), kept, rtol=0, atol=0)


def test_unscaling_by_hand() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(p.grad, torch.ones(5))
    scaler.step(optimizer)
    assert torch.equal(p, torch.zeros(5))


def test_groups_hooks_and_closures() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = optim.SGD([{"params": [a], "lr": 0.5}, {"params": [("b", b)][0][1]}], lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.add_param_group({"params": c, "lr": 0.25, "momentum": 0.9})
    for p in (a, b, c):
        p.grad = torch.ones(3)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    assert seen == ["before", "after"]
    assert [p[0].item() for p in (a, b, c)] == [0.5, 0.0, 0.75]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert [p[0].item() for p in (a, b, c)] == [0.5, -1.0, pytest.approx(0.75 - 0.25 * 1.9)]
    optimizer.zero_grad()
    assert a.grad is None
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": a})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("state_dtype", [torch.float32, "int8"], ids=str)
def test_copies_go_on_alike(how, state_dtype) -> None:
    model = torch.nn.Linear(80, 70)
    optimizer = optim.AdamW(model.parameters(), state_dtype=state_dtype, max_grad_norm=1.0, ema_decay=0.5)
    x = torch.randn(9, 80)

    def run(m, o):
        for _ in range(3):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()

    run(model, optimizer)
    twin, its = how((model, optimizer))
    assert its.max_grad_norm == 1.0
    assert its.param_groups[0]["params"][0] is twin.weight
    run(model, optimizer), run(twin, its)
    assert torch.equal(model.weight, twin.weight)


def test_lr_as_a_tensor_is_read_at_every_step() -> None:
    p, lr = torch.nn.Parameter(torch.ones(4)), torch.tensor(1.0)
    optimizer = optim.SGD([p], lr=lr)
    for value, left in ((0.5, 0.5), (0.25, 0.25)):
        lr.fill_(value)
        p.grad = torch.ones(4)
        optimizer.step()
        assert p[0].item() == left


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamW", {"state_dtype": torch.float16}, "state_dtype"),
        ("AdamW", {"state_dtype": "int4"}, "state_dtype"),
        ("AdamW", {"rounding": "up"}, "rounding"),
        ("AdamW", {"max_grad_norm": 0.0}, "max_grad_norm"),
        ("AdamW", {"max_grad_norm": "1"}, "max_grad_norm"),
        ("AdamW", {"ema_decay": 1.0}, "ema_decay"),
        ("AdamW", {"betas": (0.9, 1.0)}, "betas"),
        ("AdamW", {"lr": -1.0}, "lr"),
        ("AdamW", {"lr": float("nan")}, "lr"),
        ("AdamW", {"differentiable": True}, "differentiable"),
        ("Adam", {"cautious": True}, "cautious"),
        ("SGD", {"momentum": 0.9, "nesterov": True, "dampening": 0.5}, "Nesterov"),
        ("SGD", {"weight_decay": -0.1}, "weight_decay"),
        ("RMSprop", {"alpha": 1.0}, "alpha"),
        ("Adagrad", {"lr_decay": -1.0}, "lr_decay"),
        ("Lion", {"betas": (-0.1, 0.9)}, "betas"),
        ("LAMB", {"eps": -1.0}, "eps"),
        ("Muon", {"ns_steps": 100}, "ns_steps"),
        ("Muon", {"adjust_lr_fn": "mine"}, "not supported"),
        ("Muon", {"adamw_betas": (0.9, 2.0)}, "betas"),
    ],
)
def test_arguments_out_of_their_range(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)([torch.nn.Parameter(torch.zeros(2, 2))], **options)


def test_dtypes_that_cannot_be_optimized() -> None:
    with pytest.raises(ValueError, match="float16"):
        optim.AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))], rounding="kahan")
    with pytest.raises(ValueError, match="torch.int64"):
        optim.AdamW([torch.zeros(2, dtype=torch.int64)])
    optimizer = optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="ema_decay"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "ema_decay": 2.0})
    assert len(optimizer.param_groups) == 1


def test_options_changed_out_of_their_range_raise_before_a_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    before, step = p.detach().clone(), optimizer.state[p]["step"].clone()
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    with pytest.raises(ValueError, match="betas"):
        optimizer.step()
    with pytest.raises(ValueError, match="divisor"):
        optimizer.step(divisor=0)
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["step"], step)


def test_options_that_need_other_states_may_change_between_steps() -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = optim.AdamW([p])
    for options, keys in (
        ({}, {"exp_avg", "exp_avg_sq"}),
        ({"amsgrad": True}, {"max_exp_avg_sq"}),
        ({"ema_decay": 0.9}, {"ema"}),
        ({"state_dtype": "int8"}, {"exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale"}),
    ):
        optimizer.param_groups[0].update(options)
        p.grad = torch.randn(5000)
        optimizer.step()
        assert keys <= set(optimizer.state[p])
    assert optimizer.state[p]["exp_avg"].dtype == torch.int8
    assert optimizer.state[p]["max_exp_avg_sq"].dtype == torch.uint8


def test_the_reference_can_be_forced_in_between() -> None:
    a, b = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    mine, other = (optim.AdamW([p]) for p in (a, b))
    for step in range(4):
        a.grad = b.grad = torch.randn(5000)
        other.step()
        with bigkernels.use("reference" if step % 2 else "cpu"):
            mine.step()
    torch.testing.assert_close(a, b)
    assert mine.state[a]["step"] == 4
