"""Activations and their derivatives in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and 1 - sigmoid(x), both to full relative accuracy, by an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + e)
    far = e * near
    return tl.where(x >= 0.0, near, far), tl.where(x >= 0.0, far, near)


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative. Numbered as in bigkernels.ops.activations."""
    if ACTIVATION == 0:  # silu
        s, rest = _sigmoid(x)
        return x * s, s * (1.0 + x * rest)
    elif ACTIVATION == 1:  # gelu: x times the normal distribution, whose derivative is the density
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 2:  # gelu_tanh, by (1 + tanh(u)) / 2 = sigmoid(2u)
        square = x * x
        s, rest = _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))
        return x * s, s * (1.0 + x * rest * (1.5957691216057308 + 0.21406444881780076 * square))
    elif ACTIVATION == 3:  # relu; NaN stays NaN
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == 4:  # relu2
        r = tl.where(x <= 0.0, 0.0, x)
        return r * r, 2.0 * r
    elif ACTIVATION == 5:  # sigmoid
        s, rest = _sigmoid(x)
        return s, s * rest
    elif ACTIVATION == 6:  # identity
        return x, x * 0.0 + 1.0
    elif ACTIVATION == 7:  # tanh, by 2 sigmoid(2x) - 1
        s, rest = _sigmoid(x + x)
        small = x - x * x * x * 0.3333333333333333  # where the difference would lose the digits
        return tl.where(tl.abs(x) < 0.01, small, s - rest), 4.0 * s * rest
    else:  # quick_gelu
        tl.static_assert(ACTIVATION == 8, "an activation without a branch")
        s, rest = _sigmoid(x * 1.702)
        return x * s, s + x * rest * s * 1.702  # 1.702 last: it would overflow where s is 0
