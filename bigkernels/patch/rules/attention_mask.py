"""Masks of Hugging Face models that say what they hold, so that a kernel need not read them and nobody need build them.

A model makes its masks once a forward, by `create_causal_mask` and its siblings, and hands them to every layer. Of
causal, sliding, padded and packed ones, `Structure` keeps what kernels take as options, and `StructuredMask` is the
tensor that carries it: it becomes the dense mask of the model's own builder as soon as anything else reads it.
"""

# mypy: ignore-errors

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch_private import no_function, tree_map
from ...ops.registry import has_values, is_capturing, is_readable
from .._rule import Fit, Plan, Site, Skip, SourceRule
from .._source import Source, find_source

NAME = "bigkernels, patched"  # of the builder in the registry of masks; "bigkernels" is what users ask for by name
BUILDERS = (
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
)


@dataclass
class Structure:
    """Which of the keys a query sees; the last query is aligned to the last of the first `used` keys."""

    queries: int
    keys: int
    used: int  # nobody sees a key after these
    left: int  # as in `functional.attention`, -1 where there is no end
    right: int
    padding: Tensor | None = None  # (B, used), True where a key may be seen
    sequences: Tensor | None = None  # (B, queries): a token sees those with the same number

    def visible(self, rows: Tensor) -> Tensor:
        """The mask of the queries `rows`: (1 or B, 1, len(rows), keys)."""
        key = torch.arange(self.keys, device=rows.device, dtype=torch.int64)
        at = (rows + (self.used - self.queries))[:, None]
        seen = (key < self.used).expand(len(rows), -1)
        if self.left >= 0:
            seen = seen & (key >= at - self.left)
        if self.right >= 0:
            seen = seen & (key <= at + self.right)
        seen = seen[None, None]
        if self.padding is not None:
            padding = nn.functional.pad(self.padding, (0, self.keys - self.used))
            seen = seen & padding[:, None, None]
        if self.sequences is not None:
            seen = seen & (self.sequences[:, rows, None] == self.sequences[:, None, :])[:, None]
        return seen

    @property
    def unreadable(self) -> bool:
        """Whether `may_hide_all` cannot be asked now."""
        return self.padding is not None and self.left < 0 and is_capturing(self.padding)

    @functools.cached_property
    def may_hide_all(self) -> bool:
        """Whether some query may see no key. Options make it zero; an additive mask, finite, shows it all keys."""
        if self.padding is None:
            return False
        begins = self.padding[:, 0] if self.right == 0 else self.padding.any(1)
        return self.left >= 0 or not bool(begins.all())

    @functools.cached_property
    def packed(self) -> tuple[Tensor, int]:
        """(cu_seqlens, the longest length) of the sequences in all rows of the batch, one row after the other."""
        new = self.sequences.diff(dim=1) != 0
        first = new.new_ones(new.shape[0], 1)
        starts = torch.cat((first, new), 1).flatten().nonzero().flatten()
        ends = torch.cat((starts, starts.new_full((1,), self.sequences.numel()))).int()
        return ends, int(ends.diff().max())


class StructuredMask(Tensor):
    """A mask (B, 1, Sq, Sk) that is built when an operator reads it. `structure` says what is in it."""

    __torch_function__ = no_function

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        structure: Structure | None,
        build: Callable[[], Tensor],
    ) -> StructuredMask:
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.structure, mask._build, mask._built = structure, build, None
        return mask

    @property
    def dense(self) -> Tensor:
        if self._built is None:
            self._built = self._build().contiguous()  # which is what the strides of this tensor say
        return self._built

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = any(argument.alias_info is not None for argument in function._schema.arguments)

        def densified(value: Any) -> Any:
            if type(value) is not StructuredMask:
                return value
            if aliases:  # a write, or a view that somebody may write to
                value.structure = None
            return value.dense

        args, kwargs = tree_map(densified, (args, kwargs or {}))
        return function(*args, **kwargs)

    def tolist(self) -> list:
        return self.dense.tolist()

    def numpy(self, **options: Any) -> Any:
        return self.dense.numpy(**options)

    # For compilers, which trace tensors with tensors inside; in their graphs the mask is dense.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> StructuredMask:
        dense = inner["dense"]
        return StructuredMask(dense.shape, dense.dtype, dense.device, None, lambda: dense)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return copy.deepcopy(self.dense, memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.dense.__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:
        return repr(self.dense)


class _Config:
    """A config as the mask functions read it: that of the model, but for the name of the builder."""

    _attn_implementation = NAME

    def __init__(self, config: Any):
        self.__dict__["original"] = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


def _build(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The builder that is registered under `NAME`: structured where possible, else the model's own mask."""
    original = config.original if isinstance(config, _Config) else config
    kind = original._attn_implementation if isinstance(config, _Config) else "sdpa"
    masks = sys.modules["transformers.masking_utils"]
    build = functools.partial(masks.ALL_MASK_ATTENTION_FUNCTIONS[kind], *args, config=original, **kwargs)
    structure = None if args else _structure(kind, **kwargs)
    if structure is None:
        return build()
    shape = (kwargs["batch_size"], 1, structure.queries, structure.keys)
    dtype = torch.bool if kind == "sdpa" else kwargs.get("dtype", torch.float32)
    return StructuredMask(shape, dtype, torch.device(kwargs.get("device", "cpu")), structure, build)


def _structure(
    kind: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> Structure | None:
    """What a builder's arguments describe; None where a dense mask is as good or the only way."""
    if isinstance(q_offset, Tensor):
        if not is_readable(q_offset) or q_offset.numel() != 1:
            return None  # reading it would wait for the device
        q_offset = int(q_offset)
    if q_length == 1 or not (attention_mask is None or _is_padding(attention_mask, batch_size)):
        return None
    mask = _read(mask_function)
    if mask is None:
        return None
    left, right, sequences = mask
    if left >= kv_length and right == 0:
        left = -1
    last = q_offset - kv_offset + q_length  # one after the key at the last query's place
    used = last if right == 0 else kv_length
    if used > kv_length or q_offset < kv_offset or ((left, right) != (-1, -1) and last != used):
        return None
    if sequences is not None and (not has_values(sequences) or is_capturing(sequences)):
        return None  # kernels are told where sequences end, and how long the longest is
    if sequences is not None and (sequences.shape != (batch_size, q_length) or (q_offset, kv_length) != (0, q_length)):
        return None
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + used]
        padding = nn.functional.pad(padding, (0, used - padding.shape[1]))
        # On a GPU nobody waits for the answer: the kernels read what is hidden, if anything is.
        if not padding.is_cuda and padding.all():
            padding = None
    if sequences is not None and padding is not None:
        return None
    structure = Structure(q_length, kv_length, used, left, right, padding, sequences)
    if left < 0 and padding is None and sequences is None:
        # Builders return None then: attention is told that it is causal, or it is not masked at all.
        if allow_is_bidirectional_skip if right < 0 else allow_is_causal_skip and kind == "sdpa" and used == q_length:
            return None
    if kind == "eager" and (structure.unreadable or structure.may_hide_all):
        return None
    return structure if _holds(structure, mask_function, q_offset, kv_offset, batch_size, device) else None


def _is_padding(mask: Any, batch: int) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
        return False
    return mask.shape[0] == batch and has_values(mask)


def _read(function: Any) -> tuple[int, int, Tensor | None] | None:
    """(left, right, sequences) of a mask function, by the functions that it is composed of; None if unknown."""
    masks = sys.modules["transformers.masking_utils"]
    if function is masks.causal_mask_function:
        return -1, 0, None
    if function is masks.bidirectional_mask_function:
        return -1, -1, None
    maker = getattr(function, "__qualname__", "").split(".<locals>")[0]
    if getattr(function, "__module__", None) != masks.__name__ or function.__closure__ is None:
        return None
    held = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__), strict=True))
    match maker, list(held.values()):
        case "sliding_window_overlay", [int(window)] if window > 0:
            return window - 1, -1, None
        case "sliding_window_bidirectional_overlay", [int(window)] if window >= 0:
            return window, window, None
        case "packed_sequence_mask_function", [Tensor() as sequences] if sequences.dim() == 2:
            return -1, -1, sequences
        case "remap_positions_for_packed_sequence", _ if "mask_function" in held:
            return _read(held["mask_function"])  # within a sequence positions are as far apart as their indices
        case "and_masks", [tuple(parts)]:
            terms = [_read(part) for part in parts]
            if None in terms:
                return None
            lefts, rights, sequences = zip(*terms, strict=True)
            ids = [s for s in sequences if s is not None]
            return (_least(lefts), _least(rights), ids[0] if ids else None) if len(ids) < 2 else None
    return None


def _least(ends: tuple[int, ...]) -> int:
    return min((e for e in ends if e >= 0), default=-1)


_agreed: set[tuple] = set()


def _holds(structure: Structure, function: Callable, q_offset: int, kv_offset: int, batch: int, device: Any) -> bool:
    """Whether the structure is the function's mask, on some rows, once for each kind."""
    kind = (structure.left >= 0, structure.right, structure.sequences is not None, q_offset > 0, kv_offset > 0)
    if kind not in _agreed:
        if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        last = structure.queries - 1
        rows = torch.linspace(0, last, min(last + 1, 64), dtype=torch.float64, device=device).long()
        keys = torch.arange(structure.keys, device=device, dtype=torch.int64) + kv_offset
        index = torch.arange(batch, device=device, dtype=torch.int64)[:, None, None, None]
        theirs = function(index, index.new_zeros(1, 1, 1, 1), (rows + q_offset)[:, None], keys[None, :])
        ours = replace(structure, padding=None).visible(rows)
        if not has_values(theirs):
            return False
        if not torch.equal(*torch.broadcast_tensors(ours, theirs)):
            return False
        _agreed.add(kind)
    return True


def dense(mask: Any) -> Any:
    return mask.dense if type(mask) is StructuredMask else mask


_lock, _calls = threading.Lock(), 0


@contextmanager
def _registered() -> Iterator[None]:
    """The builder is in the library's registry while a mask is made, in any thread, and at no other time."""
    global _calls
    registry = sys.modules["transformers.masking_utils"].AttentionMaskInterface
    with _lock:
        _calls += 1
        if _calls == 1:
            registry.register(NAME, _build)
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if _calls == 0:
                registry._global_mapping.pop(NAME, None)  # there is no public way back


@functools.cache
def _structured(create: Callable) -> Callable:
    """`create` with the builder above."""

    @functools.wraps(create)
    def created(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config", args[0] if args else None)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _is_ours(config):
            return create(*args, **kwargs)
        with _registered():
            if "config" in kwargs:
                return create(*args, **kwargs | {"config": _Config(config)})
            return create(_Config(config), *args[1:], **kwargs)

    return created


def _is_ours(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) in ("sdpa", "eager")


def _sites(source: Source) -> Iterator[Site]:
    masks = sys.modules.get("transformers.masking_utils")
    builders = [getattr(masks, name, None) for name in BUILDERS]
    replacements, helpers = {}, {}
    for node in source.body():
        constant = source.constant(node) if isinstance(node, ast.Name) else None
        if isinstance(constant, types.FunctionType) and constant in builders:
            helper = f"_bigkernels_{constant.__name__}"
            replacements[node] = ast.Name(helper, ast.Load())
            helpers[helper] = _structured(constant)
    if replacements:
        yield Site(_check, replacements, helpers)


def _check(module: nn.Module, plan: Plan) -> Fit | None:
    readers = {"get_interface", "scaled_dot_product_attention"}
    sources = filter(None, (find_source(type(m)) for m in module.modules()))
    if not _is_ours(vars(module).get("config")) or not any(
        readers & {*source.function.__code__.co_names} for source in sources
    ):
        return None  # attention of another kind would have the masks built
    if not _verified():
        raise Skip("the masks that it builds are none that are known")
    return Fit("attention mask", 0.0)


@functools.cache
def _verified() -> bool:
    """Whether masks of every kind are structured and, built, equal to those of the model's own builder."""
    masks = sys.modules["transformers.masking_utils"]
    embeds = torch.zeros(2, 7, 4, dtype=torch.float32, device="cpu")
    padding = torch.ones(2, 7, dtype=torch.bool, device="cpu")
    padding[1, 4:] = False
    rows = torch.arange(7, dtype=torch.int64, device="cpu")
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 0]], dtype=torch.int64, device="cpu")
    cache = "cache" if "cache" in inspect.signature(masks.create_causal_mask).parameters else "past_key_values"
    calls = [("create_bidirectional_mask", {"attention_mask": padding})]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        calls.append((name, {"attention_mask": None, "position_ids": packed, cache: None}))
    calls.append(("create_causal_mask", {"attention_mask": padding, cache: None}))
    calls.append(("create_sliding_window_causal_mask", {"attention_mask": None, cache: None}))
    for kind in ("sdpa", "eager"):
        config = types.SimpleNamespace(_attn_implementation=kind, sliding_window=3)
        for name, given in calls:
            mask = _structured(getattr(masks, name))(config=config, inputs_embeds=embeds, **given)
            theirs = getattr(masks, name)(config=config, inputs_embeds=embeds, **given)
            if type(mask) is not StructuredMask or not torch.equal(mask.dense, theirs):
                return False
            if not torch.equal(mask.structure.visible(rows).expand(2, 1, 7, 7), theirs == (kind == "sdpa")):
                return False
    return True


RULE = SourceRule("attention", "mask", _sites)
