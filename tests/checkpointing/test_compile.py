"""Segments under `torch.compile`.

The compiler takes "recompute" and "selective" as torch's own checkpoints, which its partitioner honours: the memory
that is held falls as it does without the compiler. 8 bits and offloading run a segment outside of the graph.
"""

from __future__ import annotations

import copy

import pytest
import torch
from segments import ALL, gradients, relative
from torch import Tensor, nn
from torch.nn import functional as F

from bigkernels import apply_checkpointing, checkpoint, saved_activations
from bigkernels.checkpointing import selective
from bigkernels.memory import peak

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.first(self.norm(x))).sin().exp())


POLICIES = {n: ALL[n] for n in ("recompute", "selective, no budget", "int8", "offload", "recompute+int8")}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def near(found, expected, policy) -> None:
    """Compiled code rounds elsewhere than the operators one by one."""
    for f, e in zip(found, expected, strict=True):
        assert relative(f, e) < (1e-4 if policy.code is None else 0.03)


@policies
def test_function(policy) -> None:
    block, x = Block(), torch.randn(96, 64, requires_grad=True)
    fn = lambda x: checkpoint(block, x.tanh(), policy=policy).cos()  # noqa: E731
    tensors = [x, *block.parameters()]
    expected = gradients(block(x.tanh()).cos(), tensors)
    compiled = torch.compile(fn, backend="aot_eager")
    for _ in range(2):
        near(gradients(compiled(x), tensors), expected, policy)


@policies
def test_model(policy) -> None:
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(96, 64)
    expected = gradients(model(x), model.parameters())
    names = apply_checkpointing(model, policy)
    assert len(names) == 3
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        near(gradients(compiled(x), model.parameters()), expected, policy)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_blocks() -> None:
    """By `Module.compile`: the segment is in the graph."""
    x, graphs = torch.randn(96, 64), []
    model = nn.Sequential(*(Block() for _ in range(2)))
    expected = gradients(model(x), model.parameters())
    apply_checkpointing(model, "recompute")
    for block in model:
        block.compile(backend=lambda graph, example: graphs.append(graph) or graph)
    near(gradients(model(x), model.parameters()), expected, ALL["recompute"])
    assert graphs and all("checkpoint" in str(g.graph) for g in graphs)


def test_compiled_function_in_a_segment() -> None:
    """Graphs save tensors as operators do."""
    block, x = Block(), torch.randn(96, 64, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    tensors = [x, *block.parameters()]
    expected = gradients(block(x.tanh()), tensors)
    for policy in POLICIES.values():
        near(gradients(checkpoint(lambda x: compiled(x.tanh()), x, policy=policy), tensors), expected, policy)
    with saved_activations("int8"):
        out = compiled(x.tanh())
    near(gradients(out, tensors), expected, POLICIES["int8"])


@pytest.mark.parametrize("policy", [ALL["recompute"], selective(["aten::mm", "aten::addmm"])])
def test_whole_graph(policy) -> None:
    """No break: with nothing to keep in another form, the segment is a part of the graph."""
    block, x = Block(), torch.randn(96, 64, requires_grad=True)
    compiled = torch.compile(
        lambda x: checkpoint(block, x, policy=policy).sum(), backend="aot_eager_decomp_partition", fullgraph=True
    )
    near(torch.autograd.grad(compiled(x), [x]), torch.autograd.grad(block(x).sum(), [x]), policy)


@pytest.mark.parametrize("copied", [False, True])
def test_memory(copied: bool) -> None:
    """What is held between forward and backward: one input a block, of six tensors."""
    blocks, x = nn.Sequential(*(Block(128) for _ in range(6))), torch.randn(512, 128)
    held = []
    for policy in (None, "recompute", "int8"):
        torch._dynamo.reset()
        if policy is not None:
            apply_checkpointing(blocks, policy)
            blocks = copy.deepcopy(blocks) if copied else blocks
        compiled = torch.compile(blocks, backend="aot_eager_decomp_partition")
        compiled(x).sum().backward()  # compiles
        with peak() as p:
            out = compiled(x)
        held.append(p.end)
        out.sum().backward()
        del out
    assert held[1] < 0.35 * held[0] and held[2] < 0.6 * held[0], held
