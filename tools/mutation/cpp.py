"""Mutants of C++ source, all in one copy of it: each guarded by its number, so that one compilation has them all.

A mutated expression `a < b` reads `(bk_mutant_is(7) ? (a <= b) : (a < b))`, a deleted statement
`{ if (!bk_mutant_is(8)) { f(); } }`. Expressions are found from tokens and brackets alone: the source is formatted by
clang-format, which puts spaces around binary operators and none around the brackets of templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .mutant import Candidate

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|\#(?:[^\n\\]|\\\n|\\.)*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])+'
    |0x[0-9a-fA-F.]+(?:p[+-]?\d+)?[uUlLfF]*|\d[\d.]*(?:[eE][+-]?\d+)?[uUlLfF]*|[A-Za-z_]\w*
    |<<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|\.\.\.|\S""",
    re.S | re.X,
)
OPENERS = {"(": ")", "[": "]", "{": "}", "<": ">"}
ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="}
STOPS = {",", ";", "?", ":"}
WORDS = {"return", "case", "else", "do", "goto", "throw"}

BINARY = {  # operator: (what it becomes, kind)
    "<": ("<=", "bound"),
    "<=": ("<", "bound"),
    ">": (">=", "bound"),
    ">=": (">", "bound"),
    "==": ("!=", "condition"),
    "!=": ("==", "condition"),
    "&&": ("||", "condition"),
    "||": ("&&", "condition"),
    "+": ("-", "sign"),
    "-": ("+", "sign"),
    "*": ("+", "stride"),
    "/": ("*", "stride"),
    "%": ("/", "stride"),
    "&": ("|", "mask"),
    "|": ("&", "mask"),
    "^": ("&", "mask"),
    "<<": (">>", "mask"),
    ">>": ("<<", "mask"),
}
CALLS = {"vmax": "vmin", "vmin": "vmax", "max": "sum"}

# Lines that no test of results can tell from their mutants: hints, advice to the system, and what only decides how work
# is shared out or whether it is worth a thread, a streaming store or a kept workspace. And what is no code of ours.
SPEED_ONLY = re.compile(
    r"prefetch|fence\(\)|static_assert|grain_bytes|stream_bytes|thresholds|\bleast\b|kAhead|row_bytes|bytes_a_row|worth_streaming|"
    r"prefer_huge_pages|madvise|kKept|kInline|\bgrain\b|unroll|alignas|bigkernels::\w*:|\bTORCH_BOX\b|m\.impl"
)


@dataclass
class Token:
    text: str
    start: int
    end: int
    match: int = -1  # the other bracket
    code: bool = False  # in a function's body
    live: bool = True
    angle: bool = False  # a template's bracket
    control: bool = False  # the closing bracket of if (...), for (...)


@dataclass
class Source:
    text: str
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        for m in TOKEN.finditer(self.text):
            if not m[0].startswith(("//", "/*", "#")):
                self.tokens.append(Token(m[0], m.start(), m.end()))
        self._brackets()

    def spaced(self, i: int) -> bool:
        t = self.tokens[i]
        return self.text[t.start - 1].isspace() and self.text[t.end : t.end + 1].isspace()

    def _brackets(self) -> None:
        stack: list[tuple[int, bool]] = []
        code = False
        for i, t in enumerate(self.tokens):
            before = self.tokens[i - 1] if i else t
            t.code = code
            if t.text in "([{" or (
                t.text == "<"
                and (before.text == "template" or (re.match(r"[A-Za-z_]", before.text) and before.end == t.start))
            ):
                t.angle = t.text == "<"
                stack.append((i, code))
                if t.text == "{":
                    code = self._opens_code(i) or (code and not self._opens_type(i))
            elif t.text in (")", "]", "}") or (t.text in (">", ">>") and stack and self.tokens[stack[-1][0]].angle):
                for _ in t.text if t.text == ">>" else "1":
                    if not stack:
                        break
                    opener, code = stack.pop()
                    self.tokens[opener].match, t.match = i, opener
                    t.angle = self.tokens[opener].angle
                t.code = code
                if t.text == ")" and opener and self.tokens[opener - 1].text in ("if", "for", "while", "switch"):
                    t.control = True

    def _opens_code(self, i: int) -> bool:
        """Whether this brace starts a body: it follows a parameter list or what may stand behind one."""
        words = {")", "const", "else", "do", "noexcept", "mutable"}
        return self.tokens[i - 1].text in words

    def _opens_type(self, i: int) -> bool:
        head = []
        while i and self.tokens[i - 1].text not in (";", "{", "}"):
            i -= 1
            head.append(self.tokens[i].text)
        return bool({"struct", "class", "enum", "namespace", "union"} & set(head))

    def begin(self, i: int) -> int:
        """The first token of the expression that token i is in, at its depth."""
        k = i
        while k:
            t = self.tokens[k - 1]
            if t.text in (")", "]") and not t.control or t.angle and t.text in (">", ">>"):
                k = t.match
            elif t.text == "}" and self._is_value(t.match):
                k = t.match
            elif (
                t.control or t.text in STOPS or t.text in ASSIGNMENTS or t.text in WORDS or t.text in "([{}" or t.angle
            ):
                return k
            else:
                k -= 1
        return k

    def end(self, i: int) -> int:
        """One past its last token; -1 where it is assigned to."""
        k = i + 1
        while k < len(self.tokens):
            t = self.tokens[k]
            if t.text in "([{" or t.angle and t.text == "<":
                k = t.match + 1
            elif t.text in STOPS or t.text in ")]}" or t.angle:
                return k
            elif t.text in ASSIGNMENTS:
                return -1
            else:
                k += 1
        return k

    def _is_value(self, opener: int) -> bool:
        before = self.tokens[opener - 1]
        return before.end == self.tokens[opener].start and before.text not in (")", "{", "(")

    def enclosing(self, i: int) -> int:
        """The bracket that token i stands in, -1 outside of all."""
        k = i - 1
        while k >= 0:
            t = self.tokens[k]
            if t.match >= 0 and t.match < k:
                k = t.match - 1
            elif t.match > i:
                return k
            else:
                k -= 1
        return -1

    def statement(self, i: int) -> str:
        """The text of the statement up to token i."""
        k = i
        while k and self.tokens[k - 1].text not in (";", "{", "}"):
            k -= 1
        return self.text[self.tokens[k].start : self.tokens[i].end]


def _numeral(text: str) -> str | None:
    if re.fullmatch(r"\d+", text):
        return str(int(text) + 1)
    if re.fullmatch(r"0x[0-9a-fA-F]+u?", text):
        digits, unsigned = text.removesuffix("u"), text.endswith("u")
        return hex(int(digits, 16) ^ 1) + ("u" if unsigned else "")
    if re.fullmatch(r"[\d.]+f", text):
        return f"{float(text[:-1]) + 1}f"
    if re.fullmatch(r"0x[0-9a-fA-F.]+p[+-]?\d+f", text):
        return f"{text} * 2"
    return None


def candidates(path: str, text: str) -> list[Candidate]:
    """Every mutant that the rules make of a file."""
    source, found = Source(text), []
    tokens = source.tokens
    lines = text.splitlines()

    def add(kind: str, first: int, last: int, mutated: str, at: int, form: str = "value") -> None:
        """Of tokens first to last - 1; `at`: the token that says on which line."""
        line = text.count("\n", 0, tokens[at].start) + 1
        if SPEED_ONLY.search(lines[line - 1]):
            return
        found.append(Candidate.make(path, text, line, kind, tokens[first].start, tokens[last - 1].end, mutated, form))

    def replaced(first: int, last: int, i: int, new: str) -> str:
        return text[tokens[first].start : tokens[i].start] + new + text[tokens[i].end : tokens[last - 1].end]

    for i, t in enumerate(tokens):
        if not t.code or t.angle or i == 0:
            continue
        here = source.enclosing(i)
        if here >= 0 and tokens[here].angle:
            continue
        statement = source.statement(i)
        if re.search(r"\b(constexpr|static_assert|typedef|using|static const|template|asm)\b", statement):
            continue
        if re.search(r"\bSTD_TORCH_CHECK\b", statement) and '"' in statement:
            continue
        before = tokens[i - 1]
        if here > 0 and tokens[here - 1].text.startswith("_mm") and not re.match(r"[+-]$", t.text):
            continue  # an instruction's own constant cannot be chosen at run time
        in_for = here > 0 and tokens[here - 1].text == "for"
        if t.text in BINARY and source.spaced(i):
            first, last = source.begin(i), source.end(i)
            if last > 0:
                new, kind = BINARY[t.text]
                add(kind, first, last, replaced(first, last, i, new), i)
        elif t.text in ("-", "!") and not source.spaced(i) and (before.text in ASSIGNMENTS | STOPS | {"(", "return"}):
            first, last = source.begin(i), source.end(i)
            if last > 0:
                add("sign" if t.text == "-" else "condition", first, last, replaced(first, last, i, ""), i)
        elif t.text in ("+=", "-=", "|=", "*="):
            first, last = source.begin(i), source.end(i)
            if last > 0 and tokens[first].text != "(":
                if in_for:
                    rest = text[tokens[i + 1].start : tokens[last - 1].end]
                    add("step", first, last, replaced(first, last, i, t.text + " (" + rest + ") +"), i, "void")
                else:
                    flipped = {"+=": "-=", "-=": "+=", "|=": "&=", "*=": "+="}[t.text]
                    add("accumulation", first, last, replaced(first, last, i, flipped), i, "void")
                    add("accumulation", first, last, replaced(first, last, i, "="), i, "void")
        elif t.text == "++" and in_for and before.text in (";", ","):
            last = source.end(i)
            name = text[tokens[i + 1].start : tokens[last - 1].end]
            add("step", i, last, f"{name} += 2", i, "void")
        elif t.text == "(" and before.text in ("if", "while") and tokens[i - 2].text != "constexpr":
            inner = [u.text for u in tokens[i + 1 : t.match]]
            if not ASSIGNMENTS & set(inner) and ";" not in inner and before.text == "if":
                add("condition", i + 1, t.match, "true", i)
                add("condition", i + 1, t.match, "false", i)
        elif t.text == "?":
            first = source.begin(i)
            add("condition", first, i, "true", i)
            add("condition", first, i, "false", i)
        elif t.text in CALLS and tokens[i + 1].text == "(" and before.text not in ("::", ".", "->"):
            first, last = i, tokens[i + 1].match + 1
            add("extreme", first, last, replaced(first, last, i, CALLS[t.text]), i)
        elif t.text in ("begin", "end") and before.text in {"(", ",", "=", "+", "-", "<", "+="}:
            if tokens[i + 1].text in {")", ",", ";", "+", "-", "*", "/"}:
                add("split", i, i + 1, "(begin + 1)" if t.text == "begin" else "(end - 1)", i)
        elif new := _numeral(t.text):
            # An index that is a number only says which of several accumulators.
            if before.text != "case" and not (before.text == "[" and tokens[i + 1].text == "]"):
                add("constant", i, i + 1, new, i)
        elif tokens[here].text == "{" and (before.text in (";", "{", "}", "else") or before.control):
            if re.match(r"[a-z_*]", t.text) and (last := _deletable(source, i)):
                add("deletion", i, last + 1, "", i, "statement")
    return found


def _deletable(source: Source, i: int) -> int:
    """The semicolon of an expression statement that starts at token i, 0 where it is something else."""
    tokens = source.tokens
    if tokens[i].text in WORDS | {"if", "for", "while", "switch", "break", "continue", "default", "const", "auto"}:
        return 0
    k = i + 1 if tokens[i].text == "*" else i
    while k < len(tokens):  # a chain of names, members and indices
        t, after = tokens[k], tokens[k + 1]
        if t.text in ("[", "(") or t.angle and t.text == "<":
            if t.text == "(":
                break
            k = t.match + 1
            if re.match(r"[A-Za-z_]", tokens[k].text):
                return 0
        elif re.match(r"[A-Za-z_]", t.text):
            if re.match(r"[A-Za-z_*&]", after.text):
                return 0
            k += 1
        elif t.text in (".", "->", "::"):
            k += 1
        else:
            break
    if tokens[k].text != "(" and tokens[k].text not in ASSIGNMENTS:
        return 0
    while k < len(tokens) and tokens[k].text not in (";", "}"):
        k = tokens[k].match + 1 if tokens[k].match > k else k + 1
    return k if tokens[k].text == ";" else 0


def guarded(text: str, mutants: list) -> str:
    """The source with all mutants in it; a mutant has .number and a candidate's fields. Their spans nest."""
    mutants = sorted(mutants, key=lambda m: (m.start, -m.end))

    def render(start: int, end: int, inside: list) -> str:
        out, at, k = [], start, 0
        while k < len(inside):
            m = inside[k]
            same = [n for n in inside[k:] if (n.start, n.end) == (m.start, m.end)]
            nested = [n for n in inside[k + len(same) :] if n.start < m.end]
            out.append(text[at : m.start])
            original = render(m.start, m.end, nested)
            for n in reversed(same):
                original = _guard(n, original)
            out.append(original)
            at = m.end
            k += len(same) + len(nested)
        return "".join(out) + text[at:end]

    return render(0, len(text), mutants)


def _guard(mutant, original: str) -> str:
    is_it = f"bk_mutant_is({mutant.number})"
    if mutant.form == "statement":
        return f"{{ if (!{is_it}) {{ {original} }} }}"
    if mutant.form == "void":
        return f"({is_it} ? (void)({mutant.mutated}) : (void)({original}))"
    if mutant.mutated in ("true", "false"):
        original = f"(bool)({original})"
    return f"({is_it} ? ({mutant.mutated}) : ({original}))"


def sections(text: str, defined: set[str]) -> list[bool]:
    """For each line, whether the preprocessor keeps it where these macros are defined."""
    kept, stack = [], []
    for line in text.splitlines():
        m = re.match(r"#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line)
        if not m:
            kept.append(all(now for now, _ in stack))
            continue
        word, condition = m[1], re.sub(r"//.*", "", m[2])
        if word in ("if", "ifdef", "ifndef"):
            if word != "if":
                condition = f"{'!' if word == 'ifndef' else ''}defined({condition.strip()})"
            now = _holds(condition, defined)
            stack.append((now, now))
        elif word == "elif":
            done = stack.pop()[1]
            now = not done and _holds(condition, defined)
            stack.append((now, done or now))
        elif word == "else":
            done = stack.pop()[1]
            stack.append((not done, True))
        else:
            stack.pop()
        kept.append(False)
    return kept


def _holds(condition: str, defined: set[str]) -> bool:
    condition = re.sub(r"defined\s*\(?\s*(\w+)\s*\)?", lambda m: str(m[1] in defined), condition)
    condition = condition.replace("&&", " and ").replace("||", " or ")
    condition = re.sub(r"!(?!=)", " not ", condition)
    condition = re.sub(r"\b(?!True|False|and|or|not)[A-Za-z_]\w*", "0", condition)
    return bool(eval(condition, {}))
