"""Runs tests/interpreter in processes of its own, where Triton's interpreter takes the place of a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
PARTS = 2  # the interpreter keeps one core busy


def _run(part: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "BIGKERNELS_TEST_PART": f"{part}/{PARTS}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter():
    total = 0
    with ThreadPoolExecutor(PARTS) as pool:
        for run in pool.map(_run, range(PARTS)):
            summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr
            assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
            passed = re.search(r"(\d+) passed", summary)
            assert passed and "skipped" not in summary, summary
            total += int(passed[1])
    assert total >= 500  # that the kernels of every operator were collected and ran
