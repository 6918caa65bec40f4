"""Whole models whose sequences are cut over the ranks of a group."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.attention import Attention
from . import _transformers
from ._all_to_all import all_to_all_attention
from ._group import Group, count, resolve_group
from ._layout import Placement, check_placement, places, runs, split_length
from ._ring import ring_attention
from ._shards import gather_sequence, shard_sequence

_OP = "distributed.context_parallel"
_STRATEGIES = {"ring": ring_attention, "all_to_all": all_to_all_attention}
# Arguments of Hugging Face models that are cut, and the dimension of the tokens.
_CUT = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "labels": 1, "shift_labels": 1, "token_type_ids": 1}
_REFUSED = ("past_key_values", "cache", "pixel_values", "encoder_hidden_states", "input_features", "head_mask")
_IGNORED = -100
_FORWARDS = 64  # whose backward may be to come


def context_parallel(
    model: nn.Module,
    mesh: Group = None,
    *,
    strategy: Literal["ring", "all_to_all"] = "ring",
    placement: Placement | None = None,
    arguments: Mapping[str, int] | None = None,
) -> ContextParallel:
    """Cut the sequences of a model over the ranks of a group: each computes with a part of the tokens of every layer.

    All ranks of `mesh` call the model with the same whole batch. A Hugging Face model gets this rank's part of
    `input_ids` (or `inputs_embeds`), `labels` and `position_ids`, a padding mask (B, S) goes to attention, packed
    sequences are told apart by `position_ids` that begin again (B = 1) or by `cu_seq_lens_q`. Attention, of Hugging
    Face models and of `bigkernels.nn.Attention`, goes over all ranks. What the model returns is of this rank's tokens
    (`gather` has all of them); the loss is that of the whole batch, the same on every rank.

    Parameters are the same on all ranks, and so must become their gradients. Wrap the model in
    `DistributedDataParallel` or `fully_shard` over the ranks of data and context parallelism together
    (``mesh["data", "context"]._flatten()``): they take the mean over ranks, and the gradient of the loss is scaled for
    it. Without them, call `ContextParallel.average_gradients` after backward. The order of wrapping, patching and
    checkpointing does not matter.

    Args:
        model: changed in place; `ContextParallel.remove` undoes it. It may be wrapped already.
        mesh: a device mesh of one dimension, a process group, or None: the default group.
        strategy: "ring" or "all_to_all" (which needs a query head a rank): `ring_attention`, `all_to_all_attention`.
        placement: which tokens a rank holds; "zigzag" for a ring and "contiguous" for all-to-all by default.
        arguments: which arguments of the model's forward are cut, and along which dimension. By default those of
            Hugging Face models. Models of one's own get no loss reduced: `shard` cuts their labels, and
            `reduce_loss` adds up sums.

    Returns:
        A handle, with what a training loop may need of the cut.

    Raises:
        RuntimeError: there is no process group; in forward: the model called no attention that could be parallel.
        ValueError: the model, or an argument of its forward, cannot be cut: both are named.
    """
    group = resolve_group(_OP, mesh)
    if strategy not in _STRATEGIES:
        raise ValueError(f"bigkernels.{_OP}: strategy is {strategy!r}, accepted are 'ring' and 'all_to_all'")
    placement = placement or ("zigzag" if strategy == "ring" else "contiguous")
    check_placement(_OP, placement)
    return ContextParallel(model, group, strategy, placement, arguments)


@dataclass
class _Forward:
    """What the arguments of one forward said."""

    number: int
    total: int = 0  # tokens of all ranks
    packed: Tensor | None = None  # where packed sequences end, with 0 before them
    mask: Tensor | None = None  # of padding, (B, 1, 1, S)


class ContextParallel:
    """The handle of a model that `context_parallel` changed.

    Attributes:
        group: the process group over which sequences are cut.
        strategy, placement: as they were given or chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        strategy: str,
        placement: Placement,
        arguments: Mapping[str, int] | None,
    ) -> None:
        self.group, self.strategy, self.placement = group, strategy, placement
        self._function: Any = _STRATEGIES[strategy]
        self._arguments = dict(_CUT if arguments is None else arguments)
        self._model = model
        found = _transformers.find_model(model)
        own = [m for m in model.modules() if isinstance(m, Attention)]
        if any(isinstance(hook, _Cut) for m in model.modules() for hook in m._forward_pre_hooks.values()):
            raise ValueError(f"bigkernels.{_OP}: the model is context parallel already; remove() that first")
        if found is None and not own:
            raise ValueError(
                f"bigkernels.{_OP}: {type(model).__name__} is no Hugging Face model and has no "
                "bigkernels.nn.Attention; call ring_attention or all_to_all_attention in its forward"
            )
        self._target: nn.Module = model if found is None else found
        self._names = list(inspect.signature(type(self._target).forward).parameters)[1:]
        self._attached = None
        if found is not None:
            _transformers.check_model(found)
            if "position_ids" not in self._names:
                raise ValueError(f"bigkernels.{_OP}: forward of {type(found).__name__} takes no position_ids")
            self._attached = _transformers.attach(found, self)
        for module in own:
            module._context = self
        self._own = own
        self._handles = [
            self._target.register_forward_pre_hook(_Cut(self), with_kwargs=True, prepend=True),
            self._target.register_forward_hook(_Reduce(self)),
        ]
        self._calls = 0
        self._forward = _Forward(0)
        # Of the last forwards, as their layers may be computed again in backward.
        self._forwards: dict[int, _Forward] = {}

    def __reduce__(self) -> Any:
        return type(None), ()  # of copies and files of a model: groups are of one process

    # ---- for training loops ------------------------------------------------------------------------------------------

    def shard(self, t: Tensor, axis: int = 1) -> Tensor:
        """This rank's part of `t` along its dimension `axis`."""
        return shard_sequence(t, group=self.group, dim=axis, placement=self.placement)

    def gather(self, t: Tensor, axis: int = 1) -> Tensor:
        """The whole of which each rank has its part, logits (B, S, V) for instance; as `gather_sequence`."""
        return gather_sequence(t, group=self.group, dim=axis, placement=self.placement)

    def reduce_loss(self, loss: Tensor) -> Tensor:
        """The sum over ranks of a scalar, each rank's part of the loss. Differentiable, scaled for a mean over ranks:
        a sum of this rank's tokens divided by the number of all tokens is the mean of all.
        """
        reduced: Tensor = _SumOverRanks.apply(loss, self.group)
        return reduced

    def average_gradients(self) -> None:
        """Take the mean of the gradients over the ranks, in buckets of at most 32 MB. For models that neither
        `DistributedDataParallel` nor `fully_shard` holds.
        """
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        buckets: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            bucket = buckets.setdefault(grad.dtype, [])
            bucket.append(grad)
            if sum(g.numel() * g.element_size() for g in bucket) >= 2**25:
                self._average(buckets.pop(grad.dtype))
        for bucket in buckets.values():
            self._average(bucket)

    def _average(self, grads: list[Tensor]) -> None:
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat, group=self.group)
        count(flat.numel() * flat.element_size(), 1)
        flat /= dist.get_world_size(self.group)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def remove(self) -> None:
        """Make the model compute with whole sequences again."""
        for handle in self._handles:
            handle.remove()
        for module in self._own:
            module._context = None
        if self._attached is not None:
            _transformers.detach(self._target, self._attached)
        self._attached = None

    # ---- within forward ----------------------------------------------------------------------------------------------

    def positions(self, device: torch.device) -> Tensor:
        """The places in the sequence of this rank's tokens in the last forward: (S,), int64."""
        return places(runs(self._lengths(self._forward), self.placement)[dist.get_rank(self.group)], device)

    def _lengths(self, forward: _Forward) -> list[int]:
        return split_length(forward.total, dist.get_world_size(self.group))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, number: int | None = None, **options: Any) -> Tensor:
        """(B, H, S, D) of this rank's tokens each, over all ranks; for attention of Hugging Face models.

        Args:
            number: of the forward that it belongs to, of which what was said of padding and packing is kept to; the
                last one by default.
        """
        self._calls += 1
        forward = self._forward if number is None else self._forwards.get(number)
        if forward is None:
            raise RuntimeError(f"bigkernels.{_OP}: {_FORWARDS} other forwards came between this one and its backward")
        given = {"group": self.group, "placement": self.placement, "lengths": self._lengths(forward)}
        if forward.packed is not None:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            out: Tensor = self._function(q, k, v, cu_seqlens=forward.packed, **given, **options)
            return out.transpose(0, 1)[None]
        out = self._function(q, k, v, mask=forward.mask, **given, **options)
        return out

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """For `bigkernels.nn.Attention`, which gives all options of a call; its masks are of all keys."""
        self._calls += 1
        given = {"group": self.group, "placement": self.placement, "lengths": self._lengths(self._forward)}
        out: Tensor = self._function(q, k, v, **given, **options)
        return out

    def _cut(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        kwargs.update(zip(self._names, args, strict=False))
        first = next((n for n in self._arguments if isinstance(kwargs.get(n), Tensor)), None)
        if first is None:
            raise ValueError(f"bigkernels.{_OP}: forward got none of {', '.join(self._arguments)}")
        self._calls, number = 0, self._forward.number + 1
        self._forward = self._forwards[number] = _Forward(number, kwargs[first].shape[self._arguments[first]])
        self._forwards.pop(number - _FORWARDS, None)
        _transformers.begin(number)
        if self._attached is not None:
            self._prepare(kwargs, kwargs[first])
        for name, axis in self._arguments.items():
            if isinstance(kwargs.get(name), Tensor):
                if kwargs[name].shape[axis] != self._forward.total:
                    raise ValueError(
                        f"bigkernels.{_OP}: {name} has shape {tuple(kwargs[name].shape)}, and {first} "
                        f"{self._forward.total} tokens"
                    )
                kwargs[name] = self.shard(kwargs[name], axis)
        return (), kwargs

    def _prepare(self, kwargs: dict[str, Any], first: Tensor) -> None:
        """Arguments of a Hugging Face model that have to be known, or made, before they are cut."""
        batch, device = first.shape[0], first.device
        for name in _REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"bigkernels.{_OP}: {name} is not supported with sequences that are cut")
        for name, value in kwargs.items():
            known = (
                name in self._arguments or name == "attention_mask" or name.startswith(("cu_seq_lens", "max_length"))
            )
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1 and not known:
                raise ValueError(
                    f"bigkernels.{_OP}: forward got the tensor {name}, of which it is not known how to cut it"
                )
        if "use_cache" in self._names:
            kwargs["use_cache"] = False
        ids = kwargs.get("position_ids")
        if ids is None:
            for module in self._target.modules():
                if hasattr(module, "create_position_ids_from_input_ids"):
                    raise ValueError(
                        f"bigkernels.{_OP}: {type(module).__name__} counts positions in a way of its "
                        "own; give position_ids"
                    )
            kwargs["position_ids"] = torch.arange(self._forward.total, dtype=torch.int64, device=device)[None]
        self._forward.packed = self._sequences(kwargs, ids, batch)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.shape != (batch, self._forward.total):
                raise ValueError(
                    f"bigkernels.{_OP}: attention_mask has shape {tuple(mask.shape)}, accepted is one of padding, "
                    f"{(batch, self._forward.total)}"
                )
            if not bool((mask != 0).all()):
                if self._forward.packed is not None:
                    raise ValueError(f"bigkernels.{_OP}: attention_mask does not go with packed sequences")
                self._forward.mask = (mask != 0)[:, None, None]
        # Models take positions that jump, as those of a zigzag do, for packed sequences where there is no mask.
        held = self._lengths(self._forward)[dist.get_rank(self.group)]
        kwargs["attention_mask"] = torch.ones(batch, held, dtype=torch.int64, device=device)
        self._targets(kwargs)

    def _sequences(self, kwargs: dict[str, Any], ids: Tensor | None, batch: int) -> Tensor | None:
        """Where packed sequences end, with 0 before them."""
        given = kwargs.pop("cu_seq_lens_q", None)
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        if given is not None:
            if batch != 1:
                raise ValueError(f"bigkernels.{_OP}: packed sequences come in a batch of 1, not {batch}")
            return given
        # Of position_ids (3, B, S) each row may jump: images.
        if ids is None or ids.dim() != 2 or kwargs.get("attention_mask") is not None:
            return None
        begins = ids[:, 1:] != ids[:, :-1] + 1
        if not bool(begins.any()):
            return None
        if ids.shape[0] != 1 or batch != 1:
            raise ValueError(f"bigkernels.{_OP}: position_ids begin again; packed sequences come in a batch of 1")
        ends = begins[0].nonzero()[:, 0] + 1
        return torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), self._forward.total)])

    def _targets(self, kwargs: dict[str, Any]) -> None:
        """Labels are those of the next token, which may lie on another rank: they are moved before they are cut."""
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and shifted is None:
            return
        loss = getattr(self._target, "loss_type", None)
        if loss not in (None, "ForCausalLM"):
            raise ValueError(
                f"bigkernels.{_OP}: the loss {loss} of {type(self._target).__name__} is not reduced over ranks; leave "
                "out labels, and compute it from the logits (shard, reduce_loss)"
            )
        if shifted is None:
            assert labels is not None
            shifted = nn.functional.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
            kwargs["shift_labels"] = shifted
        if labels is None:
            kwargs["labels"] = shifted
        if kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = (shifted != _IGNORED).sum()

    def _reduce(self, output: Any) -> Any:
        if not self._calls:
            raise RuntimeError(
                f"bigkernels.{_OP}: {type(self._target).__name__} has called no attention that could be parallel"
            )
        loss = getattr(output, "loss", None)
        if self._attached is not None and isinstance(loss, Tensor):
            output.loss = self.reduce_loss(loss)
        return output


class _Cut:
    def __init__(self, state: ContextParallel | None) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self.state is None else self.state._cut(args, kwargs)


class _Reduce:
    def __init__(self, state: ContextParallel | None) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return None if self.state is None else self.state._reduce(output)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a scalar; its gradient is scaled by the number of ranks, for those who take the mean of gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = loss.detach().clone()
        count(total.element_size(), 1)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.ranks, None
