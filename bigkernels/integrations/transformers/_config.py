"""What `from_pretrained` is told about quantization, and what config.json says about it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..._deprecated import renamed_members
from ...quantization import Format, resolve_format
from ...quantization.select import as_names

METHOD = "bigkernels"
VERSION = 1

Formats = str | Format | Mapping[str, str | Format | None]


@renamed_members("bigkernels.integrations.transformers.Config", config="format")
class Config(QuantizationConfigMixin):
    """``from_pretrained(path, quantization_config=Config("int4"))`` quantizes each weight as it is read.

    Args:
        format, skip, embeddings: as `bigkernels.quantize` takes them. Formats that are calibrated need a loaded model.
        formats, tied, adapters, version, quant_method: what config.json of a saved model says: the formats and the
            names of their layers (``*`` for any number), layers that share the codes of another, and adapters
            (`bigkernels.nn.LoRALinear`).

    Raises:
        ValueError: there is no such format, it needs data, or the file was written by a newer bigkernels.
    """

    def __init__(
        self,
        format: Formats | dict | None = None,
        *,
        skip: str | tuple[str, ...] = ("lm_head",),
        embeddings: bool = False,
        formats: list[dict] | None = None,
        tied: dict[str, str] | None = None,
        adapters: list[dict] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if version > VERSION:
            raise ValueError(
                f"bigkernels: the model was saved by a newer bigkernels: files of version {version}, "
                f"where {VERSION} is known"
            )
        self.quant_method = quant_method
        self.format, self.skip, self.embeddings = _formats(format), as_names(skip), embeddings
        self.reading: Any = None  # makes the operation of the loader from a model, where it is not the usual one
        self.held = {"formats": formats or [], "tied": tied or {}, "adapters": adapters or []}
        for each in self._chosen():
            if each is not None and each.calibrated:
                raise ValueError(
                    f"bigkernels: {each} is calibrated; load the model, then "
                    "bigkernels.quantize(model, ..., calibration=batches)"
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of what config.json says, where the format is called "config"."""
        names = {"config": "format"}
        return super().from_dict({names.get(key, key): value for key, value in config_dict.items()}, **kwargs)

    def _chosen(self) -> list[Format | None]:
        return list(self.format.values()) if isinstance(self.format, dict) else [self.format]

    def to_dict(self) -> dict[str, Any]:
        if "peft" in sys.modules:  # which asks for a model's configuration before it puts adapters on
            importlib.import_module("bigkernels.integrations.peft")
        described: dict[str, Any] = {"quant_method": self.quant_method, "version": VERSION}
        if any(self.held.values()):
            return described | {key: value for key, value in self.held.items() if value}
        if isinstance(self.format, dict):
            described["config"] = {key: None if f is None else as_dict(f) for key, f in self.format.items()}
        elif self.format is not None:
            described["config"] = as_dict(self.format)
        return described | {"skip": list(self.skip), "embeddings": self.embeddings}

    def __iter__(self):
        yield from self.to_dict().items()


def as_dict(config: Format) -> dict[str, Any]:
    """A format as JSON holds it."""
    return {"format": config.name, **dataclasses.asdict(config)}


def from_dict(described: Mapping[str, Any]) -> Format:
    """The format of what `as_dict` made.

    Raises:
        ValueError: it is none.
    """
    options = dict(described)
    format = resolve_format(str(options.pop("format", None)))
    try:
        return dataclasses.replace(format, **options)
    except TypeError as error:
        raise ValueError(f"bigkernels: {format.name} has no such options: {options}") from error


def _formats(config: Any) -> Any:
    if config is None or isinstance(config, (str, Format)):
        return config if config is None else resolve_format(config)
    if "format" in config and isinstance(config["format"], str):
        return from_dict(config)
    return {
        key: from_dict(f) if isinstance(f, Mapping) else None if f is None else resolve_format(f)
        for key, f in config.items()
    }
