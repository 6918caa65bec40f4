"""What a library's layout of quantized layers is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantization import FP8
from ._packed import Packed


class Method:
    """One library's layout.

    Attributes:
        said: what the files say beside their tensors.
        mark: the last part of a name that each quantized layer has.
        parts: the last parts of the names of all tensors that a layer may have.
    """

    mark: str
    parts: tuple[str, ...]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.said: Mapping[str, str] = {}

    def layers(self, names: Collection[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Of the names of tensors: each layer, its weight in the model, and the names of its tensors by part."""
        for name in names:
            if name.endswith("." + self.mark):
                path = name[: -len(self.mark) - 1]
                held = {part: f"{path}.{part}" for part in self.parts if f"{path}.{part}" in names}
                yield path, f"{path}.weight", held

    def decode(self, name: str, held: dict[str, Tensor]) -> Packed | Tensor:
        """The weight of a layer from its tensors by their last parts.

        Raises:
            ValueError: they do not fit together; says which.
        """
        raise NotImplementedError

    def integer(self, key: str, default: int | None = None, accepted: tuple[int, ...] | None = None) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or (accepted is not None and value not in accepted):
            expected = "an integer" if accepted is None else " or ".join(map(str, accepted))
            raise ValueError(f"bigkernels.load_quantized: {key} is {value!r}, expected {expected}")
        return value


def floats(name: str, weight: Tensor, scale: Tensor) -> Packed | Tensor:
    n = weight.shape[0]
    scale = (
        scale.reshape(1, 1).expand(n, 1)
        if scale.numel() == 1
        else scale.reshape(n, -1)
        if scale.numel() == n
        else scale
    )
    if scale.shape == (n, 1):
        tensors = {"codes": weight.view(torch.uint8), "scale": scale[:, 0].float().contiguous()}
        return Packed(FP8(), tuple(weight.shape), tensors)
    raise ValueError(f"{name}.weight_scale has shape {tuple(scale.shape)}; expected one a row of {n}")
