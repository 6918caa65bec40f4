"""The CUDA optimizer kernels without a GPU: the source of their blocks in a host build, against the CPU kernels.

The CPU kernels of the lowest level have neither estimates nor fused operations, and so does the host build: results are
equal bit for bit, but for sums over many elements.
"""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from optimizer_pairs import ALL, SIZES, as_numbers, equalise, memory_of, pair, params_of, set_gradients, short
from torch import Tensor

from bigkernels import optim
from bigkernels.ops import optimizer as ops
from bigkernels.optim import _formats

ROOT = Path(__file__).resolve().parents[2]
# The level is chosen once a process: most of what is here runs in a process of its own (test_at_the_lowest_level).
LOWEST = os.environ.get("BIGKERNELS_CPU_ISA") == "base"
EPS = torch.finfo(torch.float32).eps


class Lists(Structure):
    _fields_ = [(n, c_void_p) for n in ("tensors", "grads", "chunks", "groups")] + [
        (n, c_int64) for n in ("tensor_count", "chunk_count")
    ]


class Scalar(Structure):
    _fields_ = [("value", c_void_p), ("is_double", c_bool)]


class Factors(Structure):
    _fields_ = [(n, Scalar) for n in ("grad_scale", "found_inf", "divisor", "norm")] + [("max_norm", c_double)]


def address(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def lists(tensors: Tensor, grads: Tensor, chunks: Tensor, groups: Tensor | None = None) -> Lists:
    counts = tensors.nbytes // 112, chunks.nbytes // 24  # of the records in optimizer.h
    return Lists(*map(address, (tensors, grads, chunks, groups)), *counts)


def factors(*given: Tensor | None, max_norm: float) -> Factors:
    return Factors(*(Scalar(address(t), t is not None and t.dtype == torch.float64) for t in given), max_norm)


class Host:
    """Takes the raw operators' calls. `parts` thread blocks of `warps` warps share a chunk."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.host_step.argtypes = [c_int, POINTER(Lists), POINTER(Factors), c_void_p, c_int, c_int]
        self.library.host_measure.argtypes = [POINTER(Lists), POINTER(Factors), c_void_p, c_int, c_int]
        self.library.host_norm.argtypes = [POINTER(Lists), c_void_p, c_bool, c_int, c_int]
        self.parts, self.warps = 1, 4

    def step(self, algorithm, tensors, grads, chunks, groups, scale, found_inf, divisor, norm, max_norm, trust):
        found = factors(scale, found_inf, divisor, norm, max_norm=max_norm)
        records = lists(tensors, grads, chunks, groups)
        self.library.host_step(algorithm, byref(records), byref(found), address(trust), self.parts, self.warps)

    def measure(self, tensors, grads, chunks, groups, scale, found_inf, divisor, norm, max_norm, sums):
        found = factors(scale, found_inf, divisor, norm, max_norm=max_norm)
        records = lists(tensors, grads, chunks, groups)
        self.library.host_measure(byref(records), byref(found), sums.data_ptr(), self.parts, self.warps)

    def norm(self, tensors, grads, chunks, out, infinity):
        self.library.host_norm(byref(lists(tensors, grads, chunks)), address(out), infinity, self.parts, self.warps)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("cuda_on_host") / "optimizer.so"
    folders = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "cuda/kernels")]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, *folders, "-o", path, ROOT / "tests/cuda_on_host/optimizer.cpp"], check=True)
    return path


@pytest.fixture
def host(compiled: Path) -> Host:
    return Host(compiled)


def step_on_host(host: Host, optimizer: optim.Optimizer, **arguments) -> None:
    patch = pytest.MonkeyPatch()
    for name in ("step", "measure", "norm"):
        patch.setattr(ops, name, getattr(host, name))
    try:
        optimizer.step(**arguments)
    finally:
        patch.undo()


def check(ours: dict[str, Tensor], cpu: dict[str, Tensor], before: dict[str, Tensor], close: tuple[str, ...]) -> None:
    """Equal, but for what is in `close`: to the last places of float32, or to the next number in 16 bits."""
    assert ours.keys() == cpu.keys()
    for key, mine in ours.items():
        theirs, old = cpu[key], before.get(key, cpu[key])
        if torch.equal(mine, theirs):
            continue
        if key not in close:
            wrong = (mine != theirs).sum()
        elif mine.dtype == torch.float32:
            wrong = ((mine - theirs).abs() > 4 * EPS * (theirs.abs() + old.abs()).clamp(min=1e-3)).sum()
        else:
            wrong = ((mine.view(torch.int16) - theirs.view(torch.int16)).abs() > 1).sum()
        assert wrong == 0, f"{key} of {mine.numel()}: {wrong} differ"


def test_at_the_lowest_level(library: Path):
    environment = os.environ | {"BIGKERNELS_CPU_ISA": "base"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "matches_the_cpu"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(("case", "state_dtype", "types"), ALL if LOWEST else [], ids=short)
def test_matches_the_cpu_kernels(case, state_dtype, types, host: Host):
    name, options = case
    dtype, grad_dtype, rounding = types
    options = {**options, "state_dtype": state_dtype, "rounding": rounding, "ema_decay": 0.9}
    cpu, ours = pair(name, options, dtype)
    set_gradients([cpu, ours], grad_dtype)
    params_of(cpu)[2].grad = params_of(ours)[2].grad = None
    # The trust ratio is a sum over the tensor. Other machines fuse operations at every level.
    close = ("param", "ema") if name == "LAMB" or platform.machine() != "x86_64" else ()
    for step in range(2):
        if step:
            set_gradients([cpu, ours], grad_dtype)
            equalise(ours, cpu)
        before = copy.deepcopy(memory_of(cpu))
        cpu.step(divisor=2.0)
        step_on_host(host, ours, divisor=2.0)
        for found, expected, old in zip(memory_of(ours), memory_of(cpu), before, strict=True):
            found, expected, old = map(as_numbers, (found, expected, old))
            check(found, expected, old, close)


def test_clips_as_the_cpu_kernels_do(host: Host):
    cpu, ours = pair("AdamW", {"max_grad_norm": 1.0, "lr": 0.1}, torch.float32)
    for _ in range(3):
        set_gradients([cpu, ours], torch.bfloat16)
        cpu.step(divisor=3.0)
        step_on_host(host, ours, divisor=3.0)
        torch.testing.assert_close(ours.grad_norm, cpu.grad_norm, rtol=1e-6, atol=0.0)
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            for key in theirs:
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-7)


EXACT = [("stochastic", torch.bfloat16), ("stochastic", torch.float16), ("kahan", torch.bfloat16)]


@pytest.mark.parametrize(("rounding", "dtype"), EXACT, ids=short)
def test_rounds_the_same_values_to_the_same_bits(rounding: str, dtype: torch.dtype, host: Host):
    # A learning rate that is a power of two leaves one rounding, wherever compilers fuse operations.
    cpu, ours = pair("SGD", {"lr": 2.0**-6, "rounding": rounding, "ema_decay": 0.5}, dtype)
    for _ in range(3):
        set_gradients([cpu, ours], torch.float32, 0.01)
        cpu.step()
        step_on_host(host, ours)
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            for key in theirs:
                assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_results_do_not_depend_on_how_chunks_are_shared(name: str, host: Host):
    first, second = pair(name, {"state_dtype": "int8"}, torch.float32)
    set_gradients([first, second], torch.float32)
    step_on_host(host, first)
    host.parts, host.warps = 16, 8
    step_on_host(host, second)
    for mine, theirs in zip(memory_of(first), memory_of(second), strict=True):
        for key in theirs:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6 if name == "LAMB" else 0.0, atol=0.0)


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "SGD"])
def test_nothing_happens_where_the_scaler_found_infinity(name: str, host: Host):
    _, ours = pair(name, {}, torch.float32)
    set_gradients([ours, ours], torch.float32)
    step_on_host(host, ours)
    before = copy.deepcopy(memory_of(ours))
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    step_on_host(host, ours)
    for mine, old in zip(memory_of(ours), before, strict=True):
        assert all(torch.equal(mine[key], old[key]) for key in old)
    ours.found_inf.zero_()
    step_on_host(host, ours)
    assert all(mine["step"] == 2 for mine in memory_of(ours))


def test_infinity_in_a_gradient_stays_in_its_block(host: Host):
    cpu, ours = pair("AdamW", {"state_dtype": "int8"}, torch.float32, (5000,))
    for bad in (0.0, float("inf"), float("nan")):
        set_gradients([cpu, ours], torch.float32)
        for optimizer in (cpu, ours):
            params_of(optimizer)[0].grad[700] += bad
        cpu.step()
        step_on_host(host, ours)
    mine, theirs = memory_of(ours)[0], memory_of(cpu)[0]
    for key in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(mine[key].isfinite(), theirs[key].isfinite())
        assert mine[key].isfinite().logical_not().nonzero().flatten().tolist() == [700 // 256]
    assert torch.equal(mine["param"].isfinite(), theirs["param"].isfinite())


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_norms(norm_type: float, host: Host):
    grads = [torch.randn(n).to(dtype) for n in SIZES for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    expected = [torch.linalg.vector_norm(g.double(), norm_type) for g in grads]
    plan = optim._norm._plan.only_gradients(grads, torch.device("cpu"))
    out = torch.empty(len(grads), dtype=torch.float64)
    host.norm(*plan, out, norm_type != 2.0)
    out = out if norm_type != 2.0 else out.sqrt()
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-6, atol=0.0)
    grads[3][0] = float("nan")
    host.norm(*plan, out, norm_type != 2.0)
    assert out.isnan().nonzero().flatten().tolist() == [3]


# ---- formats, bit for bit -------------------------------------------------------------------------------------------


def numbers(n: int = 1 << 20) -> Tensor:
    """Any bits, and numbers of ordinary size."""
    anything = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65520.0, 2.0**-24, 2.0**-25])
    return torch.cat([anything, torch.randn(n), torch.randn(n) * 1e-6, special])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_halves(dtype: torch.dtype, host: Host):
    x = numbers()
    random = torch.randint(0, 1 << 16, x.shape)
    nearest, rounded = (torch.empty(x.shape, dtype=dtype) for _ in range(2))
    widened = torch.empty_like(x)
    words = random.to(torch.int32)
    pointers = (c_void_p(t.data_ptr()) for t in (nearest, rounded, widened))
    host.library.host_halves(
        c_void_p(x.data_ptr()), c_void_p(words.data_ptr()), c_int64(len(x)), dtype == torch.float16, *pointers
    )
    assert same(nearest, x.to(dtype))
    assert same(widened, x.to(dtype).float())
    assert same(rounded, _formats.stochastic(x, dtype, random))


@pytest.mark.parametrize("sign", [True, False], ids=["with a sign", "without"])
@pytest.mark.parametrize("scale", [1.0, 3e-30, 2.5e38, 0.0, float("inf")])
def test_codes(scale: float, sign: bool, host: Host):
    x = torch.randn(1 << 16) * 10.0 ** torch.randint(-6, 1, (1 << 16,))
    x = x / x.abs().amax() * (scale if 0.0 < scale < float("inf") else 1.0)
    x = x if sign else x.abs()
    if scale == float("inf"):
        x[5] = scale
    codes, decoded = torch.empty(x.shape, dtype=torch.int8 if sign else torch.uint8), torch.empty_like(x)
    host.library.host_codes.argtypes = [c_void_p, ctypes.c_float, c_int64, c_bool, c_void_p, c_void_p]
    for start in range(0, len(x), _formats.BLOCK):
        block = x[start : start + _formats.BLOCK]
        expected, scales = _formats.encode8(block, sign)
        given = (codes[start : start + _formats.BLOCK], decoded[start : start + _formats.BLOCK])
        host.library.host_codes(
            block.data_ptr(), float(scales[0]), len(block), sign, given[0].data_ptr(), given[1].data_ptr()
        )
        assert torch.equal(given[0], expected)
        assert same(given[1], _formats.decode8(expected, scales))


def test_split(host: Host):
    x = numbers()
    high, rest, joined = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=torch.int16), x.clone()
    pointers = (c_void_p(t.data_ptr()) for t in (high, rest, joined))
    host.library.host_split(c_void_p(x.data_ptr()), c_int64(len(x)), *pointers)
    expected = _formats.split(x)
    assert same(high, expected[0])
    assert torch.equal(rest, expected[1])
    assert same(joined, x)


def test_options_that_change_between_steps(host: Host):
    cpu, ours = pair("SGD", {"lr": 0.1, "momentum": 0.9}, torch.float32)
    for momentum in (0.9, 0.0, 0.5):
        for optimizer in (cpu, ours):
            optimizer.param_groups[0]["momentum"] = momentum
        set_gradients([cpu, ours], torch.float32)
        cpu.step()
        step_on_host(host, ours)
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            for key in theirs:
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_edits_between_steps(host: Host):
    """Groups, states, memory, counters and remainders: the kernels of a GPU are told what those of the CPU are."""
    cpu, ours = pair("AdamW", {"rounding": "kahan", "lr": 0.1, "amsgrad": True, "ema_decay": 0.9}, torch.bfloat16)

    def step() -> None:
        set_gradients([cpu, ours], torch.bfloat16)
        cpu.step()
        step_on_host(host, ours)
        for mine, theirs in zip(memory_of(ours), memory_of(cpu), strict=True):
            assert mine.keys() == theirs.keys()
            for key in theirs.keys() - {"remainder"}:  # of what is rounded otherwise in the last place
                torch.testing.assert_close(mine[key].float(), theirs[key].float(), rtol=1e-2, atol=1e-2)

    def edit(change) -> None:
        for optimizer in (cpu, ours):
            change(optimizer, params_of(optimizer))
        step(), step()

    step()
    edit(lambda o, ps: o.state[ps[0]].update(step=torch.tensor(7.0)))
    edit(lambda o, ps: [setattr(t, "data", t.data.clone()) for t in o.state[ps[1]].values()])
    edit(lambda o, ps: o.state.update({ps[2]: {}}))
    edit(lambda o, ps: o.param_groups[0].update(amsgrad=False, rounding="nearest", ema_decay=None))
    edit(lambda o, ps: o.param_groups[0]["params"].reverse())
    edit(lambda o, ps: o.param_groups.__setitem__(0, {**o.param_groups[0], "params": ps[1:], "lr": 0.01}))
    params_of(ours)[0].grad.data = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="gradient"):
        step_on_host(host, ours)
