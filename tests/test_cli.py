from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import bigkernels
from bigkernels import _cli, functional
from bigkernels import _terminal as terminal
from bigkernels._samples import SAMPLES
from bigkernels.ops import OPERATORS, registry
from bigkernels.ops import glu as glu_file


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_info_is_json_and_complete():
    found = json.loads(json.dumps(bigkernels.info()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["bigkernels"] == bigkernels.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["model"]
    assert set(found["operators"]) == set(OPERATORS)
    for devices in found["operators"].values():
        for refusals in devices["cpu"].values():
            assert refusals["reference"] is None
            assert refusals["triton"] == "runs on cuda tensors, not cpu"


def test_info_tells_why_there_is_no_kernel(monkeypatch, capsys):
    lost = bigkernels._load.Library(None, "the library was lost")
    for module in (bigkernels._info, registry):
        monkeypatch.setattr(module, "cpu_library", lambda: lost)
    assert bigkernels.info()["libraries"]["cpu"] == {"loaded": False, "path": None, "reason": "the library was lost"}
    assert _cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cpu: the library was lost" in printed
    assert "reference" in printed


def test_info_as_a_module_and_as_json():
    done = python("-m", "bigkernels", "info", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {
        "versions",
        "cpu",
        "memory",
        "gpus",
        "libraries",
        "operators",
        "programs",
        "routes",
    }


def test_the_package_imports_nothing_for_the_command_line():
    done = python("-c", "import sys, bigkernels; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "bigkernels.functional" in loaded
    assert loaded.isdisjoint({"rich", "matplotlib", "transformers", "bigkernels._cli", "bigkernels.bench"})


def test_check_passes_with_the_kernels_of_this_machine(library, capsys):
    assert _cli.main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for operator in OPERATORS:
        assert printed.count(f"  {operator} ") == 3  # dtypes
    assert printed.count("ok") >= 15
    assert str(len(SAMPLES["rope"])) in printed


def test_check_without_kernels_says_so(monkeypatch, capsys):
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "implementations", ())
    assert _cli.main(["check", "--device", "cpu"]) == 0
    assert "Not checked" in capsys.readouterr().out


def break_glu(monkeypatch, wrong):
    """Make `wrong(right, *args)` the CPU kernel of glu, and glu the only operator that is checked."""
    right = glu_file._fwd
    kernel = registry.Implementation("cpu", "cpu")
    monkeypatch.setattr(OPERATORS["glu"], "implementations", (kernel,))
    monkeypatch.setattr(OPERATORS["glu"], "_choices", {})
    monkeypatch.setattr(glu_file, "_fwd", lambda *args: wrong(right, *args))
    for name in set(SAMPLES) - {"glu"}:
        monkeypatch.delitem(SAMPLES, name)


def scaled(right, gate, up, activation):
    return right(gate, up, activation) * 1.05


def overwriting(right, gate, up, activation):
    out = right(gate, up, activation)
    gate.zero_()
    return out


def raising(right, gate, up, activation):
    raise ArithmeticError("illegal instruction")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(scaled, "allowed"), (overwriting, "wrote to its input gate"), (raising, "ArithmeticError: illegal instruction")],
)
def test_check_finds_a_wrong_kernel(monkeypatch, capsys, kernel, said):
    break_glu(monkeypatch, kernel)
    assert _cli.main(["check", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "glu bfloat16 by cpu, silu" in printed
    assert said in printed


def test_check_names_the_missing_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert _cli.main(["check", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_bench_writes_json_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    out = tmp_path / "rows.json"
    arguments = ["bench", "glu", "--quick", "--threads", "1", "--json", str(out), "--plot", str(tmp_path)]
    assert _cli.main(arguments) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(out.read_text())
    assert written["machine"]["cpu"]["threads"] == 1
    assert {row["candidate"] for row in written["rows"]} == {"eager", "bigkernels", "liger-kernel"}
    assert (tmp_path / "glu.png").exists()
    captured = capsys.readouterr()
    assert "copy, read + write" in captured.out
    assert "liger-kernel: missing, " in captured.out
    assert "[1/5] limits of the machine" in captured.err


def test_bench_sweeps_threads(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, threads = tmp_path / "rows.json", torch.get_num_threads()
    arguments = ["bench", "glu", "--quick", "--threads", "3,1", "--json", str(out), "--plot", str(tmp_path)]
    assert _cli.main(arguments) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(out.read_text())
    assert set(written["limits"]["by_threads"]) == {"1"} and written["machine"]["cpu"]["threads"] == 3
    rows = [row for row in written["rows"] if row["candidate"] == "bigkernels"]
    assert {row["threads"] for row in rows} == {1, 3}
    for one in (row for row in rows if row["threads"] == 1):
        same = [row for row in rows if all(row[k] == one[k] for k in ("case", "dtype", "backward"))]
        three = next(row for row in same if row["threads"] == 3)
        assert one["speedup"] == 1.0
        assert three["speedup"] == pytest.approx(one["seconds"]["median"] / three["seconds"]["median"])
        assert one["limit_gbps"] > 0 and one["limit_gbps"] != three["limit_gbps"]
    assert (tmp_path / "glu-threads.png").exists()
    assert "3 threads" in capsys.readouterr().out


@pytest.mark.parametrize("threads", ["0", "1,,2", "two"])
def test_bench_refuses_wrong_threads(threads, capsys):
    with pytest.raises(SystemExit):
        _cli.main(["bench", "glu", "--threads", threads])
    assert "numbers of threads such as 2 or 1,2,4" in capsys.readouterr().err


def test_bench_fails_if_ours_is_wrong(monkeypatch, capsys):
    right = functional.glu

    def wrong(*args, **options):
        return right(*args, **options) * (1.0 if registry._forced == "reference" else 0.9)

    monkeypatch.setattr(functional, "glu", wrong)
    assert _cli.main(["bench", "glu", "--quick"]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_bench_lists_without_running(capsys):
    assert _cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "2048x128256, bfloat16, forward + backward" in printed
    assert "eager, builtin, compile, liger-kernel, bigkernels, bigkernels + compile" in printed


def test_bench_refuses_an_unknown_family(capsys):
    assert _cli.main(["bench", "gemm"]) == 2
    assert "no family 'gemm'; there are rms_norm" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["check", "--device", "tpu"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        _cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: bigkernels" in capsys.readouterr().err


def test_an_unknown_flag_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit) as exit:
        _cli.main(["plan", "folder", "--foo"])
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert "usage: bigkernels plan" in said and "bigkernels plan: error: unrecognized arguments: --foo" in said


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        _cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"bigkernels {bigkernels.__version__}\n"


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "rich", None)
    terminal.table("Title", ["name", "n"], [["a [b]", 5], ["c", 1234]], right=["n"])
    assert capsys.readouterr().out == "Title\nname      n\n-----  ----\na [b]     5\nc      1234\n\n"
    with terminal.progress(2) as steps:
        steps.begin("one")
        steps.note("ignored")
        steps.begin("two")
    assert capsys.readouterr().err == "[1/2] one\n[2/2] two\n"


@pytest.mark.parametrize("there", [True, False])
def test_the_device_is_the_gpu_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert terminal.default_device() == ("cuda" if there else "cpu")


def test_bench_measures_on_the_gpu_by_itself(monkeypatch):
    from bigkernels._cli import bench

    monkeypatch.setattr(bench, "default_device", lambda: "cuda")
    seen = []
    monkeypatch.setattr(bench, "_settings", lambda args: seen.append(args.device) or bench.Settings(args.device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _cli.main(["bench", "glu", "--list"]) == 0
    assert _cli.main(["bench", "glu", "--list", "--device", "cpu"]) == 0
    assert seen == ["cuda", "cpu"]
