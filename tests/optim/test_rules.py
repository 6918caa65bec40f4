"""What a rule says of itself is what the kernels, the tests and the integrations have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from optimizer_formulas import CASES, FORMULAS
from optimizer_pairs import CASES as PAIRS

from bigkernels import optim
from bigkernels.integrations.transformers._optimizers import NAMES
from bigkernels.optim._reference import RULES, Rule

HEADERS = Path(__file__).parents[2] / "csrc/include/bigkernels"


def classes() -> dict[str, type[optim.Optimizer]]:
    found = {name: getattr(optim, name) for name in optim.__all__ if inspect.isclass(getattr(optim, name))}
    return {name: kind for name, kind in found.items() if kind is not optim.Optimizer}


def kernel_rules() -> dict[str, dict[str, int]]:
    """Of each algorithm in the headers its number and its sets of states, as bits."""
    numbers = re.search(r"enum class Algorithm : int {(.*?)}", (HEADERS / "optimizer.h").read_text(), re.S)[1]
    found = {name: {"number": int(number)} for name, number in re.findall(r"(\w+) = (\d+)", numbers)}
    text = (HEADERS / "update.h").read_text()
    for name, body in re.findall(r"struct Update<Algorithm::(\w+)>.*?{(.*?)\n};", text, re.S):
        found[name] |= {key: int(value) for key, value in re.findall(r"(kNeeded|kKnown|kUnsigned) = (\d+)", body)}
    return found


def bits(rule: Rule, chosen: list[bool]) -> int:
    return sum(1 << place for place, is_in in enumerate(chosen) if is_in)


@pytest.mark.parametrize("rule", [r for r in RULES.values() if r.name != "descent"], ids=lambda r: r.name)
def test_the_kernels_have_the_states_of_the_rule(rule: Rule) -> None:
    with_all = {"amsgrad": True, "momentum": 0.9, "centered": True}
    with_none = {"amsgrad": False, "momentum": 0.0, "centered": False}
    assert kernel_rules()[rule.name] == {
        "number": rule.number,
        "kNeeded": bits(rule, [s in rule.needs(with_none) for s in rule.kept]),
        "kKnown": bits(rule, [s in rule.needs(with_all) for s in rule.kept]),
        "kUnsigned": bits(rule, [not s.signed for s in rule.kept]),
    }


def test_every_algorithm_of_the_kernels_has_a_rule_and_a_class() -> None:
    assert set(kernel_rules()) == set(RULES) - {"descent"} == {kind._rule.name for kind in classes().values()}


def test_every_class_is_tested_and_has_a_name_in_transformers() -> None:
    names = set(classes())
    assert set(FORMULAS) == names
    assert set(CASES) == names
    assert {name for name, _ in PAIRS} == names - {"Muon"}  # whose second half is compared by the matrices' own test
    assert {name.split("_")[1] for name in NAMES} == {name.lower() for name in names}


@pytest.mark.parametrize("kind", classes().values(), ids=lambda k: k.__name__)
def test_the_options_of_a_rule_are_arguments_of_its_class(kind: type[optim.Optimizer]) -> None:
    assert set(kind._rule.options) <= set(inspect.signature(kind).parameters)
    starts = {state.start for state in kind._rule.kept} - {None}
    assert starts <= set(kind._rule.options)
