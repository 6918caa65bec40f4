"""The CUDA kernels for linear layers of a few tokens without a GPU: their source in a host build, called by ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigkernels.ops._fragments import CODES, OFFSETS, Fragments

ROOT = Path(__file__).resolve().parents[1]
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Product(Structure):
    _fields_ = [
        ("code", c_int), ("offset", c_int), ("group", c_int), ("type", c_int), ("wide", c_bool), ("bias_type", c_int),
        ("backward", c_bool), ("x", c_void_p), ("stride", c_int64), ("weight", c_void_p), ("factor", c_void_p),
        ("book", c_void_p), ("bias", c_void_p), ("top", c_void_p), ("out", c_void_p),
        ("m", c_int), ("n", c_int), ("k", c_int),
    ]  # fmt: skip


class _Options(Structure):
    _fields_ = [("blocks", c_int), ("stages", c_int), ("order", c_int), ("reversed", c_bool), ("early", c_bool)]


@dataclass(frozen=True)
class Run:
    """How thread blocks run: how many there may be, stages in their rings, a number from which their order is drawn
    (0: as numbered), whether the warps' is reversed, and whether copies arrive at once and not as late as they may.
    """

    blocks: int = 7
    stages: int = 3
    order: int = 0
    reversed: bool = False
    early: bool = False


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Host:
    def __init__(self, path: Path):
        self._few = ctypes.CDLL(str(path)).host_few
        self._few.argtypes = [POINTER(Product), POINTER(_Options)]

    def __call__(
        self,
        x: Tensor,
        f: Fragments,
        book: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        wide: bool = False,
        backward: bool = False,
        how: Run | None = None,
    ) -> Tensor:
        how = how or Run()
        out = torch.full((x.shape[0], f.k if backward else f.n), float("nan"), dtype=torch.float32 if wide else x.dtype)
        bias_type = 0 if bias is None else _TYPES[bias.dtype]
        factor, top = (None, f.top) if backward and x.dtype == torch.float16 else (f.factor, None)
        operands = map(address, (f.units, factor, book, bias, top, out))
        product = Product(
            CODES.index(f.code),
            OFFSETS.index(f.offset),
            f.group,
            _TYPES[x.dtype],
            wide,
            bias_type,
            backward,
            address(x),
            x.stride(0),
            *operands,
            x.shape[0],
            f.n,
            f.k,
        )
        options = _Options(how.blocks, how.stages, how.order, how.reversed, how.early)
        blocks = self._few(byref(product), byref(options))
        assert blocks > 0, "no kernel" if blocks == 0 else "a counter is not zero afterwards"
        return out


def build(folder: Path) -> Host:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = folder / "few.so"
    folders = [f"-I{ROOT / 'csrc' / name}" for name in ("include", "cuda/kernels")]
    # Not optimised: that takes the compiler half a minute.
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, *folders, "-o", path, ROOT / "tests/cuda_on_host/few.cpp"], check=True)
    return Host(path)
