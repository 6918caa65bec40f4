"""The scripts of the first half hour on a GPU, rehearsed with the driver that launches nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def rehearse(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(TOOLS / script), "--without-device", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_probe_writes_its_figures(tmp_path):
    printed = rehearse("gpu_probe.py", "--parts", "limits", "optimizers", "--json", str(tmp_path / "probe.json"))
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["rehearsed"] and found["machine"]["routes"] and found["machine"]["versions"]["torch"]
    assert {row["part"] for row in found["rows"]} == {"limits", "optimizers"}
    assert [row for row in found["rows"] if "error" in row] == []
    assert "8 rows in" in printed


@pytest.mark.slow
def test_the_first_calls_stop_in_time():
    printed = rehearse("gpu_first.py", "--dtypes", "bfloat16", "--seconds", "1")
    assert "rms_norm, one row, bfloat16 ... ok" in printed and " 0 wrong" in printed


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path):
    assert " 0 wrong" in rehearse("gpu_first.py")
    rehearse("gpu_probe.py", "--json", str(tmp_path / "probe.json"))
    errors = [row for row in json.loads((tmp_path / "probe.json").read_text())["rows"] if "error" in row]
    assert {row["candidate"] for row in errors} <= {"SDPA cuDNN"}  # which CPU tensors do not get
