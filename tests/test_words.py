"""Words that a reader had to learn here, in whose place the field has one: they stay out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A pattern; where it is looked for; what to write; files that may have it.
WORDS = [
    (r"\bturned\b", ("bigkernels", "docs"), "transposed, which 'turned' does not say", ("nn/quantized_experts.py",)),
    (r"\bserv(e|es|ed|ing)\b", ("bigkernels", "docs", "*.md"), "supports, computes or runs: 'serves' leaves open which",
     ("bench/process.py", "bench/generation.py", "bench/processes/")),
    (r"\bgrams?\b", ("bigkernels/quantization", "bigkernels/nn", "docs", "*.md"), "hessian, as in GPTQ",
     ("quantization/_weight.py",)),
    (r"\btile loops?\b", ("bigkernels", "csrc", "docs", "*.md"), "GEMM micro-kernel", ()),
    (r"\bregions?\b", ("bigkernels/checkpointing",), "segment; `checkpointing/__init__.py` says of what", ()),
    (r"\b(ref_|old_)?logps\b", ("bigkernels/losses", "docs", "*.md"), "logprobs",
     ("losses/_linear.py", "losses/_unpaired.py")),
    (r"\binstruction-set levels?\b", ("bigkernels", "csrc", "docs", "*.md"), "ISA level", ()),
    (r"\b(turned|strips?)\b", ("csrc",), "transposed; row block (the glossary of CONTRIBUTING.md)", ()),
    (r"\bpieces?\b", ("csrc/cpu", "csrc/include"), "chunk, block or range (the glossary of CONTRIBUTING.md)", ()),
    (r"(?<![.\w])named\(", ("bigkernels/quantization", "bigkernels/checkpointing", "bigkernels/program"),
     "resolve_...", ()),
]  # fmt: skip
HISTORY = ("CHANGELOG.md", "NOTES.md", "benchmarks/results/")  # what was


def tracked(*where: str) -> list[str]:
    try:
        found = subprocess.run(("git", "ls-files", "--", *where), cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize(("pattern", "where", "instead", "allowed"), WORDS, ids=[word[0] for word in WORDS])
def test_words(pattern: str, where: tuple[str, ...], instead: str, allowed: tuple[str, ...]):
    found = []
    for name in tracked(*where):
        if name.endswith((".png", ".json", ".svg")) or any(part in name for part in (*allowed, *HISTORY)):
            continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, f"write {instead}\n" + "\n".join(found)
