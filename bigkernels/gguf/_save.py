"""A model into a GGUF file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import LoRALinear
from ._source import Source

_WHAT = "bigkernels.save_gguf"
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def save_gguf(
    model: nn.Module, path: str | os.PathLike, type: str | None = None, *, tokenizer: str | os.PathLike | None = None
) -> None:
    """Write a causal language model into a GGUF file, by the `gguf` package's writer.

    A model that `load_gguf` made is written with the metadata and the vocabulary of its file, codes as they are, and
    numbers as the model has them now, in the file's type. What was not changed is written bit for bit as it was read; a
    layer that holds no codes anymore (`dequantize`) is written in the model's dtype.

    Others (Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts, Gemma 2 and 3, Phi-3, Starcoder2, StableLM, as
    transformers has them) get metadata from their configuration. What is read back of each written file must be the
    model's: an option, or a number edited in a module, that readers would not see is an error.
    Layers in codes that a type of blocks holds bit for bit (`Q8_0`, `Q4_1`, `MXFP4`, `GGUFBlocks`) are written so;
    other formats as numbers.

    Args:
        model: adapters are merged first.
        path: of the file; one that is there is replaced.
        type: of the matrices of numbers of a model that came from no file: "F32", "F16", "BF16", "Q8_0", "Q4_0",
            "Q4_1", "Q5_0" or "Q5_1", rounded as the `gguf` package does. Rows that are no whole blocks become F16,
            vectors stay F32. None takes the dtype they have.
        tokenizer: for a model that came from no file: a folder with a tokenizer.json of bytes merged in pairs (GPT-2,
            SmolLM, Llama 3, Qwen) or a tokenizer.model of SentencePiece (Llama 2, Mistral, Gemma; `sentencepiece` reads
            it), or another GGUF file, whose entries are copied. llama.cpp opens no file without a vocabulary;
            transformers and `load_gguf` do.

    Raises:
        ImportError: gguf is not installed.
        ValueError: the model is of another kind, has an option that no such file can say, or holds something that its
            file has no place for (its name is given), a number that was edited in a module included; or the tokenizer
            is not one of those.
    """
    try:
        import gguf

        from ._describe import described
        from ._read_back import check_read_back
        from ._vocabulary import vocabulary
        from ._write import Writing, add
    except ImportError as error:
        raise ImportError(f"{_WHAT} needs gguf ({error}); pip install 'bigkernels[gguf]' installs it") from error
    if type is not None and type not in TYPES:
        raise ValueError(f"{_WHAT}: type is {type!r}; accepted are {', '.join(TYPES)}")
    adapter = next((name for name, m in model.named_modules() if _adapts(m)), None)
    if adapter is not None:
        raise ValueError(f"{_WHAT}: {adapter} has an adapter; merge it, or save it by itself")
    source = getattr(model, "gguf_source", None)
    if not isinstance(source, Source):
        source = described(model, type)
        if tokenizer is not None:
            sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
            config: Any = model.config
            words = vocabulary(tokenizer, config.get_text_config().vocab_size, sizes)
            source = replace(source, metadata=source.metadata | words)
    elif type is not None or tokenizer is not None:
        raise ValueError(f"{_WHAT}: the model came from a GGUF file, whose types and vocabulary it keeps")
    writing = Writing(model, source)
    target = Path(path)
    begun = target.with_name(target.name + ".part")  # what is there may be what the model is mapped from
    writer = gguf.GGUFWriter(os.fspath(begun), source.architecture)
    try:
        for place in source.places:
            kind, blocks = writing.blocks(place)
            writer.add_tensor(place.name, blocks, raw_dtype=gguf.GGMLQuantizationType(kind))
        for key, pair in source.metadata.items():
            if key == "general.alignment":
                writer.add_custom_alignment(pair.value)
            elif key != "general.architecture":
                add(writer, gguf.GGUFValueType, key, pair)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_read_back(model, begun)
        begun.replace(target)
    finally:
        begun.unlink(missing_ok=True)


def _adapts(module: nn.Module) -> bool:
    """LoRALinear, and PEFT's layers."""
    return isinstance(module, LoRALinear) or (hasattr(module, "base_layer") and hasattr(module, "active_adapters"))
