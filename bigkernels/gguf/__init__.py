"""GGUF files: language models with the file's own codes, and back."""

from ._load import load_gguf
from ._save import save_gguf

__all__ = ["load_gguf", "save_gguf"]
