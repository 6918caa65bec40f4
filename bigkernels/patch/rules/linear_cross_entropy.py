"""The head of a language model and its loss in one, in training: the logits between them are never made.

The call of the head gives `Logits`, an object that notes what the forward does with it; the loss functions of `loss`
hand what it stands for to the kernel. What was not foreseen computes the logits, so that the model's own code stays in
charge. Which models can be fused is found out by running that code, from the head to the loss, on probes.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._torch_private import in_proxy_mode
from ...nn.linear import Linear
from ...nn.quantized_linear import QuantizedLinear
from ...ops.arguments import autocast_dtype
from ...ops.registry import _transforms
from .._device import probe_device
from .._isolated import Stand, check_effects, is_trusted, isolated
from .._logits import Logits
from .._metrics import watcher_of
from .._places import stays
from .._rule import Fit, Plan, Site, Skip, SourceRule
from .._source import Source, call, replace
from .._verify import Probes, compare, doubled, gradients, plain
from . import linear, loss
from .add_norm import unobserved

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEATURES = 8  # of the head that is checked, whose vocabulary is the model's
_HELPER, _HIDDEN = "_bigkernels_logits", "_bigkernels_hidden"


_FORWARDS = {cls: cls.forward for cls in (nn.Linear, Linear, QuantizedLinear)}


def logits(module: nn.Module, labels: Any, head: Any, hidden: Any) -> Any:
    """head(hidden), or what stands for it where the model is in training and nobody observes the head."""
    if labels is not None and module.training and torch.is_grad_enabled():
        watcher = watcher_of(module)
        weight = None if _traced() else _weight(head)
        if weight is not None and _fits(weight, head.bias, hidden) and unobserved(head) and stays(head, weight):
            return Logits.of(head, hidden, weight, head.bias, watcher)
        if watcher is not None and watcher.coefficient:
            raise RuntimeError(
                "bigkernels.LossMetrics: this step makes its logits (torch.compile, hooks on the output"
                " layer, or one that is sharded or has an adapter), and its loss would have no "
                "z_loss"
            )
    return head(hidden)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _transforms() is not None or in_proxy_mode()


def _weight(head: Any) -> Any:
    """The weight of a linear layer that runs its class's own code, plain or quantized; None for anything else."""
    held = getattr(head, "__dict__", {}).get("forward")
    if held is not None and not (type(held) is functools.partial and held.func in linear.WRITTEN):
        return None
    kind = type(head)
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]:
        return None
    if kind is not QuantizedLinear:
        return head.weight if plain(head.weight) else None
    if not head.weight_format.dynamic and plain(*head.qweight.tensors.values()):
        return head.qweight
    return None


def _is_spread(head: Any) -> bool:
    """Whether a linear layer's weight is spread over ranks; `fully_shard` puts it together for each call. Where a call
    sees the parts, `_weight` gives none.
    """
    return type(head) in (nn.Linear, Linear) and hasattr(head.weight, "to_local")


def _fits(weight: Any, bias: Any, hidden: Any) -> bool:
    if not plain(hidden) or hidden.dtype not in _DTYPES or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        return False
    codes = weight if isinstance(weight, Tensor) else next(iter(weight.tensors.values()))
    parts = [t for t in (weight, bias) if isinstance(t, Tensor)]
    cast = autocast_dtype(hidden.device) is not None
    return (
        plain(*parts)
        and codes.dim() == 2
        and codes.device == hidden.device
        and all(cast or t.dtype == hidden.dtype for t in parts)
    )


class _Place(NamedTuple):
    """Statements first..last of a forward, from the call of the head to the loss."""

    call: ast.Call
    head: str
    first: int
    last: int
    loss: str


def _sites(source: Source) -> Iterator[Site]:
    place = _find(source)
    if place is not None:
        names = [ast.Name(name, ast.Load()) for name in (source.self_name, "labels")]
        new = call(_HELPER, *names, place.call.func, place.call.args[0])
        yield Site(_check(source, place), {place.call: new}, {_HELPER: logits})


def _find(source: Source) -> _Place | None:
    """`x = self.head(hidden)`, and later `if labels is not None:` with a loss of x and the labels."""
    body, arguments = source.tree.body, source.tree.args
    if "labels" not in [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]:
        return None
    for last, statement in enumerate(body):
        match statement:
            case ast.If(ast.Compare(ast.Name("labels"), [ast.IsNot()], [ast.Constant(None)])):
                pass
            case _:
                continue
        for node in ast.walk(statement):
            match node:
                case ast.Assign([ast.Name(target)], ast.Call() as value) if target != "labels":
                    given = [*value.args[:1], *(k.value for k in value.keywords if k.arg in ("logits", "input"))]
                    head = _find_head(source, last, _base(given[0])) if given else None
                    if head and any(_mentions(a, "labels") for a in (value, *value.keywords)):
                        return _Place(*head, last, target)
    return None


def _find_head(source: Source, before: int, name: str | None) -> tuple[ast.Call, str, int] | None:
    """The last assignment of `name` that does not read it, if it holds a call of a child of the module."""
    for index in range(before - 1, -1, -1):
        match source.tree.body[index]:
            case ast.Assign([ast.Name(target)], value) if target == name and not _mentions(value, name):
                for node in ast.walk(value):
                    match node:
                        case ast.Call(function, [argument], []) if not isinstance(argument, ast.Starred):
                            path = source.attribute(function)
                            if path is not None and len(path) == 1:
                                return node, path[0], index
                return None
    return None


def _base(node: ast.AST) -> str | None:
    """x of `x.view(-1, n)` and `x[:, 1:]`."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


# ---- the check ------------------------------------------------------------------------------------------------------


def _check(source: Source, place: _Place) -> Callable:
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        head = getattr(module, place.head, None)
        vocabulary, size = (getattr(head, name, None) for name in ("out_features", "in_features"))
        if not isinstance(head, nn.Module) or not isinstance(vocabulary, int) or not isinstance(size, int):
            return None
        if vocabulary <= size:
            return None  # logits that are no larger than the hidden states
        if _weight(head) is None and not _is_spread(head):
            kind = f"{type(head).__module__}.{type(head).__qualname__}"
            raise Skip(f"the logits come from {place.head}, a {kind} and no plain linear layer")
        function, shift = _loss_function(module, source, plan)
        if function is None and "loss_function" in source.function.__code__.co_names:
            return None  # the reason has a row of its own
        tail = _Tail(source, place, module, vocabulary, head.bias is not None, function, shift)
        return Fit("linear_cross_entropy", tail.error(plan.verify))

    return check


def _loss_function(module: nn.Module, source: Source, plan: Plan) -> tuple[Callable | None, bool]:
    """The loss function that the rule `loss` puts in the place of the model's, and whether it shifts the labels."""
    held = module.__dict__.get("_loss_function")
    if held is not None and not loss.is_token_loss(held):
        return None, False
    try:
        planned = loss.FUNCTION_RULE.plan(module, plan)
    except Skip:
        planned = None
    return (None, False) if planned is None else (planned[0].value, planned[0].value.args[1])


class _Strict(Logits):
    """Computes nothing: whatever needs logits is a reason to leave the model alone."""

    @classmethod
    def _noted(cls, note, kind):
        logits = super()._noted(note, kind)
        logits.values.compute = _refuse
        return logits


def _refuse() -> Tensor:
    raise Skip("the logits are used for more than the loss")


class _Head:
    """What a forward sees in the place of its head while it is checked."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eager: bool):
        self.weight, self.bias, self.eager = weight, bias, eager
        self.out_features, self.in_features = weight.shape

    def __call__(self, hidden: Tensor) -> Any:
        if self.eager:
            return F.linear(hidden, self.weight, self.bias)
        return _Strict.of(self, hidden, self.weight, self.bias)


class _Tail:
    """The statements of a forward from its head to its loss, as functions of (hidden, weight, bias)."""

    def __init__(self, source, place, module, vocabulary, bias, function, shift):
        self.place, self.module, self.vocabulary, self.bias = place, module, vocabulary, bias
        self.function, self.shift = function, shift
        arguments = source.tree.args
        self.more = arguments.kwarg is not None
        # Without keyword arguments of its own, the forward passes none on.
        self.plain, self.fused = (self._compile(source, fused) for fused in (False, True))

    def _compile(self, source: Source, fused: bool) -> types.FunctionType:
        place, memo = self.place, {}
        body = copy.deepcopy(source.tree.body[place.first : place.last + 1], memo)
        memo[id(place.call)].args = [ast.Name(_HIDDEN, ast.Load())]
        body.append(ast.Return(ast.Name(place.loss, ast.Load())))
        old = source.tree.args
        names = [a.arg for a in (*old.posonlyargs, *old.args, *old.kwonlyargs)]
        arguments = ast.arguments(
            [],
            [ast.arg(n) for n in (*names, _HIDDEN)],
            None,
            [],
            [],
            old.kwarg,
            [ast.Constant(None)] * (len(names) + 1),
        )
        arguments.kwarg = None if old.kwarg is None else ast.arg(old.kwarg.arg)
        more = {"type_params": []} if "type_params" in ast.FunctionDef._fields else {}
        tree = ast.FunctionDef("tail", arguments, body, [], **more)
        tail = Source(source.function, [], tree, source.imported)
        helpers = {}
        if fused:
            sites = list(loss.SOURCE_RULE.sites(tail))
            tree = replace(tree, sites)
            helpers = {name: helper for site in sites for name, helper in site.helpers.items()}
        if not is_trusted(source.function):
            check_effects(tail)
        namespace = source.function.__globals__ | helpers
        exec(compile(ast.fix_missing_locations(ast.Module([tree], [])), "<tail>", "exec"), namespace)
        return isolated(namespace["tail"])

    def error(self, verify: bool) -> float:
        """The largest error in every way in which models call their loss; Skip where it is another one."""
        labels = torch.tensor(
            [[5, 36, -100, 3, 0, 3, 12], [-100, 1, 2, 30, 3, -100, 7]], dtype=torch.int64, device=probe_device()
        )
        labels = torch.where(labels < 0, labels, labels % self.vocabulary)
        ways: list[dict] = [{}]
        if self.more and self.function is not None:
            ways.append({"num_items_in_batch": torch.tensor(5, dtype=torch.int64, device=probe_device())})
        original = None if self.function is None else isolated(self.function.args[0])
        worst = 0.0
        for dtype in (torch.float32, torch.bfloat16) if verify else (torch.float32,):
            probe = Probes(dtype=dtype)
            leaves = [
                probe(2, 7, _FEATURES),
                probe(self.vocabulary, _FEATURES, scale=2.0),
                probe(self.vocabulary) if self.bias else None,
            ]
            for way in ways:
                runs = (
                    (self.fused, False, self.function),
                    (self.plain, True, original),
                    (self.plain, True, self._exact),
                )
                given = leaves, leaves, doubled(leaves)
                dtypes: list[torch.dtype] = []
                compared = [
                    gradients(functools.partial(self._run, dtypes, labels, way, *run), t)
                    for run, t in zip(runs, given, strict=True)
                ]
                if dtypes[0] != dtypes[1]:
                    raise Skip(f"the loss is {dtypes[1]} where the kernel gives {dtypes[0]}")
                worst = max(worst, compare(*compared, "the head and the loss", self.vocabulary))
        return worst

    def _run(self, dtypes, labels, way, tail, eager, function, hidden, weight, bias):
        stand = Stand(self.module, **{self.place.head: _Head(weight, bias, eager)}, loss_function=function)
        loss = tail(stand, labels=labels, **{_HIDDEN: hidden}, **way)
        dtypes.append(loss.dtype)
        # Logits in 16 bits are what the model computes: its loss is as exact as they are.
        return loss.to(hidden.dtype)

    def _exact(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
        """What the loss rule found the model's loss to be, in the dtype of the logits."""
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if self.shift else labels
        rows, targets = logits.reshape(-1, vocab_size), targets.reshape(-1)
        if num_items_in_batch is None:
            return F.cross_entropy(rows, targets, ignore_index=ignore_index)
        return F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


RULE = SourceRule("loss", "head", _sites)
