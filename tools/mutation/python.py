"""Mutants of Python source, as in cpp.py: all in one copy, each chosen by its number while the code runs.

The Triton kernels run in the interpreter, so that a kernel's `a < b` can read `(a <= b if _mutant_is(7) else a < b)`.
"""

from __future__ import annotations

import ast
import copy

from .mutant import Candidate

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
BINARY = {
    ast.Add: (ast.Sub, "sign"),
    ast.Sub: (ast.Add, "sign"),
    ast.Mult: (ast.Add, "stride"),
    ast.Div: (ast.Mult, "stride"),
    ast.FloorDiv: (ast.Mult, "stride"),
    ast.Mod: (ast.FloorDiv, "stride"),
    ast.BitAnd: (ast.BitOr, "mask"),
    ast.BitOr: (ast.BitAnd, "mask"),
    ast.LShift: (ast.RShift, "mask"),
    ast.RShift: (ast.LShift, "mask"),
}
CALLS = {"maximum": "minimum", "minimum": "maximum"}
# What decides how fast a kernel is on a GPU and nothing else, or raises no error that the interpreter would.
SPEED_ONLY = ("num_warps", "num_stages", "eviction_policy", "multiple_of", "max_contiguous", "static_range", "cdiv")


class _Finder(ast.NodeVisitor):
    """Mutants as (kind, node, changed copy): of expressions and statements in function bodies."""

    def __init__(self) -> None:
        self.found: list[tuple[str, ast.AST, ast.AST | None]] = []
        self.depth = 0
        self.kernel = False  # in a function that Triton compiles

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "examples":  # of calls, for the ahead-of-time compiler
            return
        before, self.depth = self.kernel, self.depth + 1
        self.kernel = before or any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        for statement in node.body:
            self.visit(statement)
        self.kernel, self.depth = before, self.depth - 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)

    def generic_visit(self, node: ast.AST) -> None:
        if self.depth:
            self.mutate(node)
        if isinstance(node, ast.Raise | ast.Assert | ast.Lambda | ast.JoinedStr | ast.AnnAssign):
            return
        if isinstance(node, ast.Call):  # not the function's name
            for child in (*node.args, *(k.value for k in node.keywords if k.arg not in SPEED_ONLY)):
                self.visit(child)
            return
        super().generic_visit(node)

    def add(self, kind: str, node: ast.AST, **changes) -> None:
        changed = copy.deepcopy(node)
        for name, value in changes.items():
            setattr(changed, name, value)
        self.found.append((kind, node, changed))

    def mutate(self, node: ast.AST) -> None:
        match node:
            case ast.Compare(ops=[op], comparators=[_]) if type(op) in COMPARE:
                kind = "bound" if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) else "condition"
                self.add(kind, node, ops=[COMPARE[type(op)]()])
            case ast.BinOp(op=op) if type(op) in BINARY:
                new, kind = BINARY[type(op)]
                self.add(kind, node, op=new())
            case ast.AugAssign(op=ast.Add()):
                self.add("accumulation", node, op=ast.Sub())
                self.found.append(("accumulation", node, ast.Assign([node.target], node.value)))
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                self.found.append(("sign" if isinstance(node.op, ast.USub) else "condition", node, node.operand))
            case ast.BoolOp(op=op):
                self.add("condition", node, op=ast.And() if isinstance(op, ast.Or) else ast.Or())
            case ast.If(test=test) if not any(isinstance(s, ast.Raise) for s in node.body):
                self.found += [("condition", test, ast.Constant(True)), ("condition", test, ast.Constant(False))]
            case ast.Call(func=ast.Attribute(value=ast.Name("tl"), attr=name)) if name in CALLS:
                func = copy.deepcopy(node.func)
                func.attr = CALLS[name]
                self.add("extreme", node, func=func)
            case ast.Call(func=ast.Attribute(value=ast.Name("tl"), attr="where"), args=[c, a, b]):
                self.add("mask", node, args=[c, b, a])
            case ast.Call(func=ast.Attribute(value=ast.Name("tl"), attr="load"), keywords=keywords):
                for k in keywords:
                    if k.arg == "other" and isinstance(k.value, ast.Constant):
                        self.found.append(("mask", k.value, ast.Constant(float(k.value.value) + 1)))
            case ast.Expr(value=ast.Call()) if not ast.unparse(node).startswith(("tl.static", "tl.multiple")):
                self.found.append(("deletion", node, None))
            # Those of launchers are sizes of blocks and the like.
            case ast.Constant(value=int() | float() as value) if self.kernel and not isinstance(value, bool):
                self.found.append(("constant", node, ast.Constant(value + 1)))


def _offsets(text: str) -> list[int]:
    starts, at = [], 0
    for line in text.splitlines(keepends=True):
        starts.append(at)
        at += len(line)
    return starts


def candidates(path: str, text: str) -> list[Candidate]:
    """Every mutant that the rules make of a file; their spans are in characters (the source is ASCII)."""
    finder, starts, out = _Finder(), _offsets(text), []
    finder.visit(ast.parse(text))
    for kind, node, changed in finder.found:
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        line = text.splitlines()[node.lineno - 1]
        if any(word in line for word in SPEED_ONLY):
            continue
        form = "statement" if isinstance(node, ast.stmt) else "value"
        mutated = ast.unparse(ast.fix_missing_locations(changed)) if changed else ""
        out.append(Candidate.make(path, text, node.lineno, kind, start, end, mutated, form))
    return out


def guarded(text: str, mutants: list) -> str:
    """The source, as Python writes it from its tree, with all mutants in it."""
    starts = _offsets(text)
    wanted: dict[tuple[int, int], list] = {}
    for m in mutants:
        wanted.setdefault((m.start, m.end), []).append(m)

    def call(number: int) -> ast.expr:
        return ast.Call(ast.Name("_mutant_is", ast.Load()), [ast.Constant(number)], [])

    class Guard(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            changed = self.generic_visit(node)
            if not isinstance(node, ast.expr | ast.stmt):
                return changed
            span = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
            if isinstance(node, ast.Expr):
                here = [m for m in wanted.get(span, []) if m.form == "statement"]
            else:
                here = [m for m in wanted.get(span, []) if (m.form == "statement") == isinstance(node, ast.stmt)]
            for m in here:
                if m.form == "statement":
                    new = ast.parse(m.mutated).body or [ast.Pass()]
                    changed = ast.If(call(m.number), new, [changed])
                else:
                    new = ast.parse(m.mutated, mode="eval").body
                    changed = ast.IfExp(call(m.number), new, changed)
            return changed

    tree = ast.fix_missing_locations(Guard().visit(ast.parse(text)))
    body = tree.body
    at = next(i for i, s in enumerate(body) if not (isinstance(s, ast.Expr) or _is_future(s)))
    body.insert(at, ast.parse("from bigkernels._mutant import mutant_is as _mutant_is").body[0])
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
