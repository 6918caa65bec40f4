"""What transformers makes of a file's metadata."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from ._file import ARRAY, File, Pair

_NAME, _TOKENS = "header.gguf", "tokenizer.ggml.tokens"


def config_of(file: File) -> Any:
    """The configuration of the model, by transformers' own reader, which is given the header without what makes it
    slow: it reads a vocabulary in 3 s, to count it.

    Raises:
        ValueError: transformers reads no such architecture, or no model has these numbers.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _NAME).write_bytes(_short(file))
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=_NAME, local_files_only=True)
        except Exception as error:  # of a damaged file transformers and its libraries raise what they like
            raise file.fail(f"transformers makes no configuration of its metadata: {error}") from error
    config.name_or_path = str(file.path.parent)
    if (tokens := _tokens(file)) is not None:
        config.get_text_config().vocab_size = tokens
    return config


def _tokens(file: File) -> int | None:
    """How many tokens there are, where the vocabulary says it."""
    said = f"{file.architecture}.vocab_size" in file.metadata and file.architecture not in counting()
    return None if said or _TOKENS not in file.metadata else file.metadata[_TOKENS].count


def _short(file: File) -> bytes:
    """The header with the names of all tensors, each of one number, and without long arrays."""
    kept = {key: pair for key, pair in file.metadata.items() if pair.kind != ARRAY or pair.value is not None}
    if (tokens := _tokens(file)) is not None:
        key = _TOKENS if file.architecture in counting() else f"{file.architecture}.vocab_size"
        kept[key] = Pair(4, 1, struct.pack("<I", tokens), tokens)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(file.tensors), len(kept))]
    for key, pair in kept.items():
        parts += [_text(key), struct.pack("<I", pair.kind), pair.raw]
    for tensor in file.tensors:
        parts += [_text(tensor.name), struct.pack("<IQIQ", 1, 1, 0, 0)]
    header = b"".join(parts)
    alignment = file.get("general.alignment", 32)
    return header + bytes(-len(header) % alignment + max(alignment, 4))


def counting() -> Container[str]:
    """The architectures whose reader takes the vocabulary for its length."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # before version 5.24
        return ()
    return GGUF_CONFIG_ARCHS


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
