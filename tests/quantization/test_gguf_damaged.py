"""GGUF files that are damaged: each is refused by name, or is a model; nothing large is made on the way."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import numpy as np
import pytest

import bigkernels

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf_files import llama  # noqa: E402 - it needs gguf

WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(whole: bytes, header: int, draw: np.random.Generator) -> bytes:
    """A file with bytes, words or a piece of it changed, most of them in its header."""
    made, kind = bytearray(whole), draw.integers(0, 7)
    at = int(draw.integers(4, header - 8))
    if kind == 0:
        return bytes(made[: draw.integers(0, len(made))])
    if kind == 1:
        del made[at : at + int(draw.integers(1, 40))]
    elif kind == 2:
        made[at:at] = draw.integers(0, 256, int(draw.integers(1, 40)), dtype=np.uint8).tobytes()
    elif kind == 3:
        made[at : at + 8] = struct.pack("<Q", WORDS[draw.integers(0, len(WORDS))])
    elif kind == 4:
        made[at : at + 4] = struct.pack("<I", WORDS[draw.integers(0, 5)])
    else:
        first = 4 if kind == 5 else header
        for _ in range(int(draw.integers(1, 8))):
            made[int(draw.integers(first, header if kind == 5 else len(made)))] = draw.integers(0, 256)
    return bytes(made)


def tried(folder: Path, seeds: range) -> tuple[int, int]:
    """How many files were refused, and how many loaded."""
    whole = llama(folder / "whole.gguf", "Q4_K", head=True).read_bytes()
    header = whole.index(b"blk.0.ffn_down.weight") + 60
    path, refused = folder / "damaged.gguf", 0
    for seed in seeds:
        path.write_bytes(damaged(whole, header, np.random.default_rng(seed)))
        try:
            model = bigkernels.load_gguf(path, mmap=False)
        except ValueError as error:
            assert "bigkernels" in str(error), seed
            refused += 1
        else:
            assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), seed
    return refused, len(seeds) - refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files(count: int, tmp_path):
    transformers.logging.set_verbosity_error()
    bigkernels.load_gguf(llama(tmp_path / "first.gguf", "Q4_K"))  # what is imported then is no file's fault
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, loaded = tried(tmp_path, range(count))
    assert refused > count // 3 and loaded > count // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(
    "key, value",
    [
        ("block_count", 2**31),
        ("embedding_length", 2**30),
        ("vocab_size", 2**31 - 1),
        ("context_length", 2**31),
        ("attention.head_count", 2**30),
        ("feed_forward_length", 2**30),
        ("rope.dimension_count", 2**31),
    ],
)
def test_absurd_numbers_are_named(key: str, value: int, tmp_path):
    whole = bytearray(llama(tmp_path / "model.gguf", "Q8_0").read_bytes())
    at = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    whole[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "model.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=rf"llama\.{key} is {value}"):
        bigkernels.load_gguf(tmp_path / "model.gguf")


def header(*parts: bytes, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    "made, message",
    [
        (b"", "no GGUF file"),
        (b"GGUX" + bytes(100), "no GGUF file"),
        (header(tensors=2**62) + bytes(100), "damaged"),
        (header(pairs=2**62) + bytes(100), "two entries|damaged"),
        (header(struct.pack("<Q", 2**62), bytes(50), pairs=1), "damaged"),
        (header(text("a"), struct.pack("<IIQ", 9, 8, 2**40), bytes(64), pairs=1), "damaged"),  # an array of strings
        (header(text("a"), struct.pack("<IIQ", 9, 0, 2**40), bytes(64), pairs=1), "damaged"),
        (header(text("a"), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, pairs=1), "damaged"),  # in arrays
        (header(text("a"), struct.pack("<I", 77), bytes(64), pairs=1), "damaged"),
        (header(text("general.alignment"), struct.pack("<II", 4, 2**31), bytes(64), pairs=1), "alignment of"),
        (header(text("x"), struct.pack("<IQIQ", 1, 2**40, 0, 0), bytes(64), tensors=1), "before tensor x"),
        (header(text("x"), struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0), bytes(64), tensors=1), "before tensor x"),
        (header(text("x"), struct.pack("<IQQIQ", 2, 0, 2**40, 0, 0), bytes(64), tensors=1), "tensor x has shape"),
        (header(text("x"), struct.pack("<IQIQ", 1, 32, 0, 2**63), bytes(64), tensors=1), "before tensor x"),
        (header(text("x"), struct.pack("<IQIQ", 1, 32, 999, 0), bytes(64), tensors=1), "tensor x is of type 999"),
        (header(text("x"), struct.pack("<I", 2**31), bytes(64), tensors=1), "tensor x has 2147483648 dim"),
        (header(text("x"), struct.pack("<IQIQ", 1, 31, 12, 0), bytes(64), tensors=1), "tensor x has shape"),
    ],
)
def test_headers_that_lie(made: bytes, message: str, tmp_path):
    path = tmp_path / "lies.gguf"
    path.write_bytes(made)
    with pytest.raises(ValueError, match=message):
        bigkernels.load_gguf(path)


def test_a_short_file_is_named_by_its_tensor(tmp_path):
    path = llama(tmp_path / "model.gguf", "Q4_K")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"before tensor blk\.0\.ffn_down\.weight"):
        bigkernels.load_gguf(path)
