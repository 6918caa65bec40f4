"""The CUDA library as its compiler left it: looked at and loaded, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ("optimizer_step", "optimizer_measure", "optimizer_norm", "quantized_few", "quantized_few_bwd")
# A thread: csrc/cuda/NOTES.md says how many warps that leaves a GPU.
MOST_REGISTERS = 128
MOST_OF_FEW_TOKENS = 255  # of blocks that shared memory lets in once or twice


def cuobjdump(*arguments: str | Path) -> str:
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_registers_its_operators_beside_any_torch(cuda_library: Path) -> None:
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bigkernels::{name}", "CUDA"), name


def test_the_stream_is_a_weak_symbol(cuda_library: Path) -> None:
    # Else the library would not load beside a torch without CUDA.
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (binutils)")
    lines = subprocess.run(["nm", "--dynamic", cuda_library], check=True, capture_output=True, text=True).stdout
    assert re.search(r" w aoti_torch_get_current_cuda_stream$", lines, re.MULTILINE)
    assert not re.search(r" U (cu[A-Z]|cuda[A-Z]|__cuda)", lines), "the CUDA runtime is linked statically"


_STREAM = """
#include "bigkernels/HEADER"
extern "C" int probe(char* message, size_t size) {
  try {
    bigkernels::cuda::current_stream(0);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), size - 1);
    return 1;
  }
  return 0;
}
"""


def test_a_torch_without_streams_is_an_error(tmp_path: Path) -> None:
    """The symbol is weak: where it is missing, a call would jump to address zero."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if torch.cuda.is_available():
        pytest.skip("this torch has streams")
    header = next((ROOT / "csrc").rglob("stable_cuda.h"))
    source, made = tmp_path / "probe.cpp", tmp_path / "probe.so"
    source.write_text(f"#include <cstring>\n{_STREAM}".replace("bigkernels/HEADER", str(header)))
    torch_dir = Path(torch.__file__).parent
    command = [compiler, "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}",
               f"-isystem{torch_dir / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", source, "-o", made,
               f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_dir / 'lib'}"]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    script = (
        "import ctypes, sys, torch; text = ctypes.create_string_buffer(400); "
        "print(ctypes.CDLL(sys.argv[1]).probe(text, ctypes.c_size_t(400)), text.value.decode())"
    )
    run = subprocess.run([sys.executable, "-c", script, made], capture_output=True, text=True)
    assert run.returncode == 0, "it jumped to where the function is not"
    assert run.stdout.startswith("1 ") and "no CUDA streams" in run.stdout


def test_has_code_for_every_gpu(cuda_library: Path) -> None:
    found = cuobjdump("--list-elf", "--list-ptx", cuda_library)
    code, intermediate = (set(re.findall(rf"sm_(\d+)a?\.{kind}", found)) for kind in ("cubin", "ptx"))
    if os.environ.get("BIGKERNELS_CUDA_ARCHS"):
        pytest.skip(f"built for {code}, as BIGKERNELS_CUDA_ARCHS says")
    assert code == {"75", "80", "90"}
    assert intermediate == {"90"}


def test_no_kernel_spills(cuda_library: Path, record_property) -> None:
    text = cuobjdump("--dump-resource-usage", cuda_library)
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert len(kernels) == text.count("REG:") > 0
    for name, *numbers in kernels:
        registers, stack, local = map(int, numbers)
        record_property(name, registers)
        assert (stack, local) == (0, 0), f"{name}: {registers} registers, {stack} + {local} bytes in memory"
        most = MOST_OF_FEW_TOKENS if "few_kernel" in name else MOST_REGISTERS
        assert registers <= most, f"{name}: {registers} registers"


def test_kernels_know_where_their_pointers_point(cuda_library: Path) -> None:
    text = cuobjdump("-sass", cuda_library)
    assert "LDG.E.128" in text and "STG.E.128" in text
    unwanted = re.findall(r"^.*\b(?:LDL|STL|LD\.E|ST\.E)\b.*$", text, re.MULTILINE)
    assert unwanted == [], "loads and stores through pointers to any kind of memory"


# Instructions a weight and lane, in the whole loop over steps of the depth, its loads included: at most 2 up to 8
# tokens. An H200 has time for 4.9 of 4 bits and 9.8 of 8 where it reads at 70 % of its bandwidth.
_CODES = ("int4", "book4", "int8", "fp8")
_MOST_A_WEIGHT = 2.0
# More: in groups of 32 scales are a third of the work, and fp8 lies as bfloat16 has it.
_MORE_A_WEIGHT = {
    ("book4", 32, "bf16"): 2.05,
    ("book4", 32, "f16"): 2.05,
    ("int4", 32, "bf16"): 2.05,
    ("fp8", 0, "f16"): 2.8,
}
# Gradients, of 16 tokens: they are multiplied with the scales of groups first.
_MOST_A_WEIGHT_BACKWARD = {
    ("int4", 128): 2.4,
    ("int4", 64): 3.0,
    ("int4", 32): 4.2,
    ("book4", 128): 2.9,
    ("book4", 64): 3.1,
    ("book4", 32): 3.4,
    ("int8", 0): 1.7,
    ("int8", 32): 2.9,
    ("fp8", 0): 3.4,
}
_FEW_KERNEL = re.compile(r"few_kernel\w*?FewCodeE(\d)\w*?FewOffsetE(\d)ELi(\d+)E\w*?TypeE(\d)ELi(\d)ELb(\d)E")


def few_kernels(text: str) -> dict[tuple[str, str, int, str, int, bool], list[str]]:
    """The instructions of each kernel for a few tokens in the code of one architecture."""
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        if named := _FEW_KERNEL.search(part.split("\n")[0]):
            code, offset, group, dtype, columns, backward = map(int, named.groups())
            key = (
                _CODES[code],
                ("none", "zero", "minimum")[offset],
                group,
                ("f32", "bf16", "f16")[dtype],
                columns,
                bool(backward),
            )
            found[key] = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", part)
    return found


def main_loop(instructions: list[str]) -> list[str]:
    """The smallest loop with all matrix instructions."""
    best = None
    for end, text in enumerate(instructions):
        if jump := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text):
            begin = int(jump[1], 16) // 16
            if begin <= end:
                body = instructions[begin : end + 1]
                key = -sum("HMMA" in t for t in body), len(body)
                if best is None or key < best[0]:
                    best = key, body
    assert best is not None and best[0][0] < 0
    return best[1]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_few_tokens_take_few_instructions(architecture: str, cuda_library: Path) -> None:
    if os.environ.get("BIGKERNELS_CUDA_ARCHS"):
        pytest.skip("built for what BIGKERNELS_CUDA_ARCHS says")
    kernels = few_kernels(cuobjdump("-sass", "-arch", architecture, cuda_library))
    assert len(kernels) == 120
    for (code, offset, group, dtype, columns, backward), instructions in kernels.items():
        what = f"{code}, {offset}, {group}, {dtype}, {columns} columns of tokens{', backward' if backward else ''}"
        body = main_loop(instructions)
        # Tiles of 16 x 16 that a warp multiplies in the loop; it is over groups where registers are short.
        tiles = {2: 32, 8: 8}[columns] if backward else {1: 32, 2: 32, 4: 16, 8: 8}[columns]
        short = columns == 8 or (columns == 4 and group == 32 and (offset != "none" or code == "int8"))
        if short and not backward and 0 < group < 128:
            tiles //= 128 // group
        of_weights = tiles * columns
        # And what offsets take off.
        if backward:
            offsets = {"none": code == "int8", "zero": 1, "minimum": 1}[offset]
            sums = offsets * 4 * columns * max(1, 16 * tiles // 4 // group if group else 1)
        else:
            sums = columns * (tiles // {1: 4, 2: 4, 4: 2, 8: 1}[columns]) * (offset != "none" or code == "int8")
        products = sum("HMMA.16816.F32" in text for text in body)
        assert products == of_weights + sums, what  # nothing computed twice
        assert any("LDSM" in text for text in body), what
        if tiles in (32, 16):
            assert any("LDGSTS.E.BYPASS.128" in text for text in body), what  # copies past the registers
        each = len(body) / (8 * tiles)
        if backward and columns == 2:
            assert each <= _MOST_A_WEIGHT_BACKWARD[code, group], f"{what}: {each:.2f} instructions a weight"
        elif columns == 1:
            most = _MORE_A_WEIGHT.get((code, group, dtype), _MOST_A_WEIGHT)
            assert each <= most, f"{what}: {each:.2f} instructions a weight"


@pytest.mark.parametrize("setting", ["BIGKERNELS_CUDA=0", "no nvcc"])
def test_configures_without_cuda(setting: str, library: Path, tmp_path: Path) -> None:
    """Where nothing may compile CUDA there is a reason and no target, and that is no error."""
    torch_dir = Path(torch.__file__).parent
    cmake, ninja = (shutil.which(n, path=Path(sys.executable).parent) or shutil.which(n) for n in ("cmake", "ninja"))
    if not cmake or not ninja:
        pytest.skip("cmake and ninja are not installed")
    definitions = [f"-DBK_TORCH_DIR={torch_dir}", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DBK_ONLY_LEVELS=base"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME")}
    if setting == "no nvcc":
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("c++", "g++", "gcc", "cc", "ar", "ld", "as", "ranlib", "nm", "uname"):
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        environment["PATH"] = str(tools)
    else:
        definitions.append("-DBK_CUDA=OFF")
    build = tmp_path / "build"
    command = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = (build / "cuda_not_compiled.txt").read_text()
    assert reason in done.stdout
    assert ("turned off" if setting != "no nvcc" else "no CUDA compiler") in reason
    assert "bigkernels_cuda" not in (build / "build.ninja").read_text()
