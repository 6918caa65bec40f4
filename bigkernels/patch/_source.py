"""Rewriting the forward of one instance: from a class's function to a new function object beside it.

The new function runs in the globals of the original and shares its closure cells, so everything that the model reads
stays live; only the places that rules chose call helpers. Its code keeps the file and the line numbers of the
original, so that tracebacks and debuggers show the model's own source.
"""

# mypy: ignore-errors

from __future__ import annotations
import __future__ as futures

import ast
import copy
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from ._rule import Site, Skip, SourceRule

_FUTURES = functools.reduce(int.__or__, (getattr(futures, name).compiler_flag for name in futures.all_feature_names))


class Source:
    """The innermost function behind a class's forward: its syntax tree, its wrappers and what its names mean."""

    def __init__(
        self,
        function: types.FunctionType,
        wrappers: list[types.FunctionType],
        tree: ast.FunctionDef,
        imported: list[str],
    ):
        self.function = function
        self.imported = imported  # names that the module's import statements bind
        self.wrappers = wrappers  # outermost first
        self.tree = tree
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.self_name = arguments[0].arg if arguments else None

    def fresh(self) -> Source:
        """The same with a tree of its own, which may be edited."""
        return Source(self.function, self.wrappers, copy.deepcopy(self.tree), self.imported)

    def attribute(self, node: ast.AST) -> list[str] | None:
        """["a", "b"] for the expression `self.a.b`; None for anything else."""
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        return names[::-1] if names and isinstance(node, ast.Name) and node.id == self.self_name else None

    def constant(self, node: ast.AST) -> Any:
        """The object behind a global name or a dotted path from one; None where it is local or missing."""
        if isinstance(node, ast.Attribute):
            owner = self.constant(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, (types.ModuleType, type)) else None
        if not isinstance(node, ast.Name) or node.id not in self.function.__code__.co_names:
            return None  # co_names holds the globals, not the locals or the free variables
        return self.function.__globals__.get(node.id)

    def body(self) -> Iterator[ast.AST]:
        """Every node of the function in a fixed order, without those of nested functions and classes."""
        pending: list[ast.AST] = self.tree.body[::-1]
        while pending:
            node = pending.pop()
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
                yield node
                pending += list(ast.iter_child_nodes(node))[::-1]


def resolve(module: Any, names: list[str]) -> Any:
    """`module.a.b` for ["a", "b"]; None where there is no such attribute."""
    for name in names:
        module = getattr(module, name, None)
    return module


def call(helper: str, *args: ast.expr, **keywords: ast.expr) -> ast.Call:
    """The expression `helper(*args, **keywords)`."""
    return ast.Call(ast.Name(helper, ast.Load()), list(args), [ast.keyword(k, v) for k, v in keywords.items()])


def find_source(cls: type) -> Source | None:
    """The source of `cls.forward`, or None where there is no Python source to read."""
    return _source_of(inspect.getattr_static(cls, "forward", None))


@functools.lru_cache(maxsize=512)
def _source_of(function: Any) -> Source | None:
    wrappers = []
    while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType):
        return None
    node = find_node(function)
    return None if node is None else Source(function, wrappers, node, _imported(_parse(function.__code__.co_filename)))


def find_node(function: types.FunctionType) -> ast.FunctionDef | None:
    """The definition of a function in the syntax tree of its file; None where there is none."""
    code = function.__code__
    return _definitions(code.co_filename).get((code.co_name, code.co_firstlineno))


@functools.lru_cache(maxsize=512)
def _definitions(path: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """The functions of a file by their names and first lines, decorators included."""
    functions: dict[tuple[str, int], ast.FunctionDef] = {}
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.FunctionDef):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            functions.setdefault((node.name, line), node)
    return functions


def methods(cls: type, name: str) -> Iterator[Source]:
    """A method of a class, and the methods that it calls."""
    pending, seen = [name], {name}
    while pending:
        function = inspect.getattr_static(cls, pending.pop(), None)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if not isinstance(function, types.FunctionType) or function.__module__.split(".")[0] == "torch":
            continue
        node = find_node(function)
        if node is not None:
            source = Source(function, [], node, [])
            yield source
            more = called(source)
            pending += sorted(more - seen)
            seen |= more


def called(source: Source) -> set[str]:
    """Names of what a function calls of its self."""
    return {path[0] for n in source.body() if isinstance(n, ast.Call) and (path := source.attribute(n.func))}


def _imported(node: ast.AST) -> list[str]:
    names = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            names += [(alias.asname or alias.name).split(".")[0] for alias in child.names]
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            names += _imported(child)
    return [name for name in names if name != "*"]


@functools.lru_cache(maxsize=512)
def _parse(path: str) -> ast.Module:
    try:
        with open(path, "rb") as file:
            return ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def check_rewritable(source: Source) -> None:
    """Raise Skip unless rewriting nothing gives back exactly the code that runs now."""
    chain = [*source.wrappers, source.function]
    for outer, inner in itertools.pairwise(chain):
        if not any(content(cell) is inner for cell in outer.__closure__ or ()):
            raise Skip(f"a decorator of {source.function.__qualname__} cannot be seen through")
    if not _same_code(_compile(source, source.tree, {}), source.function.__code__):
        raise Skip(f"the source of {source.function.__qualname__} is not what runs")


def rewrite(source: Source, sites: list[Site]) -> types.FunctionType:
    """A new function like the class's forward, decorators included, with the given sites of `source` replaced."""
    helpers = {name: helper for site in sites for name, helper in site.helpers.items()}
    tree = replace(source.tree, sites)
    code = _compile(source, tree, helpers)
    old = source.function
    cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    cells |= {name: types.CellType(helper) for name, helper in helpers.items()}
    new = _clone(old, code, tuple(cells[name] for name in code.co_freevars))
    for wrapper in reversed(source.wrappers):
        closure = tuple(types.CellType(new) if content(c) is old else c for c in wrapper.__closure__ or ())
        new, old = _clone(wrapper, wrapper.__code__, closure, wrapped=new), wrapper
    return new


def replace(tree: ast.FunctionDef, sites: list[Site]) -> ast.FunctionDef:
    """The tree, which is edited, with the nodes of these sites replaced."""
    return _Replace({old: new for site in sites for old, new in site.replacements.items()}).visit(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, replacements):
        self.replacements = replacements

    def visit(self, node):
        new = self.replacements.get(node, node)
        if isinstance(new, list):
            return [self.generic_visit(_at(statement, node)) for statement in new]
        return self.generic_visit(new if new is node else _at(new, node))


def _at(new, old):
    return ast.fix_missing_locations(ast.copy_location(new, old))


def _compile(source: Source, tree: ast.FunctionDef, helpers: dict[str, Any]) -> types.CodeType:
    """The code of `tree`, with the original's free variables and the helpers as free variables."""
    bare = copy.copy(tree)
    bare.decorator_list, bare.returns = [], None
    bare.args = copy.copy(tree.args)
    # Defaults belong to the function object; they are carried over and not evaluated again.
    bare.args.defaults, bare.args.kw_defaults = [], [None] * len(tree.args.kwonlyargs)
    original = source.function.__code__
    names = ast.arguments([], [ast.arg(n) for n in (*original.co_freevars, *helpers)], None, [], [], None, [])
    keywords = {"type_params": []} if "type_params" in ast.FunctionDef._fields else {}
    factory = ast.FunctionDef("factory", names, [bare], [], **keywords)
    # Never executed: the compiler makes other code for calls on imported names, and has to know which they are.
    imports = [ast.copy_location(ast.Import([ast.alias(name)]), tree) for name in source.imported]
    wrapped = ast.fix_missing_locations(ast.Module([*imports, ast.copy_location(factory, tree)], []))
    code = compile(wrapped, original.co_filename, "exec", original.co_flags & _FUTURES, dont_inherit=True)
    for name in ("factory", original.co_name):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    fields = (
        "co_code",
        "co_names",
        "co_varnames",
        "co_freevars",
        "co_cellvars",
        "co_argcount",
        "co_posonlyargcount",
        "co_kwonlyargcount",
    )
    if (a.co_flags ^ b.co_flags) & ~inspect.CO_NESTED or any(getattr(a, f) != getattr(b, f) for f in fields):
        return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, types.CodeType) and isinstance(y, types.CodeType):
            if not _same_code(x, y):
                return False
        elif type(x) is not type(y) or repr(x) != repr(y):
            return False
    return True


def content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _clone(function, code, closure, wrapped=None) -> types.FunctionType:
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = copy.copy(function.__kwdefaults__)
    new.__annotations__ = dict(function.__annotations__)
    new.__doc__ = function.__doc__
    new.__module__, new.__qualname__ = function.__module__, function.__qualname__
    new.__dict__.update(function.__dict__)
    if wrapped is not None:
        new.__wrapped__ = wrapped
    return new


def all_sites(source: Source, rules: tuple[SourceRule, ...]) -> dict[str, tuple[SourceRule, Site]]:
    """The sites of every rule in one tree, each with a name that a later process finds again: "glu0", "rope0"."""
    return {f"{rule.name}{i}": (rule, site) for rule in rules for i, site in enumerate(rule.sites(source))}
