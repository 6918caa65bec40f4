"""Attention's kernels for Hopper, which need neither a GPU to be right nor to be compiled: what they compute, over a
model of the hardware that notices races (`hopper_on_cpu`), and what the compiler makes of them.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="this Triton has no Gluon for Hopper")
if triton.knobs.runtime.interpret:
    pytest.skip("under TRITON_INTERPRET kernels cannot be compiled", allow_module_level=True)

from driver_without_device import without_device  # noqa: E402
from hopper_on_cpu import Fault, hopper_on_cpu  # noqa: E402
from hopper_on_cpu import launch as run_on_cpu  # noqa: E402
from machine_code import resources  # noqa: E402
from test_triton_aot import compiled  # noqa: E402

from bigkernels import functional, use  # noqa: E402
from bigkernels._compare import compare  # noqa: E402
from bigkernels.ops import attention as op  # noqa: E402
from bigkernels.ops import routes  # noqa: E402
from bigkernels.ops import varlen_attention as varlen_op  # noqa: E402
from bigkernels.triton import _hopper, _hopper_attention, _hopper_backward, attention, varlen_attention  # noqa: E402
from bigkernels.triton._launch import as_if, recording  # noqa: E402


def _inputs(
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    size: int,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
):
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, n, h, size, generator=draw).to(dtype).transpose(1, 2)
        for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads))
    )


def _run(q, k, v, grad, sinks, options, seed=0, grad_lse=None):
    """Output, logsumexp and gradients by the kernels, and the kernels."""
    none = (None,) * 3
    with use("gluon"), as_if(90), hopper_on_cpu(seed) as launched:
        out, lse = attention.forward(q, k, v, *none, sinks, None, None, *options)
        rest = attention.backward(grad, grad_lse, q, k, v, out, lse, *none, sinks, None, None, *options, False)
    return [out, lse, *(t for t in rest if t.numel())], launched


def _expected(q, k, v, grad, sinks, options, grad_lse=None):
    none, sinks = (None,) * 3, None if sinks is None else sinks.to(q.dtype)
    out, lse = op._fwd_fallback(q, k, v, *none, sinks, None, None, *options)
    rest = op._bwd_fallback(grad, grad_lse, q, k, v, out, lse, *none, sinks, None, None, *options, False)
    return [out, lse, *(t for t in rest if t.numel())]


def _agree(ours, plain, exact) -> None:
    for name, *values in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, plain, exact, strict=False):
        found = compare(*values, roundings=3, scale="tensor")
        assert found.ok, f"{name}: {found}"


CASES = {
    "plain, several heads": ((2, 2, 200, 200, 64, 2), (-1, -1, 0.125, 0.0)),
    "causal, grouped heads": ((4, 2, 190, 333, 128), (-1, 0, 0.09, 0.0)),
    "window, softcap, sinks": ((2, 1, 260, 260, 64), (70, 0, 0.125, 5.0)),
    "window, softcap, sinks, wide": ((2, 2, 140, 140, 128), (40, 0, 0.09, 20.0)),
    "window to both sides, fewer keys": ((1, 1, 300, 100, 64), (70, 3, 0.125, 0.0)),
    "many blocks, one row": ((1, 1, 1, 700, 64), (-1, 0, 0.125, 0.0)),
    "float16": ((1, 1, 130, 130, 64), (-1, 0, 0.125, 0.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_right_in_any_order(name: str):
    shape, options = CASES[name]
    q, k, v, grad = _inputs(*shape, dtype=torch.float16 if name == "float16" else torch.bfloat16)
    sinks = torch.randn(q.shape[1]) if "sinks" in name else None
    options = (*options, 0.0)
    ours, launched = _run(q, k, v, grad, sinks, options, seed=len(name))
    assert launched == ["attend", "delta", "backward_queries", "backward_keys"]
    _agree(
        ours,
        _expected(q, k, v, grad, sinks, options),
        _expected(*(t.double() for t in (q, k, v, grad)), sinks, options),
    )


def test_the_order_changes_nothing():
    q, k, v, grad = _inputs(1, 1, 70, 520, 64)
    first, *others = (_run(q, k, v, grad, None, (-1, -1, 0.125, 0.0, 0.0), seed)[0] for seed in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_gradient_of_lse_and_scores_that_are_large():
    q, k, v, grad = _inputs(1, 1, 100, 100, 64)
    q, options = 30 * q, (-1, 0, 0.125, 0.0, 0.0)
    grad_lse = torch.randn(1, 1, 100)
    ours, _ = _run(q, k, v, grad, None, options, 3, grad_lse)
    exact = _expected(*(t.double() for t in (q, k, v, grad)), None, options, grad_lse.double())
    _agree(ours, _expected(q, k, v, grad, None, options, grad_lse), exact)


@pytest.mark.parametrize("size", [64, 128])
def test_packed_sequences_see_nothing_of_each_other(size: int):
    """Sequences that are empty, have no keys, or stand beside NaN."""
    lengths, key_lengths = [150, 0, 70, 3, 20], [150, 5, 200, 0, 20]
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (lengths, key_lengths))
    draw = torch.Generator().manual_seed(1)
    q, k, v, grad = (
        torch.randn(n, h, size, generator=draw).bfloat16() for n, h in ((243, 2), (375, 1), (375, 1), (243, 2))
    )
    for t, at in ((k, slice(355, 375)), (v, slice(355, 375)), (q, slice(223, 243)), (grad, slice(223, 243))):
        t[at] = float("nan")  # the last sequence
    options = (200, 200, 60, 0, 0.125, 0.0, 0.0)
    given = (cu_q, cu_k, None, None, None, None, *options)
    with use("gluon"), as_if(90), hopper_on_cpu(2) as launched:
        out, lse = varlen_attention.forward(q, k, v, *given)
        ours = [out, lse, *varlen_attention.backward(grad, None, q, k, v, out, lse, *given)[:3]]
    assert launched == ["attend", "delta", "backward_queries", "backward_keys"]

    def expected(dtype):
        x = [t.to(dtype) for t in (q, k, v, grad)]
        result = varlen_op._fwd_fallback(*x[:3], *given)
        return [*result, *varlen_op._bwd_fallback(x[3], None, *x[:3], *result, *given)[:3]]

    parts = [slice(0, 223), slice(0, 223), slice(0, 223), slice(0, 355), slice(0, 355)]
    found = [
        [t[:, at] if i == 1 else t[at] for i, (t, at) in enumerate(zip(ts, parts, strict=True))]
        for ts in (ours, expected(torch.bfloat16), expected(torch.float64))
    ]
    assert torch.equal(found[0][1].isinf(), found[2][1].isinf())
    for ts in found:
        ts[1] = ts[1].nan_to_num(neginf=0.0)
    _agree(*found)


# Each takes something away that holds the partitions apart, and has to be noticed in some order.
FAULTS = {
    "a block is refilled before it was read": ("attention", "mbarrier.wait(k_empty.index(slot), free)", "pass"),
    "the wrong phase": ("attention", "(i // STAGES & 1) ^ 1", "i // STAGES & 1"),
    "nobody waits for the copy": ("attention", "mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)", "pass"),
    "a block is given back before its product": (
        "attention", "acc = warpgroup_mma_wait(0, deps=(going,))\n            mbarrier.arrive(v_empty.index(before))",
        "mbarrier.arrive(v_empty.index(before))\n            acc = warpgroup_mma_wait(0, deps=(going,))"),
    "a block is not given back": ("attention", "            mbarrier.arrive(v_empty.index(before))\n", ""),
    "a product is taken too early": ("attention", "acc = warpgroup_mma_wait(0, deps=(going,))",
                                     "acc = warpgroup_mma_wait(1, deps=(going,))"),
    "fewer bytes than are copied": ("attention", "mbarrier.expect(q_full.index(0), GROUPS * 64 * D * 2)",
                                    "mbarrier.expect(q_full.index(0), 64 * D * 2)"),
    "no fence before the result leaves": ("attention", "    fence_async_shared()\n", ""),
    "the slot before": ("backward", "dq = warpgroup_mma(ds, k_tiles.index((count - 1) % STAGES), dq)",
                        "dq = warpgroup_mma(ds, k_tiles.index(count % STAGES), dq)"),
    "keys are given back too early": (
        "backward", "            mbarrier.arrive(k_empty.index(before))\n            ds = gl",
        "            mbarrier.arrive(k_empty.index(slot))\n            ds = gl"),
    "statistics that have not landed": ("backward", "_barriers(STAGES, 1 + 32)", "_barriers(STAGES, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_gpu_would_not_say_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, right, wrong = FAULTS[fault]
    source = Path(importlib.import_module(f"bigkernels.triton._hopper_{module}").__file__).read_text()
    assert right in source
    (tmp_path / "changed.py").write_text(source.replace(right, wrong))
    name = f"bigkernels.triton._changed_{module}"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "changed.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setitem(sys.modules, f"bigkernels.triton._hopper_{module}", changed)
    q, k, v, grad = _inputs(1, 1, 64, 700 if module == "attention" else 400, 64)
    options = (-1, -1, 0.125, 0.0, 0.0)
    exact = _expected(*(t.double() for t in (q, k, v, grad)), None, options)
    for seed in range(12):
        try:
            ours, _ = _run(q, k, v, grad, None, options, seed)
        except Fault:
            return
        if any(not torch.allclose(a.double(), b.double(), 0.1, 0.1) for a, b in zip(ours, exact, strict=True)):
            return
    pytest.fail("not noticed")


def test_descriptors_that_are_not_aligned_are_noticed():
    q, k, v, grad = _inputs(1, 1, 20, 20, 64)
    with as_if(90), hopper_on_cpu(), pytest.raises(Fault, match="16 bytes"):
        call = attention._call(q, k, v, None, None, None, None, None, -1, -1, 0.1, 0.0, 0.0)
        shifted = torch.zeros(20 * 64 + 1, dtype=q.dtype)[1:].view(1, 1, 20, 64)
        strides = {n: 0 for n in ("lse_batch", "lse_head", "out_batch", "out_head")} | {"out_token": 64}
        run_on_cpu(
            _hopper_attention.attend,
            (1,),
            shifted,
            k,
            v,
            torch.empty_like(q),
            torch.empty(1, 1, 20),
            SINKS=None,
            GROUPS=2,
            BLOCK_N=128,
            STAGES=2,
            **_hopper._options(call),
            **strides,
        )


# ---- whom they take --------------------------------------------------------------------------------------------------


def _call(queries=64, size=64, dtype=torch.bfloat16, capability=90, bias=None, scale=0.1, dropout_p=0.0):
    q = torch.empty(1, 2, queries, size, dtype=dtype, device="meta")
    with as_if(capability):
        return attention._call(q, q, q, bias, None, None, None, None, -1, -1, scale, 0.0, dropout_p), q


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"dtype": torch.float32}, "float32"),
        ({"size": 80}, "heads of 80"),
        ({"capability": 80}, "not 8.0"),
        ({"capability": 100}, "not 10.0"),
        ({"bias": torch.empty(1, 1, 64, 64, device="meta")}, "no bias"),
        ({"scale": -1.0}, "positive scales"),
        ({"dropout_p": 0.1}, "dropout"),
    ],
)
def test_other_calls_are_refused(given: dict, reason: str):
    call, q = _call(**given)
    assert reason in _hopper.refusal(call, q)
    with use("gluon"), pytest.raises(RuntimeError, match=f"'gluon' was forced but .*{reason}"):
        _hopper.takes(call, q)


def test_off_until_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    call, q = _call()
    assert not _hopper.takes(call, q)
    assert _hopper.refusal(call, q) is None
    with use("gluon"):
        assert _hopper.takes(call, q)
    monkeypatch.setattr(_hopper, "_ENABLED", True)
    assert _hopper.takes(call, q)
    with use("triton"):
        assert not _hopper.takes(call, q)
    assert not _hopper.takes(*_call(dtype=torch.float32))  # left to the others without a word
    assert not _hopper.takes(*_call(capability=80))
    monkeypatch.setattr(_hopper, "_ENABLED", False)
    row = routes.find("attention", "ours on Hopper", (9, 0))
    monkeypatch.setattr(routes, "TABLE", (routes.Route(**vars(row) | {"by": "gluon"}),))
    assert _hopper.takes(call, q)


def test_rows_that_descriptors_cannot_read_are_refused():
    call, q = _call()
    wide, row = (torch.zeros(1, 2, n, 66, dtype=torch.bfloat16) for n in (64, 1))
    for t in (wide[..., :64], wide[..., 1:65], row[..., :64].expand(1, 2, 64, 64)):
        assert "16 bytes" in _hopper.refusal(call, q, t)


# ---- what the compiler makes of them --------------------------------------------------------------------------------


@functools.cache
def _launches(size: int, everything: bool) -> dict:
    heads, key_heads = 16, 4
    q, k, v = (torch.empty(4096, h, size, dtype=torch.bfloat16, device="meta") for h in (heads, key_heads, key_heads))
    vector, ends = torch.empty(heads, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    lse = torch.empty(heads, 4096, device="meta")
    with use("gluon"), recording(90) as recorded:
        if everything:
            rest = (ends, ends, None, vector, None, None, 1024, 1024, 255, 0, 0.1, 30.0, 0.0)
            varlen_attention.forward(q, k, v, *rest)
            varlen_attention.backward(q, None, q, k, v, q, lse, *rest)
        else:
            q, k, v = (t.view(2, 2048, -1, size).transpose(1, 2) for t in (q, k, v))
            rest = (None,) * 6
            attention.forward(q, k, v, *rest, -1, 0, 0.1, 0.0, 0.0)
            attention.backward(q, None, q, k, v, q, lse.view(2, heads, 2048), *rest, -1, 0, 0.1, 0.0, 0.0, False)
    return {x.kernel.__name__: x for x in recorded if x.kernel.is_gluon()}


_TYPICAL = [("attend", 128, False), ("backward_keys", 128, False)]
_BUILDS = [
    pytest.param(n, d, e, marks=() if (n, d, e) in _TYPICAL else pytest.mark.slow)
    for n in ("attend", "backward_queries", "backward_keys")
    for d in (64, 128)
    for e in (False, True)
]


@pytest.mark.parametrize("name, size, everything", _BUILDS)
def test_what_the_compiler_makes_of_them(name: str, size: int, everything: bool, tmp_path: Path):
    launch = _launches(size, everything)[name]
    kernel = compiled(launch, 90)
    resources(kernel.asm["cubin"], tmp_path)
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(tmp_path / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([\w.]+)", text)
    assert kernel.metadata.num_warps == 12 and kernel.metadata.shared <= 227 * 1024
    # Registers go from the copying warp to the others.
    limits = set(re.findall(r"setmaxnreg\.(?:inc|dec)\S+\s+(\d+)", kernel.asm["ptx"]))
    assert {"240", "24"} <= limits
    assert any(x.startswith("UTMALDG") for x in code) and any(x.startswith("UTMASTG") for x in code)
    products = [i for i, x in enumerate(code) if x.startswith("HGMMA")]
    narrow = 32 if name == "backward_keys" and everything and size == 128 else 64
    widths = {int(code[i].split(".")[1].split("x")[1]) for i in products}
    assert widths <= {narrow, size, _hopper._BLOCK} and products
    # Nothing is spilled between products; what is, is kept over the loop, a few words a program.
    spills = [i for i, x in enumerate(code) if x.startswith(("STL", "LDL"))]
    assert len(spills) <= 8
    for first, second in zip(products, products[1:], strict=False):
        if not any(x.startswith(("UTMASTG", "USETMAXREG")) for x in code[first:second]):
            assert not [i for i in spills if first < i < second], (first, second)


@pytest.mark.slow
def test_the_whole_way_to_the_launch():
    q = torch.randn(1, 2, 200, 64).bfloat16().requires_grad_()
    with without_device(90) as driver, use("gluon"):
        functional.attention(q, q, q, causal=True, window=(50, 0)).sum().backward()
        found = [launch.kernel for launch in driver.launches]
    assert found == ["attend", "delta", "backward_queries", "backward_keys"]
    assert _hopper_backward.backward_keys.is_gluon()
