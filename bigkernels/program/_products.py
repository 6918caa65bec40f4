"""Products of a model's linear layers for those who look at what lies between them: weights are read once or not."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._ir import StoredLinear
from ._layers import computed, shape

_SAME = 1e-9  # relative to the largest of a row: rounding in float64, in another order


class Drawn:
    """Products with other weights: each column of a result is of two columns of x, with numbers drawn at random.

    A layer is given the same ones at each call, and no other layer has them: what is computed around products, and
    which layer multiplies what, is told as well by these as by the model's own. Layers that are no modules, whose
    products the model's code computes itself, have their own weights.
    """

    def __init__(self) -> None:
        self._drawn: dict[nn.Module, tuple[int, Tensor]] = {}
        self._generator = torch.Generator("cpu").manual_seed(17)

    def __call__(self, module: nn.Module | StoredLinear, x: Tensor) -> Tensor:
        if isinstance(module, StoredLinear) or not x.shape[-1]:
            return computed(module, x)
        if module not in self._drawn:
            n, k = shape(module)
            if x.shape[-1] != k:
                raise ValueError(f"a layer of {k} inputs is given {x.shape[-1]}")
            apart = torch.randint(k, (1,), generator=self._generator, dtype=torch.int64, device="cpu").item()
            factors = torch.randn(2, n, generator=self._generator, dtype=torch.float64, device="cpu") / 2**0.5
            self._drawn[module] = apart, factors.to(x.device)
        apart, factors = self._drawn[module]
        n, k = factors.shape[1], x.shape[-1]
        first, second = (t.repeat(*[1] * (x.dim() - 1), -(-n // k))[..., :n] for t in (x, x.roll(apart, -1)))
        out = (first * factors[0]).addcmul_(second, factors[1])
        return out if module.bias is None else out + module.bias.detach().to(x.dtype)


class Once:
    """Products with the model's own weights. One whose inputs are those of an earlier one, but for rounding, is not
    computed again; where they differ by more, it is.

    Args:
        seen: (B, S), tokens that are no padding. The rest may differ: no token sees them, and nobody reads what they
            come to.
    """

    def __init__(self, seen: Tensor) -> None:
        self._seen = seen
        self._known: dict[int, list[tuple[object, Tensor, Tensor]]] = {}  # by a layer's id: itself, rows in, rows out

    def __call__(self, module: nn.Module | StoredLinear, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        known = self._known.setdefault(id(module), [])
        for _, before, made in known:
            if before.shape == rows.shape and self._same(rows, before, x.shape):
                return made.view(*x.shape[:-1], -1).clone()
        out = computed(module, x)
        known.append((module, rows.clone(), out.reshape(len(rows), -1).clone()))
        return out

    def _same(self, rows: Tensor, before: Tensor, shape: torch.Size) -> bool:
        same = (rows - before).abs().amax(-1) <= _SAME * before.abs().amax(-1)
        if shape[:-1] == self._seen.shape:
            same = same | ~self._seen.flatten()
        return bool(same.all())
