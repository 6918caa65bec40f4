"""Imports go down the layers only."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "bigkernels"

# From the lowest: a package imports from those before it. `_load` and the like, single files, are below all of them.
LAYERS = (
    "ops",
    "triton",
    "quantization",
    "nn",
    "losses",
    "distributed",
    "program",
    "published",
    "gguf",
    "patch",
    "checkpointing",
    "optim",
    "integrations",
    "bench",
    "planning",
    "demo",
    "_cli",
)

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


def inner_modules(file: Path) -> set[str]:
    """Modules of another package whose names begin with an underscore that a file imports from."""
    package, found = file.relative_to(PACKAGE).parent.parts, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) + 1 - node.level], *filter(None, (node.module or "").split(".")))
            for path in (base, *((*base, alias.name) for alias in node.names)):
                if len(path) > 1 and path[:1] != package[:1]:
                    ends = (i for i in range(1, len(path)) if path[i].startswith("_"))
                    inner = PACKAGE.joinpath(*path[: next(ends, -1) + 1])
                    if inner != PACKAGE and (inner.is_dir() or inner.with_suffix(".py").exists()):
                        found.add(".".join(inner.relative_to(PACKAGE).parts))
    return found


def test_packages_keep_their_inside_to_themselves():
    """What several packages need lies in a module without an underscore; these few are left, and become fewer."""
    imports = [(str(file), name) for file in PACKAGE.rglob("*.py") for name in inner_modules(file)]
    assert len(imports) <= 56, sorted(name for _, name in imports)


def test_every_package_has_a_layer():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"_samples"} <= set(LAYERS)


def test_files_without_types_become_fewer():
    """`make types` checks all others, and so every new one."""
    unchecked = [file for file in PACKAGE.rglob("*.py") if "\n# mypy: ignore-errors\n" in file.read_text()]
    assert len(unchecked) <= 131
