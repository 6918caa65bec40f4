"""What the host takes to queue each operator of a decoded token on a GPU, measured without one.

Triton's binder, the dispatcher and the launchers are real; the driver below them launches nothing, so that what a
launch itself costs (3 to 5 us) comes on top. `--root` measures another checkout: the same before and after a change.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout, built")
parser.add_argument("--json", type=Path, metavar="FILE", help="add the times to those in a file, keeping the least")
args = parser.parse_args()
sys.path[:0] = [str(args.root), str(args.root / "tests")]
warnings.filterwarnings("ignore")

import driver_without_device  # noqa: E402
import torch  # noqa: E402

from bigkernels import functional as bk  # noqa: E402
from bigkernels import use  # noqa: E402

BF16 = torch.bfloat16


class Launcher:
    def __call__(self, *args: object) -> None:
        pass


def cases() -> dict:
    """A token of a Llama of 8 billion parameters."""
    x, w, b = torch.randn(1, 1, 4096).to(BF16), torch.ones(4096, dtype=BF16), torch.zeros(4096, dtype=BF16)
    gate, up = torch.randn(2, 1, 1, 14336).to(BF16)
    q, k = (torch.randn(1, 1, h, 128).to(BF16).transpose(1, 2) for h in (32, 8))
    cos, sin = torch.randn(2, 1, 1, 128).to(BF16)
    keys, values = torch.randn(2, 1, 8, 1024, 128).to(BF16)
    short = keys[:, :, :200], values[:, :, :200]
    weights = {n: bk.quantize_weight(torch.randn(512, 4096), n) for n in ("int8", "int8-dynamic", "int4", "fp8")}
    return {
        "rms_norm": lambda: bk.rms_norm(x, w),
        "rms_norm with residual": lambda: bk.rms_norm(x, w, residual=x),
        "layer_norm": lambda: bk.layer_norm(x, w, b),
        "glu": lambda: bk.glu(gate, up),
        "rope": lambda: bk.rope(q, k, cos, sin),
        "decode attention, 1024 keys": lambda: bk.attention(q, keys, values),
        "decode attention, 200 keys": lambda: bk.attention(q, *short),
        **{f"quantized layer, {n}": lambda qw=qw: bk.quantized_linear(x, qw) for n, qw in weights.items()},
    }


def microseconds(step) -> float:
    for _ in range(60):
        step()
    best = float("inf")
    for _ in range(60):
        begin = time.perf_counter()
        for _ in range(20):
            step()
        best = min(best, (time.perf_counter() - begin) / 20)
    return best * 1e6


def main() -> None:
    torch.set_num_threads(1)
    driver_without_device.Driver.launcher_cls = lambda self, source, metadata: Launcher()
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with driver_without_device.without_device(90), torch.no_grad(), use("triton"):
        for name, step in cases().items():
            taken = min(microseconds(step), found.get(name, float("inf")))
            found[name] = round(taken, 1)
            print(f"{name:32s} {taken:7.1f} us")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
