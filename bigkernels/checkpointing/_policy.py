"""What to keep of a segment's activations, in which code, and where: three questions, independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from os import PathLike
from typing import Any

from .._deprecated import renamed_arguments


@dataclass(frozen=True)
class Selection:
    """Which operators' results are kept while the rest is recomputed.

    Attributes:
        operators: names ("aten::mm", "bigkernels::attention_fwd"), or None for attention and matrix products.
        budget: how much may be kept of what a run without checkpointing holds: a fraction in (0, 1], or bytes a
            segment. What to keep is then chosen by the measured time of each operator a byte of its results.
    """

    operators: frozenset[str] | None = None
    budget: float | int | None = None


@dataclass(frozen=True)
class Code:
    """A code of 8 bits with a scale for 128 values.

    Attributes:
        format: "int8" or "fp8".
        stochastic: rounded at random, so that the mean is exact; else to the nearest.
    """

    format: str
    stochastic: bool = False

    def __post_init__(self):
        if self.format not in ("int8", "fp8"):
            raise ValueError(
                f"bigkernels.checkpointing: Code: format is {self.format!r}; accepted are 'int8' and 'fp8'"
            )


@dataclass(frozen=True)
class Host:
    """Memory of the host (page-locked) for GPU tensors; for CPU tensors files that are mapped.

    Attributes:
        folder: of the files; None for the system's.
        min_nbytes: bytes of the smallest tensor that moves.
    """

    folder: str | None = None
    min_nbytes: int = 2**20


@dataclass(frozen=True)
class Policy:
    """How activations of a segment are saved for backward. Policies are added: each says some of the three, once.

    Attributes:
        keep: "all", "nothing" (everything is recomputed), or a `Selection`; None is "all".
        code: None as they are, or a `Code`.
        place: None where they are, or `Host`.
    """

    keep: str | Selection | None = None
    code: Code | None = None
    place: Host | None = None

    def __post_init__(self):
        if not (self.keep in (None, "all", "nothing") or isinstance(self.keep, Selection)):
            raise ValueError(
                f"bigkernels.checkpointing.Policy: keep is {self.keep!r}; accepted are 'all', 'nothing', "
                "None and Selection"
            )
        for name, kind in (("code", Code), ("place", Host)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise TypeError(
                    f"bigkernels.checkpointing.Policy: {name} is {getattr(self, name)!r}; accepted are "
                    f"None and {kind.__name__}"
                )

    def __add__(self, other: Policy) -> Policy:
        if not isinstance(other, Policy):
            return NotImplemented
        for f in fields(self):
            if getattr(self, f.name) is not None and getattr(other, f.name) is not None:
                raise ValueError(
                    f"bigkernels.checkpointing: both policies say {f.name}: {getattr(self, f.name)} and "
                    f"{getattr(other, f.name)}"
                )
        return replace(self, **{f.name: value for f in fields(other) if (value := getattr(other, f.name)) is not None})


_HALF_OR_ALL: Any = object()  # of a budget that is not given


def recompute() -> Policy:
    """Keep nothing but the segment's inputs, and run it again in backward (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174)."""
    return Policy(keep="nothing")


def selective(
    operators: Iterable[str | Callable] | None = None, *, budget: float | int | None = _HALF_OR_ALL
) -> Policy:
    """Keep the results of expensive operators and recompute what lies between them (Korthikanti et al. 2022,
    https://arxiv.org/abs/2205.05198).

    Args:
        operators: names or operators (`torch.ops.aten.mm`). Named without a budget, they are kept, all of them and no
            others. None: with a budget, any that the segment calls; without, attention, with its logsumexp, and matrix
            products.
        budget: a fraction in (0, 1] of the bytes that a run without checkpointing holds of a segment, its inputs
            included, or bytes of results a segment. The first run of a segment measures each operator; from the second
            on, those with the most time a byte are kept. By default half, where no operators are named.

    Raises:
        ValueError: the budget is not positive, or a fraction above 1.
    """
    if budget is _HALF_OR_ALL:
        budget = 0.5 if operators is None else None
    if budget is not None and (budget <= 0 or (isinstance(budget, float) and budget > 1)):
        raise ValueError(
            f"bigkernels.checkpointing.selective: budget is {budget}, expected a fraction in (0, 1] or a "
            "positive number of bytes"
        )
    names = None if operators is None else frozenset(_operator_name(o) for o in operators)
    return Policy(keep=Selection(names, budget))


def _operator_name(operator: object) -> str:
    if isinstance(operator, str):
        return operator.replace(".", "::", 1) if "::" not in operator else operator
    name = getattr(operator, "_qualified_op_name", None)
    name_of = getattr(operator, "name", None)
    if name is None and callable(name_of):
        name = name_of().split(".")[0]
    if name is None:
        raise ValueError(
            f"bigkernels.checkpointing.selective: {operator!r} is no operator; accepted are names such as "
            "'aten::mm' and members of torch.ops"
        )
    return name


def int8(*, stochastic: bool = False) -> Policy:
    """Keep 8-bit integers with a scale for 128 values; inputs of norms' and gated units' successors are computed again
    from what is kept."""
    return Policy(code=Code("int8", stochastic))


def fp8(*, stochastic: bool = False) -> Policy:
    """As `int8`, with floats of 4 exponent and 3 mantissa bits (e4m3)."""
    return Policy(code=Code("fp8", stochastic))


@renamed_arguments("bigkernels.checkpointing.offload", directory="folder", least="min_nbytes")
def offload(folder: str | PathLike | None = None, *, min_nbytes: int = 2**20) -> Policy:
    """Move what is kept out of the way until backward comes near it.

    GPU tensors go to page-locked host memory that is used again, beside the computation, and come back one segment
    ahead. CPU tensors go to mapped files in `folder`, which the system writes and reads as memory asks for it.

    Args:
        folder: of the files of CPU tensors; None for the system's temporary one.
        min_nbytes: smaller tensors stay.
    """
    return Policy(place=Host(None if folder is None else str(folder), min_nbytes))


_NAMED = {"recompute": recompute, "selective": selective, "int8": int8, "fp8": fp8, "offload": offload}


def resolve_policy(policy: str | Policy) -> Policy:
    """A policy from a name, or from names with "+" between them.

    Raises:
        TypeError: `policy` is neither a string nor a `Policy`.
        ValueError: there is no such policy, or two of them contradict.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"bigkernels.checkpointing: policy is {type(policy).__name__}; accepted are str and Policy")
    return _sum_of(policy)


@cache
def _sum_of(names: str) -> Policy:
    policy = Policy()
    for name in names.split("+"):
        if name.strip() not in _NAMED:
            accepted = ", ".join(_NAMED)
            raise ValueError(f"bigkernels.checkpointing: policy {name.strip()!r}; accepted are {accepted}, and sums")
        policy = policy + _NAMED[name.strip()]()
    return policy
