"""The inputs of a model, and the steps that are planned: one of training; reading a prompt and giving a token."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_private import FakeTensor, tree_map
from ._trace import tensors_in

Inputs = dict[str, Any] | tuple
Loss = Callable[[nn.Module, Inputs], Tensor]


def make_inputs(model: nn.Module, given: Any, batch: int, seq: int, device: torch.device, *, labels: bool) -> Inputs:
    """Fake inputs: those given (only shapes and dtypes count), or those that the model's forward asks for.

    Raises:
        ValueError: the forward asks for something else than token numbers or images.
    """
    if given is not None:
        fakes = tree_map(
            lambda t: torch.empty(t.shape, dtype=t.dtype, device=device) if isinstance(t, Tensor) else t, given
        )
        return fakes if isinstance(fakes, (dict, tuple)) else tuple(fakes) if isinstance(fakes, list) else (fakes,)
    names = inspect.signature(type(model).forward).parameters
    config: Any = getattr(model, "config", None)
    inputs: dict[str, Any] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.zeros(batch, seq, dtype=torch.int64, device=device)
    elif "pixel_values" in names and hasattr(config, "image_size"):
        sides = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        shape = batch, getattr(config, "num_channels", 3), *sides
        inputs["pixel_values"] = torch.zeros(shape, dtype=dtype, device=device)
    else:
        raise ValueError(
            f"bigkernels.plan: {type(model).__name__}.forward takes neither input_ids nor pixel_values; "
            "give `inputs`, a tensor, tuple or dict of the shapes of one batch"
        )
    if labels and "labels" in names:
        whole = "pixel_values" in inputs or type(model).__name__.endswith("ForSequenceClassification")
        shape = (batch,) if whole else (batch, seq)
        inputs["labels"] = torch.zeros(shape, dtype=torch.int64, device=device)
    elif not labels and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    return inputs


def call(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    return model(**inputs, **options) if isinstance(inputs, Mapping) else model(*inputs, **options)


def default_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss that a model of transformers returns; of others the sum of their first output."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    out = call(model, inputs, **options)
    loss = getattr(out, "loss", None)
    if loss is not None:
        return loss
    return next(t for t in tensors_in(out) if t.is_floating_point()).sum()


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Models of transformers look at positions for sequences that share a row; those of fakes they cannot read, and
    would then build masks that a run does without."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    original = getattr(masks, "find_packed_sequence_indices", None)
    if original is None:
        yield
        return

    def find(position_ids: Tensor) -> Tensor | None:
        return None if isinstance(position_ids, FakeTensor) else original(position_ids)

    masks.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = original


def takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters
