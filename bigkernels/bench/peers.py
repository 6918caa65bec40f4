"""Kernels of other packages, where they are installed and run on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import flex_attention

from .case import Missing, Settings

LIGER = "liger-kernel"
FLASH = "flash-attn"
FLEX = "flex_attention"
BITSANDBYTES = "bitsandbytes"


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


def flash_attention(make: Callable) -> dict[str, Callable[[str], Callable]]:
    """The peer entry of the flash-attn package: `make(flash_attn)` returns the function to run."""

    def load(device: str) -> Callable:
        if device != "cuda":
            raise Missing("its kernels run on GPUs only")
        try:
            import flash_attn
        except ImportError as error:
            raise Missing(f"not installed here: {error}") from error
        return make(flash_attn)

    return {FLASH: load}


def flex(settings: Settings, make: Callable[[Callable], Callable]) -> dict[str, Callable[[str], Callable]]:
    """The peer entry of FlexAttention: `make(the compiled flex_attention)` returns the function to run."""

    def load(device: str) -> Callable:
        if not settings.compile:
            raise Missing("it needs torch.compile, which was left out")
        return make(torch.compile(flex_attention, dynamic=False))

    return {FLEX: load}


def bitsandbytes(make: Callable) -> dict[str, Callable[[str], Callable]]:
    """The peer entry of bitsandbytes: `make(bitsandbytes)` returns the function to run."""

    def load(device: str) -> Callable:
        try:
            import bitsandbytes as package
        except ImportError as error:
            raise Missing(f"not installed here: {error}") from error
        return make(package)

    return {BITSANDBYTES: load}
