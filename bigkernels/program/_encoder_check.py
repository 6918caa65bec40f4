"""A layer's graph against the layer's own code, both in float64; and a program against the layers, as they are."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import nn

from . import _encoder_reference as reference
from ._encoder_call import Form, Given, drawn
from ._encoder_ir import LayerGraph
from ._layers import products
from ._products import Drawn
from ._trace import Refused

_ERROR = 1e-6  # relative to the largest


def check_layer(layer: nn.Module, graph: LayerGraph, form: Form, seen: Given) -> None:
    """
    Raises:
        Refused: they differ.
    """
    from ._encoder_identify import record_layer

    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    for own, (batch, length) in ((True, (2, 6)), (False, (3, 18)), (False, (1, 33))):
        given = drawn(form, seen, batch, length, 11 + batch, device)
        if own:
            trace, _ = record_layer(layer, given, form.dtype)
            made = reference.run(graph, given)
        else:
            weights = Drawn()
            with products(weights):
                trace, _ = record_layer(layer, given, form.dtype)
                made = reference.run(graph, given)
        theirs = trace.recorder.steps[trace.logits.step].outs[trace.logits.number]
        theirs = theirs.reshape(made.shape)
        error, scale = (made - theirs).abs().max().item(), theirs.abs().max().item()
        if not error <= _ERROR * scale:
            raise Refused(f"(layer): what was found differs from the layer by {error / scale:.1e}, {length} tokens")
