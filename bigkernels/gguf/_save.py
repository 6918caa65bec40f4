"""A model that came out of a GGUF file, back into one."""

from __future__ import annotations

import os

from torch import nn

from ..nn import LoRALinear
from ._source import Source

_WHAT = "bigkernels.save_gguf"


def save_gguf(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model that `load_gguf` made into a GGUF file, by the `gguf` package's writer: with the metadata and the
    vocabulary of its file, codes as they are, and numbers as the model has them now, in the file's type.

    What was not changed is written bit for bit as it was read. A layer that holds no codes anymore (`dequantize`) is
    written in the model's dtype.

    Args:
        model: as `load_gguf` (or `from_pretrained` with ``gguf_file``) made it, or a copy; adapters are merged first.
        path: of the file; one that is there is replaced.

    Raises:
        ImportError: gguf is not installed.
        ValueError: the model came from no GGUF file, or holds something that its file has no place for (its name is
            given).
    """
    try:
        import gguf

        from ._write import Writing, add
    except ImportError as error:
        raise ImportError(f"{_WHAT} needs gguf ({error}); pip install 'bigkernels[gguf]' installs it") from error
    source = getattr(model, "gguf_source", None)
    if not isinstance(source, Source):
        raise ValueError(f"{_WHAT}: the {type(model).__name__} came from no GGUF file; llama.cpp's "
                         "convert_hf_to_gguf.py writes one of a folder that `save_pretrained` made")  # fmt: skip
    adapter = next((name for name, m in model.named_modules() if isinstance(m, LoRALinear)), None)
    if adapter is not None:
        raise ValueError(f"{_WHAT}: {adapter} has an adapter; merge it, or save it by itself")
    writing = Writing(model, source)
    tensors = [(place.name, *writing.blocks(place)) for place in source.places]  # before a file is touched
    writer = gguf.GGUFWriter(os.fspath(path), source.architecture)
    for key, pair in source.metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(pair.value)
        elif key != "general.architecture":
            add(writer, gguf.GGUFValueType, key, pair)
    for name, kind, blocks in tensors:
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
