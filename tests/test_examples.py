"""Every example runs to its end, in a process of its own, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What an example must have printed, beside ending without an error.
PRINTS = {
    "custom_model": "In the forests of the night;",
    "less_memory": "recompute: ",
    "optimize": "resumed bit by bit: True",
    "patch_llm": "step 9: loss",
    "qlora": "merged: loss",
    "use_operators": "no gradient for the ignored token: True",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if path.stem in ("patch_llm", "qlora"):
        pytest.importorskip("transformers")
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}  # tiny tensors
    done = subprocess.run([sys.executable, str(path)], check=False, env=environment, cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert PRINTS[path.stem] in done.stdout, done.stdout
