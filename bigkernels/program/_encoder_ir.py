"""What a layer of an encoder computes, as operations on rows: those of `_ir.py`, and attention that keeps nothing.

Each text of a batch is rows of its own, one after the other, without padding. What a layer is given beside hidden
states is named as its forward does: scores (masks, and biases that are added), and rotary angles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ._ir import HeadsOf, NormSpec, Operation, Stored


@dataclass(frozen=True)
class Turn:
    """out: the heads of `x`, normed and rotated as `Heads` says."""

    x: HeadsOf
    out: int
    norm: NormSpec | None = None
    angles: int | None = None
    rotary: int = 0
    interleaved: bool = False


@dataclass(frozen=True)
class Mix:
    """Attention of each token over those of its text: out (heads * dv). Heads `x.columns` of keys and values are those
    of groups. `scores`: an index of what the call says of scores, None where it says nothing.
    """

    q: HeadsOf
    k: HeadsOf
    v: HeadsOf
    out: int
    heads: int
    groups: int
    d: int
    dv: int
    scale: float
    softcap: float = 0.0
    causal: bool = False
    scores: int | None = None
    sinks: Stored | None = None


@dataclass(frozen=True)
class GivenAngles:
    """Cosines and sines that a layer is given: argument `name`, a pair, of which `order` are cosines and sines."""

    name: str
    order: tuple[int, ...]
    layout: str  # "halves", "pairs" or "once": how each angle is repeated there
    sign: int  # of the sines
    rotary: int
    interleaved: bool


@dataclass
class LayerGraph:
    """One layer.

    Attributes:
        hidden, logits: the values that go in and come out.
        scores: names of the arguments that say which keys are seen, or are added to scores.
        angles: those that its heads are rotated by.
        returns: how its result comes: None, alone; or what a tuple has behind it: names of arguments, which are given
            back as they came, and None for None.
    """

    widths: list[int] = field(default_factory=list)
    operations: list[Operation | Turn | Mix] = field(default_factory=list)
    angles: list[GivenAngles] = field(default_factory=list)
    hidden: int = 0
    logits: int = -1
    scores: tuple[str, ...] = ()
    returns: tuple[str | None, ...] | None = None
    embed: Any = None

    def value(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1
