"""Names of torch's that are not public: each is there, and what notices if one does not do what it did."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels import _torch_private, apply_checkpointing

ROOT = Path(bigkernels.__file__).parent
GATHERED = ("checkpointing", "planning")  # packages whose private names are all in `_torch_private`


def _private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def _dotted(node: ast.AST) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(["torch", *reversed(parts)]) if isinstance(node, ast.Name) and node.id == "torch" else None


@functools.cache
def names() -> dict[str, set[str]]:
    """Files by private name."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            dotted = []
            if isinstance(node, ast.Attribute):
                dotted = [_dotted(node) or ""]
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
                dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in dotted:
                if name and _private(name):
                    found.setdefault(name, set()).add(where)
    return found


def _resolve(dotted: str) -> object:
    parts = dotted.split(".")
    value = torch
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:i]))
        value = getattr(value, part)
    return value


def test_each_is_there() -> None:
    assert len(names()) > 10
    for name in names():
        _resolve(name)
    for name in _torch_private.__all__:
        assert getattr(_torch_private, name) is not None


@pytest.mark.parametrize("package", GATHERED)
def test_they_are_in_one_place(package: str) -> None:
    elsewhere = {n: files for n, files in names().items() if any(f.startswith(f"{package}/") for f in files)}
    assert {n for n in elsewhere if not n.startswith(("torch._ops", "torch.ops."))} == set()  # types, and operators


def test_a_torch_that_calls_modules_in_another_way_is_an_error(monkeypatch) -> None:
    """Regions would never run, and nobody would notice but by the memory."""
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    _torch_private.calls_go_through_instances.cache_clear()
    try:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
        with pytest.raises(RuntimeError, match="calls modules in another way"):
            apply_checkpointing(model)
    finally:
        monkeypatch.undo()
        _torch_private.calls_go_through_instances.cache_clear()
    assert _torch_private.calls_go_through_instances()
    assert len(apply_checkpointing(model)) == 2
