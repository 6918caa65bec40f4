"""Linear layers of a few tokens, with weights in the order of matrix fragments: the CUDA kernels' own source in a host
build, with copies to shared memory that arrive late, blocks in any order and warps in either.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from few_on_host import Host, Run, build
from torch import Tensor, nn

import bigkernels
from bigkernels import functional, use
from bigkernels.ops import _few_tokens, registry, routes
from bigkernels.ops._fragments import CODES, OFFSETS, Fragments, in_fragments, kind_of
from bigkernels.ops.codes import AFFINE4, AFFINE4M, FIRST_WITHOUT_KERNELS, INT8G
from bigkernels.quantization import FP4, NF4, Int4, QuantizedWeight

FORMATS = {
    "int4, 32": Int4(32),
    "int4, 64": Int4(64),
    "int4, 128": Int4(128),
    "int4, rtn": Int4(64, "rtn"),
    "q4_1": "q4_1",
    "nf4, 32": NF4(32),
    "nf4, 64": NF4(64),
    "nf4, 128": NF4(128, False),
    "fp4": FP4(),
    "int8": "int8",
    "q8_0": "q8_0",
    "fp8": "fp8",
}
DTYPES = [torch.bfloat16, torch.float16]
TOKENS = (1, 3, 16, 17, 33, 64)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return build(tmp_path_factory.mktemp("few_on_host"))


def made(config, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    torch.manual_seed(seed)
    w = torch.randn(n, k) * torch.linspace(0.01, 3, n)[:, None]
    w[n // 2] = 0.0
    return functional.quantize_weight(w + 0.1 * torch.rand(n, 1), config)


def tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, k) + 0.3).to(dtype)


def of(qweight: QuantizedWeight) -> tuple[Fragments, Tensor | None]:
    operands = qweight.operands()
    return in_fragments(*operands, qweight.shape[1]), operands.book


def exact(qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in float64; the values of a book as the matrix units get them."""
    operands = qweight.operands()
    book = None if operands.book is None else operands.book.to(dtype)
    return operands._replace(book=book).decoded(qweight.shape[1], torch.float64)


def check(found: Tensor, x: Tensor, qweight: QuantizedWeight, *, backward: bool = False) -> None:
    """Sums in float32: their errors are small beside the sum of magnitudes, a wrong element's is not. Backward the
    gradients are rounded once more, after they were multiplied with the scales of groups.
    """
    w = exact(qweight, x.dtype)
    w = w if backward else w.T
    want, size = x.double() @ w, x.double().abs() @ w.abs()
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    most = rounding[x.dtype if backward else found.dtype]
    if backward:  # of independent errors; what an offset is taken from is larger than what is left
        times = 4 if qweight.operands().zero is None else 8
        size = times * (x.double().square() @ w.square()).sqrt() + want.abs()
    wrong = (found.double() - want).abs() / size.clamp(min=1e-30)
    assert wrong.isfinite().all() and wrong.max() <= most, f"{wrong.max():.2e} of {most:.2e}"


def scaled(grad: Tensor, fragments: Fragments) -> Tensor:
    """Gradients as the kernels take them: multiplied with the factors of rows, in whole pieces of 16 bytes."""
    if fragments.factor is not None:
        grad = (grad.float() * fragments.factor).to(grad.dtype)
    return nn.functional.pad(grad, (0, -grad.shape[1] % 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_number_of_tokens(name: str, dtype: torch.dtype, host: Host):
    qweight = made(FORMATS[name], 77, 328)
    fragments, book = of(qweight)
    for i, m in enumerate(TOKENS):
        x = tokens(m, 328, dtype)
        how = Run(blocks=(1, 3, 5)[i % 3], stages=2 + i % 2, order=i, reversed=i % 2 == 0, early=i % 3 == 0)
        check(host(x, fragments, book, wide=True, how=how), x, qweight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_backward_of_every_format_and_number_of_tokens(name: str, dtype: torch.dtype, host: Host):
    qweight = made(FORMATS[name], 184, 200)
    fragments, book = of(qweight)
    for i, m in enumerate(TOKENS):
        grad = tokens(m, 184, dtype)
        how = Run(blocks=(1, 3, 5)[i % 3], stages=2 + i % 2, order=i, reversed=i % 2 == 0, early=i % 3 == 0)
        found = host(scaled(grad, fragments), fragments, book, wide=True, backward=True, how=how)
        check(found, grad, qweight, backward=True)


@pytest.mark.parametrize(("n", "k"), [(1, 8), (16, 128), (65, 136), (130, 640), (200, 1032), (64, 512)])
@pytest.mark.parametrize("name", ["int4, 128", "fp8"])
def test_sizes(name: str, n: int, k: int, host: Host):
    qweight = made(FORMATS[name], n, k)
    fragments, book = of(qweight)
    for m in (2, 20, 40):
        x = tokens(m, k, torch.bfloat16)
        check(host(x, fragments, book, wide=True, how=Run(order=m)), x, qweight)


@pytest.mark.parametrize("name", ["int4, 64", "nf4, 64", "int8"])
def test_results_depend_on_neither_order_nor_time(name: str, host: Host):
    """Parts are added up in the order of the depth, whoever finishes last; copies may come late or at once."""
    qweight = made(FORMATS[name], 70, 1160)
    fragments, book = of(qweight)
    for m in (5, 34):
        x = tokens(m, 1160, torch.bfloat16)
        found = [
            host(x, fragments, book, how=Run(7, stages, order, reversed, early))
            for stages, order, reversed, early in (
                (3, 0, False, False),
                (3, 5, True, False),
                (3, 9, False, True),
                (2, 0, True, True),
                (2, 11, False, False),
                (4, 3, True, False),
            )
        ]
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("blocks", [1, 2, 6, 13, 1000])
def test_any_number_of_blocks(blocks: int, host: Host):
    qweight = made("int4", 190, 1544)
    fragments, _ = of(qweight)
    x = tokens(4, 1544, torch.float16)
    check(host(x, fragments, wide=True, how=Run(blocks, order=blocks)), x, qweight)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_result(dtype: torch.dtype, bias: torch.dtype, host: Host):
    qweight = made("int8", 50, 256)
    fragments, _ = of(qweight)
    x, b = tokens(6, 256, dtype), torch.randn(50).to(bias)
    found, plain = host(x, fragments, bias=b), host(x, fragments, wide=True)
    assert found.dtype == dtype
    assert torch.equal(found, (plain + b.float()).to(dtype))
    check(host(x, fragments), x, qweight)


def test_strided_tokens(host: Host):
    qweight = made("int4", 40, 256)
    fragments, _ = of(qweight)
    x = tokens(9, 512, torch.bfloat16)[:, :256]
    assert torch.equal(host(x, fragments), host(x.contiguous(), fragments))


def test_nan_and_infinity_stay_with_their_tokens_and_rows(host: Host):
    qweight = made("int4", 40, 256)
    fragments, _ = of(qweight)
    x = tokens(9, 256, torch.bfloat16)
    x[3, 17], x[5, 200] = float("nan"), float("inf")
    found = host(x, fragments, wide=True)
    assert found[3].isnan().all() and not found[5].isfinite().any()
    rest = [0, 1, 2, 4, 6, 7, 8]
    check(found[rest], x[rest], qweight)
    fp8 = made("fp8", 40, 256)
    fp8.tensors["codes"][7, 100] = 0xFF
    fragments, _ = of(fp8)
    x = tokens(3, 256, torch.float16)
    found = host(x, fragments, wide=True)
    assert found[:, 7].isnan().all() and found.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "fp8", "nf4, 64", "int4, 128"])
def test_every_code_is_decoded_exactly(name: str, dtype: torch.dtype, host: Host):
    """Every code in every place of a unit, alone: a token with a single one shows it."""
    qweight = made(FORMATS[name], 16, 256)
    codes = qweight.tensors["codes"]
    codes.copy_(torch.arange(codes.numel()).view(codes.shape).to(torch.uint8).view(codes.dtype))
    if name == "fp8":
        codes[(codes & 127) == 127] = 0
    fragments, book = of(qweight)
    w = exact(qweight, dtype)
    for begin in range(0, 256, 64):
        x = torch.eye(256)[begin : begin + 64].to(dtype)
        found = host(x, fragments, book, wide=True)
        torch.testing.assert_close(found.double(), w.T[begin : begin + 64], rtol=2e-5, atol=1e-6 * float(w.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_put_in_order_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    qweight = made(FORMATS[name], 200, 328)
    whole, _ = of(qweight)
    monkeypatch.setattr("bigkernels.ops._fragments._AT_ONCE", 1)
    parts, _ = of(qweight)
    assert torch.equal(whole.units, parts.units)
    assert whole.factor is None or torch.equal(whole.factor, parts.factor)


def test_formats_without_a_kernel():
    assert kind_of(AFFINE4.number, 16) is None
    assert kind_of(AFFINE4M.number, 64) is None
    assert kind_of(INT8G.number, 64) is None
    assert kind_of(FIRST_WITHOUT_KERNELS, 32) is None
    one = torch.ones(4, 4)
    with pytest.raises(ValueError, match="no fragments"):
        in_fragments(torch.zeros(4, 8, dtype=torch.uint8), one, one, one[0], None, 16, AFFINE4.number, 16)


# ---- the copy of a weight, and who is asked ------------------------------------------------------------------------


@pytest.fixture
def on_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[Fragments]:
    """The operator's launcher with the host build below it; the copies that were made."""
    copies: list[Fragments] = []

    def run(x, units, factor, book, bias, code, offset, group, out):
        f = Fragments(units, factor, None, CODES[code], OFFSETS[offset], group, out.shape[1], x.shape[1])
        out.copy_(host(x, f, book, bias, wide=out.dtype == torch.float32))

    def run_back(grad, units, book, top, code, offset, group, out):
        f = Fragments(units, None, top, CODES[code], OFFSETS[offset], group, grad.shape[1], out.shape[1])
        out.copy_(host(grad, f, book, wide=out.dtype == torch.float32, backward=True))

    def noted(*args):
        copies.append(in_fragments(*args))
        return copies[-1]

    monkeypatch.setattr(_few_tokens, "_run", run)
    monkeypatch.setattr(_few_tokens, "_run_back", run_back)
    monkeypatch.setattr(_few_tokens, "in_fragments", noted)
    return copies


def call(launcher, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    *tensors, group, kind = qweight.operands()
    return launcher(x, *tensors, bias, group, kind, qweight.shape[1], qweight.format.dynamic, wide)


def elsewhere(*_):
    return "by Triton"


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch):
    """As if a GPU had measured these kernels to be the fastest."""
    monkeypatch.setattr(_few_tokens, "is_chosen", lambda x, call=None: registry._forced in (None, "cuda"))
    return _few_tokens.before(elsewhere)


@pytest.mark.parametrize("name", ["int4, 128", "nf4, 64", "fp8"])
def test_the_copy_is_made_once_and_again_after_a_write(name: str, on_host, routed):
    qweight = made(FORMATS[name], 40, 256)
    x = tokens(3, 256, torch.bfloat16).view(3, 1, 256)
    for _ in range(3):
        found = call(routed, x, qweight)
        assert found.shape == (3, 1, 40) and found.dtype == x.dtype
        check(found.view(3, 40), x.view(3, 256), qweight)
    assert len(on_host) == 1
    for part in qweight.tensors.values():
        if not part.dtype.is_floating_point:
            part.copy_(torch.randint_like(part, 0, 100))
        else:
            part.mul_(2)
        results = [call(routed, x, qweight) for _ in range(3)]
        # The first call after a write is left to others: what is written to before each call is not worth a copy.
        assert isinstance(results[0], str)
        check(results[1].view(3, 40), x.view(3, 256), qweight)
        assert torch.equal(results[1], results[2])
    assert len(on_host) == 1 + len(qweight.tensors)


def test_what_is_made_anew_for_each_call_is_copied_once_at_most(on_host, routed):
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    codes, scale, *rest, group, kind = qweight.operands()
    found = [routed(x, codes, scale.clone(), *rest, None, group, kind, 256, False) for _ in range(5)]
    assert len(on_host) == 1
    assert [isinstance(f, str) for f in found] == [False, True, True, True, True]


def test_rows_of_a_weight_and_inference_tensors_are_left_to_others(on_host, routed):
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    assert isinstance(call(routed, x, qweight.rows(0, 20)), str)
    with torch.inference_mode():
        other = made("int4", 40, 256)
        assert isinstance(call(routed, x, other), str)
    assert on_host == []


def test_copies_go_with_their_weights(on_host, routed):
    before = len(_few_tokens._copies)
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    call(routed, x, qweight)
    assert len(_few_tokens._copies) == before + 1
    on_host.clear()
    del qweight
    assert len(_few_tokens._copies) == before


def test_a_write_that_is_not_counted_needs_refresh(on_host, routed):
    linear = nn.Linear(256, 40)
    model = nn.Sequential(linear)
    bigkernels.quantize(model, "int8")
    qweight, x = model[0].qweight, tokens(3, 256, torch.bfloat16)
    first = call(routed, x, qweight)
    model[0].codes.data.neg_()
    assert torch.equal(call(routed, x, qweight), first)
    bigkernels.quantization.refresh(model)
    assert torch.equal(call(routed, x, model[0].qweight), -first)
    assert len(on_host) == 2


def test_no_copy_is_made_while_a_graph_is_captured(on_host, routed, monkeypatch):
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    monkeypatch.setattr(_few_tokens, "is_capturing", lambda t: True)
    assert isinstance(call(routed, x, qweight), str) and on_host == []
    with use("cuda"), pytest.raises(RuntimeError, match="captured"):
        call(routed, x, qweight)
    monkeypatch.setattr(_few_tokens, "is_capturing", lambda t: False)
    first = call(routed, x, qweight)
    monkeypatch.setattr(_few_tokens, "is_capturing", lambda t: True)
    assert torch.equal(call(routed, x, qweight), first) and len(on_host) == 1


def test_others_are_asked_unless_the_table_or_the_user_says_so(on_host, monkeypatch):
    launcher = _few_tokens.before(elsewhere)
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    monkeypatch.setattr(routes, "capability_of", lambda t: (9, 0))
    monkeypatch.setattr(_few_tokens, "unavailable", lambda: None)
    _few_tokens._is_routed.cache_clear()
    assert call(launcher, x, qweight) == "by Triton" and on_host == []
    with use("cuda"):
        check(call(launcher, x, qweight), x, qweight)
    row = routes.find("quantized_linear", _few_tokens.CALL, (9, 0))
    measured = dataclasses.replace(row, by="cuda", evidence="measured")
    monkeypatch.setattr(routes, "TABLE", tuple(measured if r is row else r for r in routes.TABLE))
    _few_tokens._is_routed.cache_clear()
    try:
        check(call(launcher, x, qweight), x, qweight)
        with use("triton"):
            assert call(launcher, x, qweight) == "by Triton"
        for other, options in ((tokens(65, 256, torch.bfloat16), {}), (x.float(), {})):
            assert call(launcher, other, qweight, **options) == "by Triton"
        assert call(launcher, tokens(3, 250, torch.bfloat16), made("int4", 40, 250)) == "by Triton"
        assert call(launcher, x, made("int8-dynamic", 40, 256)) == "by Triton"
    finally:
        _few_tokens._is_routed.cache_clear()


@pytest.mark.parametrize(
    ("config", "m", "k", "dtype", "message"),
    [
        ("int4", 65, 256, torch.bfloat16, "64 tokens"),
        ("int4", 2, 250, torch.bfloat16, "multiple of 8"),
        ("int4", 2, 256, torch.float32, "float32"),
        ("int8-dynamic", 2, 256, torch.float16, "rounded"),
    ],
)
def test_forced_where_there_is_no_kernel(config, m, k, dtype, message, on_host):
    launcher = _few_tokens.before(elsewhere)
    with use("cuda"), pytest.raises(RuntimeError, match=f"'cuda' was forced but .*{message}"):
        call(launcher, tokens(m, k, dtype), made(config, 40, k))


def test_tokens_that_lie_badly_are_copied(on_host, routed):
    qweight = made("int4", 40, 256)
    x = tokens(4, 256, torch.bfloat16)
    shifted = torch.zeros(4 * 256 + 1, dtype=x.dtype)[1:].view(4, 256).copy_(x)
    columns = x.T.contiguous().T
    odd = torch.zeros(4, 259, dtype=x.dtype)[:, :256].copy_(x)
    want = call(routed, x, qweight, torch.ones(40), True)
    for other in (shifted, columns, odd):
        assert torch.equal(call(routed, other, qweight, torch.ones(80)[::2], True), want)


# ---- gradients ------------------------------------------------------------------------------------------------------


def call_back(launcher, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
    *tensors, group, kind = qweight.operands()
    return launcher(grad, *tensors, group, kind, qweight.shape[1])


@pytest.fixture
def routed_back(routed):
    return _few_tokens.before_backward(elsewhere)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4, 64", "q4_1", "nf4, 64", "int8", "q8_0", "fp8"])
def test_gradients_from_the_same_copy(name: str, dtype: torch.dtype, on_host, routed, routed_back):
    """Rows of any number, tokens of any size: in float16 gradients of 1e-6 are not rounded to nothing."""
    qweight = made(FORMATS[name], 77, 136)
    call(routed, tokens(3, 136, dtype), qweight)
    grad = tokens(5, 77, dtype) * torch.tensor([1.0, 1e-3, 30.0, 1e-2, 0.0], dtype=dtype)[:, None]
    found = call_back(routed_back, grad.view(5, 1, 77), qweight)
    assert found.shape == (5, 1, 136) and found.dtype == dtype and len(on_host) == 1
    w = exact(qweight, dtype)
    want = grad.double() @ w
    size = (grad.double().square() @ w.square()).sqrt() * 3 + want.abs()
    most = torch.finfo(dtype).eps * size + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((found.view(5, 136).double() - want).abs() <= most).all()


def test_who_computes_gradients(on_host, monkeypatch):
    launcher = _few_tokens.before_backward(elsewhere)
    qweight, grad = made("int4", 40, 256), tokens(3, 40, torch.bfloat16)
    monkeypatch.setattr(routes, "capability_of", lambda t: (9, 0))
    monkeypatch.setattr(_few_tokens, "unavailable", lambda: None)
    _few_tokens._is_routed.cache_clear()
    try:
        assert call_back(launcher, grad, qweight) == "by Triton" and on_host == []
        with use("cuda"):
            check(call_back(launcher, grad, qweight), grad, qweight, backward=True)
            with pytest.raises(RuntimeError, match="'cuda' was forced but .*64 tokens"):
                call_back(launcher, tokens(65, 40, torch.bfloat16), qweight)
            with pytest.raises(RuntimeError, match="'cuda' was forced but .*float32"):
                call_back(launcher, grad.float(), qweight)
        monkeypatch.setattr(_few_tokens, "_ENABLED", True)
        _few_tokens._is_routed.cache_clear()
        check(call_back(launcher, grad, qweight), grad, qweight, backward=True)
        for other, weight in (
            (tokens(65, 40, torch.bfloat16), qweight),
            (grad.float(), qweight),
            (grad, made("int4", 40, 250)),
            (grad[:0], qweight),
        ):
            assert call_back(launcher, other, weight) == "by Triton"
        with use("triton"):
            assert call_back(launcher, grad, qweight) == "by Triton"
    finally:
        _few_tokens._is_routed.cache_clear()


def test_the_variable_takes_whole_models_where_use_forces_one_operator(on_host, monkeypatch):
    """`use` raises at operators without a kernel of that name, whatever it is; the variable asks for what there is."""
    launcher = _few_tokens.before(elsewhere)
    qweight, x = made("int4", 40, 256), tokens(3, 256, torch.bfloat16)
    monkeypatch.setattr(routes, "capability_of", lambda t: (9, 0))
    monkeypatch.setattr(_few_tokens, "unavailable", lambda: None)
    monkeypatch.setattr(_few_tokens, "_ENABLED", True)
    _few_tokens._is_routed.cache_clear()
    try:
        check(call(launcher, x, qweight), x, qweight)
        assert call(launcher, tokens(65, 256, torch.bfloat16), qweight) == "by Triton"
        functional.rms_norm(torch.ones(2, 8))
        for backend in ("cuda", "gluon", "torch"):
            with use(backend), pytest.raises(RuntimeError, match=f"rms_norm: there is no '{backend}' implementation"):
                functional.rms_norm(torch.ones(2, 8))
    finally:
        _few_tokens._is_routed.cache_clear()


@pytest.mark.parametrize("name", ["int4, 128", "int8"])
def test_backward_needs_no_dequantized_weight(name: str, on_host, routed, routed_back):
    """What is allocated is the result and the gradient in pieces, whatever the weight's size is."""
    qweight = made(FORMATS[name], 512, 512)
    call_back(routed_back, tokens(2, 512, torch.bfloat16), qweight)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        call_back(routed_back, tokens(2, 512, torch.bfloat16), qweight)
    assert sizes and max(sizes) <= 2 * 512


def test_backward_depends_on_neither_order_nor_time(host: Host):
    qweight = made("int4", 700, 136)
    fragments, book = of(qweight)
    for m in (5, 34):
        grad = scaled(tokens(m, 700, torch.bfloat16), fragments)
        found = [
            host(grad, fragments, book, backward=True, how=Run(5, stages, order, reversed, early))
            for stages, order, reversed, early in ((3, 0, False, False), (3, 5, True, False), (2, 9, False, True))
        ]
        assert all(torch.equal(found[0], other) for other in found[1:])
