"""What a plan says of a step program, beside what one keeps after a real call."""

from __future__ import annotations

import pytest
import torch
from planning.conftest import CONFIGS, build

import bigkernels
from bigkernels import memory
from bigkernels._load import cpu_library

pytestmark = pytest.mark.skipif(cpu_library().reason is not None, reason=str(cpu_library().reason))
LIMITS = {"copy": 2e10, "matrix": {"float32": 1e11, "bfloat16": 4e11}}
SETTING = {"mode": "inference", "dtype": "float32", "limits": LIMITS}


@pytest.mark.parametrize(("batch", "seq"), [(1, 512), (4, 100), (1, 1)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "wide"])
def test_values_of_a_run(name: str, batch: int, seq: int):
    """Where each has a place of its own, and where places are used again."""
    config = CONFIGS["llama" if name == "wide" else name]()
    if name == "wide":
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 384, 1024, 4
    model = build(config, torch.float32).eval()
    bigkernels.patch(model)
    ids = torch.randint(3, 500, (batch, seq))
    with torch.no_grad():
        model(input_ids=ids[:, :1], logits_to_keep=1)
        memory.release_workspaces()
        before = memory.workspaces()
        model(input_ids=ids, logits_to_keep=1)
    taken = memory.workspaces() - before
    (program,) = bigkernels.info()["programs"]["models"][:1] or [None]
    found = bigkernels.plan(config, batch=batch, seq=seq, patch=True, **SETTING).held["program"]
    assert 0.3 * taken < found < 3 * taken + 1e5, (taken, found)


def test_where_there_is_none():
    for options in ({"patch": False}, {"patch": {"decode": False}}, {"patch": "loss"}):
        found = bigkernels.plan(CONFIGS["llama"](), batch=1, seq=64, **options, **SETTING)
        assert ("program" in found.held) == (options["patch"] == "loss")
    plain = bigkernels.plan(CONFIGS["llama"](), batch=1, seq=64, patch={"decode": False}, **SETTING)
    whole = bigkernels.plan(CONFIGS["llama"](), batch=1, seq=64, patch=True, **SETTING)
    assert whole.peak - plain.peak == whole.held["program"] > 0
    assert "program" in str(whole) and whole.from_json(whole.to_json()) == whole


def test_info_knows_the_programs():
    model = build(CONFIGS["llama"](), torch.float32).eval()
    bigkernels.patch(model)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 500, (1, 5)))
        model(input_ids=torch.randint(3, 500, (1, 5)), output_hidden_states=True)
    rows = [row for row in bigkernels.info()["programs"]["models"] if row["calls"] == 1 and row["by modules"] == 1]
    assert any("2 layers" in r["state"] and "output_hidden_states" in r["why"] and r["nbytes"] > 0 for r in rows)
