"""Where in a model each tensor of a file went."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..quantization import Format
from ._file import Pair

SMALL = 2**20  # bytes of a tensor that are kept beside what became of it


@dataclass(frozen=True)
class Place:
    """A tensor of a file in a model.

    Attributes:
        name, shape, kind: of the tensor, as the file has them.
        target: the name of the parameter, or of the layer (of experts, the parameter) with its codes.
        coded: whether it went there as codes.
        order: the row of the file that became each row of the weight; None: as they are.
        part: which part of several that lie one below the other in the weight, and how many those are.
        raw: the bytes in the file of what is no codes: what they become, where that is what the model still has.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    target: str
    coded: bool
    order: Tensor | None = None
    part: tuple[int, int] = (0, 1)
    raw: Tensor | None = None


@dataclass
class Source:
    """What `save_gguf` needs to know of the file that a model is from."""

    architecture: str
    metadata: dict[str, Pair]
    places: list[Place] = field(default_factory=list)
    anew: bool = False  # of a model that came from no file

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model copies what is small."""
        few = [p if p.raw is None or p.raw.nbytes <= SMALL else replace(p, raw=None) for p in self.places]
        return self.__dict__ | {"places": few}


@dataclass
class Contents:
    """`state`: what the model is filled with; `formats`: of layers (and parameters of experts) that hold codes."""

    source: Source
    state: dict[str, Tensor] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
