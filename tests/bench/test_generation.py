"""The generation family on a tiny random model, without anything that has to be fetched."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from bigkernels import _cli
from bigkernels.bench import engine, generation, generation_bars, report
from bigkernels.bench.case import EAGER, OURS, Missing, Settings
from bigkernels.bench.engine import Row
from bigkernels.bench.families import cases
from bigkernels.bench.limits import Limits
from bigkernels.bench.process import Busy, Process
from bigkernels.bench.processes import llama_cpp_model
from bigkernels.bench.timing import Statistics

pytest.importorskip("transformers")

CHECKOUT = Path(__file__).parents[2]
QUICK = replace(
    Settings.quickly(),
    rounds=1,
    seconds=0.0,
    baseline=str(CHECKOUT),
    candidates=(EAGER, OURS, generation.INT4, generation.BEFORE[OURS], generation.Q4_1),
)
LIMITS = Limits("cpu", 1e9, {"bfloat16": 1e12}, "given", "given", read=1e9)


@pytest.fixture(scope="module")
def line_up():
    """The models of `QUICK`, loaded once."""
    yield generation.line_up(QUICK)
    generation.line_up(QUICK).close()
    generation.line_up.cache_clear()


def find(start: str, settings: Settings = QUICK):
    return next(case for case in cases("generation", settings) if case.name.startswith(start))


def run(case, rounds: int = 1) -> dict[str, Row]:
    return {row.candidate: row for row in engine.run(case, LIMITS, replace(QUICK, rounds=rounds))}


def test_a_prompt_is_read_and_tokens_are_generated_by_all_that_compete(line_up):
    names = [EAGER, OURS, generation.INT4, generation.BEFORE[OURS]]
    for start, tokens in (("prefill B 1, 64 tokens", 64), ("decode B 1, context 8", 1), ("decode B 8, context 8", 8)):
        rows = run(find(start))
        assert [name for name, row in rows.items() if row.status == "ok"] == names
        assert rows[generation.Q4_1].reason == "random weights have no GGUF file"
        for name in names:
            assert rows[name].tokens_per_second == pytest.approx(tokens / rows[name].seconds.median)
            assert rows[name].ours == (name in (OURS, generation.INT4))
            assert rows[name].figures.get("peak" if start.startswith("prefill") else "cpu", 0) > 0


def test_a_decoded_token_reads_the_weights_and_what_the_cache_holds(line_up):
    case = find("decode B 8, context 8")
    rows = run(case)
    # The embedding is the head; then, in each of two layers, q, o, k, v, gate, up, down and two norms; and a last norm.
    weights = 512 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64) + 64
    behind = 8 + 2  # tokens, in the middle of the four that are decoded
    cache = 8 * behind * 2 * 2 * 2 * 16  # sequences, tokens, keys and values, layers, heads, elements
    assert rows[OURS].bytes == pytest.approx(2 * (weights + cache), rel=1e-3)  # and a few buffers
    assert rows[generation.INT4].bytes < rows[OURS].bytes
    assert rows[OURS].limit_percent == pytest.approx(rows[OURS].bytes / 1e9 / rows[OURS].seconds.median * 100)


def test_copies_are_proposed_and_a_core_is_taken(line_up):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    copied, taken = run(find("copying")), run(find("decode, one core taken"))
    for rows, suffix in ((copied, generation.LOOKUP), (taken, generation.ALONE)):
        for name in (OURS, OURS + suffix):
            assert rows[name].status == "ok"


def test_operators_are_measured_beside_those_of_the_baseline(line_up):
    case = next(c for c in cases("generation", QUICK) if c.name == "operator alone, int4, 16 x 128 to 128")
    rows = run(case)
    assert {name: row.status for name, row in rows.items()}[generation.BEFORE[OURS]] == "ok"
    assert rows[OURS].status == "ok" and rows[OURS].family == "generation"


def test_a_model_that_computes_something_else_is_found(line_up, monkeypatch):
    model = line_up.get(OURS)
    ask = model.ask

    def wrong(do, **what):
        answer = ask(do, **what)
        return {"losses": [loss + 0.5 for loss in answer["losses"]]} if do == "score" else answer

    monkeypatch.setattr(model, "ask", wrong)
    monkeypatch.setattr(model, "error", None)
    row = run(find("decode B 1, context 8"))[OURS]
    assert row.status == "wrong" and row.seconds is None
    assert engine.failed([row]) == [row]


def test_a_model_that_runs_its_modules_is_told(line_up, monkeypatch):
    model = line_up.get(OURS)
    counted = SimpleNamespace(left=0, why="a reason")
    monkeypatch.setattr(model, "steps", counted)
    monkeypatch.setattr(model, "_left", 0)
    case = find("decode B 1, context 8")
    assert run(case)[OURS].reason is None
    counted.left = 3
    rows = run(case)
    assert rows[OURS].reason == "by its modules: a reason"
    assert f"{OURS} in {case.name}: by its modules: a reason" in report.remarks(list(rows.values()))


def test_the_full_run_has_the_cases_of_the_design():
    names = [str(case) for case in cases("generation", Settings())]
    assert len(set(names)) == len(names)
    for start in (
        "prefill B 1, 512 tokens, 1 thread",
        "decode B 1, context 4096, 1 thread",
        "decode B 8, context 64",
        "copying, 96 tokens",
        "operator alone, int4, 16 x 4096 to 4096",
        "Llama 1 B, decode",
    ):
        assert any(name.startswith(start) for name in names), start
    everything = next(c for c in cases("generation", Settings()) if c.name.startswith("decode B 1, context 512"))
    assert {EAGER, OURS, generation.MODULES, generation.GGUF, generation.Q4_1} <= set(everything.candidates)


def row(case: str, candidate: str, seconds: float, threads: int = 2, **more) -> Row:
    found = Row("generation", case, "cpu", "bfloat16", False, candidate, candidate.startswith(OURS), "tokens/s", 0, 0)
    found.seconds, found.threads = Statistics.of([seconds]), threads
    for name, value in more.items():
        setattr(found, name, value)
    return found


def test_bars_are_ratios_of_rows():
    middle, short, long = (f"decode B 1, context {n}, 2 threads" for n in (512, 64, 4096))
    prompt = "prefill B 1, 512 tokens, 2 threads"
    rows = [
        row(middle, generation.GGUF, 1e-3),
        row(middle, generation.Q4_1, 1.9e-3),
        row(middle, OURS, 4e-3, limit_percent=77.0),
        row(middle, EAGER, 10e-3),
        row(short, OURS, 3e-3),
        row(long, OURS, 7.032e-3),
        row(short, generation.INT4, 2e-3),
        row("decode B 8, context 64, 2 threads", generation.INT4, 3.2e-3),
        row(prompt, OURS, 0.1),
        row(prompt, "before", 0.11),
        row("copying, 96 tokens, 2 threads", OURS, 6e-3),
        row("copying, 96 tokens, 2 threads", OURS + generation.LOOKUP, 3e-3),
        row(prompt, generation.INT4, 0.1, figures={"perplexity": 40.1, "perplexity of the modules in float32": 40.0}),
    ]
    found = {bar.name: bar for bar in generation_bars.bars(rows) if bar.measured is not None}
    seen = {name: (pytest.approx(bar.measured), bar.met) for name, bar in found.items()}
    assert seen == {
        "the GGUF's codes against llama.cpp, 2 threads": (1.9, True),
        "bfloat16 decoding against eager": (2.5, False),
        "bfloat16 decoding, of the byte limit": (77.0, None),
        "prefill, bfloat16, against the baseline": (1.1, False),
        "tokens a second of batch 8 against 1, int4": (5.0, True),
        "context 3900 against 64, bfloat16": (4.032 * 3836 / 4032, False),
        "prompt lookup, bfloat16": (2.0, True),
        "perplexity added by the arithmetic, int4": (0.25, True),
    }
    assert generation_bars.bars([]) and all(
        bar.measured is None and bar.met is None for bar in generation_bars.bars([])
    )


def test_the_command_writes_rows_and_prints_ratios(tmp_path, capsys, line_up):
    path = tmp_path / "rows.json"
    command = [
        "bench",
        "generation",
        "--quick",
        "--only",
        "decode B 1, context 8, 1 thread,",
        "--json",
        str(path),
        "--candidates",
        EAGER,
        OURS,
    ]
    assert _cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "decode B 1, context 8, 1 thread" in printed and "context 64" not in printed
    content = json.loads(path.read_text())
    assert {row["candidate"] for row in content["rows"]} == {EAGER, OURS}
    assert all(row["threads"] == 1 for row in content["rows"])
    assert set(content["limits"]["by_threads"]) <= {"1"}


def test_a_process_says_why_it_cannot(line_up):
    ask = line_up.get(generation.BEFORE[OURS]).ask
    with pytest.raises(Missing, match="nowhere"):
        ask("load", model="/nowhere")
    with pytest.raises(Missing, match="KeyError"):
        ask("fly")
    process = Process("serve")  # which ends at once
    with pytest.raises(Missing, match="exit code 0"):
        process.ask("load", model="/nowhere")
    process.close()


def test_a_busy_process_runs_inside_the_block_only():
    busy = Busy()
    try:
        with busy:
            pass
        state = Path(f"/proc/{busy.running.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state in ("T", "R")  # the signal may still be on its way
    finally:
        busy.close()


def test_a_busy_process_ends_with_the_one_that_started_it():
    code = (
        "import os, signal; from bigkernels.bench.process import Busy; busy = Busy(); "
        "print(busy.running.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    started = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False)
    stat = Path(f"/proc/{started.stdout.strip()}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] in ("Z", "X"):
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


def test_llama_cpp_is_looked_for_where_it_may_be(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("BIGKERNELS_LLAMA_CPP", raising=False)
    monkeypatch.chdir(tmp_path)
    assert llama_cpp_model.library() is None
    with pytest.raises(FileNotFoundError, match="node-llama-cpp"):
        llama_cpp_model.Model()
    folder = tmp_path / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
    folder.mkdir(parents=True)
    for name in ("libllama-common.so", "libllama.v0.5.0.so", "libggml.v0.5.0.so"):
        (folder / name).touch()
    assert llama_cpp_model.library() == folder / "libllama.v0.5.0.so"
    monkeypatch.setenv("BIGKERNELS_LLAMA_CPP", str(tmp_path))
    monkeypatch.chdir("/")
    assert llama_cpp_model.library() == folder / "libllama.v0.5.0.so"


class _Tensor:
    def __init__(self, data):
        self.data, self.shape, self.size = data, data.shape, data.size


class _Request:
    """As OpenVINO's: a state of the tokens it has read; the logits say how many they are."""

    def __init__(self):
        self.state, self.seen = _Tensor(numpy.zeros((1, 2, 0, 4))), []

    def infer(self, inputs):
        self.seen.append(inputs)
        batch, length = inputs["input_ids"].shape
        assert inputs["attention_mask"].shape == (batch, self.state.shape[2] + length)
        assert inputs["position_ids"][0, 0] == self.state.shape[2]
        self.state = _Tensor(numpy.zeros((batch, 2, self.state.shape[2] + length, 4)))

    def reset_state(self):
        self.state = _Tensor(numpy.zeros((1, 2, 0, 4)))

    def query_state(self):
        return [self]

    def get_tensor(self, name):
        assert name == "logits"
        return _Tensor(numpy.arange(10.0) == self.state.shape[2] % 10)


def test_openvino_goes_on_behind_its_prompt(monkeypatch):
    """Positions, masks and states of the calls that its script makes; tokens are forgotten after they were timed."""
    fake = SimpleNamespace(Tensor=_Tensor, opset13=None, InferRequest=_Request, Model=object)
    monkeypatch.setitem(sys.modules, "openvino", fake)
    monkeypatch.setitem(sys.modules, "openvino_genai", SimpleNamespace())
    script = CHECKOUT / "bigkernels" / "bench" / "processes" / "openvino_model.py"
    spec = importlib.util.spec_from_file_location("openvino_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, request = module.Model(), _Request()
    names = ("input_ids", "attention_mask", "position_ids", "beam_idx")
    model.graph = SimpleNamespace(inputs=[SimpleNamespace(get_names=lambda name=name: {name}) for name in names])
    model.requests = {1: request}
    assert model.prefill([[5, 6, 7], [7, 6, 5]], 1)["seconds"] >= 0
    for _ in range(2):
        assert len(model.decode(4, 1)["seconds"]) == 4
        assert request.state.shape[2] == 3
    assert [call["input_ids"][0, 0] for call in request.seen[1:5]] == [5, 6, 7, 5]
    losses = model.score([1, 3, 4, 5], 2, 1)["losses"]
    likely = numpy.log(numpy.exp(1) + 9)
    numpy.testing.assert_allclose(losses, [likely, likely])


def test_openvino_needs_a_file(line_up):
    with pytest.raises(Missing, match="GGUF"):
        generation.line_up(QUICK).get(generation.OPENVINO)
