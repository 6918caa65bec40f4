"""The vocabulary of a tokenizer as a GGUF file has it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._file import ARRAY, STRING, File, Pair

_WHAT = "bigkernels.save_gguf"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_INT32, _UINT32, _FLOAT32, _BOOL = 5, 4, 6, 7
_PREFIX = "tokenizer."

# How text is cut before its bytes are merged, by the names that llama.cpp gives to it.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CUTS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace("{1,3}", ""): "qwen2"}


def vocabulary(source: str | os.PathLike, size: int, sizes: dict[int, tuple[int, int]]) -> dict[str, Pair]:
    """From another GGUF file, whose entries are taken as they are, or from a folder with a tokenizer.json or a
    tokenizer.model of SentencePiece.

    Raises:
        ImportError: sentencepiece is not installed, and the folder has a tokenizer.model.
        ValueError: the vocabulary is of another size, or llama.cpp's name for its way to cut text is not known.
    """
    path = Path(source)
    if path.is_file() and path.suffix != ".json":
        file = File.read(path, sizes)
        found = {key: pair for key, pair in file.metadata.items() if key.startswith(_PREFIX)}
        count = found["tokenizer.ggml.tokens"].count if "tokenizer.ggml.tokens" in found else 0
    else:
        folder = path if path.is_dir() else path.parent
        found, count = (_of_pieces if (folder / "tokenizer.model").exists() else _of_merges)(folder, size)
    if count != size:
        raise ValueError(f"{_WHAT}: {source} has {count} tokens, and the model {size}")
    return found


def _of_merges(folder: Path, size: int) -> tuple[dict[str, Pair], int]:
    try:
        read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{_WHAT}: {folder} has no tokenizer.json that can be read ({error}); give a GGUF file with "
            "the same vocabulary instead"
        ) from error
    known, added = read["model"], read.get("added_tokens", [])
    cut = _cut(read.get("pre_tokenizer"))
    if (
        known.get("type") != "BPE"
        or known.get("byte_fallback")
        or cut is None
        or read.get("normalizer") not in (None, {"type": "NFC"})
    ):
        raise ValueError(
            f"{_WHAT}: llama.cpp's name for the tokenizer in {folder} is not known here; give a GGUF file "
            "with the same vocabulary instead"
        )
    by_number = {i: text for text, i in known["vocab"].items()} | {t["id"]: t["content"] for t in added}
    kinds = dict.fromkeys(by_number, _NORMAL)
    kinds |= {t["id"]: _CONTROL if t["special"] else _USER_DEFINED for t in added}
    count = max(size, max(by_number, default=-1) + 1)
    tokens = [by_number.get(i, f"[PAD{i}]") for i in range(count)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in known["merges"]]
    found = {
        "tokenizer.ggml.model": _text("gpt2"),
        "tokenizer.ggml.pre": _text(cut),
        "tokenizer.ggml.tokens": _texts(tokens),
        "tokenizer.ggml.merges": _texts(merges),
        "tokenizer.ggml.token_type": _numbers(_INT32, "i", [kinds.get(i, _UNUSED) for i in range(count)]),
    }
    return found | _special(folder, {t: i for i, t in enumerate(tokens)}), count


def _of_pieces(folder: Path, size: int) -> tuple[dict[str, Pair], int]:
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{_WHAT}: a tokenizer.model is read by sentencepiece, which is not installed") from error
    from gguf.vocab import SentencePieceVocab

    try:
        read = SentencePieceVocab(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{_WHAT}: {folder} has no tokenizer.model that can be read ({error})") from error
    pieces = [(text.decode(), score, int(kind)) for text, score, kind in read.all_tokens()]
    special = _added(folder)
    for i, text in special.items():  # of tokenizer_config.json, which files of pieces need not know
        if i < len(pieces) and pieces[i][0] == text:
            pieces[i] = text, pieces[i][1], _CONTROL
    pieces += [
        (special.get(i, f"[PAD{i}]"), -1000.0, _CONTROL if i in special else _UNUSED) for i in range(len(pieces), size)
    ]
    texts, scores, kinds = zip(*pieces, strict=True)
    prefix = read.sentencepiece_tokenizer.EncodeAsPieces("a")[:1] != ["a"]
    found = {
        "tokenizer.ggml.model": _text("llama"),
        "tokenizer.ggml.pre": _text("default"),
        "tokenizer.ggml.tokens": _texts(list(texts)),
        "tokenizer.ggml.scores": _numbers(_FLOAT32, "f", scores),
        "tokenizer.ggml.token_type": _numbers(_INT32, "i", kinds),
        "tokenizer.ggml.add_space_prefix": Pair(_BOOL, 1, b"", prefix),
    }
    return found | _special(folder, {t: i for i, t in enumerate(texts)}), len(texts)


def _cut(found: Any) -> str | None:
    parts = found["pretokenizers"] if (found or {}).get("type") == "Sequence" else [found or {}]
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    rest, regex = parts[:-1], parts[-1].get("use_regex", True)
    if not rest:
        return "gpt-2" if regex else None
    if len(rest) > 1:
        return None
    if rest[0].get("type") == "Digits" and rest[0].get("individual_digits") and regex:
        return "smollm"
    if rest[0].get("type") != "Split" or rest[0].get("behavior") != "Isolated" or rest[0].get("invert") or regex:
        return None
    return _CUTS.get(rest[0]["pattern"].get("Regex"))


def _said(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _added(folder: Path) -> dict[int, str]:
    """The special tokens that tokenizer_config.json names with their numbers."""
    added = _said(folder).get("added_tokens_decoder", {})
    return {int(i): token["content"] for i, token in added.items() if token.get("special")}


def _special(folder: Path, numbers: dict[str, int]) -> dict[str, Pair]:
    """What tokenizer_config.json says of tokens with a meaning, and the template of chats."""
    said = _said(folder)
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = said.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in numbers:
            found[f"tokenizer.ggml.{key}_token_id"] = Pair(_UINT32, 1, b"", numbers[token])
    for name in ("bos", "eos"):
        found[f"tokenizer.ggml.add_{name}_token"] = Pair(_BOOL, 1, b"", bool(said.get(f"add_{name}_token", False)))
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else said.get("chat_template")
    return found | ({"tokenizer.chat_template": _text(template)} if isinstance(template, str) else {})


def _text(value: str) -> Pair:
    return Pair(STRING, 1, b"", value)


def _texts(values: list[str]) -> Pair:
    encoded = [value.encode() for value in values]
    raw = struct.pack("<IQ", STRING, len(encoded)) + b"".join(struct.pack("<Q", len(e)) + e for e in encoded)
    return Pair(ARRAY, len(encoded), raw, None)


def _numbers(kind: int, code: str, values: Sequence[float]) -> Pair:
    return Pair(ARRAY, len(values), struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values), None)
