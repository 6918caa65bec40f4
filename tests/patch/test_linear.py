"""Linear layers as `patch` leaves them by default: the kernel for calls without gradients where it pays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import ISA_LEVELS
from torch import nn
from torch.nn import functional as F

import bigkernels
from bigkernels.nn import LoRALinear, QuantizedLinear
from bigkernels.nn import linear as table
from bigkernels.patch.rules import linear as rule
from bigkernels.quantization import prepare_qat


@pytest.fixture(autouse=True)
def four_tokens(monkeypatch):
    """The table of a machine where up to four tokens of float32 and bfloat16 pay, and three or more of float16."""
    pay = {torch.float32: (1, 4), torch.bfloat16: (1, 4), torch.float16: (3, 10**9)}
    monkeypatch.setattr(table, "_tokens", lambda: pay)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The sizes of the tokens that went to the kernel."""
    seen, run = [], rule.linear_by_packed

    def noted(x, weight, bias):
        seen.append(x.numel() // x.shape[-1])
        return run(x, weight, bias)

    monkeypatch.setattr(rule, "linear_by_packed", noted)
    return seen


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def model(**options) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 40), Scaled(40, 40), nn.Linear(40, 30, bias=False))
    bigkernels.patch(made, **options)
    return made


def plain() -> nn.Sequential:
    made = model()
    bigkernels.unpatch(made)
    return made


def test_report_and_the_way_back():
    made = plain()
    assert all("forward" not in module.__dict__ for module in made)
    report = bigkernels.patch(made, strict=True)
    assert [(row.path, row.what) for row in report.inference] == [("0", "linear"), ("2", "linear")]
    assert report.inference[0].error < 1e-2 and not report.patched and not report.skipped
    assert str(report).splitlines()[0] == "in inference: 2"
    report = bigkernels.patch(made, linear=False)
    assert not report.patched and not report.inference
    report = bigkernels.patch(made, linear=True)
    assert [row.what for row in report.patched] == ["linear"] * 2 and not report.inference


def test_nothing_is_written_where_it_pays_nowhere(monkeypatch):
    monkeypatch.setattr(table, "_tokens", dict)
    report = bigkernels.patch(nn.Sequential(nn.Linear(8, 8)), strict=True)
    assert not report.inference and not report.skipped
    report = bigkernels.patch(nn.Sequential(nn.Linear(8, 8, device="meta")), strict=True)
    assert not report.inference and not report.skipped


def test_the_table_names_levels_and_dtypes():
    from bigkernels.ops.registry import KERNEL_DTYPES

    assert set(table._TOKENS) <= set(ISA_LEVELS)
    for row in table._TOKENS.values():
        assert set(row) <= set(KERNEL_DTYPES) and all(1 <= least <= most for least, most in row.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_without_gradients_go_to_the_kernel(calls, dtype):
    made, other = model().to(dtype), plain().to(dtype)
    for shape, kernel in (((64,), True), ((1, 1, 64), True), ((2, 2, 64), True), ((5, 64), False), ((0, 64), False)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            found = made(x)
        assert len(calls) == (2 if kernel else 0), shape
        calls.clear()
        torch.testing.assert_close(found, other(x).detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    with torch.inference_mode():
        made(torch.randn(3, 64, dtype=dtype))
    assert len(calls) == 2


def test_a_dtype_may_pay_from_some_tokens_on(calls):
    made = model().half()
    with torch.no_grad():
        for tokens in (1, 2, 3, 100):
            made(torch.randn(tokens, 64).half())
    assert calls == [3, 3, 100, 100]


def test_calls_with_gradients_are_pytorchs(calls):
    made, other = model(), plain()
    x = torch.randn(2, 64)
    assert torch.equal(made(x), other(x)) and not calls
    for m in (made, other):
        m(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(made.parameters(), other.parameters(), strict=True))
    made.requires_grad_(False)
    made(x)
    assert len(calls) == 2  # nothing asks for a gradient
    calls.clear()
    x.requires_grad_()
    made(x).sum().backward()
    assert not calls and x.grad is not None


def test_what_is_not_values_is_pytorchs(calls):
    made, other, x = model(), plain(), torch.randn(2, 64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(x), other(x))
        assert torch.equal(torch.func.vmap(made)(x), torch.func.vmap(other)(x))
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), other(x))
        assert "bigkernels" not in str(torch.export.export(made, (x,)).graph)
        assert "bigkernels" not in str(torch.jit.trace(made, x, check_trace=False).graph)
        torch.testing.assert_close(torch.func.jvp(made, (x,), (x,))[0], other(x))
        assert torch.equal(copy.deepcopy(made).double()(x.double()), copy.deepcopy(other).double()(x.double()))
        assert made[0](input=x).shape == (2, 40)
        for wrong in (torch.randn(2, 63), torch.randn(2, 64).bfloat16(), torch.randn(2, 64).to("meta")):
            with pytest.raises(RuntimeError):
                made(wrong)
    assert not calls


def test_hooks_run_and_writes_are_seen(calls):
    made, x = model(), torch.randn(2, 64)
    seen = []
    made[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        made(x)
        made[0].weight.mul_(2)
        made[2].weight.data = torch.ones(30, 40)
        made[0].bias.data.fill_(0.5)
        expected = F.linear(F.linear(x, made[0].weight, made[0].bias), made[1].weight, made[1].bias) * 2
        torch.testing.assert_close(made(x), F.linear(expected, made[2].weight), rtol=1e-4, atol=1e-4)
        made[0].weight = nn.Parameter(torch.zeros(40, 64))
        made[0].bias = None
        assert made[0](x).eq(0).all()
    assert len(seen) == 3 and len(calls) == 5


def test_copies_are_layers_of_their_own(calls):
    made, x = model(), torch.randn(1, 64)
    with torch.no_grad():
        expected = made(x)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            calls.clear()
            assert torch.equal(other(x), expected) and len(calls) == 2
            made[0].weight.add_(1)
            assert torch.equal(other(x), expected)
            made[0].weight.sub_(1)
            bigkernels.unpatch(other)
            assert "forward" not in other[0].__dict__


def test_packed_weights_serve_many_tokens(calls):
    made, other, x = model(), plain(), torch.randn(40, 64)
    assert bigkernels.nn.linear.pack(made) == ["0", "2"]
    with torch.no_grad():
        torch.testing.assert_close(made(x), other(x), rtol=1e-4, atol=1e-4)
        assert calls == [40, 40]
        made[0].weight.zero_()
        made[0].bias.zero_()
        assert made[0](x).eq(0).all()


@pytest.mark.parametrize("options", [{}, {"linear": True}])
def test_patched_layers_are_quantized_and_come_back(options):
    made, x = model(**options), torch.randn(3, 64)
    before = copy.deepcopy(made).state_dict()
    report = bigkernels.quantize(made, "int8")
    assert [row.path for row in report.quantized] == ["0", "2"] and isinstance(made[0], QuantizedLinear)
    other = plain()
    bigkernels.quantize(other, "int8")
    with torch.no_grad():
        assert torch.equal(made(x), other(x))
    bigkernels.dequantize(made)
    assert type(made[0]) is nn.Linear and set(made[0].__dict__) == set(nn.Linear(2, 2).__dict__)
    with torch.no_grad():
        made[0].weight.zero_()
        assert torch.equal(made[0](x), made[0].bias.expand(3, -1))  # its own weight, and not that of the layer before
    bigkernels.unpatch(made)
    assert made.state_dict().keys() == before.keys()


def test_patched_layers_train_as_if_quantized_and_take_adapters():
    made, x = model(), torch.randn(3, 64)
    prepare_qat(made, "int8")
    assert "forward" not in made[0].__dict__ and type(made[0]) is not nn.Linear
    other = plain()
    prepare_qat(other, "int8")
    with torch.no_grad():
        assert torch.equal(made(x), other(x))
        made, other = model(), plain()
        for m in (made, other):
            torch.manual_seed(1)
            LoRALinear.add_to(m, "0")
        torch.testing.assert_close(made(x), other(x), rtol=1e-4, atol=1e-4)
        made[0].merge()
        other[0].merge()
        torch.testing.assert_close(made(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"linear": True}])
def test_another_class_computes_what_it_says(options):
    made, x = model(**options), torch.randn(2, 64)
    with torch.no_grad():
        expected = made[0](x) * 2
        made[0].__class__ = Scaled
        torch.testing.assert_close(made[0](x), expected)
        made = model(**options)
        nn.utils.parametrizations.weight_norm(made[0])
        made[0].parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(made[0](x), expected - made[0].bias)


def test_a_forward_of_ones_own_is_left_alone():
    made = plain()
    own = made[0].forward = lambda x: x[..., :40]
    report = bigkernels.patch(made)
    assert made[0].forward is own and "0" in [row.path for row in report.skipped]
    assert "0" not in [row.path for row in bigkernels.quantize(made, "int8").quantized]
