"""A mutant: one place of one source file, and what stands there instead."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Candidate:
    path: str  # from the project's root
    line: int
    kind: str
    start: int  # in characters
    end: int
    mutated: str
    name: str  # the place as it was and as it is: it stays the same when other lines move
    form: str = "value"  # "value", "void" or "statement": where it may stand
    number: int = 0

    @classmethod
    def make(
        cls, path: str, text: str, line: int, kind: str, start: int, end: int, mutated: str, form: str = "value"
    ) -> Candidate:
        comment = r"\s#[^\n]*" if path.endswith(".py") else r"//[^\n]*"

        def one_line(text: str) -> str:
            return " ".join(re.sub(comment, "", text).split())

        mutated, original = one_line(mutated), one_line(text[start:end])
        before, after = original, mutated or "(deleted)"
        if len(original) < 16 and "\n" not in text[start:end]:  # too short to be found again: the whole line
            first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
            before = one_line(text[first:last])
            after = one_line(text[first:start] + (mutated or "(deleted)") + text[end:last])
        return cls(path, line, kind, start, end, mutated, f"{path}: `{before}` -> `{after}`", form)

    def numbered(self, number: int) -> Candidate:
        return replace(self, number=number)
