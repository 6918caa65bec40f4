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
    "accelerate_loop": "loaded bit by bit: True",
    "custom_model": "In the forests of the night;",
    "fsdp2": "sharded",
    "long_sequences": "MiB sent a step and rank",
    "restarts": "restarted 1 times",
    "less_memory": "recompute: ",
    "optimize": "resumed bit by bit: True",
    "patch_llm": "step 9: loss",
    "qlora": "merged: loss",
    "trainer": "resumed bit by bit: True",
    "trl_sft_dpo": "DPO: margin of rewards",
    "use_operators": "no gradient for the ignored token: True",
}

NEEDS = {
    "accelerate_loop": ("accelerate", "transformers"),
    "fsdp2": ("transformers",),
    "long_sequences": ("transformers",),
    "patch_llm": ("transformers",),
    "qlora": ("transformers",),
    "trainer": ("accelerate", "transformers.trainer_optimizer"),
    "trl_sft_dpo": ("peft", "tokenizers", "datasets", "trl"),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    for module in NEEDS.get(path.stem, ()):
        pytest.importorskip(module)
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}  # tiny tensors
    done = subprocess.run(
        [sys.executable, str(path)], check=False, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert PRINTS[path.stem] in done.stdout, done.stdout
