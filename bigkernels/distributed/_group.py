"""Process groups as the functions of this package take them, and the traffic that they make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Newer torch has other names for the collectives of single tensors, and warns of the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = Union["dist.ProcessGroup", "DeviceMesh", None]


@dataclass
class Traffic:
    """What one rank has sent to others while it was counted.

    Attributes:
        nbytes: of tensors; that of `headers` is not in it.
        messages: how many of them.
        headers: bytes of what ranks tell each other of a call before it: lengths, options, a seed.
    """

    nbytes: int = 0
    messages: int = 0
    headers: int = 0


_counting: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends by functions of `bigkernels.distributed` within the context.

    >>> with count_traffic() as traffic:
    ...     ring_attention(q, k, v, group=group, causal=True).sum().backward()
    >>> traffic.nbytes
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def count(nbytes: int, messages: int = 1) -> None:
    for traffic in _counting:
        traffic.nbytes += nbytes
        traffic.messages += messages


def resolve_group(op: str, group: Group) -> dist.ProcessGroup:
    """The process group meant by `group`: itself, that of a mesh of one dimension, or the default one."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"bigkernels.{op}: there is no process group; call torch.distributed.init_process_group first"
        )
    if group is None:
        found = dist.group.WORLD
        assert found is not None
        return found
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            names = group.mesh_dim_names
            raise ValueError(
                f"bigkernels.{op}: the mesh has {group.ndim} dimensions {names or ''}; give one of them, mesh['name']"
            )
        return group.get_group()
    raise TypeError(
        f"bigkernels.{op}: group is {type(group).__name__}; accepted are a ProcessGroup, a DeviceMesh of one "
        "dimension and None, the default group"
    )


class Exchange:
    """Messages that are under way: started together, waited for when what they bring is needed."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._ops: list[dist.P2POp] = []
        self._works: list[dist.Work] = []

    def send(self, t: Tensor, to: int) -> None:
        count(t.numel() * t.element_size())
        self._ops.append(dist.P2POp(dist.isend, t, group=self._group, group_peer=to))

    def receive(self, t: Tensor, source: int) -> Tensor:
        self._ops.append(dist.P2POp(dist.irecv, t, group=self._group, group_peer=source))
        return t

    def start(self) -> None:
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._ops = [], []


def agree(
    op: str,
    group: dist.ProcessGroup,
    names: tuple[str, ...],
    values: tuple[int, ...],
    device: torch.device,
    own: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """What every rank says of a call: `own` of each. `values`, which go by `names`, must be the same on all.

    Raises:
        ValueError: on every rank, naming what differs; nothing has been sent by then that somebody waits for.
    """
    size = dist.get_world_size(group)
    mine = torch.tensor([*values, *own], dtype=torch.int64, device=device)
    if size == 1:
        return [own]
    everybody = mine.new_empty(size * len(mine))
    all_gather_single(everybody, mine, group=group)
    for traffic in _counting:
        traffic.headers += mine.numel() * 8 * (size - 1)
    rows = everybody.view(size, -1).tolist()
    for i, name in enumerate(names):
        if len({row[i] for row in rows}) > 1:
            given = ", ".join(str(row[i]) for row in rows)
            raise ValueError(f"bigkernels.{op}: ranks differ in {name}: {given}")
    return [tuple(row[len(values) :]) for row in rows]
