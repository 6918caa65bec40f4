"""What a model writes in place after a norm, an addition, a gated unit, a rotation or a loss: as unpatched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bigkernels


class RMSNorm(nn.Module):
    """As models write it: 16-bit rows are copied to float32."""

    def __init__(self, n):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.eps, self.weight, self.bias = 1e-6, nn.Parameter(torch.rand(n) + 0.5), nn.Parameter(torch.rand(n))

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * y + self.bias).to(x.dtype)


class Base(nn.Module):
    def __init__(self, norm=RMSNorm):
        super().__init__()
        self.norm, self.norm2, self.f = norm(32), norm(32), nn.Linear(32, 32)


class Stream(Base):
    def forward(self, x):
        h = x * 1
        y = self.norm(h)
        h += self.f(y)
        z = self.norm2(h)
        h *= 0.5
        return h + z


class InOneLine(Base):
    def forward(self, x):
        h = x * 1
        h += self.f(self.norm(h))
        h.add_(self.norm2(h))
        return h


class Alias(Base):
    def forward(self, x):
        h = x * 1
        rows = h.view(-1, h.shape[-1])
        y = self.norm(h)
        rows[:3] = 0
        return self.f(y) + h


class Residual(Base):
    def forward(self, x):
        h = x + self.f(x)
        y = self.norm(h)
        h += self.f(y)
        return h + self.norm2(x + h)


class Branch(nn.Sequential):
    pass


class InAChild(nn.Module):
    """The caller writes; the norm is somewhere inside of what it called."""

    def __init__(self, norm=RMSNorm):
        super().__init__()
        self.branches = nn.ModuleList([Branch(norm(32), nn.Linear(32, 32)) for _ in range(2)])

    def forward(self, x):
        h = x * 1
        for branch in self.branches:
            h += branch(h)
        return h


class InAMethod(Base):
    def forward(self, x):
        return self.update(x * 1)

    def update(self, h):
        y = self.norm(h)
        torch.add(h, self.f(y), out=h) if not torch.is_grad_enabled() else h.add_(self.f(y))
        return h


class ByAMethod(Base):
    def forward(self, x):
        h = x * 1
        y = self.normed(h)
        h += y
        return h

    def normed(self, h):
        return self.f(self.norm(h))


class OfTheResult(Base):
    def forward(self, x):
        y = self.norm(x)
        y += 1
        y.mul_(2)
        return self.f(y)


class Gated(Base):
    def __init__(self, norm=RMSNorm):
        super().__init__(norm)
        self.g, self.act = nn.Linear(32, 32), nn.SiLU()

    def forward(self, x):
        y = self.act(self.g(x)) * self.f(x)
        y *= 2
        return self.norm(y)


MODELS = (Stream, InOneLine, Alias, Residual, InAChild, InAMethod, ByAMethod, OfTheResult, Gated)


def step(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    return [
        out.detach(),
        *torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()], materialize_grads=True),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [RMSNorm, nn.RMSNorm, LayerNorm])
@pytest.mark.parametrize("cls", MODELS)
def test_a_write_after_a_norm(cls, norm, dtype):
    torch.manual_seed(0)
    model = cls(norm).to(dtype)
    x = torch.randn(4, 7, 32).to(dtype)
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if isinstance(module, norm):  # in float64 nothing else would be copied
            module.register_forward_pre_hook(lambda m, args: (args[0].clone(),))
    exact = step(wide, x.double())
    theirs = step(model, x)
    report = bigkernels.patch(model)
    assert any("norm" in row.what for row in report.patched)
    ours = step(model, x)
    scale = [t.double().abs().max().item() for t in theirs]
    for a, b, e, s in zip(ours, theirs, exact, scale, strict=True):
        off, own = ((t.double() - e).abs().max().item() for t in (a, b))
        assert off <= 2 * own + 4 * torch.finfo(dtype).eps * s


class Plain(Base):
    """Writes before the norm, and to what the norm does not see."""

    def forward(self, x):
        h = x * 1
        h += 1
        count = 0
        count += 1
        y = self.norm(h)
        out = self.f(y)
        out += h
        return out + self.norm2(out) * count


@pytest.mark.parametrize("cls, copied", [(Plain, []), (Stream, ["norm", "norm2"]), (OfTheResult, [])])
def test_nothing_is_copied_where_nothing_is_written(cls, copied):
    model = cls()
    bigkernels.patch(model)
    assert [n for n in ("norm", "norm2") if getattr(model, n).forward.args[1].copies] == copied


def test_transformers_models_are_not_copied():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    bigkernels.patch(model)
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    assert len(norms) == 3 and not any(m.forward.args[1].copies for m in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_written_to_after_the_loss(dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).train()
    ids = torch.arange(12).view(2, 6)

    def gradient():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        with torch.no_grad():
            out.logits[..., 3] = -1e4
            out.logits.div_(2)
        out.loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).float()

    before = gradient()
    bigkernels.patch(model)
    torch.testing.assert_close(
        gradient(), before, rtol=0, atol=(1e-5 if dtype == torch.float32 else 0.03) * before.abs().max().item()
    )
