"""Fits the polynomials of csrc/include/bigkernels/math.h and prints them with their worst relative error in float64.

A weighted least-squares fit on Chebyshev nodes is iterated with the residual as weight (Lawson's method), which
converges to the minimax polynomial; the coefficients are then rounded to float32.
"""

import math

import numpy as np


def fit(basis: np.ndarray, target: np.ndarray, scale: np.ndarray, rounds: int = 200) -> tuple[np.ndarray, float]:
    """Coefficients c that minimise max|basis @ c - target| / |scale|, and that maximum with float32 coefficients."""
    weight = np.ones(len(target))
    for _ in range(rounds):
        root = np.sqrt(weight)[:, None] / np.abs(scale)[:, None]
        c, *_ = np.linalg.lstsq(basis * root, target * root[:, 0], rcond=None)
        error = np.abs(basis @ c - target) / np.abs(scale)
        weight *= error + 1e-3 * error.max()
        weight /= weight.sum()
    c = c.astype(np.float32).astype(np.float64)
    return c, float((np.abs(basis @ c - target) / np.abs(scale)).max())


def nodes(low: float, high: float, count: int = 2000) -> np.ndarray:
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(count) + 0.5) / count)


def show(name: str, c: np.ndarray, error: float) -> None:
    print(f"{name}: worst relative error {error:.2e} = {error * 2**24:.2f} ulp")
    print("  " + ", ".join(f"{v:.9e}f" for v in c))


def main() -> None:
    # exp(r) on [-ln2/2, ln2/2], lowest order first; 1 + r are exact.
    r = nodes(-math.log(2) / 2, math.log(2) / 2)
    powers = np.stack([r**k for k in range(2, 7)], 1)
    show("exp", *fit(powers, np.exp(r) - 1 - r, np.exp(r)))
    # tanh(x) = x + x^3 P(x^2) for |x| <= 0.625.
    x = nodes(1e-6, 0.625)
    show("tanh", *fit(np.stack([x ** (2 * k + 3) for k in range(6)], 1), np.tanh(x) - x, np.tanh(x)))
    # Phi(-x) = exp(-x^2 / 2) * t * P(t) with t = 1 / (1 + c x), x >= 0: relative accuracy in the whole tail.
    c = 0.25
    t = nodes(1.0 / (1 + c * 14.0), 1.0)
    x = (1 / t - 1) / c
    mills = np.array([0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x])
    show("normal tail", *fit(np.stack([t ** (k + 1) for k in range(10)], 1), mills, mills))


if __name__ == "__main__":
    main()
