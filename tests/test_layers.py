"""Imports go down the layers only."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "bigkernels"

# From the lowest: a package imports from those before it. `_load` and the like, single files, are below all of them.
LAYERS = ("ops", "triton", "quantization", "nn", "losses", "distributed", "program", "published", "gguf", "patch",
          "checkpointing", "optim", "integrations", "bench", "planning", "demo", "_cli")  # fmt: skip

# What goes up all the same: `quantize` makes modules.
UPWARD = {("quantization", "nn")}


def imported(file: Path) -> set[str]:
    """The packages of ours that a file imports from, at the top or inside functions; not for type checkers alone."""
    package = file.relative_to(PACKAGE).parent.parts
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                base = package[: len(package) + 1 - child.level]
                path = (*base, *(child.module or "").split("."))
                found.update([path[0]] if path[0] else [alias.name for alias in child.names])
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def test_imports_go_down():
    order = {name: i for i, name in enumerate(LAYERS)}
    upward = set()
    for file in PACKAGE.rglob("*.py"):
        here = file.relative_to(PACKAGE).parts[0]
        if here in order:
            upward |= {(here, other) for other in imported(file) if order.get(other, -1) > order[here]}
    assert upward == UPWARD


def test_every_package_has_a_layer():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"_samples"} <= set(LAYERS)


def test_files_without_types_become_fewer():
    """`make types` checks all others, and so every new one."""
    unchecked = [file for file in PACKAGE.rglob("*.py") if "\n# mypy: ignore-errors\n" in file.read_text()]
    assert len(unchecked) <= 131
