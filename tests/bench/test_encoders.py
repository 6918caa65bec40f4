"""The encoder family on small models: all candidates are right, and figures come along."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigkernels._load import cpu_library
from bigkernels.bench import engine
from bigkernels.bench.case import EAGER, OURS, Settings
from bigkernels.bench.families import cases

QUICK = replace(Settings.quickly(), candidates=(EAGER, OURS, f"{OURS} int8"))


@pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))
def test_candidates_are_right():
    found = cases("encoders", QUICK)
    assert {c.threads for c in found} >= {1}
    assert len({c.name.split(",")[0] for c in found}) == 3
    for case in found[:4]:
        steps, rows = engine.check(case)
        assert {r.status for r in rows} == {"ok"}, [(r.candidate, r.reason) for r in rows]
        assert set(steps) == set(case.candidates)
        assert case.tokens > 0 and case.metric == "tokens/s"


def test_figures_say_latencies_and_cosines():
    case = cases("encoders", QUICK)[0]
    contest = case.prepare()
    candidate = next(c for c in contest.candidates if c.name == OURS)
    candidate.results()
    for _ in range(3):
        candidate.step()
    figures = candidate.figures()
    assert 0.99 < figures["cosine"] <= 1.001 and 0 < figures["p50"] <= figures["p99"]


def test_a_wrong_embedding_is_told():
    case = cases("encoders", QUICK)[0]
    contest = case.prepare()
    results = contest.candidates[0].results()
    bad = {name: cosines - 0.5 for name, cosines in results.items()}
    (comparison,) = contest.compare(bad, {}, {}).values()
    assert not comparison.ok
