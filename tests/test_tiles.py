"""The amx level without tile units: their instructions in plain C++ (tests/tiles_on_host)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from conftest import Isa, emulates, flags
from every_level import CHECK, EVERY_PATH
from torch import Tensor

HEADER = emulated.ROOT / "tests/tiles_on_host/tiles.h"


@pytest.fixture(scope="module")
def amx(library: Path) -> Isa:
    if not emulates("amx"):
        pytest.skip("beside tiles the amx level uses AVX-512 with BF16, which this processor lacks")
    return Isa("amx", emulated.tree())


def test_it_is_the_level_in_emulation(amx: Isa):
    loaded = amx.run("import torch, bigkernels._load as b; print(torch.ops.bigkernels.cpu_isa(), b.cpu_library().path)")
    level, path = loaded.split()
    assert level == "amx" and Path(path).parent.parent == amx.root
    done = subprocess.run(["objdump", "-d", path], capture_output=True, text=True) if shutil.which("objdump") else None
    assert done is None or ("zmm" in done.stdout and "tmm" not in done.stdout)


def test_samples(amx: Isa):
    assert "WRONG" not in amx.run(CHECK)


def test_samples_of_any_size_in_any_number_of_threads(amx: Isa):
    assert amx.run(EVERY_PATH) == ""


# Beside the samples: what chooses tiles by shapes and types. Two minutes.
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/ops/test_attention.py", "-k", "odd or pairs or random"),
        ("tests/ops/test_decode.py",),
        ("tests/ops/test_linear.py", "tests/ops/test_few_tokens.py", "tests/quantization/test_formats.py"),
        ("tests/quantization/test_gguf_kernels.py", "-k", "not every_level"),
        ("tests/ops/test_linear_cross_entropy.py", "-k", "not every_level"),
    ],
    ids=lambda arguments: Path(arguments[0]).stem,
)
def test_operators(amx: Isa, arguments: tuple[str, ...]):
    assert "passed" in amx.pytest(*arguments)


# ---- the instructions themselves ------------------------------------------------------------------------------------

CALLS = """
#define CALL extern "C" __attribute__((visibility("default"))) void
static void shapes(int rows, int bytes, int depth) {  // of c; a: (rows, depth), b: (depth, bytes / 4)
  struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } s = {};
  s.palette = 1;
  s.bytes[0] = bytes, s.rows[0] = rows, s.bytes[1] = 4 * depth, s.rows[1] = rows, s.bytes[2] = bytes, s.rows[2] = depth;
  _tile_loadconfig(&s);
}
CALL multiply(int integers, int rows, int bytes, int depth, void* c, const void* a, const void* b, int64_t stride) {
  shapes(rows, bytes, depth);
  _tile_loadd(0, c, stride), _tile_loadd(1, a, stride), _tile_loadd(2, b, stride);
  if (integers) _tile_dpbssd(0, 1, 2); else _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, stride);
  _tile_release();
}
CALL without_shapes() { _tile_zero(0); }
CALL other_shapes() { shapes(3, 64, 16); _tile_dpbssd(0, 2, 1); }
CALL twice() { shapes(16, 64, 16); _tile_dpbssd(0, 1, 1); }
"""


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None or "fma" not in flags():
        pytest.skip("takes g++ and a processor with AVX2")
    path = tmp_path_factory.mktemp("tiles") / "tiles.so"
    flags_of = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fPIC", "-shared"]
    command = ["g++", *flags_of, "-x", "c++", "-include", HEADER, "-o", path, "-"]
    subprocess.run(command, check=True, input=CALLS, text=True)
    return ctypes.CDLL(str(path))


def multiply(library: ctypes.CDLL, c: Tensor, a: Tensor, b: Tensor, rows: int, columns: int, depth: int) -> Tensor:
    c = c.clone()
    integers = c.dtype == torch.int32
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (c, a, b))
    library.multiply(integers, rows, 4 * columns, depth, *pointers, ctypes.c_int64(80))
    return c


SHAPES = [(16, 16, 16), (3, 16, 16), (16, 5, 16), (16, 16, 7), (1, 1, 1), (13, 11, 9)]


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_products_of_integers(instructions, rows, columns, depth):
    c = torch.randint(-(2**31), 2**31 - 1, (16, 20), dtype=torch.int64).int()
    a, b = (torch.randint(-128, 128, (16, 80), dtype=torch.int8) for _ in range(2))
    left = a[:rows, : 4 * depth].long()
    right = b[:depth, : 4 * columns].long().view(depth, columns, 4).transpose(1, 2).reshape(4 * depth, columns)
    expected = c.clone()
    expected[:rows, :columns] = (c[:rows, :columns].long() + left @ right).int()
    assert torch.equal(multiply(instructions, c, a, b, rows, columns, depth), expected)


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_products_of_bfloat16(instructions, rows, columns, depth):
    c = torch.randn(16, 20)
    a, b = (torch.randn(16, 40).bfloat16() for _ in range(2))
    left = a[:rows, : 2 * depth].double()
    right = b[:depth, : 2 * columns].double().view(depth, columns, 2).transpose(1, 2).reshape(2 * depth, columns)
    expected = c.double()
    expected[:rows, :columns] += left @ right
    found = multiply(instructions, c, a, b, rows, columns, depth)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    outside = torch.ones_like(c, dtype=torch.bool)
    outside[:rows, :columns] = False
    assert torch.equal(found[outside], c[outside])


def test_even_and_odd_elements_are_summed_apart_and_subnormals_are_zero(instructions):
    c, a, b = torch.zeros(16, 20), torch.zeros(16, 40).bfloat16(), torch.zeros(16, 40).bfloat16()
    # Row 0: 2^24 and 1 at even places, -2^24 at an odd one; in one sum in order the 1 would be left.
    a[0, :3], b[0, 0], b[0, 1], b[1, 0] = torch.tensor([2.0**24, -(2.0**24), 1]).bfloat16(), 1, 1, 1
    a[1, 0], b[2, 0], a[2, 4] = 2.0**-126, 2.0**-1, 2.0**-126  # a product that is subnormal
    c[3, 0] = 2.0**-127
    found = multiply(instructions, c, a, b, 16, 16, 16)
    assert found[0, 0] == 0 and found[1, 0] == 2.0**-126 and found[2, 0] == 0 and found[3, 0] == 0


@pytest.mark.parametrize("name", ["without_shapes", "other_shapes", "twice"])
def test_what_the_hardware_refuses_ends_the_process(instructions, name):
    call = f"import ctypes; ctypes.CDLL({instructions._name!r}).{name}()"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode < 0 and "tiles_on_host: " in done.stderr
