"""Launchers that are done again from a tape: the same launches, with the tensors of each call, in few steps."""

from __future__ import annotations

import ctypes
import gc
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bigkernels import functional, use
from bigkernels._samples import SAMPLES
from bigkernels.triton import _launch, _prepared, _tape
from bigkernels.triton._prepared import prepared
from bigkernels.triton._tape import Tape

BF16 = torch.bfloat16

# ---- launchers of kernels that are ctypes: their results are compared ------------------------------------------------


class Kernel:
    """``OUT[i] = A[i] + factor * B[i]`` for n float32 values, launched as Triton launches."""

    arg_names = ["A", "B", "OUT", "n", "factor"]

    def __getitem__(self, grid):
        def launch(a, b, out, n, factor, **options):
            run(0, 0, 0, 0, 0, 0, None, None, None, a.data_ptr(), b.data_ptr(), out.data_ptr(), n, factor)
            return SimpleNamespace(run=run, function=7, packed_metadata="packed", metadata=SimpleNamespace())

        return launch


ran: list[tuple] = []


def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, a, b, out, n, factor):
    ran.append((x, y, z))
    a, b, out = ((ctypes.c_float * n).from_address(p) for p in (a, b, out))
    for i in range(n):
        out[i] = a[i] + factor * b[i]


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """A driver that knows one stream, so that tapes can be played."""
    active = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(_tape, "_driver", lambda: active)
    # A flag of the process, which stays set where a test before let two threads leave their modes in another order.
    monkeypatch.setattr(torch.utils._python_dispatch, "_is_in_torch_dispatch_mode", False)
    ran.clear()


def add(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    _launch.launch(Kernel(), (3, 2), a, b, out, out.numel(), factor=factor, num_warps=4)


def both(launcher, *calls):
    """What a launcher gives for each call, and what it gives from its tape; and the wrapped launcher."""
    wrapped = prepared(launcher)
    for args in calls:
        for _ in range(4):
            expected, found = launcher(*args), wrapped(*args)
            expected, found = (r if isinstance(r, tuple) else (r,) for r in (expected, found))
            assert len(found) == len(expected)
            for e, f in zip(expected, found, strict=True):
                assert torch.equal(e, f) and (e.stride(), e.dtype) == (f.stride(), f.dtype)
    return wrapped


def played(wrapped) -> list[Tape]:
    return [t for t in wrapped.tapes.values() if isinstance(t, Tape)]


def test_arguments_may_be_one_tensor_or_two():
    """A layout says nothing of which arguments are the same: the tape must not remember that."""

    def launcher(a, b, factor):
        out = torch.empty_like(a)
        add(a, b, out, factor)
        return out

    a, b = torch.randn(2, 8)
    wrapped = both(launcher, (a, a, 2.0), (a, b, 2.0), (b, a, 2.0), (a, b, 3.0))
    assert len(played(wrapped)) == 2  # one a factor
    assert (3, 2, 1) in ran


def test_views_are_pointers_into_what_they_view():
    def launcher(a, b):
        out = a.new_empty(2, 3)
        add(a[1], b.view(4, 3)[2], out[1])
        add(a[0], b.view(4, 3).narrow(0, 3, 1)[0], out[0])
        return out

    tape = played(both(launcher, (torch.randn(2, 3), torch.randn(12)), (torch.randn(2, 3), torch.randn(12))))[0]
    assert [type(step).__name__ for step in tape.steps] == ["New", "Launched", "Launched"]


def test_an_allocation_that_is_returned_transposed_is_made_so():
    def launcher(a):
        out = a.new_empty(3, 2)
        add(a, a, out)
        return out.transpose(0, 1), a.new_empty(0)

    tape = played(both(launcher, (torch.randn(6),)))[0]
    assert [type(step).__name__ for step in tape.steps] == ["New", "Launched", "New"]


def test_operators_of_torch_are_done_again():
    def launcher(a, b):
        part, unused = a.new_empty(3), torch.empty_like(b)
        add(a.contiguous(), b, part)
        part.mul_(2)
        total = part.double().sum(0, keepdim=True)
        first, second = torch.stack((part, part + total)).unbind(0)
        add(first, second, part, 0.5)
        assert unused.numel()
        return part, total.float()

    calls = [(torch.randn(6)[::2], torch.randn(3)) for _ in range(3)]
    tape = played(both(launcher, *calls))[0]
    assert sum(type(step).__name__ == "New" for step in tape.steps) == 1  # not the unused one


def test_what_reads_a_value_is_never_repeated():
    def launcher(a, b):
        out = torch.empty_like(a)
        add(a, b, out, factor=float(a[0]))
        return out

    wrapped = both(launcher, *((torch.randn(4), torch.randn(4)) for _ in range(3)))
    assert list(wrapped.tapes.values()) == [None]


def test_neither_are_tensors_from_elsewhere_and_results_that_are_arguments():
    elsewhere = torch.randn(4)

    def adds(a):
        out = torch.empty_like(a)
        add(a, elsewhere, out)
        return out

    def multiplies(a):
        return a * elsewhere

    def writes(a):
        add(a, a, a)
        return a

    for launcher in (adds, multiplies):
        assert list(both(launcher, (torch.randn(4),)).tapes.values()) == [None]
    wrapped = prepared(writes)
    a = torch.ones(4)
    for n in range(1, 5):
        assert wrapped(a) is a and torch.equal(a, torch.full((4,), 2.0**n))


def test_another_layout_is_another_tape():
    def launcher(a, b):
        out = torch.empty_like(a)
        add(a.contiguous(), b.float().contiguous(), out.view(-1))
        return out

    memory = torch.randn(64)
    calls = [
        (memory[:4], memory[4:8]),
        (memory[1:5], memory[4:8]),
        (memory[:8:2], memory[4:8]),
        (memory[:5], memory[:5]),
        (memory[:4], memory[4:8].double()),
        (memory[:4].view(2, 2), memory[:4]),
    ]
    assert len(played(both(launcher, *calls))) == len(calls)


def test_a_mode_that_looks_gets_the_launcher():
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def launcher(a):
        out = torch.empty_like(a)
        add(a, a, out)
        return out

    wrapped = both(launcher, (torch.randn(4),))
    with Mode():
        wrapped(torch.randn(4))
    assert torch.ops.aten.empty_like.default in seen


def test_layouts_are_forgotten_in_the_order_in_which_they_came(monkeypatch):
    monkeypatch.setattr(_prepared, "_MOST", 3)
    wrapped = prepared(lambda a: a.new_empty(a.shape))
    for n in range(1, 9):
        wrapped(torch.empty(n))
    assert [key[2] for key in wrapped.tapes] == [(6,), (7,), (8,)]


def test_results_of_inference_are_inference_tensors():
    def launcher(a):
        out = torch.empty_like(a)
        add(a, a, out)
        return out

    wrapped = both(launcher, (torch.randn(4),))
    with torch.inference_mode():
        assert wrapped(torch.randn(4)).is_inference()
    assert not wrapped(torch.randn(4)).is_inference()


# ---- without the dispatcher ------------------------------------------------------------------------------------------


def doubled(a: Tensor, b: Tensor | None = None, factor: float = 1.0) -> Tensor:
    out = torch.empty_like(a)
    add(a, a if b is None else b, out, factor)
    return out


@pytest.fixture
def direct():
    """A launcher with a tape, called without the dispatcher; what an operator would get is noted in `asked`."""
    wrapped = prepared(doubled)
    for _ in range(3):
        wrapped(torch.ones(4))
        wrapped(torch.ones(4), torch.ones(4))
    assert len(played(wrapped)) == 2
    asked: list[tuple] = []

    def overload(*args):
        asked.append(args)
        return wrapped(*args)

    call = wrapped.direct(overload)
    call.asked = asked
    return call


def test_a_tape_is_played_without_the_dispatcher(direct):
    a, b = torch.randn(2, 4)
    assert torch.equal(direct(a), 2 * a) and torch.equal(direct(a, b), a + b)
    assert torch.equal(direct(torch.nn.Parameter(a)), 2 * a) and not direct(a).requires_grad
    with torch.inference_mode():
        assert direct(a).is_inference()
    assert not direct.asked


def test_another_layout_goes_to_the_dispatcher(direct):
    direct(torch.ones(5))
    direct(torch.ones(4), torch.ones(4), 2.0)
    assert len(direct.asked) == 2


class _Subclass(Tensor):
    pass


class _Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Function(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize("mode", [_Dispatch, _Function, _profiler])
def test_who_looks_sees_the_operator(direct, mode):
    a = torch.randn(4)
    with mode():
        direct(a)
    assert len(direct.asked) == 1
    assert torch.equal(direct(a), 2 * a) and len(direct.asked) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.view_as_complex(torch.ones(4, 2)).conj().imag,  # negative where it is read, not in memory
        torch.ones(4).as_subclass(_Subclass),
        torch.ones(4).to_sparse(),
        torch._efficientzerotensor(4),
        torch.nested.nested_tensor([torch.ones(4)]),
    ],
    ids=["negative", "subclass", "sparse", "zero", "nested"],
)
def test_tensors_that_are_not_their_memory_go_to_the_dispatcher(tensor):
    wrapped, asked = prepared(doubled), []
    alike = torch.ones(4, 2)[:, 1] if tensor.is_neg() else torch.ones(4)
    for _ in range(3):
        wrapped(alike)
    assert played(wrapped)
    wrapped.direct(lambda *args: asked.append(args))(tensor)
    assert len(asked) == 1


def test_tensors_that_a_transform_wraps_go_to_the_dispatcher(direct):
    asked = []
    call = prepared(doubled).direct(lambda x: asked.append(x) or x)
    torch.vmap(call)(torch.ones(2, 4))
    torch.func.grad(lambda x: call(x).sum())(torch.ones(4))
    assert len(asked) == 2


def test_hooks_of_triton_go_to_the_dispatcher(direct):
    from triton import knobs

    def hook(metadata):
        pass

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        direct(torch.ones(4))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(direct.asked) == 1


def test_no_gradient_goes_through_what_a_tape_calls():
    def launcher(a, weight):
        out = torch.empty_like(a)
        add(a, weight.float(), out)
        return out, (weight * 2).sum(0, keepdim=True)

    wrapped, weight = prepared(launcher), torch.ones(4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        wrapped(torch.ones(4), weight.detach())
    out, total = wrapped.direct(None)(torch.ones(4), weight)
    assert out.tolist() == [2.0] * 4 and not total.requires_grad and total.item() == 8


def test_graphs_hold_the_operator(device_free):
    x, weight, graphs = torch.ones(2, 64, dtype=BF16), torch.ones(64, dtype=BF16), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad(), use("triton"):
        for _ in range(3):
            functional.rms_norm(x, weight)
        torch.compile(lambda x: functional.rms_norm(x, weight), backend=keep, fullgraph=True)(x)
    assert [n.target for n in graphs[0].graph.nodes if "bigkernels" in str(n.target)] == [
        torch.ops.bigkernels.rms_norm.default
    ]


def test_names_are_bound_again_after_the_driver():
    from bigkernels.ops import rms_norm as file

    assert isinstance(file._infer, torch._ops.OpOverload)


# ---- the package's launchers, with a driver that launches nothing ----------------------------------------------------


@pytest.fixture
def device_free(monkeypatch):
    """Notes each launch: the kernel, its grid, and its arguments, pointers by what they point to."""
    monkeypatch.undo()
    without_device = pytest.importorskip("driver_without_device").without_device
    noted: list[tuple] = []
    with without_device(90) as driver:

        def launcher_cls(source, metadata):
            def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
                noted.append((source.name, (x, y, z), function, args))

            return launch

        driver.launcher_cls = launcher_cls
        yield noted


def _described(noted: list[tuple], known: dict[int, str]) -> list[tuple]:
    def describe(value):
        pointer = value.data_ptr() if isinstance(value, Tensor) else value
        return known.get(pointer, "other") if isinstance(value, Tensor) or pointer > 2**32 else value

    return [
        (name, grid, function, tuple(describe(a) if isinstance(a, (Tensor, int)) else a for a in args))
        for name, grid, function, args in noted
    ]


PICKED = [(op, SAMPLES[op][i]) for op in ("rms_norm", "layer_norm", "rope", "glu", "cross_entropy", "quantized_linear",
          "decode_attention", "attention") for i in (1,)]  # fmt: skip


@pytest.mark.parametrize("operator, sample", PICKED, ids=lambda v: v if isinstance(v, str) else v.name)
def test_a_tape_launches_what_its_launcher_does(device_free, operator, sample):
    inputs = sample.inputs(torch.bfloat16)
    known = {t.data_ptr(): name for name, t in inputs.items() if isinstance(t, Tensor) and t.numel()}

    def noted():
        device_free.clear()
        with use("triton"):
            sample.results(inputs)
        return _described(device_free, known)

    first = noted()
    assert first
    for _ in range(3):
        assert noted() == first


def _steps_of_python(call) -> int:
    """Calls of functions, of Python and of C, that one call takes: the least of three counts, without the garbage
    collector, whose finalizers of what other tests left would be counted too.
    """
    counts = []

    def profile(frame, event, argument):
        counts[-1] += event in ("call", "c_call")

    for _ in range(4):
        call()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(3):
            counts.append(-1)  # the call of sys.setprofile
            sys.setprofile(profile)
            try:
                call()
            finally:
                sys.setprofile(None)
    finally:
        if collects:
            gc.enable()
    return min(counts)


def _usual_calls():
    """A token of a Llama of 8 billion parameters."""
    x, w = torch.ones(1, 1, 4096, dtype=BF16), torch.ones(4096, dtype=BF16)
    g = torch.ones(1, 1, 14336, dtype=BF16)
    q, k = (torch.ones(1, 1, heads, 128, dtype=BF16).transpose(1, 2) for heads in (32, 8))
    angles = torch.ones(1, 1, 128, dtype=BF16)
    cache = torch.ones(1, 8, 1024, 128, dtype=BF16)
    qweight = functional.quantize_weight(torch.randn(256, 4096), "int4")
    return {
        "rms_norm": (lambda: functional.rms_norm(x, w), 40),
        "rms_norm with residual": (lambda: functional.rms_norm(x, w, residual=x), 46),
        "layer_norm": (lambda: functional.layer_norm(x, w, w), 46),
        "glu": (lambda: functional.glu(g, g), 38),
        "rope": (lambda: functional.rope(q, k, angles, angles), 50),
        "decode attention": (lambda: functional.attention(q, cache, cache), 60),
        "quantized_linear": (lambda: functional.quantized_linear(x, qweight), 71),
    }


def test_few_steps_of_python_a_call(device_free, monkeypatch):
    """Time is what counts, and what other processes disturb: steps stand for it, 0.1 to 0.3 us each."""
    # A flag of the process, which stays set where a test before let two threads leave their modes in another order.
    monkeypatch.setattr(torch.utils._python_dispatch, "_is_in_torch_dispatch_mode", False)
    with torch.no_grad(), use("triton"):
        taken = {name: (_steps_of_python(call), most) for name, (call, most) in _usual_calls().items()}
    assert {name: counted for name, counted in taken.items() if counted[0] > counted[1]} == {}


def test_a_short_cache_takes_one_launch(device_free):
    q, cache = torch.ones(1, 32, 1, 128, dtype=BF16), torch.ones(1, 8, 200, 128, dtype=BF16)
    with torch.no_grad(), use("triton"):
        functional.attention(q, cache, cache)
        assert [name for name, *_ in device_free] == ["split"]


def test_this_triton_launches_as_tapes_do():
    assert _prepared._can_prepare()
