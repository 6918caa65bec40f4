"""What all optimizers share: arguments, states and their formats, and one step for all parameters of a device."""

# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._exit import Running
from .._torch_private import disable_dynamo
from ..ops import optimizer as ops
from ..ops.registry import compute_dtype
from . import _formats, _norm, _plan
from ._plan import Entry, Plan, cut, dense, gathered, local, placed, shaped
from ._reference import NOT_NEGATIVE, Rule, trust_ratio
from ._schedule import Schedule
from ._states import States

if TYPE_CHECKING:
    from ._backward import StepInBackward

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
_COMMON = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE}
# What torch.optim's classes take and these have no use for.
_OF_TORCH = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


class Optimizer(States):
    """A torch optimizer whose step is one pass over memory.

    What every optimizer of this module takes beside the arguments of its torch namesake, in the constructor or in a
    parameter group (`max_grad_norm` in the constructor only):

    Args:
        state_dtype: how states are stored: torch.float32, torch.bfloat16, or "int8", blocks of 256 elements with a
            float32 scale (tensors of fewer than 4096 elements keep float32).
        rounding: how 16-bit parameters are rounded: "nearest"; "stochastic", unbiased, by random numbers that depend on
            torch's seed at construction, the step and the element only (give ranks of one model the same seed); or
            "kahan" (bfloat16 only), which keeps what rounding takes in 16 bits, so that parameter and remainder
            together are a float32 master weight.
        max_grad_norm: clip the gradients of all groups together to this 2-norm, inside the step: the gradients
            themselves are left as they are. `grad_norm` then is the norm before clipping, a tensor on the device.
        ema_decay: also keep an average of the parameters in float32, `average = decay * average + (1 - decay) *
            parameter`, starting at the parameters before their first step; `averaged()` swaps it in.
        decoupled_weight_decay: multiply the parameters instead of adding to the gradients.
        cautious: decoupled decay only of elements where it has the direction of the update (Chen et al. 2025,
            https://arxiv.org/abs/2510.12402).

    Gradients may have another dtype than their parameter. Parameters may have any strides; a view is updated inside the
    view only.

    Groups, options, parameters and states may be edited between steps, by assignment or in place, as those of torch's
    optimizers: each step looks at what there is. The options decide which states count. One that they no longer ask for
    is kept as it is, and goes on from there when they ask for it again; but a remainder of "kahan" is dropped, as it is
    of no use once the parameter has moved without it, and one of a parameter that was cast to float32 becomes part of
    it. States in another dtype, on another device or in other strides are converted. RuntimeError for those of another
    shape, as for gradients.
    """

    _takes_sparse = False
    _step_supports_amp_scaling = True  # GradScaler hands over its scale and found_inf instead of unscaling

    def __init__(self, params: Iterable, defaults: dict[str, Any], *, max_grad_norm: float | None):
        self._check_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self._in_backward: StepInBackward | None = None
        self._offloaded_plans: Callable | None = None
        self._forget()
        defaults = {**_OF_TORCH, **defaults}
        defaults.setdefault("seed", None)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Nothing is known of where parameters and states are."""
        self._schedule: Schedule | None = None
        self._grad_norm: Tensor | None = None

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _refuse(self, argument: str, given: object, accepted: str) -> None:
        raise ValueError(f"{self._name}: {argument} is {given!r}; accepted are {accepted}")

    def _check_norm(self, norm: float | None) -> None:
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            self._refuse("max_grad_norm", norm, "positive numbers and None")

    def _check(self, o: dict) -> None:
        """Of a parameter group, with its members in "params"."""
        self._check_options(self._rule, o)
        self._check_members(o)

    def _check_options(self, rule: Rule, o: dict) -> None:
        name = self._name
        if o["differentiable"]:
            raise ValueError(f"{name}: differentiable=True is not supported; torch.optim.{type(self).__name__} has it")
        if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
            raise ValueError(f"{name}: Tensor lr must be 1-element")
        for key, accepted in (*_COMMON.items(), *rule.options.items()):
            for value in o[key] if isinstance(o[key], (tuple, list)) else (o[key],):
                on_device = isinstance(value, Tensor) and value.device.type != "cpu"
                if key == "lr" and on_device:
                    continue  # to look at it would be to wait for it
                if (on_device and key not in _COMMON) or (isinstance(value, Tensor) and value.numel() != 1):
                    self._refuse(key, value, "numbers and tensors of one element on the CPU")
                if not accepted.has(float(value)):
                    self._refuse(key, o[key], accepted.words)
        if o.get("nesterov") and "dampening" in o and (o["momentum"] <= 0 or o["dampening"] != 0):
            raise ValueError(f"{name}: Nesterov momentum requires a momentum and zero dampening")
        if o["state_dtype"] not in _formats.STATE_DTYPES:
            self._refuse("state_dtype", o["state_dtype"], "torch.float32, torch.bfloat16 and 'int8'")
        if o["rounding"] not in _plan.ROUNDINGS:
            self._refuse("rounding", o["rounding"], ", ".join(map(repr, _plan.ROUNDINGS)))
        if o["ema_decay"] is not None and not 0.0 <= o["ema_decay"] < 1.0:
            self._refuse("ema_decay", o["ema_decay"], "numbers in [0, 1) and None")
        if o["cautious"] and not o["decoupled_weight_decay"]:
            raise ValueError(f"{name}: cautious weight decay has to be decoupled (decoupled_weight_decay=True)")

    def _check_members(self, o: dict) -> None:
        name = self._name
        for p in o["params"]:
            if p.dtype not in _FLOATS:
                raise ValueError(f"{name}: a parameter of {p.dtype} cannot be optimized")
            if o["rounding"] == "kahan" and p.dtype == torch.float16:
                raise ValueError(f"{name}: rounding='kahan' is for bfloat16 parameters, and one is float16")

    @disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check(group)
        except Exception:
            del self.param_groups[-1]
            raise
        if group["seed"] is None:
            # Drawn from torch's generator where it is used, so that torch.manual_seed decides it.
            drawn = group["rounding"] == "stochastic"
            group["seed"] = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")) if drawn else 0
        self._schedule = None

    # ---- the step ---------------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the last step's gradients before clipping, float32 (); None without `max_grad_norm`."""
        return self._grad_norm

    @disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, divisor: float | Tensor | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.
            divisor: divides the gradients, inside the step: the number of tokens that a summed loss was taken over. A
                tensor on the parameters' device costs no synchronisation.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse and the optimizer has no rule for that.
            RuntimeError: a gradient or a state has another shape than its parameter, or its memory was given back;
                nothing has been stepped then.
            ValueError: `divisor` is not positive, a step counter is no whole number from 0 on, or a group was given
                options out of their range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if divisor is not None and not isinstance(divisor, Tensor) and not 0 < divisor < math.inf:
            self._refuse("divisor", divisor, "positive numbers and tensors")
        if self._in_backward is not None:
            self._in_backward.finish(divisor)
        else:
            self._step(divisor)
        return loss

    def _step(self, divisor: float | Tensor | None) -> None:
        if self._schedule is None or not self._schedule.holds(self):
            self._schedule = Schedule(self, list(self._all()), whole=True)
        self._take(self._schedule, divisor)

    def _all(self) -> Iterator[tuple[Tensor, int]]:
        """All parameters, with the numbers of their groups."""
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                yield p, number

    def _decides(self, o: dict) -> tuple:
        """What of a group decides which states there are, and which parameters are stepped together."""
        return o["state_dtype"], o["rounding"], o["ema_decay"] is not None, self._rule.needs(o)

    def _take(self, schedule: Schedule, divisor: float | Tensor | None, norm: Tensor | None = None) -> None:
        """One step of the parameters of a schedule that have a gradient. `norm`: to clip by, instead of their own."""
        with Running():
            self._take_now(schedule, divisor, norm)

    def _take_now(self, schedule: Schedule, divisor: float | Tensor | None, norm: Tensor | None) -> None:
        for o in self.param_groups:
            self._check({**o, "params": ()})
        work = [(plan, *plan.gradients(dense_of=self._dense)) for plan in schedule.plans]
        eager = [self._complete(p, number) for p, number in schedule.without if p.grad is not None]
        given = [shaped(placed(self._dense(e.param.grad), e.param), e.param) for e in eager]  # or an error, before
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.max_grad_norm is not None and norm is None:
            norm = self._grad_norm = self._norm_of(work, given, scale, divisor)
        for plan, grads, _ in work:
            self._run(plan, grads, scale, found_inf, divisor, norm)
        if eager and not (found_inf is not None and float(found_inf)):
            for entry, g in zip(eager, given, strict=True):
                self._eager(entry, g, scale, divisor, norm)

    def _norm_of(self, work: list, eager: list[Tensor], scale, divisor) -> Tensor | None:
        """The norm of all gradients together, as they are once scale and divisor are taken out: float32 ()."""
        for plan, _, _ in work:
            plan.wait()
        sums = [_norm.squares(plan, grads) for plan, grads, _ in work] + [_norm.squares_of(g) for g in eager]
        return _scaled(_norm.total(sums).sqrt(), scale, divisor).float() if sums else None

    def _plans_of(self, rule: Rule, entries: list[Entry], follows: bool = False) -> list[Plan]:
        if self._offloaded_plans is None:
            return [Plan(rule, entries)]
        return self._offloaded_plans(rule, entries, follows)

    def _offload(self, plans: Callable[[Rule, list, bool], list[Plan]]) -> None:
        """Keep states in host memory, with plans made by `plans` (`offload_states`)."""
        self._offloaded, self._offloaded_plans, self._schedule = True, plans, None
        for p, _ in self._all():
            state = self.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    here = value.to("cpu")
                    state[key] = here.pin_memory() if p.is_cuda else here

    def _dense(self, g: Tensor) -> Tensor:
        if g.layout == torch.strided:
            return g
        if not self._takes_sparse:
            raise RuntimeError(f"{self._name} does not support sparse gradients")
        return g.to_dense()

    def _run(self, plan: Plan, grads: Tensor, scale, found_inf, divisor, norm) -> None:
        plan.before()
        common = self._arguments(plan, grads, scale, found_inf, divisor, norm)
        trust = None
        if plan.rule.measured:
            sums = torch.zeros(len(plan.params), 2, dtype=torch.float64, device=plan.device)
            ops.measure(*common, sums)
            trust = trust_ratio(*_norm.over_shards(plan.params, sums).unbind(1)).float()
        ops.step(plan.rule.number, *common, trust)
        plan.after()

    def _arguments(self, plan: Plan, grads: Tensor, scale=None, found_inf=None, divisor=None, norm=None) -> tuple:
        """What the raw operators take after the algorithm. The plan keeps it: a captured graph replays from it."""
        device = plan.device
        records, lrs = _plan.groups([self._options(plan.rule, o) for o in self.param_groups], device)
        common = (
            plan.tensors,
            grads,
            plan.chunks,
            plan.groups(records),
            _on(scale, device),
            _on(found_inf, device),
            _on(divisor, device),
            _on(norm, device),
            float(self.max_grad_norm or 0.0),
        )
        plan.held = (lrs, common)
        return common

    def _eager(self, entry: Entry, grad: Tensor, scale, divisor, norm) -> None:
        """The step of one parameter by the reference."""
        p, state, o = entry.param, entry.state, self.param_groups[entry.group]
        here, rule = local(p), self._rule_of(p, o)
        o, wide = self._options(rule, o), compute_dtype(here.dtype)
        g = _scaled(local(grad).to(wide), scale, divisor)
        if norm is not None:
            g = g * (self.max_grad_norm / (norm.to(g.device) + 1e-6)).clamp(max=1.0).to(wide)
        if o["maximize"]:
            g = -g
        state["step"] += 1
        step = int(state["step"])
        numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in o.items() if k != "params"}
        if "betas" in o:
            numbers["betas"] = tuple(map(float, o["betas"]))
        keys = [k for k in rule.states if k in entry.keys]
        states = {k: local(self._read(k, state)).to(wide) for k in keys}
        master = _formats.join(here, local(state["remainder"])) if "remainder" in entry.keys else here.to(wide)
        whole = rule.whole and hasattr(p, "to_local")

        def stored(states: dict[str, Tensor]) -> dict[str, Tensor]:
            for k in keys:
                self._write(p, k, cut(p, states[k]) if whole else states[k], state)
            kept = {k: local(self._read(k, state)).to(wide) for k in keys}
            return {k: gathered(p, s) for k, s in kept.items()} if whole else kept

        if whole:
            master, g, states = gathered(p, master), gathered(p, g), {k: gathered(p, s) for k, s in states.items()}
        new = rule.update(master, g, states, {**numbers, "stored": stored}, step)
        if not rule.measured:
            stored(states)
        if whole:
            new = cut(p, new)
        if "remainder" in entry.keys:
            high, rest = _formats.split(new)
            here.copy_(high)
            local(state["remainder"]).copy_(rest)
        elif o["rounding"] == "stochastic" and here.dtype in (torch.bfloat16, torch.float16):
            if not dense(here):  # elements are counted in the order of a copy
                new = new.contiguous()
            rounded = torch.empty_like(new, dtype=here.dtype)
            random = _formats.random_16(o["seed"], step, new.numel(), new.device)
            _formats.flat(rounded).copy_(_formats.stochastic(_formats.flat(new), here.dtype, random))
            here.copy_(rounded)
            new = rounded
        else:
            here.copy_(new)
            new = here
        if "ema" in entry.keys:
            average = local(state["ema"])
            average.lerp_(new.to(average.dtype), 1 - o["ema_decay"])

    # ---- averages ---------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the parameters' place while the block runs, for evaluation and for saving.

        The parameters are kept in a copy meanwhile, and come back exactly. Parameters that never had an `ema_decay`, or
        have not taken a step, stay as they are; where it was switched off, the average is that of then. Steps inside
        the block raise RuntimeError.
        """
        kept = [(p, self.state[p]) for p, _ in self._all() if isinstance(self.state.get(p), dict)]
        swapped = [(p, p.detach().clone(), s["ema"]) for p, s in kept if "ema" in s]
        if not swapped and all(o["ema_decay"] is None for o in self.param_groups):
            raise RuntimeError(f"{self._name}: no group has an ema_decay")
        with torch.no_grad():
            for p, _, average in swapped:
                p.copy_(average)
        handle = self.register_step_pre_hook(_refuse_step)
        try:
            yield
        finally:
            handle.remove()
            with torch.no_grad():
                for p, own, _ in swapped:
                    p.copy_(own)


def _refuse_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    raise RuntimeError("bigkernels.optim: a step inside `averaged()` would be lost")


def _scaled(x: Tensor, scale: Tensor | None, divisor: float | Tensor | None) -> Tensor:
    for d in (scale, divisor):
        if d is not None:
            x = x / (d.to(x.device) if isinstance(d, Tensor) else d)
    return x


def _on(value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number for a kernel: one float32 or float64 on its device."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.double()
    return value.to(device, non_blocking=True)
