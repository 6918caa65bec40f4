"""One token at the sizes of SmolLM2-135M: what a call costs where there is hardly any work.

torch.compile does not compete: its wrapper around one tiny operator costs more than any of the operators.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch

from ..case import Case, Settings
from . import cross_entropy, glu, layer_norm, rms_norm, rope


def cases(settings: Settings) -> list[Case]:
    options = {"family": "small", "metric": "us", "compiled": False, "cold": False}
    dtype = torch.bfloat16
    return [
        case
        for backward in (False, True)
        for case in (
            rms_norm.case(settings, 1, 576, dtype, backward=backward, name="rms_norm 576", **options),
            layer_norm.case(settings, 1, 576, dtype, backward=backward, name="layer_norm 576", **options),
            rope.case(settings, 9, 3, 1, 64, dtype, backward=backward, name="rope 9/3x64", **options),
            glu.case(settings, 1, 1536, dtype, backward=backward, name="glu 1536", **options),
            cross_entropy.case(settings, 1, 49152, dtype, backward=backward, name="cross_entropy 49152", **options),
        )
    ]
