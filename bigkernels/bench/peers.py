"""Kernels of other packages, where they are installed and run on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from .case import Missing, Settings

LIGER = "liger-kernel"
FLASH = "flash-attn"
FLASH4 = "flash-attn-4"
CUDNN = "cuDNN"
FLEX = "flex_attention"
TORCHAO = "torchao"
MARLIN = "Marlin"
INT_MM = "torch._int_mm"
SCALED_MM = "torch._scaled_mm"
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


def flash_attention_4(make: Callable) -> dict[str, Callable[[str], Callable]]:
    """The peer entry of the flash-attn-4 package: `make(its flash_attn_func)` returns the function to run."""

    def load(device: str) -> Callable:
        if device != "cuda":
            raise Missing("its kernels run on GPUs only")
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as error:
            raise Missing(f"not installed here: {error}") from error

        def first(*args, **options):
            result = flash_attn_func(*args, **options)
            return result[0] if isinstance(result, tuple) else result  # some versions return the log-sum-exps too

        return make(first)

    return {FLASH4: load}


def cudnn(function: Callable) -> dict[str, Callable[[str], Callable]]:
    """The peer entry of a function over `scaled_dot_product_attention`, by cuDNN's kernels alone."""

    def load(device: str) -> Callable:
        if device != "cuda":
            raise Missing("its kernels run on GPUs only")

        def call(*args, **inputs):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return function(*args, **inputs)

        return call

    return {CUDNN: load}


def on_cuda(name: str, make: Callable) -> dict[str, Callable[[str], Callable]]:
    """A peer that `make()` makes on a GPU; what it cannot import is missing."""

    def load(device: str) -> Callable:
        if device != "cuda":
            raise Missing("it competes on GPUs only")
        try:
            return make()
        except ImportError as error:
            raise Missing(f"not installed here: {error}") from error

    return {name: load}


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
