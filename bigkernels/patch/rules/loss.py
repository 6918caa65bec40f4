"""Cross entropies: the loss function of a Hugging Face model, and those that a forward or a child module computes."""

# mypy: ignore-errors

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from .._device import once_a_device, probe_device
from .._isolated import isolated
from .._logits import Logits, materialized
from .._rule import Fit, ModuleRule, Plan, Site, Skip, SourceRule, Write
from .._source import Source, find_source
from .._verify import Probes, compare, gradients, plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As `torch.nn.functional.cross_entropy`, by the kernel for rows of logits with one class each."""
    input = materialized(input)
    if (
        size_average is None
        and reduce is None
        and _fits(input, target)
        and (
            weight is None
            or (
                plain(weight)
                and weight.dtype == input.dtype
                and not weight.requires_grad
                and weight.shape == input.shape[1:]
            )
        )
        and (input.dtype == torch.float32 or not torch.is_autocast_enabled(input.device.type))
    ):
        loss = _kernel(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        return loss.to(input.dtype)
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _fits(logits: Any, target: Any, any_rank: bool = False) -> bool:
    """Whether the kernel takes rows of logits, of two dimensions but with `any_rank`, and a class for each."""
    if not plain(target) or not (isinstance(logits, Logits) or plain(logits)):
        return False
    shape = logits.shape
    return (
        (len(shape) == 2 or any_rank)
        and shape[-1] > 0
        and target.shape == (math.prod(shape[:-1]),)
        and logits.dtype in _DTYPES
        and target.dtype == torch.int64
        and target.device == logits.device
    )


def _kernel(logits: Tensor | Logits, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    if isinstance(logits, Logits):
        return logits.cross_entropy(target, weight, **options)
    return functional.cross_entropy(logits, target, weight, **options)


_ORIGINAL = nn.CrossEntropyLoss.forward


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Takes the place of the class where a forward makes its own loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return module_forward(self, input, target)


def module_forward(module: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
    if nn.CrossEntropyLoss.forward is not _ORIGINAL:  # replaced since
        return nn.CrossEntropyLoss.forward(module, input, target)
    return cross_entropy(
        input,
        target,
        module.weight,
        ignore_index=module.ignore_index,
        reduction=module.reduction,
        label_smoothing=module.label_smoothing,
    )


def token_loss(
    original: Callable,
    shift: bool,
    logits: Any,
    labels: Any,
    vocab_size: Any,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Any = None,
    **kwargs: Any,
) -> Tensor:
    """As `original`, a loss function that a Hugging Face model was given, without a float32 copy of the logits.

    With `shift` token t is compared with label t + 1; the labels move, and the logits stay where they are.
    """
    targets, logits = labels, materialized(logits)
    if shift and shift_labels is not None:
        targets = shift_labels
    elif shift and isinstance(labels, Tensor):
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if (
        isinstance(logits, (Tensor, Logits))
        and isinstance(targets, Tensor)
        and logits.dim() > 1
        and logits.shape[-1] == vocab_size
        and (shift or shift_labels is None)
        and (not kwargs or _ignores_options(original))
    ):
        lazy = isinstance(logits, Logits)  # which knows its rows
        rows, targets = logits if lazy else logits.reshape(-1, vocab_size), targets.reshape(-1).to(logits.device)
        if _fits(rows, targets, lazy):
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = _kernel(rows, targets, ignore_index=ignore_index, reduction=reduction)
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            return loss if num_items_in_batch is None else loss / num_items_in_batch
    if shift_labels is not None:
        kwargs["shift_labels"] = shift_labels
    if isinstance(logits, Logits):
        logits = logits.tensor()
    return original(
        logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index, **kwargs
    )


def is_token_loss(function: Any) -> bool:
    return type(function) is functools.partial and function.func is token_loss


def _ignores_options(function: Callable) -> bool:
    """Models hand their own keyword arguments on to the loss. Hugging Face's losses drop them; others may not."""
    return getattr(function, "__module__", None) == "transformers.loss.loss_utils"


def _plan_function(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    """Models whose forward calls `self.loss_function`, a property with a value of the instance behind it."""
    accessor = inspect.getattr_static(type(module), "loss_function", None)
    if not isinstance(accessor, property) or accessor.fset is None:
        return None
    if not all(
        "_loss_function" in (*f.__code__.co_names, *f.__code__.co_consts) for f in (accessor.fget, accessor.fset)
    ):
        return None
    source = find_source(type(module))
    if source is None or "loss_function" not in source.function.__code__.co_names:
        return None
    function = module.loss_function
    if is_token_loss(function):
        function = function.args[0]  # patched before
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    name = getattr(function, "__name__", type(function).__name__)
    if "vocab_size" not in names:
        return None
    if names[:3] != ["logits", "labels", "vocab_size"] or not {"num_items_in_batch", "ignore_index"} <= set(names):
        raise Skip(f"the loss function {name} takes other arguments: {', '.join(names)}")
    kind = _identify(function, "shift_labels" in names)
    if isinstance(kind, Skip):
        raise kind
    shift, error = kind
    kernel = "cross_entropy (next token)" if shift else "cross_entropy (same token)"
    return Write(module, "_loss_function", functools.partial(token_loss, function, shift)), Fit(kernel, error)


FUNCTION_RULE = ModuleRule("loss", _plan_function)


@once_a_device
def _identify(function: Callable, takes_shifted: bool) -> tuple[bool, float] | Skip:
    """Whether a loss function compares with the next token or the same, and the error; or why it is left alone."""
    reason = None
    for shift in (True, False):
        try:
            return shift, _check_function(function, shift, takes_shifted)
        except Skip as skip:
            reason = skip if reason is None or "kernel" in str(skip) else reason
    return reason


def _check_function(function: Callable, shift: bool, takes_shifted: bool) -> float:
    """Every way in which models call a loss function, in two dtypes, with gradients."""
    function = isolated(function)
    name = f"the loss function {getattr(function, '__name__', type(function).__name__)}"
    vocabulary, worst = 37, 0.0
    labels = torch.tensor(
        [[5, 36, -100, 3, 0, 3, 12], [-100, 1, 2, 30, 3, -100, 7]], dtype=torch.int64, device=probe_device()
    )
    five, three = (torch.tensor(n, dtype=torch.int64, device=probe_device()) for n in (5, 3))
    ways: list[dict] = [{}, {"ignore_index": 3}, {"num_items_in_batch": 4}, {"num_items_in_batch": five}]
    if shift and takes_shifted:
        ways += [{"shift_labels": labels}, {"shift_labels": labels, "num_items_in_batch": three}]
    for dtype in (torch.float32, torch.bfloat16):
        for way in ways:
            given = labels if "ignore_index" not in way else labels.clamp_min(0)
            leaves = [Probes(dtype=dtype)(2, 7, vocabulary, scale=3.0)]

            def theirs(z, way=way, given=given):
                return function(z, given, vocabulary, **way)

            def ours(z, way=way, given=given):
                return token_loss(_refuse, shift, z, given, vocabulary, **way)

            # The losses compute in float32, and so does the yardstick; what is compared is the formula.
            exact = [t.double() for t in gradients(ours, [leaves[0].detach().float().requires_grad_()])]
            worst = max(worst, compare(gradients(ours, leaves), gradients(theirs, leaves), exact, name))
    return worst


def _refuse(*args: Any, **kwargs: Any) -> Tensor:
    raise Skip("the loss function: the kernel does not support this call")


def _plan_module(module: nn.Module, plan: Plan) -> tuple[Write, Fit] | None:
    if type(module) is not nn.CrossEntropyLoss or nn.CrossEntropyLoss.forward is not _ORIGINAL:
        return None
    return Write(module, "forward", functools.partial(module_forward, module)), Fit("cross_entropy", _error(plan))


MODULE_RULE = ModuleRule("loss", _plan_module)


def _sites(source: Source) -> Iterator[Site]:
    for node in source.body():
        if isinstance(node, ast.Call):
            target = source.constant(node.func)
            for original, helper in ((F.cross_entropy, cross_entropy), (nn.CrossEntropyLoss, CrossEntropyLoss)):
                if target is original:
                    name = f"_bigkernels_{helper.__name__}"
                    new = ast.Name(name, ast.Load())
                    yield Site(
                        lambda module, plan: Fit("cross_entropy", _error(plan)), {node.func: new}, {name: helper}
                    )


def _error(plan: Plan) -> float:
    """The kernel against torch's cross entropy with every option, once a plan."""
    if "cross_entropy" not in plan.memory:
        worst = 0.0
        target = torch.tensor([5, 36, -100, 3, 0, 3, 12], dtype=torch.int64, device=probe_device())
        weight = Probes(seed=1)(37).detach().abs() + 0.1
        for dtype in (torch.float32, torch.bfloat16) if plan.verify else (torch.float32,):
            for way in (
                {},
                {"reduction": "sum"},
                {"reduction": "none", "ignore_index": 3},
                {"label_smoothing": 0.2},
                {"weight": weight.to(dtype)},
            ):
                given = target if "ignore_index" not in way else target.clamp_min(0)
                leaves = [Probes(dtype=dtype)(7, 37, scale=3.0)]
                results = [
                    gradients(lambda z, f=f, way=way, given=given: f(z, given, **way), leaves)
                    for f in (cross_entropy, F.cross_entropy)
                ]
                wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in way.items()}
                exact = gradients(
                    lambda z, way=wide, given=given: F.cross_entropy(z, given, **way),
                    [leaves[0].detach().double().requires_grad_()],
                )
                worst = max(worst, compare(*results, exact, "cross_entropy"))
        plan.memory["cross_entropy"] = worst
    return plan.memory["cross_entropy"]


SOURCE_RULE = SourceRule("loss", "cross_entropy", _sites)
