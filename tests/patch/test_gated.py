"""An activation that is kept in a variable until its product: T5's gated layers, and what looks like them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o, self.act = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16), nn.GELU()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        gate = self.act(self.a(x))
        up = self.b(x)
        x = gate * up
        x = self.dropout(x)
        if x.dtype != self.o.weight.dtype:
            x = x.to(self.o.weight.dtype)
        return self.o(x)


class OtherSide(Kept):
    def forward(self, x):
        up = self.b(x)
        gate = F.silu(self.a(x))
        return self.o(up * gate)


class InABranch(Kept):
    def forward(self, x):
        if x.dim() > 1:
            gate = self.act(self.a(x))
            x = self.dropout(self.b(x) * gate)
        return self.o(x)


class Two(Kept):
    def forward(self, x):
        gate = F.silu(self.a(x))
        up = F.sigmoid(self.b(x))
        return self.o(gate * up)


class OneKept(Kept):
    def forward(self, x):
        gate = F.silu(self.a(x))
        return self.o(gate * F.sigmoid(self.b(x)))


class ReadTwice(Kept):
    def forward(self, x):
        gate = self.act(self.a(x))
        return self.o(gate * self.b(x)) + gate.mean()


class Returned(Kept):
    def forward(self, x, more=False):
        gate = self.act(self.a(x))
        if more:
            return gate
        return self.o(gate * self.b(x))


class Rebound(Kept):
    def forward(self, x):
        gate = self.act(self.a(x))
        gate = gate + 1
        return self.o(gate * self.b(x))


class Locals(Kept):
    def forward(self, x):
        gate = self.act(self.a(x))
        seen = locals()["gate"].mean()
        return self.o(gate * self.b(x)) + seen


class Closure(Kept):
    def forward(self, x):
        gate = self.act(self.a(x))

        def product(up):
            return gate * up

        return self.o(product(self.b(x)))


class WrittenBetween(Kept):
    def forward(self, x):
        g = self.a(x)
        gate = F.gelu(g)
        with torch.no_grad():
            g.detach().zero_()
        return self.o(gate.detach() * self.b(x)) + g.sum()


class WrittenByAView(Kept):
    def forward(self, x):
        g = self.a(x) * 1
        gate = torch.relu(g.view(-1, 24))
        g.zero_()
        return self.o(gate * self.b(x).view(-1, 24))


class OtherBlock(Kept):
    def forward(self, x):
        gate = self.act(self.a(x))
        if x.dim() == 3:
            gate = x.new_ones(24)
        return self.o(gate * self.b(x))


FUSED = (Kept, OtherSide, InABranch, Two, OneKept)
LEFT_ALONE = (ReadTwice, Returned, Rebound, Locals, Closure, WrittenBetween, WrittenByAView, OtherBlock)


def step(model, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    return [
        out.detach(),
        *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True, materialize_grads=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [*FUSED, *LEFT_ALONE])
def test_a_kept_activation(cls, dtype):
    model, x = cls().to(dtype), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = step(model, x)
    report = bigkernels.patch(model)
    assert sum(row.what.startswith("glu") for row in report.patched) == (cls in FUSED)
    for a, b in zip(step(model, x), before, strict=True):
        atol = (1e-5 if dtype == torch.float32 else 0.03) * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(copied, x)[0], step(model, x)[0])


@pytest.mark.parametrize("what", ["hook", "dtype", "shape"])
def test_calls_that_the_kernel_does_not_take(what):
    model = Kept()
    bigkernels.patch(model)
    x, seen = torch.randn(2, 5, 16), []
    if what == "hook":
        model.act.register_forward_hook(lambda m, args, out: seen.append(out) or 2 * out)
    elif what == "dtype":
        model.b.double().register_forward_pre_hook(lambda m, args: (args[0].double(),))
    else:
        model.b = nn.Linear(16, 1)
    after = step(model, x)
    bigkernels.unpatch(model)
    for a, b in zip(after, step(model, x), strict=True):
        torch.testing.assert_close(a, b)
    assert what != "hook" or len(seen) == 2


def test_a_gate_that_a_hook_writes_to_is_an_error():
    model = Kept()
    bigkernels.patch(model)
    gates = []
    model.a.register_forward_hook(lambda m, args, out: gates.append(out))
    model.b.register_forward_hook(lambda m, args, out: None if gates[0].detach().zero_() is None else None)
    with pytest.raises(RuntimeError, match="written to between"):
        model(torch.randn(2, 5, 16))


@pytest.mark.parametrize("name", ["T5", "UMT5", "MT5", "LongT5", "Pop2Piano"])
@pytest.mark.parametrize("activation", ["gated-gelu", "gated-silu"])
def test_the_t5_family(name, activation):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        feed_forward_proj=activation,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    ids = torch.arange(22).view(2, 11) + 3
    gates = sum(hasattr(m, "wi_1") for m in model.modules())

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids[:, :7].contiguous(), attention_mask=torch.ones_like(ids)).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradients()
    # Kernels draw the elements that attention drops from numbers of their own.
    report = bigkernels.patch(model, attention=False)
    assert sum(row.what.startswith("glu") for row in report.patched) == gates == 2
    torch.testing.assert_close(gradients(), before, rtol=0, atol=2e-6 * before.abs().max().item())
