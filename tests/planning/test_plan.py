"""Arguments, the search under a limit, reports, and the command."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from planning.conftest import CONFIGS, build
from torch import nn

from bigkernels import _cli, optim, plan
from bigkernels.planning import MemoryPlan
from bigkernels.planning._plan import parse_bytes

LIMITS = {"copy": 2e10, "matrix": {"float32": 1e11, "bfloat16": 4e11}}
SETTING = {"batch": 2, "seq": 64, "dtype": "bfloat16", "limits": LIMITS}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def wide() -> MemoryPlan:
    """A plan whose limit everything fits."""
    return plan(CONFIGS["llama"](), **SETTING, limit="1TB")


def test_what_fits_comes_by_time(wide):
    assert wide.fits
    assert wide.reason is None
    fitting = [c for c in wide.choices if c.fits]
    assert len({(c.checkpointing, c.state_dtype, c.patch) for c in wide.choices}) == len(wide.choices)
    assert [c.seconds for c in fitting] == sorted(c.seconds for c in fitting)
    assert wide.best == fitting[0]
    # Recomputing costs time and saves memory; smaller states and fused kernels save both.
    by = {(c.checkpointing, c.state_dtype, c.patch): c for c in fitting}
    assert wide.best.checkpointing is None
    assert wide.best.patch == "yes"
    assert wide.best.state_dtype == "int8"
    plain = by[None, "float32", "no"]
    assert plain.peak == wide.peak
    assert plain.seconds == pytest.approx(wide.seconds)
    again = by["recompute", "float32", "no"]
    assert again.peak < plain.peak
    assert again.seconds > plain.seconds
    assert by[None, "int8", "no"].peak < by[None, "bfloat16", "no"].peak < plain.peak
    assert by[None, "float32", "yes"].peak < by[None, "float32", "loss"].peak <= plain.peak


def test_a_limit_between_is_met_and_leaves_the_rest_out(wide):
    sizes = sorted(c.peak for c in wide.choices if c.fits)
    limit = sizes[len(sizes) // 2]
    found = plan(CONFIGS["llama"](), **SETTING, limit=limit)
    assert found.limit == limit
    assert found.fits == (found.peak <= limit)
    assert {c.fits for c in found.choices} == {True, False}
    assert all((c.peak <= limit) == c.fits for c in found.choices if c.problem is None)
    assert found.best.seconds == min(c.seconds for c in found.choices if c.fits)
    where = [c.fits for c in found.choices]
    assert where == sorted(where, reverse=True)


def test_a_limit_that_nothing_fits_is_told_with_the_reason(wide):
    least = min(c.peak for c in wide.choices if c.problem is None)
    found = plan(CONFIGS["llama"](), **SETTING, limit=wide.parameters)
    assert not found.fits
    assert found.best is None
    assert not any(c.fits for c in found.choices)
    assert found.choices[0].peak == least
    assert "Nothing fits" in found.reason
    assert "Parameters and gradients alone" in found.reason
    assert str(found.choices[0]) in found.reason


def test_an_optimizer_of_torch_leaves_no_choice_of_states():
    found = plan(CONFIGS["llama"](), **SETTING, optimizer="torch.AdamW", limit="1TB")
    assert {c.state_dtype for c in found.choices} == {None}


def test_a_policy_that_a_model_does_not_bear_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())  # no repeated blocks
    found = plan(model, inputs=torch.empty(2, 8), limits=LIMITS, limit="1GB")
    assert found.best.checkpointing is None
    problems = {c.checkpointing: c.problem for c in found.choices}
    assert problems[None] is None
    assert "ValueError" in problems["recompute"]


def test_limits_of_inference():
    found = plan(CONFIGS["llama"](), **SETTING, mode="inference", new_tokens=4, limit="1GB")
    assert {c.patch for c in found.choices} == {"no", "yes"}
    assert {c.checkpointing for c in found.choices} == {None}


def test_json_round_trip(wide, tmp_path):
    path = tmp_path / "some" / "plan.json"
    text = wide.to_json(path)
    assert MemoryPlan.from_json(text) == wide
    assert MemoryPlan.from_json(path.read_text()) == wide
    content = json.loads(text)
    assert content["held"]["parameters"] == wide.parameters
    assert content["limits"] == LIMITS
    with pytest.raises(ValueError, match="schema 0; this version reads 1"):
        MemoryPlan.from_json(json.dumps(content | {"schema": 0}))


def test_the_text_has_every_part(wide):
    text = str(wide)
    for word in ("llama, train on cpu", "optimizer state", "activations", "backward", "together", "Fastest that fits"):
        assert word in text


def test_a_picture(wide, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "pictures" / "plan.png"
    wide.plot(path)
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("1.5g", 15 * 10**8), ("300 kB", 300_000), ("7 B", 7), (7, 7)],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mode": "serve"}, ValueError, "mode is 'serve'"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"seq": 1.5}, ValueError, "seq is 1.5"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"autocast": "half precision"}, ValueError, "autocast is 'half precision'"),
        ({"optimizer": "adamz"}, ValueError, "optimizer is 'adamz'; accepted are"),
        ({"optimizer": 3}, TypeError, "optimizer is a int"),
        (
            {"optimizer": "torch.AdamW", "state_dtype": "int8"},
            ValueError,
            "state_dtype is for the classes of bigkernels",
        ),
        ({"state_dtype": "int3"}, ValueError, "state_dtype is 'int3'"),
        ({"checkpointing": "forget"}, ValueError, "'forget'"),
        ({"patch": "maybe"}, ValueError, "patch is 'maybe'"),
        ({"device": "meta"}, ValueError, "device is 'meta'"),
        ({"limit": "24"}, ValueError, "limit is '24', which has no unit; write 24GB or 24B"),
        ({"limit": "much"}, ValueError, "limit is 'much'"),
        ({"limit": -1}, ValueError, "limit is -1"),
        ({"limits": {"copy": 1.0}}, ValueError, "needed are 'copy' and 'matrix'"),
    ],
)
def test_arguments_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        plan(CONFIGS["llama"](), **SETTING | options)


def test_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model is a int"):
        plan(3)
    with pytest.raises(ValueError, match="has no config.json"):
        plan(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no configuration"):
        plan(str(tmp_path))
    with pytest.raises(ValueError, match="give `inputs`"):
        plan(nn.Linear(2, 2), limits=LIMITS)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is none here"):
            plan(nn.Linear(2, 2), device="cuda")


def test_code_that_depends_on_values_is_told():
    class Picks(nn.Linear):
        def forward(self, x):
            return super().forward(x[x.sum(1) > 0])

    with pytest.raises(RuntimeError, match="Picks cannot be planned: its code depends on values"):
        plan(Picks(4, 4), inputs=torch.empty(2, 4), limits=LIMITS)


def test_a_loss_and_an_optimizer_of_ones_own():
    model = nn.Linear(16, 8, bias=False)

    def loss(model, inputs):
        return nn.functional.cross_entropy(model(inputs["x"]), inputs["y"])

    inputs = {"x": torch.empty(4, 16), "y": torch.empty(4, dtype=torch.int64)}
    made = optim.Lion(nn.Linear(1, 1).parameters(), state_dtype=torch.bfloat16)
    found = plan(model, inputs=inputs, loss=loss, optimizer=made, limits=LIMITS)
    assert found.optimizer == "Lion"
    assert found.optimizer_state == 2 * 16 * 8 + 8
    assert found.held["inputs"] == 4 * 4 * 16 + 8 * 4
    of_function = plan(
        model, inputs=inputs, loss=loss, optimizer=lambda p: torch.optim.SGD(p, momentum=0.9), limits=LIMITS
    )
    assert of_function.optimizer_state == 4 * 16 * 8


def test_the_machine_is_measured_where_no_limits_are_given():
    found = plan(nn.Linear(4, 4), inputs=torch.empty(2, 4))
    assert found.limits["copy"] > 0
    assert found.limits["matrix"]["float32"] > 0
    assert found.seconds > 0


def test_the_package_imports_without_what_planning_needs():
    snippet = (
        "import sys, bigkernels; print({'transformers', 'matplotlib', 'bigkernels.bench.limits'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_measured_times_decide_nothing(monkeypatch):
    """What a "selective" policy keeps follows from the limits: fake tensors take no time that means anything."""
    from bigkernels.checkpointing import _select

    found = set()
    for times in (
        itertools.count(),
        itertools.count(0, -1),
        map(random.Random(0).gauss, itertools.repeat(0), itertools.repeat(1)),
    ):
        monkeypatch.setattr(_select, "time", SimpleNamespace(perf_counter=times.__next__))
        found.add(plan(CONFIGS["llama"](), **SETTING, checkpointing="selective").peak)
    assert len(found) == 1


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path / "tiny-llama")
    return str(tmp_path / "tiny-llama")


SPEED = ["--bandwidth", "20", "--tflops", "0.4"]


def test_the_command_writes_what_it_is_told(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", folder, "--batch", "2", "--seq", "64", "--dtype", "bfloat16", "--optimizer", "adamw",
                 "--state-dtype", "int8", "--checkpointing", "selective", "--limit", "24GB", "--json", str(out),
                 "--plot", str(picture), *SPEED]  # fmt: skip
    assert _cli.main(arguments) == 0
    found = MemoryPlan.from_json(out.read_text())
    same = plan(folder, **SETTING, state_dtype="int8", checkpointing="selective", patch=True)
    assert (found.peak, found.held, found.model) == (same.peak, same.held, "tiny-llama")
    assert found.limits["copy"] == 20e9
    assert picture.read_bytes().startswith(PNG)
    captured = capsys.readouterr()
    assert "Limit 24.00 GB: the setting fits." in captured.out
    assert "checkpointing recompute, patched: yes" in captured.err


def test_the_command_says_that_nothing_fits(folder, capsys):
    assert _cli.main(["plan", folder, "--seq", "64", "--limit", "100kB", *SPEED]) == 1
    assert "Nothing fits" in " ".join(capsys.readouterr().out.split())


def test_the_command_plans_generation(folder, capsys):
    assert _cli.main(["plan", folder, "--mode", "inference", "--seq", "64", "--new-tokens", "4", *SPEED]) == 0
    printed = capsys.readouterr().out
    assert "kv cache" in printed
    assert "last token" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/folder"], "there is no folder '/no/such/folder'"),
        (["FOLDER", "--dtype", "int8"], "dtype is 'int8'"),
        (["FOLDER", "--bandwidth", "20"], "--bandwidth and --tflops go together"),
        (["FOLDER", "--checkpointing", "forget", *SPEED], "'forget'"),
    ],
)
def test_the_command_refuses(folder, arguments, said, capsys):
    assert _cli.main(["plan", *(folder if a == "FOLDER" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bigkernels plan: ")
    assert said in error


def test_a_real_model_is_not_touched():
    model = build(CONFIGS["llama"](), torch.float32).eval()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    keys = {name: set(vars(m)) for name, m in model.named_modules()}
    plan(model, batch=1, seq=16, patch=True, checkpointing="recompute", limits=LIMITS)
    for name, p in model.state_dict().items():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert {name: set(vars(m)) for name, m in model.named_modules()} == keys
    assert not model.training
