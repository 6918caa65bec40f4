"""Muon: momentum, orthogonalised, for matrices; AdamW for everything else."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import optimizer as ops
from ._algorithms import Betas
from ._optimizer import Optimizer
from ._orthogonal import compute_in, orthogonalize_
from ._plan import Entry, Plan, cut, gathered, local
from ._reference import RULES, Rule, muon_factor

_BATCH = 2**24  # elements of equal shapes that are orthogonalised together, in one workspace


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), as torch.optim.Muon for matrices.

    One rule decides: parameters of two or three dimensions take Muon, the latter as stacks of matrices (experts), and
    all others AdamW. A group with `use_muon` False takes AdamW whatever its shapes: embeddings and output heads, which
    `muon_groups` sets apart.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate of the matrices.
        weight_decay: decoupled.
        momentum: decay of the average of gradients.
        nesterov: look ahead by one momentum.
        ns_coefficients: of the polynomial of a Newton-Schulz step.
        eps: the least norm that a matrix is divided by before the first one.
        ns_steps: how many.
        adjust_lr_fn: "original" (also None) multiplies lr with sqrt(max(1, rows / columns)), "match_rms_adamw"
            (Moonshot, https://arxiv.org/abs/2502.16982) with 0.2 sqrt(max(rows, columns)), so that AdamW's lr and decay
            fit, "spectral_unclamped" (Bernstein, https://jeremybernste.in/writing/deriving-muon, as torch 2.14) with
            sqrt(rows / columns).
        maximize: ascend.
        use_muon: None for the rule above, or True or False for a whole group.
        adamw_lr: learning rate of the other parameters; None: `lr`. Where `lr` is 0 they stand still as well, as
            torch.distributed.checkpoint relies on when it takes a step to make states.
        adamw_betas, adamw_eps: as in `AdamW`.
        adamw_weight_decay: None: `weight_decay`.

    Products are in bfloat16 on GPUs and on CPUs with tile units, as in torch, and in float32 on others. Distributed
    parameters are gathered: each rank orthogonalises the whole matrix. The other arguments: see `Optimizer`.
    """

    _rule = RULES["muon"]

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        use_muon: bool | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: Betas = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        cautious: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            "use_muon": use_muon,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "ema_decay": ema_decay,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, options, max_grad_norm=max_grad_norm)

    def _check(self, o: dict) -> None:
        super()._check(o)
        self._check_options(RULES["adam"], self._options(RULES["adam"], o))
        name = "bigkernels.optim.Muon"
        if len(o["ns_coefficients"]) != 3:
            raise ValueError(f"{name}: ns_coefficients are {o['ns_coefficients']!r}; accepted are three numbers")
        if not 0 <= o["ns_steps"] < 100:
            raise ValueError(f"{name}: ns_steps is {o['ns_steps']!r}; accepted are 0 to 99")
        if o["adjust_lr_fn"] not in (None, "original", "match_rms_adamw", "spectral_unclamped"):
            raise ValueError(f"{name}: Adjust learning rate function {o['adjust_lr_fn']} is not supported")
        for p in o["params"]:
            if o["use_muon"] and p.dim() not in (2, 3):
                raise ValueError(f"{name}: use_muon is for matrices and stacks of them; one has shape {tuple(p.shape)}")
            if p.is_complex() and self._rule_of(p, o) is RULES["muon"]:
                raise ValueError(f"{name}: complex matrices are not supported")

    def _rule_of(self, p: Tensor, o: dict) -> Rule:
        matrix = o["use_muon"] if o["use_muon"] is not None else p.dim() in (2, 3)
        return RULES["muon" if matrix and p.numel() else "adam"]

    def _options(self, rule: Rule, o: dict) -> dict:
        if rule is RULES["muon"]:
            return o
        plain = {k: v for k, v in o.items() if k not in ("momentum", "nesterov")}
        if rule is RULES["descent"]:
            return {**plain, "maximize": False}  # which the direction has seen to
        return {
            **plain,
            "lr": o["lr"] if o["adamw_lr"] is None or _is_zero(o["lr"]) else o["adamw_lr"],
            "betas": o["adamw_betas"],
            "eps": o["adamw_eps"],
            "weight_decay": o["weight_decay"] if o["adamw_weight_decay"] is None else o["adamw_weight_decay"],
        }

    def _decides(self, o: dict) -> tuple:
        return (*super()._decides(o), o["use_muon"], *_orthogonalization(o))

    def _plans_of(self, rule: Rule, entries: list[Entry], follows: bool = False) -> list[Plan]:
        if rule is not RULES["muon"]:
            return super()._plans_of(rule, entries, follows)
        alike: dict[tuple, list] = {}
        for entry in entries:
            p, o = entry.param, self.param_groups[entry.group]
            where = (p.device_mesh, p.placements) if hasattr(p, "to_local") else None  # parts of one shape, too
            key = (p.shape, where, *_orthogonalization(o))
            batches = alike.setdefault(key, [[]])
            if len(batches[-1]) * p.numel() >= _BATCH:
                batches.append([])
            batches[-1].append(entry)
        # One workspace for all batches, which follow one another.
        batches = [batch for found in alike.values() for batch in found]
        size = max(len(batch) * local(batch[0].param).numel() for batch in batches)
        device = local(batches[0][0].param).device
        workspace = torch.empty(size, dtype=compute_in(device), device=device)
        return [_MatrixPlan(batch, self.param_groups[batch[0].group], workspace) for batch in batches]

    def _run(self, plan: Plan, grads: Tensor, scale, found_inf, divisor, norm) -> None:
        if not isinstance(plan, _MatrixPlan):
            return super()._run(plan, grads, scale, found_inf, divisor, norm)
        plan.before()
        plan.workspace.zero_()  # matrices without a gradient stay zero, and are not descended along
        ops.step(plan.rule.number, *self._arguments(plan, grads, scale, found_inf, divisor, norm), None)
        plan.orthogonalize()
        # The first call has counted the step; given trust ratios this one counts none.
        steps = plan.descent
        given, records = (t.view(torch.int64).view(-1, 2) for t in (grads, steps.records))
        used = torch.where(given[:, :1] == 0, 0, records)
        ops.step(steps.plan.rule.number, *self._arguments(steps.plan, used, found_inf=found_inf), steps.ones)
        plan.after()


def _orthogonalization(o: dict) -> tuple:
    """What matrices have to have in common to be orthogonalised together."""
    return tuple(o["ns_coefficients"]), o["ns_steps"], o["eps"], o["adjust_lr_fn"]


def _is_zero(lr: float | Tensor) -> bool:
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0


class _Descent:
    """The second half of a Muon step: along the orthogonal matrices in the workspace."""

    def __init__(self, entries: list[Entry], updates: list[Tensor]):
        self.plan = Plan(RULES["descent"], entries)
        self.records, _ = self.plan.gradients(updates)
        self.ones = torch.ones(len(entries), dtype=torch.float32, device=self.plan.device)


class _MatrixPlan(Plan):
    """Parameters of one shape: their updates, orthogonalised together, go where the gradients of a descent are read."""

    def __init__(self, entries: list[Entry], options: dict, workspace: Tensor):
        here = local(entries[0].param)
        self.workspace = workspace[: len(entries) * here.numel()].view(len(entries), *here.shape)
        updates = list(self.workspace.unbind())
        # A parameter that is transposed in memory has its update in the same order.
        like = [
            t.as_strided(t.shape, _order(local(entry.param)), t.storage_offset())
            for t, entry in zip(updates, entries, strict=True)
        ]
        super().__init__(RULES["muon"], entries, targets=like, extras=())
        self.updates = like
        self._arguments = _orthogonalization(options)
        self.descent = _Descent(entries, like)

    def orthogonalize(self) -> None:
        shape = self.params[0].shape
        arguments = (*self._arguments[:3], muon_factor(shape, self._arguments[3]))
        if hasattr(self.params[0], "to_local"):
            for p, update in zip(self.params, self.updates, strict=True):
                update.copy_(_gathered(p, update, arguments))
        elif all(update.is_contiguous() for update in self.updates):
            orthogonalize_(self.workspace.view(-1, *shape[-2:]), *arguments)
        else:
            stack = torch.stack(self.updates)
            orthogonalize_(stack.view(-1, *shape[-2:]), *arguments)
            for update, result in zip(self.updates, stack, strict=True):
                update.copy_(result)

    def before(self) -> None:
        self.descent.plan.before()

    def after(self) -> None:
        self.descent.plan.after()


def _order(t: Tensor) -> tuple[int, ...]:
    """The strides of a dense copy in the same order."""
    return torch.empty_like(t, device="meta").stride()


def _gathered(p: Tensor, update: Tensor, arguments: tuple) -> Tensor:
    """This rank's part of the whole matrix, orthogonalised."""
    whole = gathered(p, update)
    orthogonalize_(whole.view(-1, *p.shape[-2:]), *arguments)
    return cut(p, whole)


def muon_groups(model: nn.Module, **of_adamw: Any) -> list[dict[str, Any]]:
    """The trainable parameters of a model in two groups for `Muon`: the matrices of hidden layers, and the rest.

    Embeddings and output heads are matrices that AdamW trains better. An embedding is the weight of a module with
    `embedding` among its base classes' names or of one tied to it; an output head is the last linear layer of the model
    whose rows are as many as those of an embedding, or what `get_output_embeddings()` returns.

    Args:
        model: the model.
        of_adamw: options of the second group, such as `adamw_lr`.

    Returns:
        Groups with their parameters by name; `use_muon` is False in the second.
    """
    embeddings = [m for m in model.modules() if any("embedding" in c.__name__.lower() for c in type(m).__mro__)]
    weights = [getattr(m, "weight", None) for m in embeddings]
    vocabulary = {w.shape[0] for w in weights if w is not None and w.dim() == 2}
    apart = {id(p) for m in embeddings for p in m.parameters(recurse=False)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        wide = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in vocabulary]
        head = wide[-1] if wide else None
    if head is not None:
        apart |= {id(p) for p in head.parameters()}
    hidden, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (hidden if p.dim() in (2, 3) and id(p) not in apart else rest).append((name, p))
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False, **of_adamw}]
    return [g for g in groups if g["params"]]


__all__ = ["Muon", "muon_groups"]
