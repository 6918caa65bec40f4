"""Gradients of `DistributedDataParallel` summed in 8 bits, with what rounding left out added to the next ones
(Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847).
"""

# Annotations are evaluated here: DistributedDataParallel reads those of hooks.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ._group import Group, all_gather_single, count, resolve_group

_OP = "distributed.Int8Gradients"


class Int8Gradients:
    """The state of `int8_gradients_hook`: what each bucket's rounding left out so far.

    >>> model.register_comm_hook(Int8Gradients(), int8_gradients_hook)

    A gradient and what was left out of the one before it are rounded to 8 bits, with a scale for every `block_size`
    elements. Each rank sums one part of all ranks' codes in float32, in the order of the ranks, and rounds the mean,
    again with what that left out before; all ranks decode the same codes, so that their parameters stay the same. A
    rank sends ``2 * (N - 1) / N * (1 + 4 / block_size)`` bytes an element, where float32 takes four times as much.

    `state_dict` and `load_state_dict` carry it through checkpoints: each rank has its own.

    Args:
        group: that of the wrapped model; None is the default group.
        block_size: elements with one scale, at least 16.

    Raises:
        RuntimeError: there is no process group.
        ValueError: `block_size` is less than 16.
    """

    def __init__(self, group: Group = None, block_size: int = 2048) -> None:
        if block_size < 16:
            raise ValueError(f"bigkernels.{_OP}: block_size is {block_size}, expected 16 or more")
        self.group = resolve_group(_OP, group)
        self.block_size = block_size
        self._left_out: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """What was left out, a tensor a bucket and stage, of this rank."""
        return {name: t.clone() for name, t in self._left_out.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._left_out = {name: t.clone() for name, t in state.items()}

    def _rounded(self, values: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (blocks, block_size), scales (blocks,), and what they stand for; `values` are whole blocks, float32."""
        left = self._left_out.get(name)
        if left is not None and left.shape == values.shape:
            values = values + left
        blocks = values.view(-1, self.block_size)
        scales = blocks.abs().amax(1) / 127
        # What is not finite stays so: a code of 0 times a scale that is no number.
        codes = (blocks / scales[:, None]).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-127, 127).to(torch.int8)
        decoded = (codes * scales[:, None]).view(-1)
        left = values - decoded
        self._left_out[name] = torch.where(left.isfinite(), left, 0.0)
        return codes, scales, decoded


def int8_gradients_hook(state: Int8Gradients, bucket: dist.GradBucket) -> Future[Tensor]:
    """For `DistributedDataParallel.register_comm_hook`: the mean of a bucket over ranks, as `Int8Gradients` has it."""
    buffer, group = bucket.buffer(), state.group
    ranks = dist.get_world_size(group)
    unit = ranks * state.block_size
    padded = buffer.new_zeros(-(-len(buffer) // unit) * unit, dtype=torch.float32)
    padded[: len(buffer)] = buffer
    codes, scales, _ = state._rounded(padded, f"{bucket.index()}.gradients")
    theirs, their_scales = torch.empty_like(codes), torch.empty_like(scales)
    dist.all_to_all_single(theirs, codes, group=group)
    dist.all_to_all_single(their_scales, scales, group=group)
    total = theirs.new_zeros(len(padded) // ranks, dtype=torch.float32)
    for part, scale in zip(theirs.chunk(ranks), their_scales.chunk(ranks), strict=True):
        total += (part * scale[:, None]).view(-1)
    mine, scale, _ = state._rounded(total / ranks, f"{bucket.index()}.means")
    every, every_scale = torch.empty_like(codes), torch.empty_like(scales)
    all_gather_single(every, mine, group=group)
    all_gather_single(every_scale, scale, group=group)
    count(2 * (mine.numel() + 4 * scale.numel()) * (ranks - 1), 4 * (ranks - 1))
    buffer.copy_((every * every_scale[:, None]).view(-1)[: len(buffer)])
    future: Any = Future()
    future.set_result(buffer)
    return future
