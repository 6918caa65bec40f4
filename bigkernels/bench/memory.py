"""How much memory a step needs beyond what is there before it."""

from __future__ import annotations

from collections.abc import Callable

from ..memory import peak, quiet_stderr


def extra_peak(step: Callable[[], object], device: str) -> int:
    """The `bigkernels.memory.peak` of one step, in bytes; what it returns is held until the end."""
    with quiet_stderr(), peak(device) as region:
        kept = step()
    del kept
    return region.bytes
