"""What users do to an optimizer between steps: each step counts with what there is, and never with an old address."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

import bigkernels
from bigkernels import _look, optim
from bigkernels.optim import _formats

# Every way in which a step is taken on this machine.
WAYS = {
    "kernel": {},
    "reference": {},
    "int8": {"state_dtype": "int8"},
    "in host memory": {},
    "in backward": {},
    "Muon": {},
}


def backend(way: str) -> contextlib.AbstractContextManager:
    return bigkernels.use("reference") if way == "reference" else contextlib.nullcontext()


class Training:
    def __init__(self, way: str):
        torch.manual_seed(0)
        self.way = way
        self.net = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 70))
        cls = optim.Muon if way == "Muon" else optim.AdamW
        self.optimizer = cls(self.net.parameters(), lr=0.05, **WAYS[way])
        if way == "in host memory":
            optim.offload_states(self.optimizer)
        if way == "in backward":
            optim.step_in_backward(self.net, self.optimizer)
        self.x = torch.randn(20, 70)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.net.zero_grad()
        with backend(self.way):
            self.net(self.x).square().mean().backward()
            self.optimizer.step()

    def moved(self, p: Tensor) -> float:
        before = p.detach().clone()
        self.step()
        return (p.detach() - before).abs().max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["list", "elements", "group", "groups"])
def test_a_layer_that_is_replaced_trains(way: str, how: str) -> None:
    t = Training(way)
    old, t.net[1] = t.net[1], nn.Linear(70, 70)
    group = t.optimizer.param_groups[0]
    if how == "list":
        group["params"] = list(t.net.parameters())
    elif how == "elements":
        group["params"][2:] = list(t.net[1].parameters())
    elif how == "group":
        t.optimizer.param_groups[0] = {**group, "params": list(t.net.parameters())}
    else:
        t.optimizer.param_groups = [{**group, "params": list(t.net.parameters())}]
    kept = old.weight.detach().clone()
    assert t.moved(t.net[1].weight) > 1e-3 and t.moved(t.net[1].bias) > 1e-3
    assert t.optimizer.state[t.net[1].weight]["step"] == 2
    assert torch.equal(old.weight, kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["assign", "clear", "delete"])
def test_a_layer_that_is_taken_out_stands_still(way: str, how: str) -> None:
    t = Training(way)
    if how == "delete":
        t.optimizer.param_groups[0]["params"] = list(t.net[0].parameters())
        t.optimizer.add_param_group({"params": t.net[1].parameters()})
        del t.optimizer.param_groups[0]
    else:
        t.optimizer.param_groups[0]["params"][:2] = []
    assert t.moved(t.net[0].weight) == 0.0
    assert t.moved(t.net[1].weight) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_has_the_options_of_the_group_it_is_in(way: str) -> None:
    t = Training(way)
    first, second = t.net[0].weight, t.net[1].weight
    groups = t.optimizer.param_groups
    groups[0]["params"] = list(t.net[0].parameters())
    groups.append({**groups[0], "params": list(t.net[1].parameters()), "lr": 0.0, "weight_decay": 0.0})
    assert t.moved(first) > 1e-3
    assert t.moved(second) == 0.0
    groups.reverse()
    assert t.moved(first) > 1e-3
    assert t.moved(second) == 0.0
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    assert t.moved(first) == 0.0
    assert t.moved(second) > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["assign", "clear", "inner", "delete"])
def test_a_state_that_is_reset_begins_again(way: str, how: str) -> None:
    t = Training(way)
    weight = t.net[1].weight
    states = t.optimizer.state
    {
        "assign": lambda: states.__setitem__(weight, {}),
        "clear": states.clear,
        "inner": states[weight].clear,
        "delete": lambda: states.__delitem__(weight),
    }[how]()
    t.step()
    assert states[weight]["step"] == 1
    assert states[t.net[0].weight]["step"] == (1 if how == "clear" else 3)


def test_options_of_other_groups_of_muon() -> None:
    """Matrices that were orthogonalised together are not, where one group is told otherwise."""
    moved = []
    for steps in (5, 2):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        o = optim.Muon([{"params": [a]}, {"params": [b]}], lr=0.1)
        for _ in range(2):
            a.grad, b.grad = torch.randn(8, 8), torch.randn(8, 8)
            o.step()
            o.param_groups[1]["ns_steps"] = steps
        moved.append((a.detach(), b.detach()))
    assert torch.equal(moved[0][0], moved[1][0])
    assert (moved[0][1] - moved[1][1]).abs().max() > 1e-3


# ---- counters -------------------------------------------------------------------------------------------------------

COUNTERS = {
    "float32": lambda n: torch.tensor(n, dtype=torch.float32),
    "int64": lambda n: torch.tensor(n, dtype=torch.int64),
    "bfloat16": lambda n: torch.tensor(n, dtype=torch.bfloat16),
    "one element": lambda n: torch.full((1,), n, dtype=torch.float32),
    "of a vector": lambda n: torch.full((3,), n, dtype=torch.float32)[1],
    "float64": lambda n: torch.tensor(n, dtype=torch.float64),
    "int": int,
    "float": float,
}


@pytest.mark.parametrize("way", ["kernel", "reference", "in host memory"])
@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Muon"])
def test_counters_of_other_kinds(way: str, kind: str, name: str) -> None:
    if name == "Muon" and way == "in host memory":
        pytest.skip("its products belong on the GPU")
    results = []
    for counter in (COUNTERS[kind], COUNTERS["float64"]):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5))
        o = getattr(optim, name)([p], lr=0.1)
        if way == "in host memory":
            optim.offload_states(o)
        for step in range(5):
            if step == 2:
                o.state[p]["step"] = counter(7)
            p.grad = torch.randn(5)
            with backend(way):
                o.step()
        assert float(o.state[p]["step"]) == 10
        results.append(p.detach())
    assert torch.equal(*results)


def test_counters_of_one_vector_are_counted_in_it() -> None:
    ps = [nn.Parameter(torch.randn(10)) for _ in range(2)]
    o = optim.AdamW(ps)
    for p in ps:
        p.grad = torch.ones(10)
    o.step()
    counts = torch.zeros(4, dtype=torch.float32)
    for i, p in enumerate(ps):
        o.state[p]["step"] = counts[i]
    o.step(), o.step()
    assert counts.tolist() == [2, 2, 0, 0]
    counts.fill_(30)
    o.step()
    assert counts.tolist() == [31, 31, 30, 30]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "counter",
    [torch.tensor(-1.0), torch.tensor(2.5), torch.tensor(float("nan")), torch.zeros(2), "three", 1j, None],
    ids=str,
)
def test_what_is_no_counter(counter, reference: bool) -> None:
    p = nn.Parameter(torch.ones(5))
    o = optim.AdamW([p])
    p.grad = torch.ones(5)
    o.step()
    before = p.detach().clone()
    o.state[p]["step"] = counter
    with backend("reference" if reference else ""), pytest.raises(ValueError, match="step"):
        o.step()
    assert torch.equal(p, before)


def test_a_counter_that_is_written_over() -> None:
    p = nn.Parameter(torch.ones(5))
    o = optim.AdamW([p])
    p.grad = torch.ones(5)
    o.step()
    before = p.detach().clone()
    o.state[p]["step"].fill_(2.5)
    with pytest.raises((RuntimeError, ValueError), match="step"):
        o.step()
    assert torch.equal(p, before)


# ---- options that are off -------------------------------------------------------------------------------------------


def with_remainder(rounding: str = "kahan") -> tuple[nn.Parameter, optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3000).bfloat16())
    o = optim.AdamW([p], lr=1e-3, rounding=rounding, ema_decay=0.9)
    for _ in range(4):
        p.grad = torch.randn(3000).bfloat16()
        o.step()
    return p, o, _formats.join(p.detach(), o.state[p]["remainder"])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["kahan", "nearest"])
@pytest.mark.parametrize("how", ["cast", "load"])
def test_a_parameter_and_its_remainder_become_the_wider_one(dtype, rounding: str, reference: bool, how: str) -> None:
    p, o, master = with_remainder()
    assert (master != p.float()).any()
    if how == "cast":
        p.grad = None
        p.data = p.data.to(dtype)
        o.param_groups[0]["rounding"] = rounding
    else:
        q = nn.Parameter(p.detach().to(dtype))
        loaded = optim.AdamW([q], rounding=rounding)
        loaded.load_state_dict(o.state_dict())
        p, o = q, loaded
    twin = nn.Parameter(master.double())
    theirs = torch.optim.AdamW([twin], lr=1e-3)
    theirs.state[twin] = {k: o.state[p][k].double().clone() for k in ("step", "exp_avg", "exp_avg_sq")}
    p.grad = torch.randn(3000).to(dtype)
    twin.grad = p.grad.double()
    with backend("reference" if reference else ""):
        o.step()
    theirs.step()
    assert (p.double() - twin).abs().max() < (1e-6 if dtype == torch.float32 else 1e-12)
    assert "remainder" not in o.state[p]


@pytest.mark.parametrize("reference", [False, True])
def test_remainders_of_other_values_are_left_out(reference: bool) -> None:
    p, o, _ = with_remainder()
    p.grad = None
    p.data = torch.randn(3000)
    before = p.detach().clone()
    o.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones(3000)
    with backend("reference" if reference else ""):
        o.step()
    assert torch.equal(p, before) and "remainder" not in o.state[p]


@pytest.mark.parametrize("reference", [False, True])
def test_without_its_remainder_a_parameter_is_rounded_as_any_other(reference: bool) -> None:
    p, o, _ = with_remainder()
    q = nn.Parameter(p.detach().clone())
    plain = optim.AdamW([q], lr=1e-3)
    plain.load_state_dict(o.state_dict())
    assert set(plain.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(RuntimeError, match="ema_decay"), plain.averaged():
        pass
    o.param_groups[0]["rounding"] = "nearest"
    with backend("reference" if reference else ""):
        for these, optimizer in ((p, o), (q, plain)):
            these.grad = torch.linspace(-1, 1, 3000).bfloat16()
            optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("reference", [False, True])
def test_an_average_that_is_switched_off_stays_what_it_was(reference: bool) -> None:
    p, o, _ = with_remainder()
    average = o.state[p]["ema"].clone()
    o.param_groups[0]["ema_decay"] = None
    with backend("reference" if reference else ""):
        p.grad = torch.randn(3000).bfloat16()
        o.step()
    assert torch.equal(o.state[p]["ema"], average)
    with o.averaged():
        assert torch.equal(p, average.bfloat16())


def test_a_momentum_that_is_switched_on_begins_as_torchs() -> None:
    made = []
    for module, dtype in ((optim, torch.float32), (torch.optim, torch.float64)):
        p = nn.Parameter(torch.ones(5, dtype=dtype))
        o = module.SGD([p], lr=0.1, momentum=0.0, dampening=0.5)
        for step in range(4):
            o.param_groups[0]["momentum"] = 0.9 if step > 1 else 0.0
            p.grad = torch.arange(5, dtype=dtype)
            o.step()
        made.append(p.detach().double())
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)


# ---- memory ---------------------------------------------------------------------------------------------------------


def clone_data(state: dict) -> None:
    for t in state.values():
        t.data = t.data.clone()


def share(state: dict) -> None:
    for t in state.values():
        t.share_memory_()


def set_(state: dict) -> None:
    state["exp_avg"].set_(torch.zeros_like(state["exp_avg"]))


def zeros_data(state: dict) -> None:
    state["exp_avg"].data = torch.zeros_like(state["exp_avg"])


def swap(state: dict) -> None:
    torch.utils.swap_tensors(state["exp_avg"], torch.zeros_like(state["exp_avg"]))


@pytest.mark.parametrize("change", [clone_data, share, set_, zeros_data, swap])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", [20, 20000])
def test_the_memory_that_a_state_has_now_counts(change, native: bool, size: int, monkeypatch) -> None:
    if not native:
        monkeypatch.setattr(_look, "_native", lambda: None)
    made, bystanders = [], []
    for module, dtype in ((optim, torch.float32), (torch.optim, torch.float64)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(size, dtype=torch.float32).to(dtype))
        o = module.AdamW([p], lr=0.1)
        g = torch.randn(size, dtype=torch.float32)
        for step in range(4):
            p.grad = g.to(dtype)
            if step == 1:
                change(o.state[p])
                bystanders = [torch.full((size,), 7.0) for _ in range(8)]  # whatever gets the freed memory
            o.step()
        assert all(bool((b == 7).all()) for b in bystanders)
        made.append(p.detach().double())
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)


WRONG = {
    "a grown parameter": lambda p, o: setattr(p, "data", torch.randn(300)),
    "a shrunk parameter": lambda p, o: setattr(p, "data", p.data[:10]),
    "a parameter of another shape": lambda p, o: setattr(p, "data", torch.randn(5, 20)),
    "a small gradient": lambda p, o: setattr(p.grad, "data", torch.randn(10)),
    "a resized gradient": lambda p, o: p.grad.resize_(10),
    "a gradient of another shape": lambda p, o: setattr(p.grad, "data", torch.randn(5, 20)),
    "a resized state": lambda p, o: o.state[p]["exp_avg"].resize_(10),
    "a state of another shape": lambda p, o: o.state[p].update(exp_avg=torch.zeros(5, 20)),
    "a state of integers": lambda p, o: o.state[p].update(exp_avg=torch.zeros(100, dtype=torch.int64)),
    "a state that is no tensor": lambda p, o: o.state[p].update(exp_avg=3.0),
    "codes without scales": lambda p, o: o.state[p].update(exp_avg=torch.zeros(100, dtype=torch.int8)),
    "a freed parameter": lambda p, o: p.untyped_storage().resize_(0),
    "a freed gradient": lambda p, o: p.grad.untyped_storage().resize_(0),
    "a freed state": lambda p, o: o.state[p]["exp_avg"].untyped_storage().resize_(0),
    "one number for all elements": lambda p, o: setattr(p, "data", torch.zeros(1).expand(100)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("way", ["kernel", "reference", "python", "in host memory"])
def test_what_does_not_fit_is_refused_before_anything_is_written(wrong: str, way: str, monkeypatch) -> None:
    if way == "python":
        monkeypatch.setattr(_look, "_native", lambda: None)
    p, other = (nn.Parameter(torch.randn(100)) for _ in range(2))
    o = optim.AdamW([other, p], lr=0.1)
    if way == "in host memory":
        optim.offload_states(o)
    with backend(way):
        for _ in range(2):
            p.grad, other.grad = torch.randn(100), torch.randn(100)
            o.step()
        before = copy.deepcopy((other, o.state[other]))
        WRONG[wrong](p, o)
        with pytest.raises(RuntimeError):
            o.step()
    torch.testing.assert_close((other, o.state[other]), before, rtol=0, atol=0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=str)
def test_gradients_that_come_and_go(native: bool, dtypes: tuple, monkeypatch) -> None:
    """In any pattern, dtype and order of elements, after each other."""
    if not native:
        monkeypatch.setattr(_look, "_native", lambda: None)
    torch.manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.full((3, n), 0.5, dtype=d)) for n in (1, 4, 0, 7)] for d in (torch.float32, torch.float64)
    )
    optimizers = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for pattern in (15, 15, 5, 5, 10, 15, 0, 9, 9, 15, 15):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            g = torch.randn(p.shape).bfloat16()
            g = g.t().contiguous().t() if pattern == 10 else g
            p.grad = q.grad = None
            if pattern >> i & 1:
                p.grad, q.grad = torch.zeros_like(p), g.double()
                p.grad.data = g.to(dtypes[pattern % len(dtypes)])
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_a_negative_view() -> None:
    p, q = (nn.Parameter(torch.ones(())) for _ in range(2))
    z = torch.tensor(1.0 + 2.0j)
    mine, theirs = optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1)
    for _ in range(3):
        p.grad, q.grad = z.imag.clone(), z.imag.clone()
        mine.step(), theirs.step()
        p.grad, q.grad = z.conj().imag, z.conj().imag
        assert p.grad.is_neg()
        mine.step(), theirs.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("way", ["kernel", "in host memory"])
def test_what_is_written_through_data_is_seen(way: str) -> None:
    p = nn.Parameter(torch.ones(300))
    o = optim.SGD([p], lr=1.0)
    if way == "in host memory":
        optim.offload_states(o)
    p.grad = torch.zeros(300)
    o.step()
    p.data.fill_(0.25)
    o.step()
    assert torch.equal(p, torch.full((300,), 0.25))


def test_looking_by_c_and_by_python_is_the_same(monkeypatch) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.complex64, torch.int16)
    ts = [torch.zeros(3, 4, dtype=d) for d in dtypes] + [torch.zeros(()), torch.zeros(0, 3), torch.zeros((1,) * 9)]
    changes = {
        "nothing": (lambda t: None, (True, True)),
        "memory": (lambda t: setattr(t, "data", t.data.clone()), (True, False)),
        "dtype": (lambda t: setattr(t, "data", t.data.to(torch.float16)), (False, False)),
        "strides": (lambda t: t.t_(), (False, False)),
        "shape": (lambda t: t.resize_(2, 6), (False, False)),
        "freed": (lambda t: t.untyped_storage().resize_(0), (False, False)),
    }
    for native in (True, False):
        if not native:
            monkeypatch.setattr(_look, "_native", lambda: None)
        for name, (change, expected) in changes.items():
            seen, now = _look.Seen(), [t.clone() for t in ts]
            seen.record(now)
            assert list(seen.addresses) == [t.data_ptr() for t in now]
            change(now[1])
            assert seen.look(now) == expected, (name, native)
        for wrong in (None, 5, torch.zeros(3).to_sparse()):
            with pytest.raises((RuntimeError, AttributeError, TypeError)):
                _look.Seen().record([*ts, wrong])


def test_the_native_look_is_there(library) -> None:
    if hasattr(Tensor, "__dlpack_c_exchange_api__"):
        assert _look._native() is not None


def views(module, dtype) -> tuple[list, torch.optim.Optimizer]:
    base = torch.ones(100, 100, dtype=dtype)
    params = [nn.Parameter(base), nn.Parameter(base[:50]), nn.Parameter(base[25:75])]
    return params, module.AdamW(params, lr=0.1, **({"foreach": False} if module is torch.optim else {}))


def state_of_another(module, dtype) -> tuple[list, torch.optim.Optimizer]:
    params = [nn.Parameter(torch.ones(3000, dtype=dtype)) for _ in range(2)]
    o = module.AdamW(params, lr=0.1, **({"foreach": False} if module is torch.optim else {}))
    for p in params:
        p.grad = torch.ones(3000, dtype=dtype)
    o.step()
    o.state[params[1]] = o.state[params[0]]
    return params, o


def counter_of_another(module, dtype) -> tuple[list, torch.optim.Optimizer]:
    params, o = state_of_another(module, dtype)
    a, b = (o.state[p] for p in params)
    o.state[params[1]] = {k: v if k == "step" else v.clone() for k, v in b.items()}
    return params, o


def twice(module, dtype) -> tuple[list, torch.optim.Optimizer]:
    p = nn.Parameter(torch.ones(3000, dtype=dtype))
    o = module.AdamW([p], lr=0.1, **({"foreach": False} if module is torch.optim else {}))
    o.param_groups[0]["params"].append(p)
    return [p], o


@pytest.mark.parametrize("make", [views, state_of_another, counter_of_another, twice])
@pytest.mark.parametrize("way", ["kernel", "reference", "in host memory"])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(make, way: str) -> None:
    made = []
    for module, dtype in ((optim, torch.float32), (torch.optim, torch.float64)):
        params, o = make(module, dtype)
        if module is optim and way == "in host memory":
            optim.offload_states(o)
        torch.manual_seed(0)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            with backend(way):
                o.step()
        made.append([p.detach().double() for p in params])
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)


# ---- what users keep in states --------------------------------------------------------------------------------------


def test_entries_of_the_users() -> None:
    made = []
    for module in (optim, torch.optim):
        p = nn.Parameter(torch.ones(5000))
        o = module.AdamW([p])
        p.grad = torch.ones(5000)
        o.state["mine"], o.state["dict"] = 1, {"x": torch.ones(3)}
        o.step()
        o.state[p]["note"], o.state[p]["my_codes"] = "text", torch.ones(3, dtype=torch.int8)
        o.step()
        saved = o.state_dict()
        again = module.AdamW([p])
        again.load_state_dict(copy.deepcopy(saved))
        again.step()
        assert again.state["mine"] == 1 and again.state["dict"]["x"].sum() == 3
        assert "my_codes" in again.state[p]
        assert module is torch.optim or again.state[p]["note"] == "text"  # torch makes a generator of it
        made.append(p.detach())
    torch.testing.assert_close(*made)
