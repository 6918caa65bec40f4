"""What models of transformers know of weights that are tied, where these are codes.

Such a model lists the names of its tied weights (`_tied_weights_keys`); `tie_weights` looks these up among parameters
and buffers, and `save_pretrained` leaves the second of two names out. Codes have other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

_NAMES, _PLAIN = "_tied_weights_keys", "_tied_weights_keys_unquantized"


def name_codes(model: nn.Module, tied: Mapping[str, Iterable[str]]) -> None:
    """Put the names of codes in the place of those of weights.

    Args:
        tied: path of each layer with codes that it shares, and the names of these.
    """
    for prefix, module in model.named_modules():
        mapping = getattr(module, _NAMES, None)
        if not isinstance(mapping, Mapping) or _PLAIN in module.__dict__:
            continue
        copies = {}
        for target, source in mapping.items():
            codes = [tied.get(f"{prefix}.{name}".lstrip(".").removesuffix(".weight")) for name in (target, source)]
            if codes[0] is None or None in codes:
                copies[target] = source
            else:
                copies |= {
                    target.removesuffix("weight") + name: source.removesuffix("weight") + name for name in codes[0]
                }
        if copies != mapping:
            module.__dict__[_PLAIN], module.__dict__[_NAMES] = module.__dict__.get(_NAMES), copies


def name_weights(model: nn.Module) -> None:
    """The names of weights again."""
    for module in model.modules():
        if _PLAIN in module.__dict__:
            plain = module.__dict__.pop(_PLAIN)
            module.__dict__.pop(_NAMES)
            if plain is not None:
                module.__dict__[_NAMES] = plain
