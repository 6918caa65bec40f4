"""Attention of Hugging Face models, where they look their function up in the attention interface.

`ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)` stays as it is; what
it returns is exchanged for a function with the same arguments. The config is never written to: several models may
share one, and models read it to decide about masks and dtypes.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...ops.registry import is_capturing, needs_grad
from .._device import once_a_device, probe_device
from .._isolated import isolated
from .._rule import Fit, Plan, Site, Skip, SourceRule
from .._source import Source, call, resolve
from .._verify import Probes, compare, doubled, gradients, outputs_only, undisturbed
from .attention import attend, log_fallback, refusal
from .attention_mask import StructuredMask, dense

_OPTIONS = {"dropout", "scaling", "is_causal", "position_bias", "softcap", "attention_mask"}


class Spec(NamedTuple):
    """What an attention function computes from (module, query, key, value, attention_mask) and its options."""

    reads: frozenset[str]  # the options that change its result
    sdpa: bool  # it is the library's function over `scaled_dot_product_attention`, else it makes the weights itself
    grouped: bool  # fewer heads of keys, by the module's num_key_value_groups
    sinks: bool  # of the module
    unmasked: bool = True  # whether it takes None for a mask
    error: float = 0.0

    def refusal(self, module: Any, q: Any, k: Any, v: Any, mask: Any, options: dict[str, Any]) -> str | None:
        """Why this call is left to the function; None where the kernels support it."""
        if options.get("output_attentions") or (not self.sdpa and _weights_wanted(module)):
            return "attention weights are asked for"
        for name, value in options.items():
            if name in self.reads and name not in _OPTIONS and value is not None:
                return f"the option {name}"
        if self.sdpa and options.get("softcap") is not None:
            return "the option softcap"
        if mask is None and not self.unmasked:
            return "there is no mask"
        groups = getattr(module, "num_key_value_groups", 1) if self.grouped else 1
        if isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4:
            if q.shape[1] != k.shape[1] * groups:
                return "the heads of query and key do not fit"
        bias = options.get("position_bias") if "position_bias" in self.reads else None
        reason = refusal(q, k, v, mask, self._dropout(module, options), bias)
        if reason is None and (bias is not None or not self.sdpa) and needs_grad(q, k) and _hides_rows(mask):
            reason = "some query sees no key"
        if reason is None and self.sinks:
            sinks = module.sinks
            if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.device != q.device):
                reason = "the sinks are no vector of the heads"
        return reason

    def _dropout(self, module: Any, options: dict[str, Any]) -> float:
        return options.get("dropout", 0.0) if self.sdpa or module.training else 0.0

    def compute(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
        """(B, Sq, H, Dv)."""
        causal = False
        if self.sdpa:
            causal = options.get("is_causal")
            causal = causal if causal is not None else getattr(module, "is_causal", True)
            causal = q.shape[2] > 1 and mask is None and causal
        extra = {
            name: options.get(given)
            for name, given in (("bias", "position_bias"), ("softcap", "softcap"))
            if given in self.reads
        }
        if self.sinks:
            extra["sinks"] = module.sinks
        if self.sdpa and extra["bias"] is not None:
            mask = _finite(mask, q.dtype)
        out = attend(q, k, v, mask, self._dropout(module, options), causal, options.get("scaling"), **extra)
        return out.transpose(1, 2).contiguous()


_hiding = WeakTensorKeyDictionary()  # masks, which layers share: (their version, whether they hide a row)


def _hides_rows(mask: Any) -> bool:
    """Whether a query sees no key, where the mask is added to the scores.

    Their sum is the least number everywhere, so that the weights are equal, and queries and keys have the gradients of
    equal weights. The kernels, which compute the weights once more from a sum that has lost the scores' digits, have
    other ones.
    """
    if type(mask) is StructuredMask and mask.structure is not None:
        return mask.structure.unreadable or mask.structure.may_hide_all
    mask = dense(mask)
    if type(mask) is not Tensor or mask.is_meta or torch.compiler.is_compiling():
        return False  # a graph cannot depend on what is in a mask
    if is_capturing(mask):
        return True  # a CUDA graph replays the same kernels whatever is in it
    version = None if mask.is_inference() else mask._version
    known = _hiding.get(mask)
    if known is None or known[0] != version:
        if mask.dtype == torch.bool:
            seen = mask.any(-1)
        else:
            seen = mask.amax(-1) > torch.finfo(mask.dtype).min / 2
        known = _hiding[mask] = version, not bool(seen.all())
    return known[1]


def _finite(mask: Any, dtype: torch.dtype) -> Any:
    """With a position bias the library makes a boolean mask finite: a query that sees nothing then sees everything."""
    if type(mask) is StructuredMask:
        structure = mask.structure
        if structure is not None and not structure.unreadable and not structure.may_hide_all:
            return mask
        mask = mask.dense
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _weights_wanted(module: Any) -> bool:
    """Whether somebody looks at what the attention module returns beside its output."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    for hook in getattr(module, "_forward_hooks", {}).values():
        if capturing is None or getattr(hook, "__module__", None) != capturing.__name__:
            return True
    collector = getattr(capturing, "_active_collector", None)
    if torch.compiler.is_compiling():  # which cannot read a context variable
        wanted = getattr(collector, "global_var", None)
    else:
        wanted = collector.get() if collector is not None else None
    return wanted is not None and any("attentions" in key for key in wanted)


def _by_kernels(original: Callable, spec: Spec) -> Callable:
    """A function with the arguments of `original`, and its results; None for the attention weights."""

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **options: Any):
        reason = (
            "its options are not named" if rest else spec.refusal(module, query, key, value, attention_mask, options)
        )
        if reason is not None:
            log_fallback(type(module).__name__, reason)
            return original(module, query, key, value, dense(attention_mask), *rest, **options)
        return spec.compute(module, query, key, value, attention_mask, options), None

    return attention


_replacements: dict[Callable, Callable] = {}


def interface(found: Callable) -> Callable:
    """What takes the place of an attention function; the function itself where it is not known."""
    replacement = _replacements.get(found)
    if replacement is None and not torch.compiler.is_compiling():
        spec = _identify(found)
        replacement = _replacements[found] = _by_kernels(found, spec) if isinstance(spec, Spec) else found
    return replacement or found


def _sites(source: Source) -> Iterator[Site]:
    models = sys.modules.get("transformers.modeling_utils")
    for node in source.body():
        match node:
            case ast.Call(ast.Attribute(_, "get_interface"), [implementation, default], []):
                owner, path = source.constant(node.func.value), source.attribute(implementation)
                if path and isinstance(owner, getattr(models, "AttentionInterface", ())):
                    check = _check(owner, path, source.constant(default), _uses_weights(source))
                    new = call("_bigkernels_interface", ast.copy_location(ast.Call(node.func, node.args, []), node))
                    yield Site(check, {node: new}, {"_bigkernels_interface": interface})


def _check(owner: Any, path: list[str], default: Any, uses_weights: bool):
    def check(module: nn.Module, plan: Plan) -> Fit | None:
        implementation = resolve(module, path)
        if implementation not in ("sdpa", "eager"):
            raise Skip(f"its attention runs through {implementation}")
        if implementation == "eager" and uses_weights:
            raise Skip("its forward computes with the attention weights")
        function = owner.get_interface(implementation, default)
        spec = _identify(function)
        if isinstance(spec, Skip):
            raise spec
        interface(function)
        return Fit("attention (sinks)" if spec.sinks else "attention", spec.error)

    return check


def _uses_weights(source: Source) -> bool:
    """Whether the forward does more with the weights, the second value of a call of the function, than return them."""
    weights = {node.targets[0].elts[1].id for node in source.body() if _is_pair(node)}
    returned = set()
    for node in source.body():
        if isinstance(node, ast.Return) and node.value is not None:
            elements = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            returned |= {id(e) for e in elements}
    return any(
        isinstance(node, ast.Name)
        and node.id in weights
        and isinstance(node.ctx, ast.Load)
        and id(node) not in returned
        for node in source.body()
    )


def _is_pair(node: ast.AST) -> bool:
    match node:
        case ast.Assign([ast.Tuple([ast.Name(), ast.Name()])], ast.Call(ast.Name(name))):
            return "attention" in name
    return False


@once_a_device
def _identify(function: Callable) -> Spec | Skip:
    """What `function` computes, or why the kernels cannot take its place."""
    name = getattr(function, "__name__", type(function).__name__)
    with undisturbed():
        try:
            return _decide(function)
        except Skip as skip:
            return skip
        except Exception as error:  # noqa: BLE001  it was called with arguments that it may not be made for
            return Skip(f"{name} cannot be checked: {type(error).__name__}")


def _decide(function: Callable) -> Spec:
    library = sys.modules.get("transformers.integrations.sdpa_attention")
    if function is getattr(library, "sdpa_attention_forward", None):
        spec = Spec(frozenset(inspect.signature(function).parameters), True, True, False)
        return spec._replace(error=_error(function, spec))
    name = function.__name__
    options, attributes = _reads(function)
    unknown = attributes - {"num_key_value_groups", "sinks", "training", "head_dim"}
    if unknown:
        raise Skip(f"{name} reads {', '.join(sorted(unknown))} of its module")
    function = isolated(function)
    spec = Spec(frozenset(options), False, "num_key_value_groups" in attributes, "sinks" in attributes)
    try:
        return spec._replace(error=_error(function, spec))
    except TypeError:
        spec = spec._replace(unmasked=False)
        return spec._replace(error=_error(function, spec))


def _reads(function: types.FunctionType) -> tuple[set[str], set[str]]:
    """The options that the body of an attention function reads, and the attributes of its first argument."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):
        raise Skip(f"{function.__name__} has no source to read") from None
    arguments = tree.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if any(a is not None and a.arg in loaded for a in (arguments.vararg, arguments.kwarg)):
        raise Skip(f"{function.__name__} reads options that it does not name")
    attributes, uses = [], 0
    for node in ast.walk(tree):
        match node:
            case ast.Name(name) if name == names[0]:
                uses += 1
            case ast.Attribute(ast.Name(name), attribute) if name == names[0]:
                attributes.append(attribute)
            case ast.Call(ast.Name("getattr" | "hasattr"), [ast.Name(name), ast.Constant(attribute), *_]):
                attributes += [attribute] * (name == names[0])
    if uses != len(attributes):
        raise Skip(f"{function.__name__} hands its module on")
    return set(names[5:]) & loaded, set(attributes)


_QUERIES, _KEYS, _HEADS, _SIZE = 19, 33, 4, 32


def _error(function: Callable, spec: Spec) -> float:
    """The kernels against the function, with every option alone and some together, in two dtypes."""
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys, groups, mask, options in _calls(spec):
            worst = max(worst, _compare(function, spec, dtype, queries, keys, groups, mask, options))
    with torch.autocast(probe_device().type, torch.bfloat16):
        leaves = _leaves(spec, torch.float32, _QUERIES, _KEYS, 1, {})
        mask = _mask("causal", torch.float32, _QUERIES, _KEYS)
        if _theirs(function, spec, 1, mask, {"scaling": 0.3})(*leaves).dtype != torch.bfloat16:
            raise Skip(f"{function.__name__} keeps its dtype under autocast")
    return worst


def _calls(spec: Spec) -> Iterator[tuple]:
    """(queries, keys, groups, mask, options) of the calls that are compared; a string stands for a tensor."""
    extra: list[dict[str, Any]] = [{}]
    if "softcap" in spec.reads:
        extra.append({"softcap": 1.5})
    if "position_bias" in spec.reads:
        extra.append({"position_bias": "bias"})
    groups = 2 if spec.grouped else 1
    for more in extra:
        yield _QUERIES, _KEYS, groups, "causal", {"scaling": 0.3} | more
        if spec.unmasked:
            yield 1, _KEYS, groups, None, {"scaling": 0.3} | more
        if spec.sdpa:
            yield _QUERIES, _KEYS, groups, "boolean", more
            yield _QUERIES, _KEYS, groups, None, more  # the rest of a static cache
            yield _QUERIES, _KEYS, groups, None, {"is_causal": False} | more
    if spec.sdpa:
        yield _KEYS, _QUERIES, 1, None, {}
    else:
        yield _QUERIES, _KEYS, 1, "hidden", {"scaling": 0.3}


def _mask(kind: str | None, dtype: torch.dtype, queries: int, keys: int | None = None) -> Tensor | None:
    if kind is None:
        return None
    keys = queries if keys is None else keys
    seen = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=probe_device()).tril(keys - queries)
    if kind == "hidden":
        seen[1, :, 0] = False
    if kind == "boolean":
        seen[1, :, :, :2] = False
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=probe_device()).masked_fill(~seen, torch.finfo(dtype).min)


def _leaves(spec: Spec, dtype, queries, keys, groups, options) -> list[Tensor | None]:
    probe = Probes(dtype=dtype)
    leaves = [probe(2, _HEADS, queries, _SIZE), *(probe(2, _HEADS // groups, keys, _SIZE) for _ in range(2))]
    leaves.append(probe(1, _HEADS, queries, keys) if "position_bias" in options else None)
    return [*leaves, probe(_HEADS) if spec.sinks else None]


def _stub(groups: int, sinks: Tensor | None) -> types.SimpleNamespace:
    return types.SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False, head_dim=_SIZE)


def _theirs(function, spec: Spec, groups, mask, options):
    def theirs(q, k, v, bias, sinks):
        given = options | ({} if bias is None else {"position_bias": bias})
        return function(_stub(groups, sinks), q, k, v, mask, dropout=0.0, **given)[0]

    return theirs


def _compare(function, spec: Spec, dtype, queries, keys, groups, kind, options) -> float:
    mask = _mask(kind, dtype, queries, keys)

    def ours(q, k, v, bias, sinks):
        wide = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        return spec.compute(_stub(groups, sinks), q, k, v, wide, options | {"position_bias": bias})

    leaves = _leaves(spec, dtype, queries, keys, groups, options)
    theirs = _theirs(function, spec, groups, mask, options)
    # One query is a decoding step. A finite mask shows a hidden query everything; what gradient that has is lost in the
    # rounding of its scores.
    observe = outputs_only if kind == "hidden" or queries == 1 else gradients
    results = [observe(f, t) for f, t in ((ours, leaves), (theirs, leaves), (ours, doubled(leaves)))]
    return compare(*results, function.__name__)


RULE = SourceRule("attention", "interface", _sites)
