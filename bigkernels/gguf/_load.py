"""A model of transformers out of a GGUF file, with the file's own codes."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn.quantized import Quantized
from ..quantization import Format, quantize
from ._config import config_of, counting
from ._file import File
from ._source import Contents


def load_gguf(path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, mmap: bool = True) -> nn.Module:
    """A causal language model of transformers from a GGUF file, in evaluation mode on the CPU.

    Linear layers, embeddings and experts become `bigkernels.nn.QuantizedLinear`, `QuantizedEmbedding` and
    `QuantizedExperts` with the codes of the file: types Q4_0 and Q4_1 as `bigkernels.quantization.Q4_1`, Q8_0 as
    `Q8_0`, MXFP4 as `MXFP4`; Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS, TQ1_0 and TQ2_0 as `GGUFBlocks`, which kernels
    read on CPUs. A head that is tied to the embedding shares its codes. Everything else, other types included, becomes
    dense, in `dtype`. The values are those that the `gguf` package dequantizes.

    Args:
        path: of the file. What transformers reads of its metadata decides the model; the tokenizer is read by
            ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``.
        dtype: of the dense weights and of what the layers compute.
        mmap: whether what lies in the file as the model needs it (blocks of `GGUFBlocks`, numbers of `dtype`) stays
            there, mapped into memory, and is read when it is used. The file must then not change while the model lives:
            to make it shorter ends the process.

    Raises:
        ImportError: transformers or gguf is not installed.
        OSError: there is no such file.
        ValueError: the file is none of GGUF, ends too early, or is of an architecture that transformers does not read;
            a tensor is missing, of another shape, not finite, or has no place in the model (its name is given).
    """
    file = open_file(path)
    if file.architecture in counting() and not known_processor(file.architecture):
        raise ValueError(
            f"bigkernels.load_gguf: {file.path} is of the architecture {file.architecture}, whose tensors "
            "are converted in ways that are not known here; from_pretrained(folder, gguf_file=name) reads "
            "it"
        )
    config = config_of(file)
    try:
        from transformers import AutoModelForCausalLM

        from ._state import read_contents

        with Unfilled():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # of numbers that fit no model it raises what it likes
        raise file.fail(f"transformers makes no model of its metadata: {error}") from error
    contents = read_contents(file, model, config, dtype, mmap)
    fill(model, contents, file)
    return model


def open_file(path: str | os.PathLike) -> File:
    """The header of a file.

    Raises:
        ImportError, OSError, ValueError: as `load_gguf`.
    """
    try:
        import gguf
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"bigkernels.load_gguf needs transformers and gguf ({error}); pip install 'bigkernels[gguf]' installs them"
        ) from error
    path = Path(path)
    file = File.read(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    architecture = file.architecture
    if file.get(f"{architecture}.rope.scaling.type", "none") != "none" and architecture != "gpt-oss":
        raise ValueError(f"bigkernels.load_gguf: {path} scales its rotary embedding, which transformers does not read")
    return file


def known_processor(architecture: str) -> bool:
    from transformers import modeling_gguf_pytorch_utils as known

    return architecture in known.TENSOR_PROCESSORS


def stand(model: nn.Module, contents: Contents) -> None:
    """Make layers without values in the places of those whose weights are codes."""
    formats = dict(contents.formats)
    tied: dict[int, list[str]] = {id(p): [] for p in model.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        tied[id(p)].append(name.removesuffix(".weight"))
    for group in tied.values():  # the file has one tensor for all of them
        held = next((layer for layer in group if layer in formats), None)
        if held is not None:
            formats |= dict.fromkeys(group, formats[held])
    by_format: dict[Format, set[str]] = {}
    for name, config in formats.items():
        by_format.setdefault(config, set()).add(name)
    for config, chosen in by_format.items():
        quantize(model, config, skip=(), embeddings=True, filter=functools.partial(_is_in, chosen))
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            contents.state[f"{name}.format"] = module.description()


def _is_in(names: set[str], name: str, module: nn.Module) -> bool:
    return name in names


def fill(model: Any, contents: Contents, file: File) -> None:
    stand(model, contents)
    state = contents.state
    loaded = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    filled = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    empty = [
        name
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if t.is_meta or (isinstance(t, nn.Parameter) and id(t) not in filled)
    ]
    if empty or loaded.unexpected_keys:
        missing = ", ".join(empty or loaded.unexpected_keys)
        raise ValueError(f"bigkernels.load_gguf: {file.path} has no tensor for {missing}")
    model.__dict__["gguf_source"] = contents.source


class Unfilled(TorchFunctionMode):
    """Tensors that nothing was written to yet are on the meta device: weights take no memory before they are read."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
