"""GGUF files by ``from_pretrained(folder, gguf_file=name)``: in codes, on every device, instead of dequantized."""

# mypy: ignore-errors

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ...gguf._file import File
from ...gguf._load import open_file, stand
from ...gguf._source import Contents
from ...gguf._state import read_contents
from ._config import Config
from ._held import describe
from ._quantizer import Quantizer

try:
    from transformers.integrations import gguf as known
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    _theirs = known.read_gguf_metadata
except ImportError:  # before version 5.24 files are dequantized, by no quantizer
    GgufHfQuantizer = None


class GgufQuantizer(Quantizer):
    """transformers' quantizer of GGUF files, as `load_gguf` reads them. Architectures that transformers keeps in blocks
    by itself, and ``GgufConfig(dequantize=True)``, are left to its own.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self._file: File | None = None
        self._contents: Contents | None = None
        self._dtype = torch.float32

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_file": None, "_contents": None}

    def read_header(self, gguf_file: str) -> None:
        from transformers.integrations.gguf import is_gguf_arch_supported

        asked = self.quantization_config
        self._file = open_file(gguf_file)
        if asked.dequantize or is_gguf_arch_supported(self._file.architecture):
            self.__class__ = GgufHfQuantizer
            self.__init__(asked)
            self.read_header(gguf_file)
            return
        self.quantization_config = Config()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        return self._dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _tie(model)
        self._contents = read_contents(self._file, model, model.config, self._dtype, True)
        stand(model, self._contents)
        self._tied = describe(model)["tied"]
        self._expect(model)

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Tensor]:
        return self._contents.state

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> list:
        return []  # those of the model are for names and shapes of safetensors files

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.__dict__["gguf_source"] = self._contents.source
        self._contents = self._file = None
        return model


def _tie(model: nn.Module) -> None:
    """Weights that transformers ties after loading are one from now on."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        owner, _, key = target.rpartition(".")
        try:
            model.get_submodule(owner)._parameters[key] = model.get_parameter(source)
        except AttributeError:
            continue


def register_gguf(ours: bool) -> None:
    if GgufHfQuantizer is not None:
        AUTO_QUANTIZER_MAPPING["gguf"] = GgufQuantizer if ours else GgufHfQuantizer
        known.read_gguf_metadata = _checked if ours else _theirs


def _checked(gguf_path: str, *args: Any, **kwargs: Any) -> Any:
    """transformers' reader, which asks for a file's metadata first, of a file that holds what its header says.

    Raises:
        ValueError: it does not; the tensor is named.
    """
    import gguf

    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    File.read(Path(gguf_path), sizes, whole=False).bytes.close()
    return _theirs(gguf_path, *args, **kwargs)
