"""The vector functions and conversions under the CPU kernels, value by value, at every instruction-set level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("bigkernels._native", reason="bigkernels._native is in development builds only")

SNIPPET = """
import sys; sys.path.insert(0, "tests")
import test_native; test_native.check_level()
"""


def native():
    from bigkernels import _native

    return _native


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the exact value's last place; subnormal results may be zero."""
    normal = np.abs(exact) >= 2.0**-126
    assert (np.abs(found[~normal] - exact[~normal]) <= 2.0**-126).all()
    spacing = np.spacing(np.abs(exact[normal]).astype(np.float32)).astype(np.float64)
    return float((np.abs(found[normal] - exact[normal]) / spacing).max())


def every(low: float, high: float) -> np.ndarray:
    """A million floats of [low, high]: evenly by value, and both signs evenly by exponent."""
    line = np.linspace(low, high, 700_000)
    powers = 2.0 ** np.linspace(-140, math.log2(max(abs(low), abs(high))), 150_000)
    return np.concatenate((line, powers, -powers)).clip(low, high).astype(np.float32)


def erfc(x: np.ndarray) -> np.ndarray:
    return torch.special.erfc(torch.from_numpy(x)).numpy()


EXACT = {
    "exp": (-87.0, 88.7, np.exp, 1.5),
    "sigmoid": (-87.0, 87.0, lambda x: np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x))), 3),
    "tanh": (-20.0, 20.0, np.tanh, 2),
    "normal_cdf": (-12.9, 12.9, lambda x: 0.5 * erfc(-x / math.sqrt(2)), 8),
    "normal_pdf": (-13.0, 13.0, lambda x: np.exp(-x * x / 2) / math.sqrt(2 * math.pi), 3),
}


def check_function(name: str) -> None:
    low, high, exact, bound = EXACT[name]
    x = every(low, high)
    error = ulps(native().vector_math(name, x).astype(np.float64), exact(x.astype(np.float64)))
    print(f"{native().cpu_isa()} {name}: {error:.2f} ulp")
    assert error <= bound, f"{name}: {error} ulp"


def check_special_values() -> None:
    inf, nan = math.inf, math.nan
    expected = {
        "exp": {-inf: 0, inf: inf, 0: 1, -200: 0, 89: inf, 1e30: inf, -1e30: 0},
        "sigmoid": {-inf: 0, inf: 1, 0: 0.5, -1e30: 0, 1e30: 1},
        "tanh": {-inf: -1, inf: 1, 0: 0, 1e30: 1, -1e30: -1, 1e-40: 1e-40},
        "normal_cdf": {-inf: 0, inf: 1, 0: 0.5, 1e30: 1, -1e30: 0, -15: 0},
        "normal_pdf": {-inf: 0, inf: 0, 1e30: 0},
    }
    for name, values in expected.items():
        found = native().vector_math(name, np.array([*values, nan], np.float32))
        assert np.isnan(found[-1]), name
        np.testing.assert_array_equal(found[:-1], np.array(list(values.values()), np.float32), err_msg=name)


def check_conversions() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        half = torch.from_numpy(bits.view(np.int16)).view(dtype)
        np.testing.assert_array_equal(native().widen(name, bits), half.float().numpy())
        # Every half's value, the midpoints to the next one, and just beside them: all cases of rounding.
        values = half.float()[half.isfinite()].sort().values.double()
        middle = ((values[1:] + values[:-1]) / 2).float()
        low, high = torch.nextafter(middle, torch.tensor(-3e38)), torch.nextafter(middle, torch.tensor(3e38))
        x = torch.cat((values.float(), middle, low, high, torch.tensor([math.inf, -math.inf, 7e4, -3.4e38, 1e-9])))
        found = torch.from_numpy(native().narrow(name, x.numpy()).view(np.int16)).view(dtype)
        exact = x.to(dtype)
        same = (found == exact) | (exact.abs() <= 2.0**-126)  # the AVX-512 instruction flushes bfloat16's subnormals
        assert same.all(), (name, x[~same][:5], found[~same][:5])
        assert (found[~(found == exact)].float().abs() <= 2.0**-126).all()
        assert (
            torch.from_numpy(native().narrow(name, np.array([math.nan], np.float32)).view(np.int16))
            .view(dtype)
            .isnan()
            .all()
        )


def check_level() -> None:
    for name in EXACT:
        check_function(name)
    check_special_values()
    check_conversions()


def test_every_level(isa):
    assert isa.run(SNIPPET).count("ulp") == len(EXACT)


def test_the_module_sees_the_level_that_the_library_chose():
    assert native().cpu_isa() == torch.ops.bigkernels.cpu_isa()


def test_probes():
    assert native().copy_bandwidth(1 << 22, 0.01) > 1e8
    assert native().update_bandwidth(1 << 22, 0.01) > 1e8
    assert "float32" in native().matrix_dtypes()
    for name in native().matrix_dtypes():
        assert native().matrix_peak(name, 0.01, 1) > 1e8
    with pytest.raises(ValueError, match="has no float8"):
        native().matrix_peak("float8", 0.01)
    with pytest.raises(ValueError, match="too few bytes"):
        native().copy_bandwidth(10, 0.01)
    with pytest.raises(ValueError, match="too few bytes"):
        native().update_bandwidth(10, 0.01)
