"""What a GGUF file holds (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read so that a damaged file
raises ValueError, allocates no more than its own size and runs nothing.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantization.ggml import BLOCK_TYPES, BlockType

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
_DEEPEST = 8  # arrays in arrays
_BY_NUMBER = {row.number: row for row in BLOCK_TYPES.values()}
_FEW = 4096  # elements of an array that is kept
_MOST_POSITIONS = 2**27


@dataclass(frozen=True)
class Info:
    """A tensor: its name, shape (the longest stride first), type by number, and where its bytes are in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int

    @property
    def row(self) -> BlockType | None:
        """The row of its type, None of one that the `gguf` package alone decodes."""
        return _BY_NUMBER.get(self.kind)


@dataclass(frozen=True)
class Pair:
    """One entry of the metadata: its type, the number of elements of an array, its bytes after key and type, and its
    value; None of arrays that are long or of arrays.
    """

    kind: int
    count: int
    raw: bytes
    value: Any


@dataclass(frozen=True)
class File:
    """Metadata, tensors, and all bytes, mapped into memory: what is written there stays in this process."""

    path: Path
    metadata: dict[str, Pair]
    tensors: list[Info]
    bytes: mmap.mmap

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata[key].value if key in self.metadata else default

    def data(self, tensor: Info) -> Tensor:
        """The bytes of a tensor, in the file's memory, as a tensor with storage of its own."""
        return torch.frombuffer(self.bytes, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.begin)

    def forget(self, tensor: Info) -> None:
        """Let the system take back the memory of a tensor's bytes, which are in the file still."""
        begin = tensor.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self.bytes.madvise(mmap.MADV_DONTNEED, begin, tensor.begin + tensor.nbytes - begin)

    def fail(self, why: str) -> ValueError:
        return ValueError(f"bigkernels.load_gguf: {self.path}: {why}")

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture"))

    def check_finite(self, tensor: Info) -> None:
        """Raise ValueError where a scale, or a number, is infinite or NaN."""
        row, data = tensor.row, self.data(tensor)
        if row is None:
            return
        if row.is_numbers:
            bad = data.numel() > 0 and not row.decode(data).isfinite().all()
        else:
            blocks = data.view(-1, row.nbytes)
            bad = any(bool((blocks[:, at + 1] & 0x7C == 0x7C).any()) for at in row.scales)
        if bad:
            what = "number" if row.is_numbers else "scale"
            raise self.fail(f"tensor {tensor.name} holds a {what} that is not finite")

    @classmethod
    def read(cls, path: Path, sizes: dict[int, tuple[int, int]], whole: bool = True) -> File:
        """`sizes`: elements and bytes of a block of each type. Without `whole`, sizes in the metadata are not compared
        with those of the tensors.

        Raises:
            OSError: there is no such file.
            ValueError: it is no GGUF file, or its header does not describe it.
        """
        size = path.stat().st_size
        what = f"bigkernels.load_gguf: {path}"
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{what} is no GGUF file")
            held = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
        cursor = Cursor(held, 4)
        try:
            metadata, headers = cursor.header(what)
        except (EOFError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"{what} ends in its header, or is damaged there") from error
        start = cursor.at
        alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 0 < alignment <= 2**16:
            raise ValueError(f"{what} has an alignment of {alignment!r}")
        start += -start % alignment
        tensors, seen = [], set()
        for name, shape, kind, offset in headers:
            if kind not in sizes:
                raise ValueError(f"{what}: tensor {name} is of type {kind}, which the gguf package does not know")
            elements, nbytes = sizes[kind]
            if not 1 <= len(shape) <= 4 or 0 in shape or shape[-1] % elements:
                raise ValueError(f"{what}: tensor {name} has shape {shape}")
            nbytes *= math.prod(shape) // elements
            if start + offset + nbytes > size:
                raise ValueError(f"{what} ends before tensor {name} does")
            if name in seen:
                raise ValueError(f"{what} has two tensors {name}")
            seen.add(name)
            tensors.append(Info(name, shape, kind, start + offset, nbytes))
        file = cls(path, metadata, tensors, held)
        if whole:
            file._check_sizes()
        return file

    def _check_sizes(self) -> None:
        """Sizes that the metadata give are those of some tensor: nothing larger is made of them."""
        architecture = self.architecture
        most = max((n for tensor in self.tensors for n in tensor.shape), default=0)
        layers = {int(m[1]) for t in self.tensors if (m := re.match(r"(?:\w+\.)?blk\.(\d{1,9})\.", t.name))}
        for key, pair in self.metadata.items():
            if not key.startswith(f"{architecture}."):
                continue
            name = key.removeprefix(f"{architecture}.")
            numbers = pair.value if isinstance(pair.value, list) else [pair.value]
            if not re.search(r"_length$|_count|_size$|_dim|block|head|rank|length", name) or pair.kind == STRING:
                continue
            limit = most + 8
            if name in ("block_count", "decoder_block_count", "encoder.block_count"):
                limit = max(layers, default=-1) + 1
            elif re.search(r"context|position|window|chunk|original", name):
                limit = _MOST_POSITIONS
            if any(isinstance(n, (int, float)) and not -1 <= n <= limit for n in numbers):
                raise self.fail(f"{key} is {pair.value}, and no tensor has that size")


class Cursor:
    """Reads values one after the other; EOFError where the file ends."""

    def __init__(self, data: mmap.mmap | bytes, at: int = 0) -> None:
        self.data, self.at, self.size = data, at, len(data)

    def header(self, what: str) -> tuple[dict[str, Pair], list[tuple[str, tuple[int, ...], int, int]]]:
        """The metadata, and name, shape, type and offset of each tensor."""
        version = self.take("I")
        if version not in (2, 3):
            raise ValueError(f"{what} is of version {version}; accepted are 2 and 3, little-endian")
        count, pairs = self.take("Q"), self.take("Q")
        metadata: dict[str, Pair] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                raise ValueError(f"{what} has two entries {key}")
            metadata[key] = self.pair()
        headers = []
        for _ in range(count):
            name, rank = self.string(), self.take("I")
            if rank > 8:
                raise ValueError(f"{what}: tensor {name} has {rank} dimensions")
            dims = [self.take("Q") for _ in range(rank)]
            headers.append((name, tuple(reversed(dims)), self.take("I"), self.take("Q")))
        return metadata, headers

    def skip(self, count: int) -> int:
        """Go on by some bytes, and say where they begin."""
        begin = self.at
        if count > self.size - begin:
            raise EOFError
        self.at += count
        return begin

    def take(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        begin = self.skip(self.take("Q"))
        return self.data[begin : self.at].decode()

    def pair(self) -> Pair:
        kind, begin = self.take("I"), self.at
        count, value = 1, None
        if kind == STRING:
            value = self.string()
        elif kind == ARRAY:
            count, value = self._array()
        else:
            value = self.take(SCALARS[kind])
        return Pair(kind, count, self.data[begin : self.at], value)

    def _array(self, depth: int = 0) -> tuple[int, Any]:
        """The number of elements, and a list of them where they are few; others are passed over."""
        of, count = self.take("I"), self.take("Q")
        if depth > _DEEPEST or count > self.size:
            raise EOFError
        if of in SCALARS:
            code = f"<{count}{SCALARS[of]}"
            begin = self.skip(struct.calcsize(code))
            return count, list(struct.unpack_from(code, self.data, begin)) if count <= _FEW else None
        if of == STRING:
            unpack, data, at, last = struct.Struct("<Q").unpack_from, self.data, self.at, self.size - 8
            for _ in range(count):  # a vocabulary has many
                if at > last:
                    raise EOFError
                at += 8 + unpack(data, at)[0]
            self.skip(at - self.at)
        elif of == ARRAY:
            for _ in range(count):
                self._array(depth + 1)
        else:
            raise KeyError(of)
        return count, None
