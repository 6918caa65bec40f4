"""What safetensors files hold, before anything of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "I16": torch.int16,
}


def check(files: Iterable[str], expected: Mapping[str, Tensor], prefix: str) -> set[str]:
    """See that safetensors files have the tensors that are expected; other files are not looked into.

    Args:
        expected: tensors by name; shape and dtype count.
        prefix: that names may have in the files and not in the model, or the other way round.

    Returns:
        The names of tensors without elements, that nobody expects.

    Raises:
        ValueError: a file is damaged, or a tensor is missing or of another shape or dtype; its name is given.
    """
    files = list(files)
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return set()
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                for name in held.keys():
                    view = held.get_slice(name)
                    tensors[name] = tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"bigkernels: {file} is damaged: {error}") from error
    for name, t in expected.items():
        spelled = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        held = next((tensors[key] for key in spelled if key in tensors), None)
        if held is None:
            raise ValueError(f"bigkernels: the checkpoint has no tensor {name}")
        if held != (tuple(t.shape), t.dtype):
            raise ValueError(
                f"bigkernels: {name} is {held[1]} of shape {held[0]} in the checkpoint, expected "
                f"{t.dtype} of shape {tuple(t.shape)}"
            )
    return {name for name, (shape, _) in tensors.items() if shape == (0,) and name not in expected}
