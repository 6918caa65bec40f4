"""Compiles attention's kernels for GPUs that need not be here, and writes what came of each tile as a table.

    python tools/gpu_tiles.py --capability 90 80 > benchmarks/results/gpu-tiles.md

Registers, spills, shared memory, and the widths of the matrix instructions are read from what the compiler made. The
two limits are predictions, no measurements: what the matrix units can do at the widths that the kernel asks for, and
what the schedulers can issue of the instructions of its longest loop. A kernel whose warps do not overlap the two
reaches the last column.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402
from machine_code import Product, products, resources  # noqa: E402
from test_triton_aot import compiled, launches  # noqa: E402

# (multiprocessors, clock in GHz, dense bfloat16 products a clock and multiprocessor, as multiply-adds)
_GPUS = {80: ("A100", 108, 1.41, 1024), 86: ("A10", 72, 1.695, 512), 90: ("H200", 132, 1.755, 2048)}
# Published: FlashAttention 2 on A100 and H100 (Dao 2023, Shah et al. 2024), FlashAttention 3 on H100, causal aside.
_PEERS = {
    80: {"attend": "FA2 190-220", "backward": "FA2 160-190"},
    90: {"attend": "FA2 370, FA3 640, cuDNN 600", "backward": "FA2 320, FA3 560, cuDNN 518"},
}


def _speed(product: Product, capability: int) -> float:
    """The part of the units' rate that an instruction of this width reaches."""
    if capability < 90:
        return 1.0
    if not product.hopper:
        return 0.5  # Hopper's units run the instructions of Ampere at half their rate
    return min(1.0, product.width / 64 if product.width < 32 else product.width / 48 if product.width < 48 else 1.0)


def _loop(cubin: bytes) -> int:
    """Instructions of the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);", text, re.M)
    longest = 0
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < int(address, 16):
            body = sum(int(target[1], 16) <= int(a, 16) <= int(address, 16) for a, _, _ in code)
            longest = max(longest, body)
    return longest


def rows(capability: int) -> Iterator[str]:
    name, processors, clock, rate = _GPUS[capability]
    yield (
        f"| kernel | heads | call | queries x keys | warps | stages | registers | shared | matrix instructions | "
        f"units' limit | issue limit | both in turn |\n|{'---|' * 12}"
    )
    for launch in launches("attention", torch.bfloat16, capability):
        args = launch.args
        if "BLOCK_D" not in args:
            continue
        kernel = compiled(launch, capability)
        with tempfile.TemporaryDirectory() as folder:
            registers, stack = resources(kernel.asm["cubin"], Path(folder))
        m, n, d, dv = (args[k] for k in ("BLOCK_M", "BLOCK_N", "D", "DV"))
        found = products(kernel)
        each = len(found) // (args.get("PARTS") or 1)
        products_of = {"attend": d + dv, "backward_queries": 2 * d + dv, "backward_bias": d + dv}
        flops = (
            2 * m * n * products_of.get(launch.kernel.__name__, 2 * d + 2 * dv + d * (args.get("Q_SUM") is not None))
        )
        speed = sum(_speed(p, capability) for p in found[:each]) / max(each, 1)
        units = 2 * rate * processors * clock * speed / 1e3
        issue = flops / (_loop(kernel.asm["cubin"]) * launch.num_warps / 4) * processors * clock / 1e3
        call = "everything" if args["MASK"] is not None else "window" if args["LEFT"] else "causal"
        kind = sorted({f"{'wgmma m64n' if p.hopper else 'mma n'}{p.width}" for p in found})
        spills = f", {stack} B spilled" if stack else ""
        title = launch.kernel.__name__ + (" (sum)" if args.get("Q_SUM") is not None else "")
        yield (
            f"| {title} | {d}{'' if d == dv else f'/{dv}'} | {call} | {m} x {n} | {launch.num_warps} | "
            f"{args.get('STAGES') or 1} | {registers}{spills} | {kernel.metadata.shared / 1024:.0f} KB | "
            f"{', '.join(kind)}{' TWICE' if any(p.twice for p in found) else ''} | {units:.0f} | {issue:.0f} | "
            f"{1 / (1 / units + 1 / issue):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[90], choices=sorted(_GPUS))
    options = parser.parse_args()
    print(
        f"# What the compiler makes of attention's tiles\n\nMade by `python tools/gpu_tiles.py --capability "
        f"{' '.join(map(str, options.capability))}` with Triton {triton.__version__}; bfloat16. The limits are "
        "predictions in TFLOP/s from the machine code; nothing here was measured on a GPU.\n"
    )
    for capability in options.capability:
        name, processors, clock, rate = _GPUS[capability]
        print(f"## sm_{capability}: {name}, {2 * rate * processors * clock / 1e3:.0f} TFLOP/s at {clock} GHz\n")
        for row in rows(capability):
            print(row, flush=True)
        peers = "; ".join(f"{kernel}: {speed}" for kernel, speed in _PEERS.get(capability, {}).items())
        print(f"\nPublished for heads of 128 (TFLOP/s): {peers}.\n" if peers else "")


if __name__ == "__main__":
    main()
