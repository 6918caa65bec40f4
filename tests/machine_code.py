"""What a compiler made of a Triton kernel: registers, spills, and how it laid out matrix products."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_LAYOUT = re.compile(
    r"(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[(\d+), (\d+)\], "
    r"instrShape = \[([\d, ]+)\]"
)
_PRODUCT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>")


@dataclass(frozen=True)
class Product:
    """A matrix product of a program.

    Attributes:
        shape: of its result.
        hopper: whether it is of instructions for groups of four warps (wgmma).
        width: columns of an instruction.
        twice: whether warps compute the same elements.
    """

    shape: tuple[int, int]
    hopper: bool
    width: int
    twice: bool


def products(kernel: Any) -> list[Product]:
    """Of a compiled kernel for sm_80 to sm_90; for later ones `tensor_memory_products`."""
    text = kernel.asm["ttgir"]
    layouts = {
        name: (int(version), int(down), int(across), [int(n) for n in shape.split(",")])
        for name, version, down, across, shape in _LAYOUT.findall(text)
    }
    found = []
    for m, n, name in _PRODUCT.findall(text):
        version, down, across, (height, width, *_) = layouts[name]
        twice = down * height > int(m) or across * width > int(n)
        found.append(Product((int(m), int(n)), version == 3, width, twice))
    return found


def tensor_memory_products(kernel: Any) -> tuple[int, int]:
    """Of a compiled kernel for sm_100, the products of the units that keep results in a memory of their own, of which
    no warp computes a part twice; and those of warps, which are slower.
    """
    text = kernel.asm["ttgir"]
    return len(re.findall(r"ttng\.tc_gen5_mma ", text)), len(re.findall(r"tt\.dot ", text))


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread); a stack means that registers were spilled."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)
