"""Runs tests/interpreter in processes of its own, where Triton's interpreter takes the place of a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
PARTS = 2  # which workers run beside each other: the interpreter keeps one core busy


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("part", range(PARTS))
def test_triton_kernels_in_the_interpreter(part: int):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "BIGKERNELS_TEST_PART": f"{part}/{PARTS}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and "skipped" not in summary, summary
    assert int(passed[1]) >= 400 // PARTS  # that the kernels of every operator were collected and ran
