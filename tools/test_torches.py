#!/usr/bin/env python3
"""Run the test suite on the oldest torch that is supported, on the pinned one and on the newest.

    make test-torches
    python tools/test_torches.py --torch 2.10.0 newest -- -k recipe

Each has an environment of its own, .venv-torch-<version>, kept for the next run. Not part of the test suite: where pip
finds no CPU build, torch and its CUDA libraries are a download of gigabytes, and 5 GB of disk a version. With
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu and versions such as 2.12.0+cpu it finds one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pinned() -> str:
    """The version that the Makefile installs."""
    return re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def oldest() -> str:
    """The oldest version that the package's dependencies allow."""
    minor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    return minor if minor.count(".") == 2 else f"{minor}.0"


def newest(python: str) -> str:
    """The newest version that pip finds."""
    command = [python, "-m", "pip", "index", "versions", "torch", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"pip finds no torch:\n{done.stderr}")
    return re.search(r"^torch \(([^)+]+)", done.stdout)[1]


def test(version: str, python: str, pytest_args: list[str]) -> str:
    """The last line of a run of the suite, whose output goes on to the terminal."""
    arguments = [f"TORCH={version}", f"VENV=.venv-torch-{version}", f"PYTHON={python}"]
    arguments += [f"PYTEST_ARGS={' '.join(pytest_args)}"] if pytest_args else []
    print(f"\n==== torch {version}", flush=True)
    begin, last = time.monotonic(), ""
    process = subprocess.Popen(["make", "-C", ROOT, "test", *arguments], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.search(r"\d+ (passed|failed|error)", line):
            last = line.strip("= \n")
    failed = process.wait() != 0
    return f"{'FAILED' if failed else 'ok'} after {time.monotonic() - begin:.0f} s: {last or 'no test ran'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch", nargs="+", default=["oldest", "pinned", "newest"], help="versions, or oldest, pinned, newest (all)"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("pytest_args", nargs="*", help="after --: arguments of pytest")
    options = parser.parse_args()
    named = {"oldest": oldest, "pinned": pinned, "newest": lambda: newest(options.python)}
    versions = list(dict.fromkeys(named[v]() if v in named else v for v in options.torch))
    results = {version: test(version, options.python, options.pytest_args) for version in versions}
    print()
    for version, result in results.items():
        print(f"torch {version}: {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
