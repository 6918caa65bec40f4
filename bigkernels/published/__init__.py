"""Folders that other libraries quantized, with their own codes."""

from ._load import load_quantized
from ._save import save_quantized

__all__ = ["load_quantized", "save_quantized"]
