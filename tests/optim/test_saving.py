"""States saved and loaded: bitwise resumption, other formats, torch's, and what is refused."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from optimizer_formulas import FORMULAS

from bigkernels import optim

ALGORITHMS = tuple(FORMULAS)
FORMATS = [
    {},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "int8", "ema_decay": 0.9},
    {"rounding": "stochastic", "state_dtype": "int8", "max_grad_norm": 1.0},
    {"rounding": "kahan", "state_dtype": torch.bfloat16, "ema_decay": 0.99},
]


def make(name: str, params, **options):
    if name == "SGD":
        options = {"momentum": 0.9, **options}
    return getattr(optim, name)(params, lr=1e-2, **options)


def model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.ReLU(), torch.nn.Linear(90, 3)).to(dtype)


def train(m: torch.nn.Module, o: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        o.zero_grad()
        x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).to(next(m.parameters()).dtype)
        m(x).float().square().sum().backward()
        o.step()


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    states = zip(a.state.values(), b.state.values(), strict=True)
    return all(s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s) for s, t in states)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_resumption_is_bitwise(name: str, options: dict) -> None:
    m = model()
    o = make(name, m.parameters(), **options)
    train(m, o, range(3))
    file = io.BytesIO()
    torch.save({"model": m.state_dict(), "optimizer": o.state_dict()}, file)
    train(m, o, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = model()
    again.load_state_dict(saved["model"])
    torch.manual_seed(99)  # the seed of stochastic rounding comes with the state
    resumed = make(name, again.parameters(), **options)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), again.parameters(), strict=True))
    assert same(o, resumed)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("saved", FORMATS, ids=str)
@pytest.mark.parametrize("loaded", FORMATS, ids=str)
def test_states_of_other_formats_are_converted(name: str, saved: dict, loaded: dict) -> None:
    m = model()
    o = make(name, m.parameters(), **saved)
    train(m, o, range(3))
    other = make(name, m.parameters(), **loaded)
    other.load_state_dict(o.state_dict())
    group = other.param_groups[0]
    assert group["state_dtype"] == loaded.get("state_dtype", torch.float32)
    assert group["rounding"] == loaded.get("rounding", "nearest")
    for p in m.parameters():
        for key in other._rule_of(p, group).states:
            if key in o.state[p]:
                a, b = o._read(key, o.state[p]).float(), other._read(key, other.state[p]).float()
                assert (a - b).abs().max() <= 0.04 * a.abs().max()
        assert other.state[p]["step"] == 3
    train(m, other, range(3, 5))
    assert all(p.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if hasattr(torch.optim, n)])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_torch_goes_on_from_torch_state_dict(name: str, options: dict) -> None:
    m = model(torch.float32)
    if name == "Muon":
        m = torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in ((70, 90), (90, 3))))
    o = make(name, m.parameters(), **options)
    train(m, o, range(3))
    twin = copy.deepcopy(m)
    theirs = getattr(torch.optim, name)(twin.parameters(), lr=1e-2)
    before = {key: set(value) for key, value in (("group", theirs.param_groups[0]),)}
    theirs.load_state_dict(o.torch_state_dict())
    assert set(theirs.param_groups[0]) - {"decoupled_weight_decay"} <= before["group"] | {
        "max_grad_norm",
        "use_muon",
        "adamw_lr",
        "adamw_betas",
        "adamw_eps",
        "adamw_weight_decay",
        "maximize",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    }
    plain = {k: v for k, v in options.items() if k in ("max_grad_norm",)}
    ours = make(name, m.parameters(), **plain)
    ours.max_grad_norm = None
    ours.load_state_dict(o.state_dict())
    train(m, ours, range(3, 6)), train(twin, theirs, range(3, 6))
    loose = {"rtol": 2e-2, "atol": 2e-2} if name == "Muon" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(list(m.parameters()), list(twin.parameters()), **loose)


def test_groups_are_loaded_and_formats_are_not() -> None:
    m = model()
    o = optim.AdamW(m.parameters(), lr=0.5, betas=(0.5, 0.6), weight_decay=0.3, state_dtype="int8")
    train(m, o, range(1))
    other = optim.AdamW(m.parameters(), lr=0.1)
    other.load_state_dict(o.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.5, 0.6), 0.3)
    assert group["state_dtype"] == torch.float32
    assert all(s["exp_avg"].dtype == torch.float32 for s in other.state.values())


def broken(change) -> dict:
    m = model()
    o = optim.AdamW(m.parameters(), state_dtype="int8")
    train(m, o, range(2))
    found = copy.deepcopy(o.state_dict())
    change(SimpleNamespace(first=found["state"][0], all=found))
    return found


CORRUPTIONS = {
    "shape": (lambda d: d.first.update(exp_avg_codes=d.first["exp_avg_codes"][:-1]), "exp_avg is"),
    "no scales": (lambda d: d.first.pop("exp_avg_scale"), "scales"),
    "truncated scales": (lambda d: d.first.update(exp_avg_sq_scale=d.first["exp_avg_sq_scale"][:-1]), "scales"),
    "no tensor": (lambda d: d.first.update(exp_avg_codes=3.0), "float"),
    "step": (lambda d: d.first.update(step=torch.tensor(1.5)), "step"),
    "negative step": (lambda d: d.first.update(step=torch.tensor(-1.0)), "step"),
    "groups": (lambda d: d.all["param_groups"].append(d.all["param_groups"][0]), "group"),
    "parameters": (lambda d: d.all["param_groups"][0]["params"].pop(), "group"),
    "options": (lambda d: d.all["param_groups"][0].update(betas=(0.9, 2.0)), "betas"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_state_changes_nothing(corruption: str) -> None:
    change, message = CORRUPTIONS[corruption]
    m = model()
    o = optim.AdamW(m.parameters(), state_dtype="int8")
    train(m, o, range(3))
    before = copy.deepcopy(o.state_dict())
    with pytest.raises(ValueError, match=message):
        o.load_state_dict(broken(change))
    now = o.state_dict()
    assert now["param_groups"] == before["param_groups"]
    torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)
    train(m, o, range(3, 4))


def test_hooks_of_state_dicts_see_plain_tensors() -> None:
    m = model()
    o = optim.AdamW(m.parameters(), state_dtype="int8")
    train(m, o, range(2))
    seen = []
    o.register_load_state_dict_pre_hook(lambda _, d: seen.append(type(d["state"][0]["exp_avg_codes"])))
    o.register_load_state_dict_post_hook(lambda opt: seen.append(len(opt.state)))
    o.register_state_dict_post_hook(lambda _, d: d.update(extra=1))
    saved = o.state_dict()
    assert saved.pop("extra") == 1
    o.load_state_dict(saved)
    assert seen == [torch.Tensor, 4]


def test_named_parameters_keep_their_names() -> None:
    m = model()
    o = optim.AdamW(m.named_parameters())
    train(m, o, range(1))
    other = optim.AdamW(m.named_parameters())
    other.load_state_dict(o.state_dict())
    assert other.param_groups[0]["param_names"] == [n for n, _ in m.named_parameters()]
