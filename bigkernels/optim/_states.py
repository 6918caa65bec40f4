"""The states of parameters: their formats, and saving and loading them."""

# mypy: ignore-errors

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .._torch_private import disable_dynamo
from ..ops.registry import compute_dtype
from . import _formats
from ._plan import Entry, backed, dense, laid_out, local, placed, strides
from ._reference import RULES, Rule

_CODES = (torch.int8, torch.uint8)  # with a sign and without
_CODED = "_codes"  # what their names end in where they are saved
# What a state_dict does not decide: the formats are those that the optimizer was made with.
_KEPT = ("state_dtype", "rounding", "ema_decay", "cautious")
_KNOWN = frozenset(key for rule in RULES.values() for key in rule.states)


class States(torch.optim.Optimizer):
    """The half of an optimizer that knows how its states are stored."""

    _rule: Rule
    _torch_options: tuple[str, ...] = ()  # of those here, which the torch class of this name has too
    _offloaded = False  # states are in host memory

    @property
    def _name(self) -> str:
        return f"bigkernels.optim.{type(self).__name__}"

    def _rule_of(self, p: Tensor, o: dict) -> Rule:
        return self._rule

    def _options(self, rule: Rule, o: dict) -> dict:
        """The options of a group as a rule names them."""
        return o

    def _home(self, p: Tensor) -> torch.device:
        """Where the states of a parameter are."""
        return torch.device("cpu") if self._offloaded else p.device

    def _expected(self, p: Tensor, o: dict) -> dict[str, torch.dtype]:
        """The tensors of the shape of `p` in its state, with their dtypes."""
        rule = self._rule_of(p, o)
        dtypes = {s.name: _state_dtype(p, s.signed, o) for s in rule.needs(self._options(rule, o))}
        if o["rounding"] == "kahan" and p.dtype == torch.bfloat16:
            dtypes["remainder"] = torch.int16
        if o["ema_decay"] is not None:
            dtypes["ema"] = compute_dtype(p.dtype)
        return dtypes

    def _complete(self, p: Tensor, number: int) -> Entry:
        """The state of a parameter as the options of its group want it: what is missing is made, what is in another
        dtype, on another device or in other strides is converted, and what cannot be raises.

        Other tensors in it stay as they are, but for a remainder, which is a part of the parameter.
        """
        o, state = self.param_groups[number], self.state[p]
        if not isinstance(state, dict):
            raise TypeError(f"{self._name}: the state of a parameter is a {type(state).__name__} and no dictionary")
        if p.layout == torch.strided and 0 in strides(p):
            raise RuntimeError(f"{self._name}: elements of a parameter are in one place; use clone()")
        if not backed(p):
            raise RuntimeError(f"{self._name}: the memory of a parameter was given back")
        expected = self._expected(p, o)
        if "remainder" in state and "remainder" not in expected:
            self._without_remainder(p, state)
        rule = self._rule_of(p, o)
        count = self._count(p, state, rule, expected)
        for key, dtype in expected.items():
            if key not in state:
                self._begin(p, key, state, dtype, o)
                continue
            value = self._checked(p, key, state, "")
            if value.dtype != dtype or not laid_out(value, p) or value.device != self._home(p):
                self._write(p, key, self._read(key, state), state, dtype)
            elif dtype in _CODES:
                scale = state[key + "_scale"]
                if not (scale.dtype == torch.float32 and scale.is_contiguous() and scale.device == local(value).device):
                    state[key + "_scale"] = scale.to(local(value).device, torch.float32).contiguous()
        scales = (key + "_scale" for key, dtype in expected.items() if dtype in _CODES)
        return Entry(p, number, state, (*expected, *scales), count)

    def _begin(self, p: Tensor, key: str, state: dict, dtype: torch.dtype, o: dict) -> None:
        """A state before the first step."""
        if key == "ema":
            self._write(p, key, p.detach(), state, dtype)
            return
        state[key] = self._empty(p, dtype).zero_()
        start = next((s.start for s in self._rule_of(p, o).kept if s.name == key), None)  # none of a remainder
        fill = float(o[start]) if start else 0.0
        if dtype in _CODES:
            here = local(state[key])
            blocks = _formats.blocks(here.numel())
            state[key + "_scale"] = torch.full((blocks,), fill, dtype=torch.float32, device=here.device)
            if fill:
                here.fill_(255)
        elif fill:
            state[key].fill_(complex(fill, fill) if dtype.is_complex else fill)

    def _count(self, p: Tensor, state: dict, rule: Rule, expected: dict) -> Tensor:
        """How many steps a parameter has taken, as kernels count them: float64 (), on the device, so that no step waits
        for another, and as float32 stops counting at 2^24. Another counter stays what it is, and is counted on."""
        there = any(k in expected and k in state for k in rule.states)
        if rule.starts_with_state and not there and any(k in expected for k in rule.states):
            state["step"] = 0
        given = state.setdefault("step", 0 if rule.counts or not there else 1)
        home = self._home(p)
        if isinstance(given, Tensor):
            plain = given.dtype == torch.float64 and given.shape == () and type(given) is Tensor
            if plain and given.device == home and home.type != "cpu":
                return given  # to look at its value would be to wait for it
        step = self._whole(given)
        if isinstance(given, Tensor):
            return given if plain and given.device == home else torch.full((), step, dtype=torch.float64, device=home)
        state["step"] = torch.full((), step, dtype=torch.float64, device=home)
        return state["step"]

    def _whole(self, step: Any) -> float:
        """A number of steps, from whatever torch takes for one."""
        try:
            value = float(step)
        except (TypeError, ValueError, RuntimeError):
            value = -1.0
        if not (math.isfinite(value) and value >= 0 and value == int(value)):
            raise ValueError(f"{self._name}: a step is {step!r}; accepted are whole numbers from 0 on, as one element")
        return value

    def _without_remainder(self, p: Tensor, state: dict) -> None:
        """Take the remainder of a bfloat16 parameter out of its state. One that has become wider gets the digits."""
        rest = state.pop("remainder")
        if p.dtype in (torch.bfloat16, torch.float16) or not isinstance(rest, Tensor) or rest.shape != p.shape:
            return
        here, rest = local(p), local(placed(rest.to(p.device), p))
        high = here.to(torch.bfloat16)
        if here.shape == rest.shape and torch.equal(high.to(here.dtype), here):  # else it is not that parameter
            here.copy_(_formats.join(high, rest.to(torch.int16)))

    def _checked(self, p: Tensor, key: str, state: dict, which: str) -> Tensor:
        """A state of the shape of `p`, codes with their scales; or an error."""
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != p.shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            self._wrong(which, key, f"{given}; its parameter is {tuple(p.shape)}")
        if not backed(value):
            self._wrong(which, key, "a tensor whose memory was given back")
        if hasattr(value, "to_local") != hasattr(p, "to_local"):
            mine, its = (("not ", "")[hasattr(t, "to_local")] for t in (value, p))
            turns = "torch.distributed.checkpoint.state_dict turns one into the other"
            self._wrong(which, key, f"{mine}distributed and its parameter is {its}distributed; {turns}")
        if value.dtype in _CODES:
            scale = state.get(key + "_scale")
            if not isinstance(scale, Tensor) or scale.shape != (_formats.blocks(local(value).numel()),):
                self._wrong(which, key, "codes, and lacks the scales of its blocks")
        elif key == "remainder":
            if value.dtype not in (torch.int16, torch.int32):
                self._wrong(which, key, f"{value.dtype}; accepted is torch.int16")
        elif not (value.is_floating_point() or (value.is_complex() and p.is_complex())):
            self._wrong(which, key, f"{value.dtype}; its parameter is {p.dtype}")
        return value

    def _wrong(self, which: str, key: str, what: str) -> None:
        kind = ValueError if which else RuntimeError  # as torch's load_state_dict and step
        raise kind(f"{self._name}: the {which}{key} is {what}")

    def _empty(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        # A distributed parameter gives a distributed state.
        return torch.empty_like(
            p.detach(),
            dtype=dtype,
            device=self._home(p),
            memory_format=torch.preserve_format,
            pin_memory=self._offloaded and p.is_cuda,
        )

    def _write(self, p: Tensor, key: str, value: Tensor, state: dict, dtype: torch.dtype | None = None) -> None:
        """Put a float tensor of the shape of `p` into a state: over what is there, or as a new one of `dtype`."""
        if dtype is not None:
            state[key] = self._empty(p, dtype)
        there = local(state[key])
        value = local(placed(value, p))
        if there.dtype not in _CODES:
            there.copy_(value)
            if dtype is not None:
                state.pop(key + "_scale", None)
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
        here = here if dense(here) else here.contiguous()
        wide = torch.empty_like(value, dtype=torch.float32)
        decoded = _formats.decode8(_formats.flat(here), state[key + "_scale"].to(here.device, torch.float32))
        _formats.flat(local(wide)).copy_(decoded)
        return wide

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's: what `load_state_dict` of this optimizer, and with float32 states that of torch, goes on from.

        Codes of 8 bits are named so (`exp_avg_codes`): what loads them in place of floats, key by key, misses them.
        8-bit states of distributed parameters are saved as float32, whose rounding back is exact: their blocks would be
        others on another number of ranks. Their remainders are saved as int32: no backend gathers int16.
        """
        saved = super().state_dict()
        # By name, which torch.distributed.checkpoint takes where it gathers; of dtypes it knows nothing.
        saved["param_groups"] = [
            {**g, "state_dtype": str(g["state_dtype"]).removeprefix("torch.")} for g in saved["param_groups"]
        ]
        for index, state in saved["state"].items():
            if isinstance(state, dict):  # else it is an entry of the user's
                saved["state"][index] = self._saved(state)
        return saved

    def _saved(self, state: dict) -> dict:
        saved = {}
        for key, value in state.items():
            coded = key.removesuffix("_scale")
            owner = state.get(coded) if coded in _KNOWN else None
            shards = hasattr(value if owner is None else owner, "to_local")
            if key in _KNOWN and isinstance(value, Tensor) and value.dtype in _CODES:
                saved.update({key: self._read(key, state)} if shards else {key + _CODED: value})
            elif shards and key == "remainder":
                saved[key] = value.to(torch.int32)
            elif not (shards and owner is not None and key.endswith("_scale")):
                saved[key] = value
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """A state_dict in which all states are float32 and nothing is unknown to the torch class of this name."""
        saved = self.state_dict()
        states = {index: self._widened(state) for index, state in saved["state"].items() if isinstance(state, dict)}
        ours = {*_KEPT, "seed", "decoupled_weight_decay"}.difference(self._torch_options)
        groups = [{k: v for k, v in g.items() if k not in ours} for g in saved["param_groups"]]
        return {"state": states, "param_groups": groups}

    def _widened(self, state: dict) -> dict:
        state = _uncoded(state)
        saved = {}
        for key in _KNOWN & state.keys():
            value = self._read(key, state)
            saved[key] = value.to(compute_dtype(value.dtype))
        if "step" in state:
            saved["step"] = torch.full((), float(state["step"]), dtype=torch.float32, device=_device_of(state["step"]))
        return saved

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict of this class, in whatever formats, or of the torch class of this name.

        States are converted to the formats of this optimizer: those are not loaded, everything else of the groups is.
        Averages and remainders are left out where this optimizer keeps none. A float32 parameter that has the values of
        a bfloat16 one with a remainder takes its digits in at the first step.

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
        rule, saved = self._rule_of(p, o), _uncoded(saved)
        saved = {k: v for k, v in saved.items() if v is not None}
        expected = self._expected(p, o)
        own = {*rule.states, *(f"{k}_scale" for k in rule.states), "ema", "remainder", "step"}
        state = {k: v for k, v in saved.items() if k not in own}
        if "step" in saved or any(k in saved for k in rule.states):
            # torch's SGD and Muon count no steps; what they saved comes after the first one.
            step = self._whole(saved.get("step", 1.0))
            state["step"] = torch.full((), step, dtype=torch.float64, device=self._home(p))
        for key in ("remainder", "ema", *rule.states):
            # A remainder of what was bfloat16 waits for the first step: the parameter may be loaded after this.
            waits = key == "remainder" and p.dtype in (torch.float32, torch.float64)
            if key not in saved or (key not in expected and not waits and key not in rule.states):
                continue
            value = self._checked(p, key, saved, "saved ")
            value = placed(self._read(key, saved).to(self._home(p)), p)
            self._write(p, key, value, state, expected.get(key, torch.int16 if waits else value.dtype))
        return state

    def __getstate__(self) -> dict[str, Any]:
        # A copy steps where it is, whatever the original was told.
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.get("state")
        if states is not None and any(isinstance(v, _Whole) for v in states.values()):
            for k, v in states.items():
                states[k] = v.state if isinstance(v, _Whole) else v
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", None)
        self.__dict__.setdefault("_offloaded_plans", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["seed"] = group["seed"] or 0
        self._forget()


def _uncoded(saved: dict) -> dict:
    """A saved state by the names of the rule."""
    coded = {k + _CODED: k for k in _KNOWN}
    return {coded.get(k, k): v for k, v in saved.items()}


def _device_of(value: Any) -> torch.device:
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


class _Whole:
    """A state on its way through torch's load_state_dict, which would cast the tensors of a dictionary."""

    def __init__(self, state: dict):
        self.state = state


def _converted(optimizer: States, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return state_dict  # which torch refuses
    new_groups = [
        {
            **deepcopy({k: v for k, v in saved.items() if k != "params"}),
            **{k: own[k] for k in _KEPT},
            "params": saved["params"],
        }
        for own, saved in zip(groups, saved_groups, strict=True)
    ]
    states = dict(state_dict["state"])
    for own, saved, new in zip(groups, saved_groups, new_groups, strict=True):
        options = {**optimizer.defaults, **new}
        optimizer._check({**options, "params": own["params"]})
        for p, index in zip(own["params"], saved["params"], strict=True):
            if isinstance(states.get(index), dict):
                states[index] = _Whole(optimizer._adopt(p, options, states[index]))
    return {**state_dict, "state": states, "param_groups": new_groups}


def _state_dtype(p: Tensor, signed: bool, o: dict) -> torch.dtype:
    if p.dtype in (torch.float64, torch.complex64, torch.complex128):
        return p.dtype
    if o["state_dtype"] == "int8":
        return torch.float32 if p.numel() < _formats.LEAST_8BIT else torch.int8 if signed else torch.uint8
    return o["state_dtype"]
