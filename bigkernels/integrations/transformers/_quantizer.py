"""How transformers loads, saves and trains a model that bigkernels quantized."""

# mypy: ignore-errors

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from ...nn import LoRALinear, QuantizedLinear
from ...nn._weight import LazyWeight
from ...nn.quantized import Quantized
from ...quantization import dequantize
from ...quantization._ties import name_codes
from ...quantization.layers import is_linear
from ...quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear
from ...quantization.select import places, put
from ._config import METHOD, Config
from ._files import check
from ._held import adapters, build, describe, quantized
from ._read import Reading, ReadingBase

# An unknown method is a warning to transformers, and an unknown fusion an error, whose text this is a part of.
NOTE = "this model is quantized by bigkernels; `import bigkernels.integrations.transformers` before you load it"
_OURS = "_bigkernels_plain"  # what a model had before it was noted


class Quantizer(HfQuantizer):
    """transformers' quantizer of the method "bigkernels"."""

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: weakref.ref | None = None
        self._reading: ReadingBase | None = None
        self._stored: set[str] = set()
        self._tied: dict[str, str] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": self._model and self._model(), "_reading": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._model = state["_model"] and weakref.ref(state["_model"])

    # ---- loading ---------------------------------------------------------------------------------------------------

    def update_attn_implementation(self, config: Any) -> Any:
        _without_note(config)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self._reading = (self.quantization_config.reading or Reading)(model, self.quantization_config)
            _untie(model, self._reading.grouped)
            return
        self._tied = build(model, self.quantization_config.held)
        expected = self._expect(model)
        marks = check(checkpoint_files or [], expected, model.base_model_prefix)
        model._keys_to_ignore_on_load_unexpected = _joined(model._keys_to_ignore_on_load_unexpected, marks)

    def _expect(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors that files have of layers with codes, of which some read another's (`_tied`)."""
        held = dict(model.named_modules())
        for path, source in self._tied.items():
            if source is not None:
                held[path].share(held[source])
        codes = {path: module for path, module in held.items() if isinstance(module, Quantized)}
        self._stored = {f"{path}.{name}" for path, module in codes.items() for name in module._buffers}
        _untie(model, codes)
        second = {f"{path}.{name}" for path in self._tied for name in held[path].qweight.tensors}
        model._keys_to_ignore_on_load_missing = _joined(model._keys_to_ignore_on_load_missing, second)
        expected = {f"{path}.{name}": t for path, module in codes.items() for name, t in module._buffers.items()}
        return {name: t for name, t in expected.items() if name not in second}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._reading is not None and param_name in self._reading.chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return self._reading.bytes_an_element(param_name, param)

    def get_quantize_ops(self) -> Any:
        return self._reading

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if converter.target_patterns[0] in self._stored:  # what a model keeps in float32 by name are its weights
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            _share_codes(model)
        held = dict(model.named_modules())
        for path, source in self._tied.items():
            if source is None:
                raise ValueError(f"bigkernels: {path} reads the codes of a layer that {type(model).__name__} has not")
            held[path].share(held[source])
        for path, module in held.items():
            if isinstance(module, Quantized) and self.pre_quantized:
                _check_loaded(path, module)
        if found := adapters(model):
            for module in model.modules():
                module.requires_grad_(False)
            for adapter in found.values():
                adapter.lora_a.requires_grad_(True)
                adapter.lora_b.requires_grad_(True)
        trained = any(p.requires_grad for p in model.parameters())
        for module in held.values():
            if isinstance(module, Quantized):
                module._among_trained = trained
        self._reading = None
        if self.pre_quantized:  # our files need no conversion; what is dequantized is saved as usual
            model.__dict__.pop("_weight_conversions", None)
        model.__dict__.setdefault(_OURS, {})
        note(model)
        return model

    # ---- saving ----------------------------------------------------------------------------------------------------

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: Any) -> tuple[dict[str, Tensor] | None, dict]:
        held, lora = quantized(model), adapters(model)
        if not held and not lora:
            forget(model)
            return None, {}
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are saved
            return None, {}
        before = getattr(model, _OURS, {}).get("hf_quantizer")
        if before is not None:
            raise ValueError(f"bigkernels: the model is quantized by {type(before).__name__} too, and cannot be saved")
        wrapped = next((path for path in held if "base_layer" in path.split(".")), None)
        if wrapped is not None:
            raise ValueError(
                f"bigkernels: {wrapped} is inside of an adapter of PEFT, which `from_pretrained` would "
                "not find; save the adapters by their PeftModel, or `unload` them first"
            )
        if not any(p.is_floating_point() for p in model.parameters()):
            raise ValueError(
                "bigkernels: transformers saves no model all of whose parameters are quantized; leave one "
                "out, as the head by `skip`"
            )
        merged = next((path for path, module in lora.items() if module.merged), None)
        if merged is not None:
            raise ValueError(f"bigkernels: the adapter of {merged} is merged; `unmerge` it before you save the model")
        model.config.quantization_config = Config(**describe(model))
        model.config.fusion_config = {**(getattr(model.config, "fusion_config", None) or {}), NOTE: True}
        # Names and shapes are those of this model: what transformers does to weights it does not do to codes.
        model.__dict__[_OURS].setdefault("_weight_conversions", model.__dict__.get("_weight_conversions"))
        model._weight_conversions = []
        state, seen = {}, {}
        for name, t in model.state_dict().items():
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            if isinstance(module, Quantized) and key in module._buffers:
                of = module._tie if module._tie is not None and key in module.qweight.tensors else module
                if seen.setdefault((id(of), key), path) != path:
                    continue
            state[name] = t
        mark = _marked(model, held, lora)
        state.setdefault(mark, torch.empty(0, dtype=torch.uint8, device="cpu"))
        return state, {}

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        note(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize(model)
        return model if dtype is None else model.to(dtype)

    # ---- training --------------------------------------------------------------------------------------------------

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model has something of ours to train."""
        model = self._model and self._model()
        kinds = (LoRALinear, FakeQuantizedLinear, FakeQuantizedEmbedding)
        return model is not None and any(isinstance(m, kinds) for m in model.modules())

    @property
    def is_compileable(self) -> bool:
        return True


def note(model: nn.Module) -> None:
    """Tell each model of transformers in `model` that it is quantized, or has adapters, or is so no longer."""
    outermost = True
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        codes = any(isinstance(m, Quantized) for m in module.modules())
        if not codes and not any(isinstance(m, LoRALinear) for m in module.modules()):
            forget(module)
            continue
        quantizer = getattr(module, "hf_quantizer", None)
        if _OURS not in module.__dict__:
            ours = isinstance(quantizer, Quantizer)
            module.__dict__[_OURS] = {} if ours or quantizer is None else {"hf_quantizer": quantizer}
        if not isinstance(quantizer, Quantizer):
            quantizer = module.hf_quantizer = Quantizer(Config(), pre_quantized=True)
        quantizer._model = weakref.ref(module)
        module.is_quantized = module.config._is_quantized = codes
        module.quantization_method = METHOD
        if outermost:
            quantizer.quantization_config = module.config.quantization_config = Config(**describe(module))
        outermost = False


def forget(model: PreTrainedModel) -> None:
    """The model is one of plain layers again."""
    plain = model.__dict__.pop(_OURS, None)
    if plain is None:
        return
    for key in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(key, None)
    if plain.get("hf_quantizer") is not None:
        model.hf_quantizer = plain["hf_quantizer"]
    if "_weight_conversions" in plain:
        model.__dict__.pop("_weight_conversions", None)
        if plain["_weight_conversions"] is not None:
            model._weight_conversions = plain["_weight_conversions"]
    model.is_quantized = model.config._is_quantized = False
    if isinstance(getattr(model.config, "quantization_config", None), Config):
        del model.config.quantization_config
    _without_note(model.config)


def register_quantizer() -> None:
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Quantizer)


def _without_note(config: Any) -> None:
    fusions = getattr(config, "fusion_config", None)
    if isinstance(fusions, dict) and NOTE in fusions:
        config.fusion_config = {key: value for key, value in fusions.items() if key != NOTE} or None
        if config.fusion_config is None:
            del config.fusion_config


def _marked(model: nn.Module, held: dict[str, Quantized], lora: dict[str, LoRALinear]) -> str:
    """The name of a weight that a model without codes expects: found with no elements, it is one of another shape,
    which every version of transformers refuses.
    """
    path = next((p for p in held if p not in lora), None) or next(iter(lora), None)
    return path if path in held and hasattr(held[path], "experts") else f"{path}.weight"


def _joined(patterns: Any, names: set[str]) -> set[str]:
    return {*(patterns or ()), *(f"^{re.escape(name)}$" for name in names)}


def _untie(model: PreTrainedModel, codes: Any) -> None:
    """transformers ties parameters, biases of layers with codes too; codes are tied by themselves."""
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if isinstance(tied, dict):
            names = {id(model.get_submodule(path)) for path in codes}
            module.all_tied_weights_keys = {
                target: source
                for target, source in tied.items()
                if not target.endswith("weight") or id(module.get_submodule(target.rpartition(".")[0])) not in names
            }


def _share_codes(model: PreTrainedModel) -> None:
    """A head that transformers has tied to an embedding in codes reads these, and not values of theirs."""
    where = {path: paths for paths in places(model).values() for path in paths}
    paths = {module: path for path, module in model.named_modules()}
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        owner = weight._owner if isinstance(weight, LazyWeight) else None
        if not isinstance(owner, Quantized) or not is_linear(type(module)):
            continue
        layer = QuantizedLinear.standing_for(module, owner.qweight)
        put(model, where[path], layer)
        layer.share(owner)
        stored = tuple(owner.qweight.tensors)
        layer._tied_weights_keys = {key: f"{paths[owner]}.{key}" for key in stored}
        name_codes(model, {name: stored for name in (*where[paths[owner]], *where[path])})


def _check_loaded(path: str, module: Quantized) -> None:
    for name, t in (*module._buffers.items(), *module._parameters.items()):
        if t is None or t.is_meta:  # offloaded
            continue
        if not getattr(t, "_is_hf_initialized", False):
            raise ValueError(f"bigkernels: the checkpoint has no tensor {path}.{name}")
        if t.is_floating_point() and name in module.qweight.tensors and not t.isfinite().all():
            raise ValueError(f"bigkernels: {path}.{name} holds a value that is not finite")
    said = module._buffers["format"]
    if not said.is_meta and not torch.equal(said.cpu(), module.description()):
        text = bytes(said.cpu().tolist()).decode(errors="replace")
        raise ValueError(f"bigkernels: config.json and {path}.format do not agree: the file says {text}")


def plain_saving(
    model: PreTrainedModel, folder: Any, state: dict[str, Tensor], said: dict[str, Any], max_shard_size: str
) -> None:
    """`save_pretrained` of given tensors, with a quantization_config of another library."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"bigkernels.save_quantized: the model is a {type(model).__name__}, none of transformers")
    kept = {key: model.__dict__.pop(key, None) for key in ("hf_quantizer", "_weight_conversions")}
    before = model.config
    model.config = copy.deepcopy(before)
    _without_note(model.config)
    model.config.quantization_config = said
    model._weight_conversions = []
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    finally:
        model.config = before
        model.__dict__.pop("_weight_conversions", None)
        model.__dict__.update({key: value for key, value in kept.items() if value is not None})
