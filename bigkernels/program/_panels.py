"""A copy of a program's codes in panels, in the order in which a step reads them.

It is used only while it is what the stored codes say. Before each call it is looked whether PyTorch has counted a
write to them, and whether some words of each, others in every call, are what they were; before a call that begins a
sequence, or has more than a few tokens, all of their bytes are compared by a checksum: writes through `.data`,
numpy or other libraries are counted by nobody. Codes that were made in inference mode count no writes at all; of these
there is no copy.
"""

# mypy: ignore-errors

from __future__ import annotations

import resource
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..ops import program as ops
from ._memory_words import Words, of_version, same_words, word
from ._pages import empty_on_huge_pages

TOKENS = 16  # of a sequence in one call: with more, a comparison of all codes is a small part of it
_SETS, _SAMPLED = 8, 1  # sets of words of which one is looked at in each call, and words of each tensor in one
_GROUPS = Path("/sys/fs/cgroup")


class Panels:
    """What the codes of one program were copied to.

    Attributes:
        nbytes: of the copy.
        why: codes are read as they are stored, because of this; "": they are not, or there are none.
    """

    def __init__(self, packed: Tensor, codes: Sequence[Tensor], stored: bool = False) -> None:
        """
        Args:
            packed: the program; its records are given the addresses of the copy.
            codes: what is copied: tensors of the model.
            stored: make no copy.
        """
        self.nbytes, self.why = 0, ""
        self._memory: Tensor | None = None
        bytes_ = ops.panel_bytes(packed)
        self.why = _why_not(bytes_, codes, stored)
        if not bytes_ or self.why:
            return
        try:
            self._memory = empty_on_huge_pages(bytes_)
        except RuntimeError:
            self.why = "there is no memory for a copy"
            return
        ops.make_panels(packed, self._memory)
        self.nbytes = bytes_
        self._codes = list(codes)
        self._versions = [t._version for t in self._codes]
        self._words = _words(self._codes)
        pieces = [n for t in self._codes for n in (t.data_ptr(), t.nbytes)]
        self._pieces = torch.tensor(pieces, dtype=torch.int64, device="cpu").view(-1, 2)
        self._sums = ops.checksums(self._pieces)
        self._samples = [_sample(self._codes, i) for i in range(_SETS)]
        self._next = 0

    def compared(self) -> tuple[Words, Words] | None:
        """Words that are what they were as long as nobody has counted a write to the codes, and some of the codes
        themselves; None where the first are not known.
        """
        if self._memory is None:
            return [], []
        versions = [of_version(t) for t in self._codes]
        if None in versions or same_words() is None:
            return None
        first, second = ([w for part in versions for w in part[i]] for i in range(2))
        return first, second + list(zip(*self._samples[0], strict=True))

    def hold(self, whole: bool) -> bool:
        """Whether the codes are what they were, where they were; their tensors must have been looked at.

        Args:
            whole: look at all of their bytes.
        """
        if self._memory is None:
            return True
        native = same_words()
        if native is None or self._words is None:
            if self._versions != [t._version for t in self._codes]:
                return False
        elif not _same(native, self._words):
            return False
        if whole:
            return torch.equal(self._sums, ops.checksums(self._pieces))
        if native is not None:
            self._next = (self._next + 1) % _SETS
            return _same(native, self._samples[self._next])
        return True


def _why_not(bytes_: int, codes: Sequence[Tensor], stored: bool) -> str:
    if not bytes_:
        return ""
    if stored:
        return "as was asked for"
    if any(t.is_inference() for t in codes):
        return "they were made in inference mode, in which nobody counts writes"
    if not all(t.is_contiguous() for t in codes):
        return "they are not contiguous"
    free = free_memory()
    if free is not None and free < 2 * bytes_:
        return f"a copy takes {bytes_ / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
    return ""


# ---- words of memory -------------------------------------------------------------------------------------------------


def _same(native, words: tuple[array, array]) -> bool:
    addresses, values = words
    return native(addresses.buffer_info()[0], values.buffer_info()[0], 0, len(values)) == len(values)


def _words(tensors: Sequence[Tensor]) -> tuple[array, array] | None:
    """Where tensors count their versions, and these; None where that is not known."""
    versions = [of_version(t) for t in tensors]
    if None in versions:
        return None
    words = sorted(w for first, _ in versions for w in first) + sorted(w for _, second in versions for w in second)
    return array("q", [a for a, _ in words]), array("q", [v for _, v in words])


def _sample(tensors: Sequence[Tensor], number: int) -> tuple[array, array]:
    """Words of each tensor: in each set, others."""
    addresses = array("q")
    for t in tensors:
        words, first = t.nbytes // 8, -(-t.data_ptr() // 8) * 8
        if first + 8 * words > t.data_ptr() + t.nbytes:
            words -= 1
        if words > 0:
            step = max(words // (_SETS * _SAMPLED), 1)
            addresses.extend(first + 8 * ((step * (number + _SETS * i) + step // 3) % words) for i in range(_SAMPLED))
    addresses = array("q", sorted(addresses))
    return addresses, array("q", map(word, addresses))


# ---- memory ----------------------------------------------------------------------------------------------------------


def free_memory() -> int | None:
    """Bytes that the process may still take: of the machine, of its control groups, of its limit; None: unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    found += _of_groups()
    try:
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            found.append(most - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _of_groups() -> list[int]:
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and "memory" not in names.split(","):
            continue
        root = _GROUPS / "memory" if names else _GROUPS
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if names else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's: the root is the container's own group then.
        for directory in dict.fromkeys((group, *group.parents, root)):
            if directory != root and root not in directory.parents:
                continue
            try:
                most = (directory / limit).read_text().strip()
                if most == "max" or int(most) >= 2**60:
                    continue
                stat = dict(row.split() for row in (directory / "memory.stat").read_text().splitlines())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                found.append(int(most) - int((directory / used).read_text()) + cached)
            except (OSError, ValueError):
                continue
    return found
