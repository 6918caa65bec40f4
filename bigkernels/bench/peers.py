"""Kernels of other packages, where they are installed and run on the device."""

from __future__ import annotations

from collections.abc import Callable

from .case import Missing

LIGER = "liger-kernel"


def liger(make: Callable) -> dict[str, Callable[[str], Callable]]:
    """The peer entry for `operator_case`: `make(liger_kernel.transformers.functional)` returns the function to run."""

    def load(device: str) -> Callable:
        if device != "cuda":
            raise Missing("its kernels run on GPUs only")
        try:
            from liger_kernel.transformers import functional
        except ImportError as error:
            raise Missing(f"not installed here: {error}") from error
        try:
            return make(functional)
        except AttributeError as error:
            raise Missing(f"this version lacks the function: {error}") from error

    return {LIGER: load}
