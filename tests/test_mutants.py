"""The tool that makes mutants: what it finds in a source, and that one number turns one of them on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from mutation import cpp, python  # noqa: E402

CPP = """
template <class T>
struct Pair {
  static constexpr int size = 2 * 3;
};
int count(const int* p, int n, bool twice) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += p[i] * 2;
  if (twice && n > 1) {
    sum = sum - Pair<int>::size;
  }
  return twice ? sum : -sum;
}
"""
MAIN = """
#include <cstdio>
static int active;
static bool bk_mutant_is(int n) { return n == active; }
SOURCE
int main() {
  const int p[] = {1, 2, 3, 0};
  for (active = 0; active <= COUNT; ++active) std::printf("%d ", count(p, 3, true) * 1000 + count(p, 3, false));
}
"""


def test_mutants_of_cpp():
    found = {(c.kind, c.name.split(": ", 1)[1].replace("`", "")) for c in cpp.candidates("a.cpp", CPP)}
    line = "for (int i = 0; i < n; ++i) sum += p[i] * 2;"
    for kind, before, after in (
        ("bound", line, line.replace("<", "<=")),
        ("step", line, line.replace("++i", "i += 2")),
        ("constant", line, line.replace("i = 0", "i = 1")),
        ("accumulation", line, line.replace("+=", "-=")),
        ("stride", line, line.replace("*", "+")),
        ("condition", "if (twice && n > 1) {", "if (twice || n > 1) {"),
        ("condition", "if (twice && n > 1) {", "if (true) {"),
        ("deletion", "sum = sum - Pair<int>::size;", "(deleted)"),
        ("sign", "return twice ? sum : -sum;", "return twice ? sum : sum;"),
    ):
        assert (kind, f"{before} -> {after}") in found
    assert not any("2 * 3" in name or "template" in name for _, name in found)


def test_a_number_turns_one_on(tmp_path: Path):
    mutants = [c.numbered(i) for i, c in enumerate(cpp.candidates("a.cpp", CPP), 1)]
    source = MAIN.replace("SOURCE", cpp.guarded(CPP, mutants)).replace("COUNT", str(len(mutants)))
    (tmp_path / "a.cpp").write_text(source)
    try:
        subprocess.run(["c++", tmp_path / "a.cpp", "-o", tmp_path / "a"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no C++ compiler")
    plain, *others = map(int, subprocess.run([tmp_path / "a"], capture_output=True, text=True).stdout.split())
    assert plain == (12 - 6) * 1000 - 12
    same = [m.name for m, value in zip(mutants, others, strict=True) if value == plain]
    # p has a zero behind its three elements, and n > 1 holds with n >= 1 and without.
    assert len(same) < len(mutants) / 3 and any("i <= n" in name for name in same)


PYTHON = '''
import triton


@triton.jit
def kernel(a, n, flag: bool = 1 > 0):
    """Doc."""
    if n < 3:
        a += n * 2
    return tl.where(n == 1, -a, a)  # a // comment


class tl:
    @staticmethod
    def where(c, a, b):
        return a if c else b
'''


def test_mutants_of_python(monkeypatch):
    source = PYTHON.replace("import triton\n", "").replace("@triton.jit\n", "")
    mutants = [c.numbered(i) for i, c in enumerate(python.candidates("a.py", source), 1)]
    active = [0]
    text = python.guarded(source, mutants).replace("from bigkernels._mutant import mutant_is as _mutant_is", "")
    scope = {"_mutant_is": lambda n: n == active[0]}
    exec(compile(text, "a.py", "exec"), scope)

    def results() -> list[int]:
        return [scope["kernel"](5, n) for n in (1, 2, 3)]

    plain, changed = results(), set()
    assert plain == [-7, 9, 5]
    for m in mutants:
        active[0] = m.number
        if results() != plain:
            changed.add(m.name.split(": ", 1)[1].replace("`", ""))
    for before, after in (
        ("n < 3", "n <= 3"),
        ("a += n * 2", "a -= n * 2"),
        ("a += n * 2", "a = n * 2"),
        ("tl.where(n == 1, -a, a)", "tl.where(n == 1, a, -a)"),
    ):
        assert any(before in name and after in name for name in changed), (before, after)
