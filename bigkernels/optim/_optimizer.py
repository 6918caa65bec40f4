"""What all optimizers share: arguments, states and their formats, and one step for all parameters of a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..ops import _registry
from ..ops import optimizer as ops
from ..ops._registry import log
from . import _formats, _norm, _plan
from ._plan import Plan, dense, local
from ._reference import RULES, Rule, trust_ratio

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
_CODES = (torch.int8, torch.uint8)  # with a sign and without
# What torch.optim's classes take and these have no use for.
_OF_TORCH = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
# What a state_dict does not decide: the formats are those that this optimizer was made with.
_KEPT = ("state_dtype", "rounding", "ema_decay", "cautious")


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one pass over memory.

    What every optimizer of this module takes beside the arguments of its torch namesake, in the constructor or in a
    parameter group (`max_grad_norm` in the constructor only):

    Args:
        state_dtype: how states are stored: torch.float32, torch.bfloat16, or "int8", blocks of 256 elements with a
            float32 scale (tensors of fewer than 4096 elements keep float32).
        rounding: how 16-bit parameters are rounded: "nearest"; "stochastic", unbiased, by random numbers that depend on
            torch's seed at construction, the step and the element only; or "kahan" (bfloat16 only), which keeps what
            rounding takes in 16 bits, so that parameter and remainder together are a float32 master weight.
        max_grad_norm: clip the gradients of all groups together to this 2-norm, inside the step: the gradients
            themselves are left as they are. `grad_norm` then is the norm before clipping, a tensor on the device.
        ema_decay: also keep an average of the parameters in float32, `average = decay * average + (1 - decay) *
            parameter`, starting at the parameters before their first step; `averaged()` swaps it in.
        decoupled_weight_decay: multiply the parameters instead of adding to the gradients.
        cautious: decoupled decay only of elements where it has the direction of the update (Chen et al. 2025,
            https://arxiv.org/abs/2510.12402).

    Gradients may have another dtype than their parameter. Parameters may have any strides; a view is updated inside the
    view only.
    """

    _rule: Rule
    _takes_sparse = False
    _torch_options: tuple[str, ...] = ()  # of those here, which the torch class of this name has too
    _step_supports_amp_scaling = True  # GradScaler hands over its scale and found_inf instead of unscaling

    def __init__(self, params: Iterable, defaults: dict[str, Any], *, max_grad_norm: float | None):
        self._check_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self._forget()
        defaults = {**_OF_TORCH, **defaults}
        defaults.setdefault("seed", None)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Nothing is known of where parameters and states are."""
        self._plans: list[Plan] | None = None
        self._waiting: list[Tensor] = []  # without a gradient so far
        self._unserved: list[tuple[Tensor, dict]] = []  # by no kernel, with their groups
        self._forced: str | None = None
        self._grad_norm: Tensor | None = None

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _refuse(self, argument: str, given: object, accepted: str) -> None:
        raise ValueError(f"bigkernels.optim.{type(self).__name__}: {argument} is {given!r}; accepted are {accepted}")

    def _check_norm(self, norm: float | None) -> None:
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            self._refuse("max_grad_norm", norm, "positive numbers and None")

    def _check(self, o: dict) -> None:
        """Of a parameter group; the range of each option, whoever has it."""
        name = f"bigkernels.optim.{type(self).__name__}"
        if o["differentiable"]:
            raise ValueError(f"{name}: differentiable=True is not supported; torch.optim.{type(self).__name__} has it")
        if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
            raise ValueError(f"{name}: Tensor lr must be 1-element")
        for key in ("lr", "eps", "weight_decay", "momentum", "lr_decay", "initial_accumulator_value"):
            if key in o and not (key == "lr" and isinstance(o[key], Tensor) and o[key].device.type != "cpu"):
                if not 0.0 <= float(o[key]) < math.inf:
                    self._refuse(key, o[key], "finite numbers from 0 on")
        for key, values in (("betas", o.get("betas", ())), ("alpha", (o.get("alpha", 0.0),))):
            for value in values:
                if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu"):
                    self._refuse(key, value, "numbers and tensors of one element on the CPU")
                if not 0.0 <= float(value) < 1.0:
                    self._refuse(key, o[key], "numbers in [0, 1)")
        if not math.isfinite(o.get("dampening", 0.0)):
            self._refuse("dampening", o["dampening"], "finite numbers")
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
        for p in o["params"]:
            if p.dtype not in _FLOATS:
                raise ValueError(f"{name}: a parameter of {p.dtype} cannot be optimized")
            if o["rounding"] == "kahan" and p.dtype == torch.float16:
                raise ValueError(f"{name}: rounding='kahan' is for bfloat16 parameters, and one is float16")

    @torch._disable_dynamo
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
            group["seed"] = int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if drawn else 0
        self._plans = None

    # ---- states -----------------------------------------------------------------------------------------------------

    def _rule_of(self, p: Tensor, o: dict) -> Rule:
        return self._rule

    def _options(self, rule: Rule, o: dict) -> dict:
        """The options of a group as a rule names them."""
        return o

    def _expected(self, p: Tensor, o: dict) -> dict[str, torch.dtype]:
        """The tensors of the shape of `p` in its state, with their dtypes."""
        rule = self._rule_of(p, o)
        needed = zip(rule.states, rule.needs(self._options(rule, o)), strict=True)
        found = {k: _state_dtype(p, k in rule.unsigned, o) for k, there in needed if there}
        if o["rounding"] == "kahan" and p.dtype == torch.bfloat16:
            found["remainder"] = torch.int16
        if o["ema_decay"] is not None:
            found["ema"] = _wide(p.dtype)
        return found

    def _complete(self, p: Tensor, state: dict, o: dict) -> dict:
        """Give a parameter what its state lacks."""
        like = {"memory_format": torch.preserve_format}
        if "step" not in state:
            # float64: float32 stops counting at 2^24. On the device, so that no step waits for another.
            state["step"] = torch.zeros((), dtype=torch.float64, device=local(p).device)
        for key, dtype in self._expected(p, o).items():
            if key in state:
                continue
            if key == "ema":
                state[key] = p.detach().to(dtype, copy=True, **like)
                continue
            state[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False, **like)
            fill = float(o.get("initial_accumulator_value", 0.0)) if key == "sum" else 0.0
            if dtype in _CODES:
                here = local(state[key])
                state[key + "_scale"] = torch.full((_formats.blocks(here.numel()),), fill, device=here.device)
                if fill:
                    here.fill_(255)
            elif fill:
                state[key].fill_(complex(fill, fill) if dtype.is_complex else fill)
        return state

    def _write(self, p: Tensor, key: str, value: Tensor, state: dict, dtype: torch.dtype | None = None) -> None:
        """Put a float tensor of the shape of `p` into a state: over what is there, or as a new one of `dtype`."""
        if dtype is not None:
            state[key] = torch.empty_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
        there = local(state[key])
        value = local(value)
        if there.dtype not in _CODES:
            there.copy_(value)
            return
        wide = torch.empty_like(there, dtype=torch.float32).copy_(value)
        codes, scale = _formats.encode8(_formats.flat(wide), there.dtype == torch.int8)
        _formats.flat(there).copy_(codes)
        if dtype is not None:
            state[key + "_scale"] = scale
        else:
            state[key + "_scale"].copy_(scale)

    def _read(self, key: str, state: dict) -> Tensor:
        """A state as floats, where it is 8-bit; as it is otherwise."""
        value = state[key]
        if value.dtype not in _CODES:
            return value
        here = local(value)
        wide = torch.empty_like(value, dtype=torch.float32)
        decoded = _formats.decode8(_formats.flat(here), state[key + "_scale"])
        _formats.flat(local(wide)).copy_(decoded)
        return wide

    # ---- the step ---------------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the last step's gradients before clipping, float32 (); None without `max_grad_norm`."""
        return self._grad_norm

    @torch._disable_dynamo
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
            ValueError: `divisor` is not positive, or a group was given options out of their range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if divisor is not None and not isinstance(divisor, Tensor) and not 0 < divisor < math.inf:
            self._refuse("divisor", divisor, "positive numbers and tensors")
        self._step(divisor)
        return loss

    def _step(self, divisor: float | Tensor | None) -> None:
        if not self._planned():
            self._plan()
        work = [(plan, *plan.gradients(self._gradients(plan.params))) for plan in self._plans]
        eager = [(p, o) for p, o in self._unserved if p.grad is not None]
        self._gradients([p for p, _ in eager])
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if self.max_grad_norm is not None:
            sums = [_norm.squares(plan, grads) for plan, grads, _ in work]
            sums += [_norm.squares_of(p.grad) for p, _ in eager]
            if sums:
                norm = self._grad_norm = _scaled(_norm.total(sums).sqrt(), scale, divisor).float()
        for plan, grads, _ in work:
            self._run(plan, grads, scale, found_inf, divisor, norm)
        if eager and not (found_inf is not None and float(found_inf)):
            for p, o in eager:
                self._eager(p, o, scale, divisor, norm)

    def _planned(self) -> bool:
        return (
            self._plans is not None
            and self._forced == _registry._forced
            and all(plan.holds() for plan in self._plans)
            and all(p.grad is None for p in self._waiting)
        )

    def _plan(self) -> None:
        """Look at all parameters: who has a state or needs one by now, and who serves them."""
        self._forced = _registry._forced
        self._waiting, self._unserved = [], []
        entries: dict[tuple[torch.device, str], list] = {}
        reasons: dict[str, int] = {}
        for number, o in enumerate(self.param_groups):
            for p in o["params"]:
                if p.grad is None and p not in self.state:
                    self._waiting.append(p)
                    continue
                state = self._complete(p, self.state[p], o)
                device, dtype = local(p).device, local(p).dtype
                reason = ops.why_not(device.type, dtype, self._forced)
                if reason is None:
                    entries.setdefault((device, self._rule_of(p, o).name), []).append((p, number, state))
                else:
                    reasons[reason] = reasons.get(reason, 0) + 1
                    self._unserved.append((p, o))
        self._plans = [plan for (_, name), found in entries.items() for plan in self._plans_of(RULES[name], found)]
        for reason, count in reasons.items():
            log.info("optim.%s: %d parameters by the reference (%s)", type(self).__name__, count, reason)

    def _plans_of(self, rule: Rule, entries: list[tuple[Tensor, int, dict]]) -> list[Plan]:
        return [Plan(rule, entries)]

    def _gradients(self, params: list[Tensor]) -> list[Tensor | None]:
        grads = [p.grad for p in params]
        if any(g is not None and g.layout != torch.strided for g in grads):
            if not self._takes_sparse:
                raise RuntimeError(f"bigkernels.optim.{type(self).__name__} does not support sparse gradients")
            grads = [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
        return grads

    def _run(self, plan: Plan, grads: Tensor, scale, found_inf, divisor, norm) -> None:
        plan.before()
        common = self._arguments(plan, grads, scale, found_inf, divisor, norm)
        trust = None
        if plan.rule is RULES["lamb"]:
            sums = torch.zeros(len(plan.params), 2, dtype=torch.float64, device=plan.device)
            ops.measure(*common, sums)
            trust = trust_ratio(*_norm.over_shards(plan.params, sums).unbind(1)).float()
        ops.step(plan.rule.number, *common, trust)
        plan.after()

    def _arguments(self, plan: Plan, grads: Tensor, scale=None, found_inf=None, divisor=None, norm=None) -> tuple:
        """What the raw operators take after the algorithm. The plan holds on to it: a captured graph replays from it."""
        device = plan.device
        records, lrs = _plan.groups([self._options(plan.rule, o) for o in self.param_groups], device)
        common = (plan.tensors, grads, plan.chunks, records, _on(scale, device), _on(found_inf, device),
                  _on(divisor, device), _on(norm, device), float(self.max_grad_norm or 0.0))  # fmt: skip
        plan.held = (lrs, common)
        return common

    def _eager(self, p: Tensor, o: dict, scale, divisor, norm) -> None:
        """The step of one parameter by the reference."""
        state, here, rule = self.state[p], local(p), self._rule_of(p, o)
        o, wide = self._options(rule, o), _wide(here.dtype)
        g = _scaled(local(self._gradients([p])[0]).to(wide), scale, divisor)
        if norm is not None:
            g = g * (self.max_grad_norm / (norm.to(g.device) + 1e-6)).clamp(max=1.0).to(wide)
        if o["maximize"]:
            g = -g
        state["step"] += 1
        step = int(state["step"])
        numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in o.items() if k != "params"}
        if "betas" in o:
            numbers["betas"] = tuple(map(float, o["betas"]))
        keys = [k for k in rule.states if k in state]
        states = {k: local(self._read(k, state)).to(wide) for k in keys}
        master = _formats.join(here, local(state["remainder"])) if "remainder" in state else here.to(wide)
        new = rule.update(master, g, states, numbers, step)
        for k in keys:
            self._write(p, k, states[k], state)
        if "remainder" in state:
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
        if "ema" in state:
            average = local(state["ema"])
            average.lerp_(new.to(average.dtype), 1 - o["ema_decay"])

    # ---- averages ---------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the parameters' place while the block runs, for evaluation and for saving.

        The parameters are kept in a copy meanwhile, and come back exactly. Parameters without `ema_decay`, or that have
        not taken a step, stay as they are. Steps inside the block raise RuntimeError.
        """
        swapped = [(p, p.detach().clone(), s["ema"]) for p, s in self.state.items() if "ema" in s]
        if not swapped and all(o["ema_decay"] is None for o in self.param_groups):
            raise RuntimeError(f"bigkernels.optim.{type(self).__name__}: no group has an ema_decay")
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

    # ---- saving and loading -----------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's: what `load_state_dict` of this optimizer, and with float32 states that of torch, goes on from.

        8-bit states of distributed parameters are saved as float32, whose rounding back is exact: their blocks would be
        others on another number of ranks.
        """
        found = super().state_dict()
        for index, state in found["state"].items():
            coded = [k for k, v in state.items() if _is_tensor(v) and v.dtype in _CODES and hasattr(v, "to_local")]
            if coded:
                found["state"][index] = {
                    k: self._read(k, state) if k in coded else v
                    for k, v in state.items()
                    if k.removesuffix("_scale") not in coded or k in coded
                }
        return found

    def torch_state_dict(self) -> dict[str, Any]:
        """A state_dict in which all states are float32 and nothing is unknown to the torch class of this name."""
        found = self.state_dict()
        known = {key for rule in RULES.values() for key in rule.states}
        states = {
            index: {k: self._read(k, s).to(_wide(s[k].dtype)) for k in s if k in known}
            | {"step": s["step"].to(torch.float32)}
            for index, s in found["state"].items()
        }
        ours = (*_KEPT, "seed") + (() if "decoupled_weight_decay" in self._torch_options else ("decoupled_weight_decay",))
        groups = [{k: v for k, v in g.items() if k not in ours} for g in found["param_groups"]]
        return {"state": states, "param_groups": groups}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict of this class, in whatever formats, or of the torch class of this name.

        States are converted to the formats of this optimizer: those are not loaded, everything else of the groups is.

        Raises:
            ValueError: groups, shapes or dtypes do not fit; nothing has changed then.
        """
        handle = self.register_load_state_dict_pre_hook(_converted)  # after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _adopt(self, p: Tensor, o: dict, saved: dict) -> dict:
        """A saved state in the formats of this optimizer."""
        states = self._rule_of(p, o).states
        state = {k: v for k, v in saved.items() if v is not None and k.removesuffix("_scale") not in states}
        if "step" in saved or any(k in saved for k in states):
            # torch's SGD and Muon count no steps; what they saved comes after the first one.
            step = float(saved.get("step", 1.0))
            if not (step >= 0 and step == int(step)):
                raise ValueError(f"bigkernels.optim.{type(self).__name__}: a saved step is {step}")
            state["step"] = torch.tensor(step, dtype=torch.float64, device=local(p).device)
        for key, dtype in self._expected(p, o).items():
            value = saved.get(key)
            if value is None:
                state.pop(key, None)
                continue
            if not _is_tensor(value) or value.shape != p.shape:
                given = tuple(value.shape) if _is_tensor(value) else type(value).__name__
                raise ValueError(
                    f"bigkernels.optim.{type(self).__name__}: the saved {key} is {given}; its parameter is {tuple(p.shape)}"
                )
            value = value.to(p.device)
            if value.dtype in _CODES:
                value = self._checked_codes(key, value, saved)
            elif key == "remainder" and value.dtype != torch.int16:
                raise ValueError(f"bigkernels.optim.{type(self).__name__}: the saved remainder is {value.dtype}")
            self._write(p, key, value, state, dtype)
        return state

    def _checked_codes(self, key: str, codes: Tensor, saved: dict) -> Tensor:
        """8-bit states as float32."""
        scale = saved.get(key + "_scale")
        if not _is_tensor(scale) or scale.shape != (_formats.blocks(local(codes).numel()),):
            raise ValueError(f"bigkernels.optim.{type(self).__name__}: the saved {key} lacks the scales of its blocks")
        return self._read(key, {key: codes, key + "_scale": scale.to(codes.device)})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.get("state")
        if states is not None and any(isinstance(v, _Whole) for v in states.values()):
            for k, v in states.items():
                states[k] = v.state if isinstance(v, _Whole) else v
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["seed"] = group["seed"] or 0
        self._forget()


class _Whole:
    """A state on its way through torch's load_state_dict, which would cast the tensors of a dictionary."""

    def __init__(self, state: dict):
        self.state = state


def _converted(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return state_dict  # which torch refuses
    new_groups = [
        {**deepcopy({k: v for k, v in saved.items() if k != "params"}), **{k: own[k] for k in _KEPT},
         "params": saved["params"]}
        for own, saved in zip(groups, saved_groups, strict=True)
    ]  # fmt: skip
    states = dict(state_dict["state"])
    for own, saved, new in zip(groups, saved_groups, new_groups, strict=True):
        options = {**optimizer.defaults, **new}
        optimizer._check({**options, "params": own["params"]})
        for p, index in zip(own["params"], saved["params"], strict=True):
            if index in states:
                states[index] = _Whole(optimizer._adopt(p, options, states[index]))
    return {**state_dict, "state": states, "param_groups": new_groups}


def _refuse_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    raise RuntimeError("bigkernels.optim: a step inside `averaged()` would be lost")


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _state_dtype(p: Tensor, unsigned: bool, o: dict) -> torch.dtype:
    if p.dtype in (torch.float64, torch.complex64, torch.complex128):
        return p.dtype
    if o["state_dtype"] == "int8":
        return torch.float32 if p.numel() < _formats.LEAST_8BIT else torch.uint8 if unsigned else torch.int8
    return o["state_dtype"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is averaged and computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16, *_CODES) else dtype


def _scaled(x: Tensor, scale: Tensor | None, divisor: float | Tensor | None) -> Tensor:
    for d in (scale, divisor):
        if d is not None:
            x = x / (d.to(x.device) if _is_tensor(d) else d)
    return x


def _on(value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number for a kernel: one float32 or float64 on its device."""
    if value is None:
        return None
    if not _is_tensor(value):
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.double()
    return value.to(device, non_blocking=True)
