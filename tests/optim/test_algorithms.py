"""Every algorithm and option over 50 steps against float64, at every level; and against torch's own float32."""

from __future__ import annotations

import pytest
import torch
from optimizer_formulas import CASES, DECOUPLED, FORMULAS
from torch import Tensor

import bigkernels
from bigkernels import optim
from bigkernels.optim._orthogonal import compute_in

STEPS = 50
SHAPES = ((3,), (64, 48), (100, 33), (), (0,), (257,), (32, 32), (1, 7), (2, 40, 24))

ALL = [pytest.param(name, options, id=f"{name} {options}") for name, found in CASES.items() for options in found]


def made(dtype: torch.dtype, name: str = "") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in SHAPES if len(s) in (2, 3) and min(s) > 1] if name == "Muon" else SHAPES
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    """Of sizes that change from element to element and from step to step."""
    generator = torch.Generator().manual_seed(step + 1)
    size = 10.0 ** torch.randint(-3, 2, (), generator=generator).item()
    return [torch.randn(p.shape, generator=generator) * size for p in params]


def trained(optimizer, params: list[Tensor], steps: int = STEPS) -> list[Tensor]:
    for step in range(steps):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def exact(name: str, params: list[Tensor], options: dict, steps: int = STEPS) -> list[Tensor]:
    defaults = {
        k: v for k, v in getattr(optim, name)([torch.zeros(2, 2)]).defaults.items() if k in ("lr", "weight_decay")
    }
    options = {**defaults, "decoupled_weight_decay": name in DECOUPLED, **options}
    formulas = [FORMULAS[name](p, **options) for p in params]
    for step in range(steps):
        for formula, p, g in zip(formulas, params, gradients(params, step), strict=True):
            formula.step(g.to(p.dtype))
    return [formula.p for formula in formulas]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((f.double() - e).abs().max().item() for f, e in zip(found, expected, strict=True) if f.numel())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_the_reference_is_the_formula(name: str, options: dict) -> None:
    params = made(torch.float64, name)
    expected = exact(name, params, options)
    assert off(trained(getattr(optim, name)(params, **options), params), expected) < 1e-10


@pytest.mark.parametrize(("name", "options"), ALL)
def test_the_kernel_is_as_good_as_float32_allows(name: str, options: dict) -> None:
    params = made(torch.float32, name)
    expected = exact(name, params, options)
    ours = off(trained(getattr(optim, name)(params, **options), params), expected)
    plain = made(torch.float32, name)
    with bigkernels.use("reference"):  # the same operations by PyTorch's operators in float32
        reference = off(trained(getattr(optim, name)(plain, **options), plain), expected)
    assert ours <= 2 * reference + 1e-6 + (rounding(options) if name == "Muon" else 0.0)


@pytest.mark.parametrize(
    ("name", "options"), [p for p in ALL if hasattr(torch.optim, p.values[0]) and p.values[0] != "Muon"]
)
def test_torch_gives_the_same(name: str, options: dict) -> None:
    if {"cautious", "decoupled_weight_decay"} & set(options):
        pytest.skip("torch has no such option")
    params, theirs = made(torch.float32), made(torch.float32)
    expected = exact(name, params, options)
    ours = off(trained(getattr(optim, name)(params, **options), params), expected)
    torchs = off(trained(getattr(torch.optim, name)(theirs, **options), theirs), expected)
    assert ours <= 2 * torchs + 1e-6


def rounding(options: dict) -> float:
    """Of updates that are multiplied in bfloat16, where the machine has products of it, as torch.optim.Muon's are."""
    part = 2**-4 if options.get("cautious") else 2**-6  # of which the sign decides whether elements are descended along
    return part * options["lr"] * STEPS if compute_in(torch.device("cpu")) == torch.bfloat16 else 0.0


@pytest.mark.parametrize("shapes", [((64, 48), (32, 32), (48, 64)), ((300, 260), (256, 520))])
def test_muon_in_torch_is_no_nearer(shapes: tuple) -> None:
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
        for _ in range(2)
    )
    expected = exact("Muon", ours, {"lr": 0.02}, 10)
    found = off(trained(optim.Muon(ours, lr=0.02), ours, 10), expected)
    assert found <= 1.5 * off(trained(torch.optim.Muon(theirs, lr=0.02), theirs, 10), expected) + 1e-6


# ---- 16-bit parameters and low-precision states ---------------------------------------------------------------------

LARGE = ((4096,), (70, 61), (128, 129), (5,))  # from 4096 elements on states have 8 bits; not multiples of a block


def large(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in LARGE]


@pytest.mark.parametrize("name", [n for n in CASES if n != "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_formats_are_those_of_the_reference(name, dtype, state_dtype, rounding) -> None:
    """Step by step from the same place: kernel and reference round alike but for a last digit here and there."""
    if rounding == "kahan" and dtype == torch.float16:
        pytest.skip("for bfloat16 only")
    options = {"state_dtype": state_dtype, "rounding": rounding}
    if name in ("SGD", "RMSprop"):
        options["momentum"] = 0.9
    kernel, plain = large(dtype), large(dtype)
    torch.manual_seed(1)
    ours = getattr(optim, name)(kernel, **options)
    torch.manual_seed(1)
    reference = getattr(optim, name)(plain, **options)
    for step in range(4):
        for p, q, g in zip(kernel, plain, gradients(kernel, step), strict=True):
            p.grad, q.grad = g.to(dtype), g.to(dtype)
        ours.step()
        with bigkernels.use("reference"):
            reference.step()
        for p, q in zip(kernel, plain, strict=True):
            # Where a rounding falls the other way, by a unit of the parameter's last place.
            eps = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
            rough = 1e-4 if state_dtype == "int8" else 1e-6  # roots of 12 bits beside states of 5
            far = (p.double() - q.double()).abs() > eps * q.double().abs() + rough
            assert far.double().mean() <= (0.003 if state_dtype != torch.float32 or name == "Lion" else 0.0)
            equal = (p == q).double().mean()
            assert equal >= (0.0 if dtype == torch.float32 else 0.9 if state_dtype == "int8" else 0.97)
            # The next step starts from the same place.
            q.data.copy_(p.data)
            for key, value in ours.state[p].items():
                mine, other = value, reference.state[q][key]
                if mine.dtype in (torch.int8, torch.uint8):
                    # Of momenta of rough quotients the smallest differ by more than a code.
                    apart = (mine.int() - other.int()).abs()
                    assert apart[(mine.int().abs() > 20)].max() <= 1
                    assert (mine != other).double().mean() < 0.01
                other.copy_(mine)


@pytest.mark.parametrize("name", [n for n in CASES if n != "Muon"])
def test_kahan_is_a_float32_master_weight(name: str) -> None:
    """bfloat16 parameter and remainder together go bit by bit where a float32 parameter goes."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    start = large(torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in start]
    ours, master = getattr(optim, name)(start, rounding="kahan", **options), getattr(optim, name)(wide, **options)
    for step in range(20):
        for p, q, g in zip(start, wide, gradients(start, step), strict=True):
            p.grad, q.grad = g.bfloat16(), g.bfloat16().float()
        ours.step(), master.step()
    for p, q in zip(start, wide, strict=True):
        bits = (p.detach().view(torch.int16).int() << 16) + ours.state[p]["remainder"].int()
        assert torch.equal(bits.view(torch.float32), q)
        assert (p - q).abs().max() <= 2.0**-8 * q.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_has_no_bias(dtype) -> None:
    n, steps = 4096, 200
    drift = 2.0**-14  # far below half a unit of the last place at 1: nearest would stay where it is
    p = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    nearest = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    optimizers = optim.SGD([p], lr=drift, rounding="stochastic"), optim.SGD([nearest], lr=drift)
    for _ in range(steps):
        for q, optimizer in zip((p, nearest), optimizers, strict=True):
            q.grad = torch.full((n,), -1.0, dtype=dtype)
            optimizer.step()
    assert torch.equal(nearest, torch.ones(n, dtype=dtype))
    moved = (p.detach().double() - 1).mean().item()
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    error = (drift * steps * unit / n) ** 0.5  # of a sum of independent roundings
    assert abs(moved - steps * drift) < 5 * error
    assert p.detach().double().std() > 0


def test_random_numbers_depend_on_seed_step_and_element_only() -> None:
    def run(seed: int, sizes: list[int]) -> dict[int, Tensor]:
        torch.manual_seed(seed)
        params = {n: torch.nn.Parameter(torch.linspace(0.5, 2, n).bfloat16()) for n in sizes}
        optimizer = optim.AdamW(params.values(), rounding="stochastic")
        for step in range(3):
            for n, p in params.items():
                p.grad = torch.randn(n, generator=torch.Generator().manual_seed(step + n)).bfloat16()
            optimizer.step()
        return {n: p.detach() for n, p in params.items()}

    first, other = run(3, [1000, 40, 70_001]), run(3, [70_001, 1000])
    assert all(torch.equal(first[n], other[n]) for n in other)
    assert not torch.equal(first[1000], run(4, [1000])[1000])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype(dtype, grad_dtype) -> None:
    p = torch.nn.Parameter(torch.randn(700).to(dtype))
    p.grad_dtype = grad_dtype
    formula = FORMULAS["AdamW"](p, lr=1e-2, weight_decay=0.01, decoupled_weight_decay=True)
    optimizer = optim.AdamW([p], lr=1e-2, rounding="nearest")
    p.grad = torch.randn(700).to(grad_dtype)
    formula.step(p.grad)
    optimizer.step()
    rounding = {torch.float32: 1e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((p.detach().double() - formula.p).abs() <= rounding * formula.p.abs() + 1e-7).all()


# ---- clipping, averages, divisors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n != "Muon"])
def test_clipping_and_averaging_in_the_step(name: str) -> None:
    params, wide = made(torch.float32), made(torch.float64)
    ours = getattr(optim, name)(params, max_grad_norm=0.7, ema_decay=0.9)
    same = getattr(optim, name)(wide)
    averages = [p.detach().clone() for p in wide]
    for step in range(20):
        for p, q, g in zip(params, wide, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.double()
        norm = torch.nn.utils.clip_grad_norm_(wide, 0.7)
        kept = [p.grad.clone() for p in params]
        ours.step(), same.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        torch._foreach_lerp_(averages, [p.detach() for p in wide], 0.1)
    flips = 2e-3 if name == "Lion" else 2e-5  # a sign may turn where a gradient is clipped to nearly nothing
    assert off([p.detach() for p in params], [p.detach() for p in wide]) < flips
    found = [ours.state[p].get("ema") for p in params]
    assert off(found, averages) < flips
    before = [p.detach().clone() for p in params]
    with ours.averaged():
        assert all(torch.equal(p, e) for p, e in zip(params, found, strict=True))
        with pytest.raises(RuntimeError, match="averaged"):
            ours.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_divisor_divides_inside_the_step(dtype, as_tensor: bool) -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(300, dtype=dtype)) for _ in range(2))
    a.grad = torch.randn(300).to(dtype) * 64
    b.grad = a.grad / 64
    for p, divisor in ((a, torch.tensor(64) if as_tensor else 64), (b, None)):
        optimizer = optim.SGD([p], lr=0.5, max_grad_norm=3.0)
        optimizer.step(divisor=divisor)
        assert optimizer.grad_norm.item() == pytest.approx(b.grad.float().norm().item(), rel=1e-6)
    assert torch.allclose(a, b, rtol=1e-6)


# ---- this file at the other levels ----------------------------------------------------------------------------------


def test_other_levels(isa, highest_isa: str) -> None:
    if isa.name == highest_isa:
        pytest.skip("this process runs at that level")
    isa.pytest("tests/optim/test_algorithms.py", "-k", "float32_allows or kahan or (formats and AdamW) or no_bias")


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 8, 32)])
def test_muon_for_one_spectral_norm(shape: tuple[int, ...]) -> None:
    """The update of "spectral_unclamped" is that of "original", times sqrt(rows / columns) where that clamps."""
    moved = []
    for adjust in ("original", "spectral_unclamped"):
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = optim.Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved.append(p.detach())
    rows, columns = shape[-2:]
    torch.testing.assert_close(moved[1], moved[0] * min(1.0, rows / columns) ** 0.5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [1e-41, 3e-39])
def test_blocks_of_8_bits_without_a_reciprocal_are_zero(size: float, backend: str, library) -> None:
    """What a subnormal scale would divide by it may be infinite."""
    p = torch.nn.Parameter(torch.ones(16384))
    optimizer = optim.SGD([p], lr=1.0, momentum=0.9, state_dtype="int8")
    with bigkernels.use(backend):
        for _ in range(2):
            p.grad = torch.zeros(16384)
            p.grad[::3], p.grad[5] = size, -size / 2
            optimizer.step()
    assert not any(
        t.dequantize().any() if hasattr(t, "dequantize") else t.any()
        for name, t in optimizer.state[p].items()
        if "momentum" in name
    )
    assert torch.equal(p, torch.ones(16384))
