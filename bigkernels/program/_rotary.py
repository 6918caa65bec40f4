"""Angles by the model's own code: its rotary module, or what it did in place of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._context import HIDDEN, POSITIONS
from ._ir import Angles
from ._trace import ModuleCall, Ref, Refused, leaves

if TYPE_CHECKING:
    from ._identify import Builder


@dataclass(frozen=True)
class Rotary:
    """(cos, sin) of positions, (B or 1, S, rotary), by a module that gives them in another form.

    Attributes:
        args, kwargs: of the module's call; HIDDEN and POSITIONS stand for what differs.
        outs: which of the module's outputs are the angles: cosines and sines, or complex numbers.
        layout: "halves", "pairs", or "once": how each angle is repeated.
        sign: of the sines.
    """

    module: nn.Module
    args: tuple
    kwargs: tuple
    outs: tuple[int, ...]
    layout: str
    sign: int
    interleaved: bool

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        given = {HIDDEN: x, POSITIONS: position_ids}

        def fill(value):
            return given[value] if isinstance(value, str) and value in given else value

        out = self.module(*map(fill, self.args), **{k: fill(v) for k, v in self.kwargs})
        tensors = [t for t in leaves(out) if isinstance(t, Tensor)]
        picked = [tensors[i] for i in self.outs]
        cos, sin = (picked[0].real, picked[0].imag) if picked[0].is_complex() else picked
        length = position_ids.shape[-1]
        return self._shaped(cos, length), self._shaped(self.sign * sin, length)

    def _shaped(self, t: Tensor, length: int) -> Tensor:
        where = [i for i, n in enumerate(t.shape[:-1]) if n == length][-1]
        lead = [i for i in range(t.dim() - 1) if i != where]
        t = t.permute(*lead, where, t.dim() - 1).flatten(0, -3) if t.dim() > 2 else t[None]
        if self.layout == "once":
            return t.repeat_interleave(2, -1) if self.interleaved else torch.cat((t, t), -1)
        if (self.layout == "pairs") != self.interleaved:
            once = t[..., ::2] if self.layout == "pairs" else t[..., : t.shape[-1] // 2]
            return once.repeat_interleave(2, -1) if self.interleaved else torch.cat((once, once), -1)
        return t

    @classmethod
    def of(cls, b: Builder, roots: tuple[Ref, ...], layout: str, sign: int, rotary: int, interleaved: bool) -> Angles:
        call = _call_of(b, roots)
        refs = [out for out in call.outs]
        outs = tuple(refs.index(root) for root in roots)
        args = tuple(resolve_value(b, a) for a in call.args)
        kwargs = tuple((k, resolve_value(b, v)) for k, v in call.kwargs.items())
        angles = cls(call.module, args, kwargs, outs, layout, sign, interleaved)
        dtype = b.trace.dtype
        plain = (
            layout == ("pairs" if interleaved else "halves")
            and sign == 1
            and outs == (0, 1)
            and [*args[:2], *(v for _, v in kwargs)][:2] == [HIDDEN, POSITIONS]
            and len(args) + len(kwargs) == 2
            and all(k == "position_ids" for k, _ in kwargs)
        )
        table = _by_position(angles, b, dtype)
        return Angles(call.module if plain else angles, (), rotary, table, dtype)


def _call_of(b: Builder, roots: tuple[Ref, ...]) -> ModuleCall:
    for call in b.recorder.calls:
        if all(root in call.outs for root in roots):
            return call
    raise Refused(f"{b.path(roots[0])}: its angles come from no module")


def resolve_value(b: Builder, value: Any) -> Any:
    if isinstance(value, Ref):
        if b.recorder.steps[value.step].depends:
            return HIDDEN
        t = b.tensor(value)
    elif isinstance(value, Tensor):
        t = value
    else:
        return value
    positions = b.trace.positions
    if not t.dtype.is_floating_point and t.shape[-1:] == positions.shape[-1:] and bool((t == positions).all()):
        return POSITIONS
    if t.dtype.is_floating_point and t.shape[:2] == positions.shape and t.dim() == 3:
        return HIDDEN
    raise Refused("its angles are computed from more than positions")


def _by_position(rotary: Rotary, b: Builder, dtype: torch.dtype) -> bool:
    """Whether the angles at a position are the same whatever positions stand beside it."""
    x = torch.zeros(1, 1, 1, dtype=dtype, device=b.device)
    alone = torch.tensor([[0, 1, 2, 5, 17]], dtype=torch.int64, device=b.device)
    most = getattr(getattr(b.trace.model, "config", None), "max_position_embeddings", None) or 2048
    most = most if isinstance(most, int) else 2048
    last = min(most - 1, 2**22)
    try:
        with torch.no_grad():
            first = rotary(x, alone)
            far = rotary(x, torch.tensor([[17, 0, last, last, last]], dtype=torch.int64, device=b.device))
            beyond = rotary(
                x, torch.tensor([[17, 0, 4 * last, 4 * last, 4 * last]], dtype=torch.int64, device=b.device)
            )
            rotary(x, alone)  # what is kept of the longest call is taken back
    except Exception:  # noqa: BLE001  a module may refuse positions in any way
        return False
    for a, f, g in zip(first, far, beyond, strict=True):
        if not (
            torch.equal(a[:, 4], f[:, 0])
            and torch.equal(a[:, 0], f[:, 1])
            and torch.equal(a[:, 4], g[:, 0])
            and torch.equal(a[:, 0], g[:, 1])
        ):
            return False
    return True
