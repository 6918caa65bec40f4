#!/usr/bin/env python3
"""Check the wheel under another torch, or another Python, in an environment of its own.

    make wheel
    python tools/check_torch.py --torch 2.11.0
    python tools/check_torch.py --torch 2.13.0 --python python3.12

Not part of the test suite: a CUDA torch and its libraries, without which it does not import, are a download of
gigabytes and need 5 GB of disk. The environment is kept for the next run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="version to install, such as 2.11.0")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--wheel", type=Path, help="wheel to check (default: the newest in dist/)")
    parser.add_argument("--environment", type=Path, help="its folder (default: build/check/<python>-torch-<version>)")
    options = parser.parse_args()

    wheel = options.wheel or max((ROOT / "dist").glob("bigkernels-*.whl"), key=os.path.getmtime, default=None)
    if wheel is None:
        parser.error("there is no wheel in dist/: run `make wheel`, or name one with --wheel")
    if wheel.name.split("-")[2:4] != ["py3", "none"]:
        parser.error(f"{wheel.name} is for one Python; a release is py3-none")

    name = Path(options.python).resolve().name
    environment = options.environment or ROOT / "build" / "check" / f"{name}-torch-{options.torch}"
    python = environment / "bin" / "python"
    if not python.exists():
        run(options.python, "-m", "venv", environment)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    run(*pip, f"torch=={options.torch}", "numpy")  # without numpy torch warns at every start
    run(*pip, "--force-reinstall", "--no-deps", wheel.resolve())
    run(python, "-c", "import torch; assert torch.__version__.split('+')[0] == " + repr(options.torch))
    # From elsewhere than the checkout, whose package would be imported instead.
    run(environment / "bin" / "bigkernels", "info")
    run(environment / "bin" / "bigkernels", "check")
    run(python, "-c", REQUIRE_KERNELS)


# `check` compares whatever serves each operator; this fails where that is not the compiled library.
REQUIRE_KERNELS = """
import sys, torch, bigkernels
x = torch.randn(3, 40)
with bigkernels.use("cpu"):
    bigkernels.functional.rms_norm(x)
print("Python", sys.version.split()[0], "and torch", torch.__version__, "run the compiled kernels at level",
      torch.ops.bigkernels.cpu_isa())
"""


def run(*command: str | Path) -> None:
    print("$", shlex.join(map(str, command)) if command[1] != "-c" else f"{command[0]} -c ...", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=Path(__file__).anchor, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
