"""Folders that other libraries quantized, read by transformers' loader and written as transformers writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..published._load import State, check, files_of, read_json, weights
from ..published._methods import method_of
from ..published._save import stored_as

_LOAD = "bigkernels.load_quantized"
_SAVE = "bigkernels.save_quantized"


def load_quantized(folder: str | os.PathLike, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of transformers from a folder of GPTQ, AWQ, bitsandbytes, compressed-tensors, HQQ or torchao, or of
    gpt-oss (MXFP4), in evaluation mode on the CPU.

    Its linear layers become `bigkernels.nn.QuantizedLinear` with the codes of the folder, experts that transformers
    joins become `QuantizedExperts`. The values are, bit for bit, those that the library itself dequantizes (of
    LLM.int8 up to a rounding in float32, of HQQ up to those in float16). Layers for
    which no format stands (8 bits with zero points in groups) become plain ones with these values;
    ``model.dense_layers`` names them. `save_pretrained` keeps the model in this package's files.

    Args:
        folder: with config.json, whose quantization_config says what it is, and safetensors files.
        dtype: of what the layers compute; that of config.json by default.

    Raises:
        ImportError: transformers or safetensors is not installed.
        OSError: there is no such folder, config or file.
        ValueError: the method is none of these, a file is damaged, or a tensor is missing, not finite, or of another
            shape or dtype; its name is given. No code of the folder is run.
    """
    try:
        import transformers
        from safetensors import SafetensorError, safe_open  # noqa: F401

        from .transformers import Config
        from .transformers._place import Placed
    except ImportError as error:
        raise ImportError(
            f"{_LOAD} needs transformers and safetensors ({error}); pip install "
            "'bigkernels[transformers]' installs them"
        ) from error
    folder = Path(folder)
    said = read_json(folder / "config.json")
    quantization = said.get("quantization_config") or said.get("compression_config")
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{_LOAD}: {folder / 'config.json'} has no quantization_config")
    method = method_of(quantization)
    state = State(files_of(folder))
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    kind = _class(transformers, said.get("architectures"))
    placed = Placed(Config("int8"), weights(state, method))
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=placed.state,
            quantization_config=placed.config,
            output_loading_info=True,
            dtype=dtype or getattr(config, "dtype", None) or torch.float32,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:
        raise (placed.errors or [ValueError(f"{_LOAD}: {folder}: {error}")])[0] from error
    check(folder, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"])
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = str(folder)
    model.dense_layers = placed.dense
    return model.eval()


def _class(transformers: Any, names: Any) -> Any:
    for name in names if isinstance(names, list) else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return transformers.AutoModelForCausalLM


def save_quantized(model: nn.Module, folder: str | os.PathLike, method: str, *, max_shard_size: str = "5GB") -> None:
    """Write a model of transformers whose linear layers are quantized as another library stores it: the same values,
    bit for bit, in files that do not need bigkernels.

    Args:
        model: with `bigkernels.nn.QuantizedLinear` layers, and nothing else quantized.
        folder: made if there is none.
        method: "compressed-tensors", which vLLM and transformers read, for int4 (of whole zero points: quantize with
            ``Int4(algorithm="rtn")``), int8, int8-dynamic (W8A8) and fp8; or "gptq", for such int4.
        max_shard_size: of a file, as for `save_pretrained`.

    Raises:
        ImportError: transformers or safetensors is not installed.
        ValueError: there is no such method, or a layer is of a format, or of a size, that the method cannot store; its
            name is given, and nothing is written.
    """
    try:
        from .transformers import plain_saving
    except ImportError as error:
        raise ImportError(
            f"{_SAVE} needs transformers and safetensors ({error}); pip install "
            "'bigkernels[transformers]' installs them"
        ) from error
    state, config = stored_as(model, method)
    plain_saving(model, Path(folder), state, config, max_shard_size)
