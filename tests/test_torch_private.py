"""Names of torch's that are not public: each is there, and what notices if one does not do what it did."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bigkernels
from bigkernels import _torch_private, apply_checkpointing

ROOT = Path(bigkernels.__file__).parent
HOME = "_torch_private.py"
# Operators without a public name, which are looked at as those of a graph.
ALLOWED = ("torch.ops.",)


def _private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def _dotted(node: ast.AST) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(["torch", *reversed(parts)]) if isinstance(node, ast.Name) and node.id == "torch" else None


def private_names(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(_dotted(node) or "")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if _private(name) and not name.startswith(ALLOWED)}


def test_each_is_there() -> None:
    assert _torch_private._absent == {}


def test_they_are_in_one_place() -> None:
    elsewhere = {path: private_names(path) for path in ROOT.rglob("*.py") if path.name != HOME}
    assert {str(path): names for path, names in elsewhere.items() if names} == {}


MISSING = """
import warnings, torch
del torch._C._functorch.peek_interpreter_stack, torch._C._current_graph_task_id, torch._C._is_alias_of
del torch._C._storage_Use_Count
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bigkernels as bk
    import bigkernels.program._state as state
print(*(w.message for w in caught), sep="\\n")
x, w = torch.randn(3, 8, requires_grad=True), torch.ones(8)
y = bk.functional.rms_norm(x, w)
y.sum().backward()
print(type(y.grad_fn).__name__, bk.ops.rms_norm.OPERATOR.choose(x))
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
for call in (lambda: bk.quantize(model, "int8"), lambda: bk.patch(model), lambda: bk.apply_checkpointing(model)):
    try:
        call()
    except RuntimeError as e:
        print(e)
print(state.unsupported(model))
"""


def test_a_torch_without_them_switches_off_what_needs_them() -> None:
    run = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lacks = f"torch {torch.__version__} has no torch._C."
    *warned, choice, quantized, patched, checkpointed, program = run.stdout.splitlines()
    kernels = f"{lacks}_functorch.peek_interpreter_stack"
    assert f"bigkernels: {kernels}; off without it: running kernels" in warned
    assert len(warned) == 4
    assert choice.endswith("reference") and "_RMSNorm" not in choice
    assert quantized == f"bigkernels.quantize: {lacks}_is_alias_of (needed for tensors without values)"
    assert patched == f"bigkernels.patch: {lacks}_is_alias_of (needed for tensors without values)"
    assert checkpointed == f"bigkernels.apply_checkpointing: {lacks}_current_graph_task_id (needed for checkpointing)"
    assert program == f"{lacks}_storage_Use_Count"


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
