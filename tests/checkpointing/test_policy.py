"""Policies: names, sums, what is refused, and where a policy is asked for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels import apply_checkpointing, checkpoint, saved_activations
from bigkernels.checkpointing import Policy, fp8, int8, offload, recompute, resolve_policy, selective
from bigkernels.checkpointing._policy import Code, Host, Selection


def test_names() -> None:
    assert resolve_policy("recompute") == recompute() == Policy(keep="nothing")
    assert resolve_policy("selective") == selective() and isinstance(selective().keep, Selection)
    assert resolve_policy("int8") == int8() == Policy(code=Code("int8"))
    assert resolve_policy("fp8") == fp8() == Policy(code=Code("fp8", stochastic=False))
    assert resolve_policy("offload") == offload() == Policy(place=Host())
    assert resolve_policy(int8(stochastic=True)).code.stochastic


def test_sums() -> None:
    assert resolve_policy("recompute+offload") == resolve_policy(" offload + recompute ") == recompute() + offload()
    everything = selective(["aten::mm"]) + fp8() + offload("/tmp", min_nbytes=5)
    assert everything.keep.operators == {"aten::mm"} and everything.place == Host("/tmp", 5)
    assert everything.code == Code("fp8")
    assert Policy() + int8() == int8() == int8() + Policy()


@pytest.mark.parametrize("names", ["int8+fp8", "recompute+selective", "offload+offload", "int8+int8"])
def test_contradictions(names: str) -> None:
    with pytest.raises(ValueError, match="both policies say (code|keep|place)"):
        resolve_policy(names)


@pytest.mark.parametrize("name", ["", "int4", "int8+", "Recompute", "recompute offload"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="accepted are recompute, selective, int8, fp8, offload"):
        resolve_policy(name)


@pytest.mark.parametrize("wrong", [None, 8, ["int8"], Code("int8")])
def test_wrong_types(wrong) -> None:
    with pytest.raises(TypeError, match="accepted are str and Policy"):
        resolve_policy(wrong)
    with pytest.raises(TypeError):
        recompute() + wrong


def test_wrong_parts() -> None:
    with pytest.raises(ValueError, match="keep is 'some'"):
        Policy(keep="some")
    with pytest.raises(TypeError, match="code is 'int8'"):
        Policy(code="int8")
    with pytest.raises(TypeError, match="place"):
        Policy(place="/tmp")
    with pytest.raises(ValueError, match="format is 'int4'"):
        Code("int4")


def test_operators() -> None:
    names = selective([torch.ops.aten.mm, torch.ops.aten.add.Tensor, "aten.bmm", "bigkernels::attention_fwd"])
    assert names.keep.operators == {"aten::mm", "aten::add", "aten::bmm", "bigkernels::attention_fwd"}
    assert names.keep.budget is None
    with pytest.raises(ValueError, match="is no operator"):
        selective([torch.mm])


@pytest.mark.parametrize("budget", [0, 0.0, -3, -0.5, 1.5])
def test_budgets(budget) -> None:
    with pytest.raises(ValueError, match="budget is"):
        selective(budget=budget)


def test_policies_are_values() -> None:
    policy = selective(["aten::mm"], budget=0.25) + int8(stochastic=True) + offload("/tmp")
    assert hash(policy) == hash(copy.deepcopy(policy)) and pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(AttributeError):
        policy.code = None


def test_wrong_policies_change_nothing() -> None:
    ran = []
    with pytest.raises(ValueError, match="int3"):
        checkpoint(ran.append, 1, policy="int3")
    with pytest.raises(TypeError):
        checkpoint(ran.append, 1, policy=None)
    model = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
    model = nn.Sequential(model)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    for policy, error in (("int3", ValueError), (3, TypeError)):
        with pytest.raises(error):
            apply_checkpointing(model, policy)
    for every in (0, -1):
        with pytest.raises(ValueError, match="every"):
            apply_checkpointing(model, every=every)
    assert before == {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert not ran


@pytest.mark.parametrize("policy", ["recompute", "selective", "recompute+int8", "selective+offload"])
def test_a_context_cannot_run_again(policy: str) -> None:
    with pytest.raises(ValueError, match="use bigkernels.checkpoint"), saved_activations(policy):
        raise AssertionError("entered")


def test_public_names() -> None:
    for name in ("checkpoint", "apply_checkpointing", "remove_checkpointing", "saved_activations", "checkpointing"):
        assert name in bigkernels.__all__ and hasattr(bigkernels, name)
    for name in bigkernels.checkpointing.__all__:
        assert getattr(bigkernels.checkpointing, name).__doc__
