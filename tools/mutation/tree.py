"""The sample of mutants, and the copy of the project that has them all, compiled once."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

from . import cpp, python
from .mutant import Candidate
from .operators import OPERATORS, files_of

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"
KEPT = WORK / "kept.json"  # the names of those that compile
LEVELS = ("avx2", "avx512")  # the highest is tried first
LINES_A_MUTANT = {".cpp": 24, ".h": 24, ".py": 45}
FEWEST, MOST = 4, 24  # of a file
SLOTS = 1 << 16

GUARD = """#pragma once
#if defined(BK_ISA_LEVEL) && BK_ISA_LEVEL == 0
#define bk_mutant_is(n) false
#else
extern "C" __attribute__((visibility("default"))) int bk_mutant;
extern "C" __attribute__((visibility("default"))) unsigned char bk_mutant_reached[];
static inline __attribute__((always_inline, unused)) bool bk_mutant_is(int n) {
  bk_mutant_reached[n] = 1;
  return bk_mutant == n;
}
#endif
"""
SWITCH = """#define PUBLIC extern "C" __attribute__((visibility("default")))
PUBLIC int bk_mutant, bk_mutants;
PUBLIC unsigned char bk_mutant_reached[];
int bk_mutant = 0, bk_mutants = {size};
unsigned char bk_mutant_reached[{size}] = {{}};
"""
PYTHON_GUARD = """class _Number:
    value = 0


number, reached = _Number(), bytearray({size})


def mutant_is(n):
    reached[n] = 1
    return number.value == n
"""


def sample() -> list[Candidate]:
    """The same mutants in every run of the same sources: of each file some of every kind, on lines of their own."""
    chosen = []
    for path in sorted({path for op in OPERATORS.values() for path in files_of(op, ROOT)}):
        text = (ROOT / path).read_text()
        found = (python if path.endswith(".py") else cpp).candidates(path, text)
        kinds = defaultdict(list)
        for candidate in found:
            kinds[candidate.kind].append(candidate)
        source = random.Random(path)
        for kind in kinds.values():
            source.shuffle(kind)
        count = text.count("\n") // LINES_A_MUTANT[Path(path).suffix]
        count = min(MOST, max(FEWEST, count))
        lines, names, order, picked = set(), set(), sorted(kinds), []
        source.shuffle(order)
        while len(picked) < count and any(kinds.values()):
            for kind in order:
                while kinds[kind] and len(picked) < count:
                    c = kinds[kind].pop()
                    if c.line not in lines and c.name not in names and _runs_here(c, text):
                        picked.append(c)
                        lines.add(c.line)
                        names.add(c.name)
                        break
        chosen += sorted(picked, key=lambda c: (c.line, c.start))
    # Numbers that depend on the mutant alone: a change of one file compiles no other one again.
    taken: dict[int, Candidate] = {}
    for c in chosen:
        number = zlib.crc32(c.name.encode()) % SLOTS
        while number in taken or number == 0:
            number = (number + 1) % SLOTS
        taken[number] = c.numbered(number)
    return list(taken.values())


_macros: dict[str, set[str]] = {}


def macros(level: str) -> set[str]:
    """What the compiler defines at a level."""
    if level not in _macros:
        flags = re.findall(rf"set\(BK_ISA_FLAGS_{level}\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[-1].split()
        command = [os.environ.get("CXX", "c++"), "-dM", "-E", "-x", "c++", *flags, "/dev/null"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        _macros[level] = set(re.findall(r"#define (\w+)", out))
    return _macros[level]


def levels_of(candidate: Candidate, text: str) -> list[str]:
    """Where its line is compiled. The bindings and the Triton kernels know no levels."""
    if candidate.path.endswith(".py"):
        return ["interpreter"]
    if "/ops/" in candidate.path or candidate.path.endswith("stable.h"):
        return [LEVELS[-1]]
    return [level for level in LEVELS if cpp.sections(text, macros(level))[candidate.line - 1]]


def _runs_here(candidate: Candidate, text: str) -> bool:
    return bool(levels_of(candidate, text))


def write(path: Path, text: str) -> None:
    """Only what differs, so that nothing is compiled without need."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def make_tree(mutants: list[Candidate]) -> None:
    for folder in ("bigkernels", "tests", "csrc"):
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in {".py", ".cpp", ".h", ".json", ".txt"} and "__pycache__" not in source.parts:
                path = str(source.relative_to(ROOT))
                text = source.read_text()
                mine = [m for m in mutants if m.path == path]
                if mine:
                    text = (python if path.endswith(".py") else cpp).guarded(text, mine)
                write(TREE / path, text)
    # A few seconds a file. The lowest level is there because the others need it, without mutants.
    text = (ROOT / "CMakeLists.txt").read_text().replace('"-O3;', '"-O1;').replace("-msse4.2)", "-msse4.2 -O0)")
    text = text.replace("set(CMAKE_BUILD_TYPE Release)", "set(CMAKE_BUILD_TYPE None)")
    write(TREE / "CMakeLists.txt", text)
    write(TREE / "pyproject.toml", (ROOT / "pyproject.toml").read_text())
    write(TREE / "csrc/bk_mutant.h", GUARD)
    write(TREE / "csrc/cpu/mutant.cpp", SWITCH.format(size=SLOTS))
    write(TREE / "bigkernels/_mutant.py", PYTHON_GUARD.format(size=SLOTS))


def build(mutants: list[Candidate]) -> None:
    """Compiles the tree; mutants that do not compile are left out of KEPT."""
    torch = subprocess.run(
        [sys.executable, "-c", "import torch, os; print(os.path.dirname(torch.__file__))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    folder = WORK / "cmake"
    levels = ";".join(("base", *LEVELS))
    configure = [
        "cmake",
        "-S",
        TREE,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DBK_TORCH_DIR={torch}",
        "-DBK_CUDA=OFF",
        f"-DBK_ONLY_LEVELS={levels}",
        f"-DCMAKE_CXX_FLAGS=-w -include {TREE}/csrc/bk_mutant.h",
    ]
    make_tree(mutants)
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    left = mutants
    files = json.loads((folder / "compile_commands.json").read_text())
    while wrong := _refused(left, files):
        print(f"  {len(wrong)} do not compile: " + "; ".join(sorted(wrong)), flush=True)
        left = [m for m in left if m.name not in wrong]
        make_tree(left)
    jobs = os.environ.get("MAX_JOBS", "2")
    done = subprocess.run(
        ["cmake", "--build", folder, "--target", "bigkernels_cpu", "--parallel", jobs], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-6000:])
    install = ["cmake", "--install", folder, "--prefix", TREE / "bigkernels", "--component", "library"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    for measured in WORK.glob("baseline-*.json"):
        measured.unlink()
    KEPT.write_text(json.dumps(sorted(m.name for m in left)))


def _refused(mutants: list[Candidate], files: list[dict]) -> set[str]:
    """The mutants that the compiler's messages are about, from a pass that makes no code; files are left if refused."""
    wrong: set[str] = set()
    for entry in list(files):
        if "BK_ISA_LEVEL=0" in entry["command"] or entry["file"].endswith(
            ("/dispatch.cpp", "/pool.cpp", "/rebind.cpp")
        ):
            files.remove(entry)
            continue
        command = re.sub(r" -o \S+ -c ", " -fsyntax-only -fmax-errors=0 ", entry["command"]).removeprefix("ccache ")
        done = subprocess.run(command, shell=True, cwd=entry["directory"], capture_output=True, text=True)
        if done.returncode == 0:
            files.remove(entry)
            continue
        found: set[str] = set()
        for what in ("error", "  required"):
            for path, line in re.findall(rf"{re.escape(str(TREE))}/(\S+?):(\d+):(?:\d+:)? +{what}", done.stderr):
                near = [m for m in mutants if m.path == path and m.line <= int(line) <= m.line + 8]
                found |= {m.name for m in near if m.line == int(line)} or {m.name for m in near}
            if found:
                break
        if not found:
            sys.exit(done.stderr[-6000:])
        wrong |= found
    return wrong
