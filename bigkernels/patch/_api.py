"""`patch`, `unpatch` and `patched`."""

# mypy: ignore-errors

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._torch_private import LAZY, require
from ..program.suspend import ABSENT as _ABSENT
from ..program.suspend import RECORD as _RECORD
from . import _decode, _encode
from ._bound import Bound
from ._device import device_of, probing_on
from ._generated import rewritten
from ._report import PatchReport, Row
from ._rule import Plan, Skip, Write
from ._source import all_sites, check_rewritable, find_source
from ._verify import undisturbed
from ._writes import written_after
from .rules import MODULE_RULES, SOURCE_RULES


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norm: bool = True,
    rope: bool = True,
    mlp: bool = True,
    loss: bool = True,
    linear: bool | None = None,
    decode: bool | str = True,
    encode: bool = True,
    verify: bool = True,
    strict: bool = False,
) -> PatchReport:
    """Let bigkernels compute what it can in `model`, in place and for this instance only.

    Candidates are found by what a module holds and computes, not by its name, and each is compared with a kernel
    before it is touched. Code paths, arguments and dtypes that a kernel does not support run the model's own code.
    A model that is already patched is patched anew with the given flags; patching twice changes nothing.

    Args:
        model: any module; its classes and every other model stay as they are.
        attention: attention functions of Hugging Face models, calls of `scaled_dot_product_attention`, and
            `nn.MultiheadAttention`.
        linear: linear layers (CPU). By default the kernel takes calls without gradients where it is known to be at
            least as fast as PyTorch's product on such a machine (a few tokens, above all), and no others; True: all
            calls, training too; False: none. `bigkernels.pack` gives them packed weights for inference.
        norm: RMSNorm and LayerNorm modules, and the residual addition before them where the block's code has it;
            `nn.GroupNorm` and `nn.BatchNorm` (CPU), and the activation behind them.
        rope: calls of a rotary embedding function.
        mlp: products of an activation with another tensor; linear layers and the activation behind them (CPU), which
            the layer after it then does not keep for backward.
        loss: cross entropies; logits are then not copied to float32. In training (`train()`, labels given, gradients
            on) a language model whose logits go from a linear layer through a scale or a softcap into the loss never
            makes them: its loss comes from `linear_cross_entropy`. What it returns as `logits` is then a tensor that
            has no memory until it is read, and that raises RuntimeError if it is first read after the head's weights
            have changed. In evaluation, and where weights come and go (FSDP), nothing changes.
        decode: the step program of causal language models (CPU): inference takes it wherever it gives what the modules
            give. It reads weights where the model keeps them; of quantized ones it keeps a copy of its own, made at
            first use, in the order in which products read them fastest, where there is memory for it (the
            report says how much it takes, or why there is none). It is made again when the codes change: writes that
            PyTorch counts are seen at the next call, and others (through `.data`, numpy) at the latest at the next
            call that begins a sequence. It goes when the model is moved, trained or no longer patched. "stored": no
            copy; False: no program.
        encode: the step program of encoders (CPU): inference takes it for layers that map hidden states (B, S, width)
            to such, where it gives what the modules give. Padding at the end of a text is not computed: hidden states
            there are zeros. With padding elsewhere all tokens are computed. Hidden states between layers are computed
            if somebody reads them; RuntimeError if that is after layers have changed.
        verify: also compare gradients, 16-bit types and large and small inputs. What decides which kernel fits, a
            comparison of outputs in float32, always runs.
        strict: raise where a candidate cannot be patched.

    Returns:
        What was patched, with the largest relative error seen, and which candidates were left alone, with the reason.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: `decode` is neither a bool nor "stored".
        RuntimeError: with `strict`, some candidate cannot be patched; nothing is changed then.
    """
    require(LAZY, "patch")
    if not isinstance(model, nn.Module):
        raise TypeError(f"bigkernels.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if decode not in (True, False, "stored"):
        raise ValueError(f'bigkernels.patch: decode is {decode!r}; accepted are True, False and "stored"')
    flags = {
        "attention": attention,
        "norm": norm,
        "rope": rope,
        "mlp": mlp,
        "loss": loss,
        "linear": linear,
        "decode": decode,
        "encode": encode,
    }
    with undisturbed(p.device for p in model.parameters()):
        writes, report = _plan(model, flags, verify)
    if strict and report.skipped:
        reasons = "\n".join(f"  {row.path or '(model)'}: {row.what}" for row in report.skipped)
        raise RuntimeError(f"bigkernels.patch: strict=True and these cannot be patched:\n{reasons}")
    unpatch(model)
    for write in writes:
        _write(*write)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module gets back exactly what it had. A model that is not patched is left as it is.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"bigkernels.unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        _decode.release(module)
        _encode.release(module)
        for key, (value, before) in module.__dict__.pop(_RECORD, {}).items():
            _restore(path, module, key, value, before)


@contextmanager
def patched(model: nn.Module, **options: bool | str | None) -> Iterator[PatchReport]:
    """`patch(model, **options)` inside a `with` block and `unpatch(model)` after it."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)


def _write(module: nn.Module, key: str, value: Any) -> None:
    record = module.__dict__.setdefault(_RECORD, {})
    record[key] = (value, module.__dict__.get(key, _ABSENT))
    module.__dict__[key] = value


def _restore(path: str, module: nn.Module, key: str, value: Any, before: Any) -> None:
    current = module.__dict__.get(key, _ABSENT)
    if current is value or (isinstance(current, types.MethodType) and current.__func__ in _layers(value)):
        if isinstance(before, str) and before == _ABSENT:
            del module.__dict__[key]
        else:
            module.__dict__[key] = before
        return
    # Someone wrapped the patched forward and kept it, under another name (accelerate's hooks do) or as a variable of
    # the wrapper (TRL's fused head does): restore it there.
    kept = [name for name, other in module.__dict__.items() if other is value]
    cells = [
        cell
        for cell in getattr(getattr(current, "__func__", current), "__closure__", None) or ()
        if _content(cell) is value
    ]
    original = functools.partial(type(module).forward, module) if before == _ABSENT else before
    for name in kept:
        module.__dict__[name] = original
    for cell in cells:
        cell.cell_contents = original
    if not kept and not cells:
        warnings.warn(
            f"bigkernels.unpatch: {path or '(model)'}.{key} was replaced after patch; it is left as it is",
            RuntimeWarning,
            stacklevel=3,
        )


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it has none yet
        return None


def _layers(value: Any) -> list[Any]:
    """The function that was written and those that its decorators wrap."""
    layers = [value.__func__] if isinstance(value, Bound) else []
    while layers and hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    return layers


def _foreign(module: nn.Module, key: str) -> bool:
    """Whether the instance has a value of its own under `key` that patch did not write."""
    value = module.__dict__.get(key, _ABSENT)
    return value is not _ABSENT and value is not module.__dict__.get(_RECORD, {}).get(key, (_ABSENT,))[0]


def _plan(model: nn.Module, flags: dict[str, bool | str | None], verify: bool) -> tuple[list[Write], PatchReport]:
    """What to write and the report about it. Nothing is changed."""
    plan = Plan(verify, flags["linear"], written_after(model))
    report, writes = PatchReport(), []
    order: dict[str, int] = {}
    taken: set[nn.Module] = set()
    extra: dict[tuple[int, str], Write] = {}
    for path, module in model.named_modules():
        order[path] = len(order)
        for rule in MODULE_RULES:
            if flags[rule.flag] is False:
                continue
            with probing_on(device_of(module, model)):
                planned = _attempt(report, path, functools.partial(rule.plan, module, plan))
            if planned is None:
                continue
            write, fit = planned
            if _foreign(module, write.key):
                report.skipped.append(Row(path, f"{write.key} was already replaced on this instance", None))
                continue
            writes.append(write)
            extra.update({(id(w.module), w.key): w for w in fit.writes})
            (report.inference if fit.inference else report.patched).append(Row(path, fit.kernel, fit.error))
            if write.key == "forward":
                taken.add(module)
    for path, module in model.named_modules():
        if module in taken:
            continue
        source = find_source(type(module))
        if source is None or isinstance(module, torch.jit.ScriptModule):
            continue
        chosen = []
        for name, (rule, site) in _sites(type(module), type(module).forward).items():
            if flags[rule.flag]:
                with probing_on(device_of(module, model)):
                    fit = _attempt(report, path, functools.partial(_check_site, site, module, source, plan))
                if fit is not None:
                    chosen.append(name)
                    extra.update({(id(w.module), w.key): w for w in fit.writes})
                    (report.inference if fit.inference else report.patched).append(Row(path, fit.kernel, fit.error))
        if chosen:
            writes.append(Write(module, "forward", Bound(rewritten(type(module), tuple(chosen)), module)))
    writes += extra.values()
    if flags["decode"]:
        for path, module in _decode.candidates(model):
            reason = "forward was already replaced on this instance" if _foreign(module, "forward") else None
            reason = reason or _decode.unsupported(module)
            if reason is not None:
                report.skipped.append(Row(path, f"decode program: {reason}", None))
                continue
            report.programs[path] = _decode.steps_of(module, flags["decode"] == "stored")
            writes += _decode.writes_for(module, writes, report.programs[path])
    if flags["encode"]:
        for path, layers in _encode.candidates(model, _decode.decoders(model)):
            if any(p.device.type != "cpu" for layer in layers for p in layer.parameters()):
                continue
            foreign = any(_foreign(layer, "forward") for layer in layers)
            reason = "forward was already replaced on a layer" if foreign else _encode.unsupported(layers)
            if reason is not None:
                report.skipped.append(Row(path, f"encoder program: {reason}", None))
                continue
            report.programs[path] = stack = _encode.stack_of(layers)
            writes += _encode.writes_for(stack, writes)
    for rows in (report.patched, report.inference, report.skipped):
        rows.sort(key=lambda row: order[row.path])
    return writes, report


@functools.lru_cache(maxsize=512)
def _sites(cls: type, forward: Any) -> dict:  # by both: a class's forward may be replaced between two calls of `patch`
    return all_sites(find_source(cls).fresh(), SOURCE_RULES)


def _check_site(site, module, source, plan):
    fit = site.check(module, plan)
    if fit is None:
        return None
    if _foreign(module, "forward"):
        raise Skip("forward was already replaced on this instance")
    check_rewritable(source)
    return fit


def _attempt(report: PatchReport, path: str, check) -> Any:
    """The check's result; a refusal, or a failure while checking, becomes a row of the report and None."""
    try:
        return check()
    except Skip as skip:
        report.skipped.append(Row(path, str(skip), None))
    except Exception as error:  # noqa: BLE001  a check must never break the user's program
        message = (str(error).splitlines() or [""])[0][:100]
        report.skipped.append(Row(path, f"the check failed: {type(error).__name__}: {message}", None))
    return None
