"""The samples through Triton's own launch path, compiled for a GPU that need not be here; nothing is launched.

The interpreter computes with the kernels, but for its own types, without the binder and never in bfloat16. Here every
call takes the way that it takes on a GPU, to the last step.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
from raw_calls import recorded  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("under TRITON_INTERPRET kernels cannot be compiled", allow_module_level=True)

from driver_without_device import kernels, without_device  # noqa: E402

from bigkernels import functional, use  # noqa: E402
from bigkernels._samples import SAMPLES, Sample  # noqa: E402
from bigkernels.ops import OPERATORS, compress  # noqa: E402
from bigkernels.ops.registry import KERNEL_DTYPES  # noqa: E402
from bigkernels.triton import OPERATORS as KERNELS  # noqa: E402

SAMPLED = [name for name in KERNELS if name in SAMPLES]
# By default one sample of each operator, with much in it and in the dtype that no interpreter runs: compiling every
# variant takes minutes.
TYPICAL = {
    "rms_norm": "residual",
    "layer_norm": "residual",
    "rope": "interleaved, partial",
    "glu": "silu",
    "cross_entropy": "everything",
    "attention": "everything",
    "varlen_attention": "everything",
    "decode_attention": "everything",
    "quantized_linear": "int4, many tokens",
    "mlp": "gelu",
    "group_norm": "silu",
    "batch_norm": "residual and relu",
}


def _cases() -> list:
    cases = []
    for operator in SAMPLED:
        for sample in SAMPLES[operator]:
            for dtype in KERNEL_DTYPES:
                typical = sample.name == TYPICAL[operator] and dtype == torch.bfloat16
                cases.append(pytest.param(sample, dtype, marks=() if typical else pytest.mark.slow))
    return cases


def named(value: Sample | torch.dtype) -> str:
    return f"{value.operator}: {value.name}" if isinstance(value, Sample) else str(value).removeprefix("torch.")


@pytest.fixture
def driver():
    with without_device(90) as driver:
        yield driver


def test_each_operator_has_its_typical_sample():
    assert TYPICAL.keys() == set(SAMPLED)
    for operator, name in TYPICAL.items():
        assert name in [sample.name for sample in SAMPLES[operator]], operator


@pytest.mark.parametrize("sample, dtype", _cases(), ids=named)
def test_samples_reach_the_launch(sample: Sample, dtype: torch.dtype, driver):
    driver.launches.clear()
    inputs = sample.inputs(dtype)
    calls = recorded(sample, inputs, "triton")
    assert calls  # of raw operators: the reference was not asked
    supported = all(t.dtype in KERNEL_DTYPES and t.numel() for t in inputs.values() if t.is_floating_point())
    assert driver.launches or not supported


@pytest.mark.parametrize("fp8", [False, True])
def test_codes_of_saved_tensors(fp8: bool, driver):
    driver.launches.clear()
    codes, scale = torch.ops.bigkernels.compress(torch.randn(1000).bfloat16(), fp8, True, 7)
    torch.ops.bigkernels.decompress(codes, scale, fp8, torch.bfloat16)
    assert [launch.kernel for launch in driver.launches] == ["encode", "decode"]


def test_grids_that_cuda_refuses_are_refused(driver):
    x = torch.ones(4, 8).bfloat16()
    with use("triton"):
        functional.glu(x, x)
    (compiled,) = (c for kernel in kernels() for c in kernel.device_caches[0][0].values())
    with pytest.raises(RuntimeError, match="invalid argument"):
        compiled.run(1, 65536, 1, 0, compiled.function, compiled.packed_metadata, None, None, None)


def test_shared_memory_is_that_of_the_device(driver):
    driver.utils.get_device_properties(0)["max_shared_mem"] = 1024
    q = torch.ones(1, 1, 200, 128).bfloat16()
    with use("triton"), pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        functional.attention(q, q, q)


def test_nothing_stays():
    """After the driver is gone, CPU tensors have their own kernels again and Triton its own driver."""
    from triton.runtime import driver as drivers

    before, implementations = drivers._active, {n: o.implementations for n, o in OPERATORS.items()}
    x, weight = torch.randn(3, 64), torch.randn(64)
    expected = functional.rms_norm(x, weight)
    with without_device(80) as driver:
        with use("triton"):
            functional.rms_norm(x, weight)
        assert [launch.kernel for launch in driver.launches] == ["forward_rows"]
    assert torch.equal(functional.rms_norm(x, weight), expected)
    assert drivers._active is before and {n: o.implementations for n, o in OPERATORS.items()} == implementations
    assert compress.OPERATOR.choose(x) != "triton"
