"""Checkpoints of several ranks that are whole or not there."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch.distributed as dist

from ._group import Group, resolve_group

_STEP, _PART = "step-", ".part"


def save_checkpoint(
    state: dict[str, Any], folder: str | os.PathLike, step: int, *, group: Group = None, keep: int = 2
) -> str:
    """Write a checkpoint of all ranks, under a name that it gets when all of it is there.

    `torch.distributed.checkpoint` writes it.

    Where torchrun may restart (``--max-restarts``), set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: without it torch 2.13
    gives restarted ranks the store of those before them, and by what these have left there a restart may hang.

    A rank that dies meanwhile leaves a folder ``step-N.part``, which nobody loads and the next save removes. All ranks
    call this.

    Args:
        state: as `torch.distributed.checkpoint.save` takes it.
        folder: on a file system that all ranks see.
        keep: how many whole checkpoints stay, the latest ones.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `step` is negative or `keep` less than 1.
    """
    import torch.distributed.checkpoint as dcp

    op = "distributed.save_checkpoint"
    members = resolve_group(op, group)
    if step < 0 or keep < 1:
        raise ValueError(f"bigkernels.{op}: step is {step} and keep {keep}, expected 0 and 1 or more")
    folder = os.fspath(folder)
    path = os.path.join(folder, f"{_STEP}{step}")
    first = dist.get_rank(members) == 0
    if first:
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            if name.startswith(_STEP) and name.endswith(_PART):
                shutil.rmtree(os.path.join(folder, name))
    dist.barrier(members)
    dcp.save(state, checkpoint_id=path + _PART, process_group=members)
    dist.barrier(members)
    if first:
        for root, _, names in os.walk(path + _PART):
            for name in names:
                _flush(os.path.join(root, name))
        if os.path.exists(path):  # of a run that was resumed from an earlier step
            shutil.rmtree(path)
        os.rename(path + _PART, path)
        _flush(folder)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(os.path.join(folder, f"{_STEP}{old}"))
    dist.barrier(members)
    return path


def load_checkpoint(state: dict[str, Any], folder: str | os.PathLike, *, group: Group = None) -> int | None:
    """Load the latest whole checkpoint of `save_checkpoint` into `state`, in place; all ranks call this.

    The number of ranks, and how tensors are sharded, may be others than when it was saved.

    Returns:
        Its step; None where there is none, on every rank then.
    """
    import torch.distributed.checkpoint as dcp

    members = resolve_group("distributed.load_checkpoint", group)
    steps: list[Any] = [None]
    if dist.get_rank(members) == 0:
        latest = _steps(os.fspath(folder))
        steps = [latest[-1] if latest else None]
    dist.broadcast_object_list(steps, group=members, group_src=0)
    step: int | None = steps[0]
    if step is not None:
        path = os.path.join(os.fspath(folder), f"{_STEP}{step}")
        dcp.load(state, checkpoint_id=path, process_group=members)
    return step


def _steps(folder: str) -> list[int]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n.removeprefix(_STEP)) for n in names if n.startswith(_STEP) and n.removeprefix(_STEP).isdigit())


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
