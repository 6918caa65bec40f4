"""Folders of other libraries by `from_pretrained`, where the user chooses it."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...published._load import State, check, weights
from ...published._methods import method_of
from ._config import Config
from ._place import Placed
from ._quantizer import Quantizer

_METHOD = "bigkernels-published"
# What transformers calls the methods, and their names here.
_KEYS = {
    "gptq": ("gptq",),
    "awq": ("awq",),
    "bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit"),
    "compressed-tensors": ("compressed-tensors",),
    "hqq": ("hqq",),
    "mxfp4": ("mxfp4",),
    "torchao": ("torchao",),
}
_owners: dict[str, type] = {}  # the classes that ours are in the place of


class Published(QuantizationConfigMixin):
    """What config.json of a folder says of another library's quantization."""

    def __init__(self, **said: Any) -> None:
        self.quant_method = _METHOD
        self.said = said

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.said)


class PublishedQuantizer(Quantizer):
    """Reads a folder of another library as `bigkernels.load_quantized` does."""

    def __init__(self, quantization_config: Published, **kwargs: Any) -> None:
        self._method = method_of(quantization_config.said)
        self.placed: Placed | None = None
        super().__init__(Config("int8"), pre_quantized=False)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.placed = Placed(self.quantization_config, weights(State(checkpoint_files or []), self._method))
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.dense_layers = self.placed.dense
        self.placed = None
        return model


def register_published(methods: bool | Collection[str]) -> None:
    """Which methods of other libraries `from_pretrained` reads by bigkernels; those that are not named are their
    owners' again.

    Raises:
        ValueError: there is no such method.
    """
    chosen = set(_KEYS) if methods is True else set() if methods is False else set(methods)
    if unknown := sorted(chosen - set(_KEYS)):
        raise ValueError(f"bigkernels: published names {', '.join(unknown)}; accepted are {', '.join(_KEYS)}")
    for key in [key for keys in _KEYS.values() for key in keys]:
        if key in _owners:
            AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _owners.pop(key)
    for key in [key for method in chosen for key in _KEYS[method]]:
        if key in AUTO_QUANTIZATION_CONFIG_MAPPING:
            _owners[key] = AUTO_QUANTIZATION_CONFIG_MAPPING[key]
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = Published
    if chosen:
        AUTO_QUANTIZER_MAPPING[_METHOD] = PublishedQuantizer
        _teach_loading()


def _teach_loading() -> None:
    """Let models be loaded from what a `PublishedQuantizer` made of the files: a quantizer sees the names of files, and
    the loader opens them by itself.
    """
    load = PreTrainedModel._load_pretrained_model
    if getattr(load, "_bigkernels", False):
        return

    @functools.wraps(load)
    def with_ours(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        if not isinstance(quantizer, PublishedQuantizer):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        load_config = replace(load_config, ignore_mismatched_sizes=True)  # they are looked at below
        placed = quantizer.placed
        try:
            info, rest = load(model, placed.state, None, load_config, *args, **kwargs)
        except RuntimeError as error:
            raise (placed.errors or [error])[0] from error
        folder = load_config.pretrained_model_name_or_path
        whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        if not whole:  # a part of what the folder has, or with a head of its own: transformers says what is not there
            check(folder, (), info.mismatched_keys, ())
            return info, rest
        if placed.errors:
            raise placed.errors[0]
        check(folder, info.missing_keys, info.mismatched_keys, info.unexpected_keys)
        return info, rest

    with_ours._bigkernels = True
    PreTrainedModel._load_pretrained_model = staticmethod(with_ours)
