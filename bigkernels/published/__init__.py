"""Folders that other libraries quantized, with their own codes."""

from ._load import load_quantized

__all__ = ["load_quantized"]
