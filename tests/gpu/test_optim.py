"""The CUDA optimizer kernels on a GPU: against the CPU kernels, and what only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizer_formulas import FORMULAS
from optimizer_pairs import ALL, CASES, as_numbers, equalise, memory_of, pair, params_of, set_gradients, short
from torch import Tensor

from bigkernels import optim
from bigkernels.optim import _formats

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EPS = torch.finfo(torch.float32).eps
FLOATS = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # a unit in the last place


def allowed(key: str, mine: dict[str, Tensor], theirs: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    """How far a value may be from the CPU's: by float32 rounding, which fused operations do elsewhere, and from there
    to the next number of its format."""
    value = theirs[key].float()
    old = before.get(key, theirs[key]).float()
    bound = 8 * EPS * (value.abs() + old.abs() + 0.25 * value.abs().amax())
    unit = FLOATS.get(theirs[key].dtype, 0.0)
    if unit:
        bound += unit * value.abs() + (2.0**-24 if theirs[key].dtype == torch.float16 else 0.0)
    if key in ("param", "ema") or key.startswith("momentum_buffer"):
        # From a step's direction, which the CPU estimates where states are codes; momentum may cancel much of it.
        estimated = any(k.endswith("_scale") for k in theirs)
        change = (value - old).abs() + (value.abs() if key.startswith("momentum_buffer") else 0.0)
        bound += 2.0**-10 * (change + change.amax()) if estimated else 2.0**-18 * change
    if key == "ema":  # of what was stored
        bound += (mine["param"].float() - theirs["param"].float()).abs()
    return bound


def decoded(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """With 8-bit states as float32."""
    found = as_numbers(memory)
    for key in [k for k in found if k + "_scale" in found]:
        found[key] = _formats.decode8(_formats.flat(found[key]), found[key + "_scale"])
    return found


def code_steps(codes: Tensor, scale: Tensor) -> Tensor:
    """How far the neighbours of codes are; what is very small beside its block may be several codes off."""
    step = 4.0 / (codes.int().abs() + 0.5)
    blocks = scale.repeat_interleave(_formats.BLOCK)[: codes.numel()]
    return step * _formats.decode8(codes, scale).abs() + 4e-6 * blocks


def check(optimizer: optim.Optimizer, cpu: optim.Optimizer, before: list[dict[str, Tensor]], may_flip: bool = False):
    for mine, theirs, old in zip(memory_of(optimizer), memory_of(cpu), before, strict=True):
        steps = {
            k: sum(code_steps(m[k].cpu(), m[k + "_scale"].cpu()) for m in (mine, theirs))
            for k in theirs
            if k + "_scale" in theirs
        }
        mine, theirs, old = map(decoded, (mine, theirs, old))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            bound = allowed(key, mine, theirs, old)
            if key in steps:
                bound += steps[key]
            wrong = int(((value.float() - theirs[key].float()).abs() > bound).sum())
            # A sign of what is nearly zero may be another one, and then the step is.
            assert wrong <= may_flip * (1 + value.numel() // 5000), f"{key} of {value.numel()}: {wrong} differ"


@pytest.mark.parametrize(("case", "state_dtype", "types"), ALL, ids=short)
def test_matches_the_cpu_kernels(case, state_dtype, types):
    name, options = case
    dtype, grad_dtype, rounding = types
    options = {**options, "state_dtype": state_dtype, "rounding": rounding, "ema_decay": 0.9}
    cpu, ours = pair(name, options, dtype, device=DEVICE)
    set_gradients([cpu, ours], grad_dtype)
    params_of(cpu)[2].grad = params_of(ours)[2].grad = None
    for step in range(3):
        if step:
            set_gradients([cpu, ours], grad_dtype)
            equalise(ours, cpu)
        before = copy.deepcopy(memory_of(cpu))
        cpu.step(divisor=2.0)
        ours.step(divisor=2.0)
        check(ours, cpu, before, may_flip=name == "Lion")


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [("stochastic", torch.bfloat16), ("stochastic", torch.float16), ("kahan", torch.bfloat16)],
    ids=short,
)
def test_rounds_the_same_values_to_the_same_bits(rounding: str, dtype: torch.dtype):
    # A learning rate that is a power of two leaves one rounding, wherever compilers fuse operations.
    cpu, ours = pair("SGD", {"lr": 2.0**-6, "rounding": rounding, "ema_decay": 0.5}, dtype, device=DEVICE)
    for _ in range(3):
        set_gradients([cpu, ours], torch.float32, 0.01)
        cpu.step()
        ours.step()
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            for key in theirs:
                assert torch.equal(mine[key].cpu(), theirs[key]), key


@pytest.mark.parametrize("case", CASES, ids=short)
def test_repeats_bit_for_bit(case):
    name, options = case
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        _, ours = pair(name, {**options, "state_dtype": "int8", "max_grad_norm": 1.0}, torch.bfloat16, device=DEVICE)
        for _ in range(3):
            set_gradients([ours], torch.bfloat16)
            ours.step()
        results.append(memory_of(ours))
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("divisor", [None, 3.0, "tensor"])
def test_clips_as_the_cpu_does(divisor):
    cpu, ours = pair("AdamW", {"max_grad_norm": 1.0, "lr": 0.1}, torch.float32, device=DEVICE)
    divisors = [torch.tensor(3.0, device=d) if divisor == "tensor" else divisor for d in ("cpu", DEVICE)]
    for _ in range(3):
        set_gradients([cpu, ours], torch.bfloat16)
        for optimizer, value in zip((cpu, ours), divisors, strict=True):
            optimizer.step(divisor=value)
        torch.testing.assert_close(ours.grad_norm.cpu(), cpu.grad_norm, rtol=1e-6, atol=0.0)
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            for key in theirs:
                torch.testing.assert_close(mine[key].cpu(), theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_norms(norm_type: float):
    grads = [torch.randn(n, device=DEVICE).to(d) for n in (1, 31, 257, 5001, 70000) for d in FLOATS]
    grads.append(torch.randn(40, 50, device=DEVICE).t())
    found = optim.get_total_norm(grads, norm_type)
    expected = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g.double(), norm_type) for g in grads]), norm_type
    )
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0.0)
    for bad in (float("inf"), float("nan")):
        grads[7][-1] = bad
        assert not optim.get_total_norm(grads, norm_type).isfinite()
    assert optim.get_total_norm(grads, norm_type).isnan()


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "SGD", "Muon"])
def test_a_gradient_scaler_skips_and_unscales(name: str):
    torch.manual_seed(0)
    plain, scaled = (torch.nn.Linear(64, 48, device=DEVICE) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    optimizers = [getattr(optim, name)(m.parameters(), lr=0.01, max_grad_norm=1.0) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    for step in range(4):
        x = torch.randn(8, 64, device=DEVICE)
        for model, optimizer in zip((plain, scaled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=f"step {step}")
    before = copy.deepcopy(memory_of(optimizers[1]))
    (scaler.scale(scaled(x).square().mean()) * float("inf")).backward()
    scaler.step(optimizers[1])
    scaler.update()
    for mine, old in zip(memory_of(optimizers[1]), before, strict=True):
        assert all(torch.equal(mine[key], old[key]) for key in old)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"Adam", "Muon"}))
def test_waits_for_nothing(name: str):
    options = {"max_grad_norm": 1.0, "ema_decay": 0.9, "state_dtype": "int8"}
    _, ours = pair(name, options, torch.bfloat16, device=DEVICE)
    set_gradients([ours], torch.bfloat16)
    divisor = torch.tensor(3.0, device=DEVICE)
    ours.step(divisor=divisor)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(divisor=divisor)
        ours.param_groups[0]["lr"] *= 0.5  # another record for the groups
        ours.step(divisor=divisor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "SGD"])
def test_in_a_graph(name: str):
    options = {"max_grad_norm": 1.0, "state_dtype": "int8", "rounding": "stochastic"}
    lr = torch.tensor(0.01, device=DEVICE)
    _, ours = pair(name, {**options, "lr": lr}, torch.bfloat16, device=DEVICE)
    like = [torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)]
    plain = getattr(optim, name)(like, **{**options, "lr": 0.01})
    plain.param_groups[0]["seed"] = ours.param_groups[0]["seed"]
    set_gradients([ours, plain], torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(3):
        for mine, theirs in zip(params_of(ours), params_of(plain), strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad.copy_(theirs.grad)
        lr.fill_(0.01 / (step + 1))
        plain.param_groups[0]["lr"] = lr.item()
        graph.replay()
        plain.step()
        for mine, theirs in zip(memory_of(ours), memory_of(plain), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs), f"replay {step}"


def test_on_another_stream():
    cpu, ours = pair("AdamW", {"lr": 0.1}, torch.float32, device=DEVICE)
    stream = torch.cuda.Stream()
    for _ in range(3):
        set_gradients([cpu, ours], torch.float32)
        cpu.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for p in params_of(ours):
                p.grad *= 2.0  # queued behind the sleep: a step elsewhere would not see it
            ours.step(divisor=2.0)
        torch.cuda.current_stream().wait_stream(stream)
    for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
        torch.testing.assert_close(mine["param"].cpu(), theirs["param"], rtol=1e-4, atol=1e-6)


def test_on_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    cpu, ours = pair("LAMB", {"max_grad_norm": 1.0}, torch.float32, device="cuda:1")
    set_gradients([cpu, ours], torch.float32)
    cpu.step()
    ours.step()
    assert torch.cuda.current_device() == 0
    for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
        torch.testing.assert_close(mine["param"].cpu(), theirs["param"], rtol=1e-4, atol=1e-6)


def test_parameters_of_any_layout():
    torch.manual_seed(0)
    whole = torch.randn(64, 96, device=DEVICE)
    image = torch.randn(2, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    empty, number = torch.randn(0, 5, device=DEVICE), torch.randn((), device=DEVICE)
    made = [torch.randn(40, 30, device=DEVICE).t(), whole[::2, 3:50], image, empty, number]
    params = [torch.nn.Parameter(t) for t in made]
    others = [torch.nn.Parameter(t.detach().cpu().contiguous()) for t in made]
    ours, cpu = (optim.AdamW(ps, lr=0.1, max_grad_norm=1.0) for ps in (params, others))
    outside = whole.clone()
    for _ in range(3):
        for mine, theirs in zip(params, others, strict=True):
            theirs.grad = torch.randn(theirs.shape)
            mine.grad = theirs.grad.to(DEVICE)
        ours.step()
        cpu.step()
    for mine, theirs in zip(params, others, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-6)
    whole[::2, 3:50] = outside[::2, 3:50]
    assert torch.equal(whole, outside)


def test_20_000_small_tensors():
    torch.manual_seed(0)
    sizes = torch.randint(1, 400, (20_000,)).tolist()
    values = torch.randn(sum(sizes), device=DEVICE).split(sizes)
    params, others = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    ours = optim.AdamW(params, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, foreach=True)
    for _ in range(2):
        gradients = torch.randn(sum(sizes), device=DEVICE).split(sizes)
        for mine, other, g in zip(params, others, gradients, strict=True):
            mine.grad, other.grad = g, g
        ours.step()
        theirs.step()
    torch.testing.assert_close(
        torch.cat([*map(torch.detach, params)]), torch.cat([*map(torch.detach, others)]), rtol=1e-5, atol=1e-6
    )


def test_a_step_allocates_next_to_nothing():
    p = torch.nn.Parameter(torch.randn(64 << 20, device=DEVICE).bfloat16())
    p.grad = torch.randn_like(p)
    for name in ("AdamW", "LAMB"):
        ours = getattr(optim, name)([p], state_dtype="int8", max_grad_norm=1.0, rounding="stochastic")
        ours.step()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        ours.step()
        assert torch.cuda.max_memory_allocated() - held < 1 << 20


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"], ids=short)
def test_more_elements_than_32_bits_count(state_dtype):
    n = 2**31 + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * n + (4 << 30):
        pytest.skip(f"{free >> 30} GB free of {(8 * n >> 30) + 4}")
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.zeros_like(p)
    ours = optim.AdamW([p], lr=0.1, state_dtype=state_dtype, max_grad_norm=1.0)
    # Blocks at the beginning, on either side of 2^31, and the last one, which is no whole block.
    places = [slice(0, 512), slice(2**31 - 4096, 2**31 + 512), slice(n - n % 256, n)]
    small = []
    for place in places:
        p.data[place] = torch.randn(place.stop - place.start, device=DEVICE).bfloat16()
        p.grad[place] = torch.randn(place.stop - place.start, device=DEVICE).bfloat16()
        small.append(torch.nn.Parameter(p.detach()[place].clone()))
        small[-1].grad = p.grad[place].clone()
    # The first step is the same for all formats of states.
    others = optim.AdamW(small, lr=0.1, max_grad_norm=1.0)
    ours.step()
    others.step()
    torch.testing.assert_close(ours.grad_norm, others.grad_norm, rtol=1e-5, atol=0.0)
    for place, mine in zip(places, small, strict=True):
        torch.testing.assert_close(p.detach()[place], mine.detach(), rtol=2.0**-7, atol=1e-6)
    assert not p.detach()[2**30 : 2**30 + 10**6].any()
