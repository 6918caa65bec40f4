"""Rewritten forwards: residual additions, gated MLPs and rotary functions, and code that only looks like them."""

from __future__ import annotations

import functools
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigkernels


def _same(module, *args, patched, tolerance=1e-5, skipped=()):
    """Patch, assert what was found, and compare outputs and all gradients with those before."""

    def step():
        module.zero_grad()
        torch.manual_seed(0)
        leaves = [
            a.detach().clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args
        ]
        out = module(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        sum((o.double() * torch.linspace(-1, 1.7, o.numel()).view(o.shape)).sum() for o in outputs).backward()
        grads = [t.grad for t in (*leaves, *module.parameters()) if torch.is_tensor(t)]
        return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]

    before = step()
    report = bigkernels.patch(module)
    assert sorted(row.what for row in report.patched) == sorted(patched)
    assert len(report.skipped) == len(skipped)
    for row, reason in zip(report.skipped, skipped, strict=True):
        assert reason in row.what
    for ours, theirs in zip(step(), before, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    return report


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(16), nn.Linear(16, 16)


class PreNorm(Block):
    def forward(self, x):
        residual = x
        x = self.proj(x)
        x = residual + x
        residual = x
        kept = residual
        x = self.norm(x)
        return x * 2 + residual + 0.5 * kept


class PostNorm(Block):
    def forward(self, x):
        return self.norm(x + self.proj(x))


class InBranch(Block):
    def forward(self, x):
        if x.shape[0] > 1:
            y = x + self.proj(x)
            y = self.norm(y)
            return y
        with torch.no_grad():
            z = x + self.proj(x)
            x = self.norm(z)
        return x


class NormOfOther(Block):
    """The norm does not read the sum."""

    def forward(self, x):
        y = x + self.proj(x)
        z = self.norm(x)
        return y * z


class Between(Block):
    """Something happens to the sum before the norm reads it."""

    def forward(self, x):
        y = x + self.proj(x)
        y.mul_(3)
        return self.norm(y)


class Broadcast(Block):
    def forward(self, x):
        return self.norm(x + self.proj(x[:1]))


SUMS = [(PreNorm, 2), (PostNorm, 2), (InBranch, 3), (NormOfOther, 1), (Between, 1), (Broadcast, 2)]


@pytest.mark.parametrize(("build", "kernels"), SUMS)
def test_residual_addition(build, kernels):
    expected = ["layer_norm"] + ["add + layer_norm"] * (kernels - 1)
    _same(build(), torch.randn(3, 5, 16), patched=expected)


def test_a_norm_replaced_after_patching_is_used():
    module = PostNorm()
    x = torch.randn(3, 5, 16)
    bigkernels.patch(module)
    module.norm = nn.Identity()
    assert torch.equal(module(x), x + module.proj(x))


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Packed(Gated):
    def forward(self, x):
        gate, up = torch.cat((self.gate(x), self.up(x)), -1).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Functions(Gated):
    def forward(self, x):
        a = F.silu(self.gate(x)) * self.up(x)
        b = self.up(x) * F.gelu(self.gate(x), approximate="tanh")
        c = torch.sigmoid(self.gate(x)) * self.up(x)
        return self.down(a + b + c)


class Both(Gated):
    """Two activations in one product, and one whose other side only looks like one."""

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)) + self.up(x) * self.act(self.gate(x)))


class Narrow(Gated):
    """A gate that is broadcast, as for a shared expert."""

    def forward(self, x):
        return self.down(torch.sigmoid(self.gate(x)[..., :1]) * self.up(x))


class Square(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class Cubed(nn.Module):
    def forward(self, x):
        return F.silu(x) + 1e-3 * x**3


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.Sigmoid(), "sigmoid"),
        (Square(), "relu2"),
        (F.silu, "silu"),
        (torch.sigmoid, "sigmoid"),
    ],
)
def test_activations(act, name):
    _same(Gated(act), torch.randn(3, 5, 8), patched=[f"glu ({name})"])


def test_layouts():
    _same(Packed(), torch.randn(3, 5, 8), patched=["glu (silu)"])
    _same(Functions(), torch.randn(3, 5, 8), patched=["glu (silu)", "glu (gelu_tanh)", "glu (sigmoid)"])
    _same(Both(), torch.randn(3, 5, 8), patched=["glu (silu)"] * 2)
    _same(Narrow(), torch.randn(3, 5, 8), patched=["glu (sigmoid)"])


@pytest.mark.parametrize("act", [Cubed(), nn.Mish(), nn.LeakyReLU(0.01)])
def test_unknown_activations_are_skipped(act):
    _same(Gated(act), torch.randn(3, 5, 8), patched=[], skipped=["none of silu"])


@pytest.mark.parametrize("act", [nn.Dropout(0.0), nn.Identity(), nn.Softmax(-1), nn.Linear(12, 12), nn.LayerNorm(12)])
def test_other_modules_are_no_activations(act):
    kernels = ["layer_norm"] if isinstance(act, nn.LayerNorm) else []
    _same(Gated(act), torch.randn(3, 5, 8), patched=kernels)


def test_an_activation_replaced_after_patching_is_used():
    module = Gated()
    bigkernels.patch(module)
    module.act = nn.Tanh()
    x = torch.randn(2, 8)
    assert torch.equal(module(x), type(module).forward(module, x))


def test_mixed_dtypes_are_promoted_as_before():
    class Mixed(Gated):
        def forward(self, x):
            return self.act(self.gate(x).bfloat16()) * self.up(x)

    report = _same(Mixed(), torch.randn(3, 5, 8), patched=["glu (silu)"])
    assert report.skipped == []


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotary_partial(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    n = cos.shape[-1]
    a, b = rotary(q[..., :n], k[..., :n], cos, sin, unsqueeze_dim)
    return torch.cat((a, q[..., n:]), -1), torch.cat((b, k[..., n:]), -1)


def rotary_pairs(q, k, cos, sin):
    def turn(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def rotary_single(x, cos, sin):
    return x * cos.unsqueeze(2) + rotate_half(x) * sin.unsqueeze(2)


def rotary_backwards(q, k, cos, sin):
    return rotary(q, k, cos, -sin)


def rotary_scaled(q, k, cos, sin):
    a, b = rotary(q, k, cos, sin)
    return a, b * 1.0001


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Whole(Attention):
    def forward(self, q, k, cos, sin):
        return rotary(self.scale * q, k, cos, sin)


class Keywords(Attention):
    def forward(self, q, k, cos, sin):
        q, k = rotary(cos=cos, sin=sin, q=self.scale * q.transpose(1, 2), k=k.transpose(1, 2), unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)


class Partial(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_partial(self.scale * q, k, cos[..., :8], sin[..., :8])


class Pairs(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_pairs(self.scale * q, k, cos, sin)


class Single(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_single(self.scale * q.transpose(1, 2), cos, sin).transpose(1, 2)


class Positions(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_partial(self.scale * q, k, cos, sin, None)


class Backwards(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_backwards(self.scale * q, k, cos, sin)


class Almost(Attention):
    def forward(self, q, k, cos, sin):
        return rotary_scaled(self.scale * q, k, cos, sin)


ROPES = [
    (Whole, "rope", ""),
    (Keywords, "rope", ""),
    (Partial, "rope", ""),
    (Pairs, "rope (interleaved)", ""),
    (Single, "rope", ""),
    (Positions, "", "called in another way"),
    (Backwards, "", "computes something else"),
    (Almost, "", "computes something else"),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("build", "kernel", "reason"), ROPES)
def test_rotary_functions(build, kernel, reason, batch):
    q, k, angles = torch.randn(2, 4, 5, 16), torch.randn(2, 1, 5, 16), torch.randn(batch, 5, 8).repeat(1, 1, 2)
    _same(
        build(),
        q,
        k,
        angles.cos(),
        angles.sin(),
        patched=[kernel] if kernel else [],
        skipped=[reason] if reason else [],
    )


@pytest.mark.parametrize(
    ("q", "angles"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_rotary_dtypes(q, angles):
    args = [torch.randn(2, 4, 5, 16, dtype=q), torch.randn(2, 2, 5, 16, dtype=q)]
    args += [torch.randn(1, 5, 16, dtype=angles), torch.randn(1, 5, 16, dtype=angles)]
    _same(Whole(), *args, patched=["rope"], tolerance=1e-5 if torch.float32 in (q,) else 0.02)


def test_shapes_the_kernel_does_not_know_run_the_models_function():
    module = Whole()
    q, k = torch.randn(3, 4, 5, 16), torch.randn(3, 4, 5, 16)
    for cos, sin in ([torch.randn(3, 1, 16)] * 2, [torch.randn(1, 1, 16)] * 2, [torch.randn(5, 16)] * 2):
        before = module(q, k, cos, sin) if cos.dim() == 3 else None
        with bigkernels.patched(module):
            if before is None:
                with pytest.raises(RuntimeError):
                    module(q, k, cos, sin)
            else:
                assert torch.equal(module(q, k, cos, sin)[0], before[0])


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        out = function(self, *args, **kwargs)
        return out + 1

    return wrapper


REGISTRY = {}


def opaque(function):
    REGISTRY[function.__name__] = function

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return REGISTRY["forward"](self, *args, **kwargs)

    return wrapper


class Decorated(Gated):
    @decorated
    @decorated
    def forward(self, x, *, scale=2.0):
        return super().forward(x) + self.act(self.gate(x)).mean() + scale * (self.act(self.gate(x)) * self.up(x)).sum()


class Opaque(Gated):
    @opaque
    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


def test_decorators_defaults_and_super_survive():
    report = _same(Decorated(), torch.randn(3, 5, 8), patched=["glu (silu)", "linear + silu"])
    assert report.skipped == []


def test_a_decorator_that_hides_the_function_is_skipped():
    _same(Opaque(), torch.randn(3, 5, 8), patched=[], skipped=["cannot be seen through"])


def test_source_that_does_not_match_the_code_is_skipped(tmp_path, monkeypatch):
    """As when a file was edited after it was imported."""
    source = "import torch\nclass Mlp(torch.nn.Module):\n    def forward(self, x):\n        return torch.relu(x) * {}\n"
    (tmp_path / "edited_module.py").write_text(source.format("x"))
    monkeypatch.syspath_prepend(tmp_path)
    import edited_module

    (tmp_path / "edited_module.py").write_text(source.format("(x + 1)"))
    report = bigkernels.patch(edited_module.Mlp())
    assert report.patched == []
    assert ["is not what runs" in row.what for row in report.skipped] == [True]


def test_tracebacks_show_the_models_source():
    module = Gated()
    bigkernels.patch(module)
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(2, 7))
    frames = traceback.extract_tb(caught.tb)
    assert any(frame.filename == __file__ and "self.down(self.act" in frame.line for frame in frames)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.criterion = nn.Linear(8, 11), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, target):
        logits = self.head(x)
        loss = nn.CrossEntropyLoss(ignore_index=3)(logits, target)
        loss = loss + self.criterion(logits, target) + F.cross_entropy(logits, target, reduction="none").mean()
        return loss + F.cross_entropy(logits, logits.softmax(-1)) + F.cross_entropy(logits.T[None], target[None])


def test_losses_of_a_forward():
    target = torch.tensor([3, 1, 10, 0, 2, 2, 3, 9, 5, 4, 1])
    _same(Classifier(), torch.randn(11, 8), target, patched=["cross_entropy"] * 5)
