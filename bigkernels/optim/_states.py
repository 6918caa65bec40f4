"""The states of parameters: their formats, and saving and loading them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..ops._registry import compute_dtype
from . import _formats
from ._plan import laid_out, local, placed
from ._reference import RULES, Rule

_CODES = (torch.int8, torch.uint8)  # with a sign and without
_CODED = "_codes"  # what their names end in where they are saved
# What a state_dict does not decide: the formats are those that the optimizer was made with.
_KEPT = ("state_dtype", "rounding", "ema_decay", "cautious")


class States(torch.optim.Optimizer):
    """The half of an optimizer that knows how its states are stored."""

    _rule: Rule
    _torch_options: tuple[str, ...] = ()  # of those here, which the torch class of this name has too
    _offloaded = False  # states are in host memory

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
        needed = zip(rule.states, rule.needs(self._options(rule, o)), strict=True)
        found = {k: _state_dtype(p, k in rule.unsigned, o) for k, there in needed if there}
        if o["rounding"] == "kahan" and p.dtype == torch.bfloat16:
            found["remainder"] = torch.int16
        if o["ema_decay"] is not None:
            found["ema"] = compute_dtype(p.dtype)
        return found

    def _complete(self, p: Tensor, state: dict, o: dict) -> dict:
        """Give a parameter what its state lacks."""
        if "step" not in state:
            # float64: float32 stops counting at 2^24. On the device, so that no step waits for another.
            state["step"] = torch.zeros((), dtype=torch.float64, device=self._home(p))
        for key, dtype in self._expected(p, o).items():
            if key in state:
                if state[key].dtype != dtype or not laid_out(state[key], p) or state[key].device != self._home(p):
                    self._write(p, key, self._read(key, state), state, dtype)
                continue
            if key == "ema":
                self._write(p, key, p.detach(), state, dtype)
                continue
            state[key] = self._empty(p, dtype).zero_()
            fill = float(o.get("initial_accumulator_value", 0.0)) if key == "sum" else 0.0
            if dtype in _CODES:
                here = local(state[key])
                state[key + "_scale"] = torch.full((_formats.blocks(here.numel()),), fill, device=here.device)
                if fill:
                    here.fill_(255)
            elif fill:
                state[key].fill_(complex(fill, fill) if dtype.is_complex else fill)
        return state

    def _empty(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        # A distributed parameter gives a distributed state.
        return torch.empty_like(
            p.detach(), dtype=dtype, device=self._home(p), memory_format=torch.preserve_format,
            pin_memory=self._offloaded and p.is_cuda,
        )  # fmt: skip

    def _write(self, p: Tensor, key: str, value: Tensor, state: dict, dtype: torch.dtype | None = None) -> None:
        """Put a float tensor of the shape of `p` into a state: over what is there, or as a new one of `dtype`."""
        if dtype is not None:
            state[key] = self._empty(p, dtype)
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

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's: what `load_state_dict` of this optimizer, and with float32 states that of torch, goes on from.

        Codes of 8 bits are named so (`exp_avg_codes`): what loads them in place of floats, key by key, misses them.
        8-bit states of distributed parameters are saved as float32, whose rounding back is exact: their blocks would be
        others on another number of ranks. Their remainders are saved as int32: no backend gathers int16.
        """
        found = super().state_dict()
        # By name, which torch.distributed.checkpoint takes where it gathers; of dtypes it knows nothing.
        found["param_groups"] = [
            {**g, "state_dtype": str(g["state_dtype"]).removeprefix("torch.")} for g in found["param_groups"]
        ]
        for index, state in found["state"].items():
            found["state"][index] = self._saved(state)
        return found

    def _saved(self, state: dict) -> dict:
        saved = {}
        for key, value in state.items():
            owner = state.get(key.removesuffix("_scale"))
            shards = hasattr(value if owner is None else owner, "to_local")
            if isinstance(value, Tensor) and value.dtype in _CODES:
                saved.update({key: self._read(key, state)} if shards else {key + _CODED: value})
            elif shards and key == "remainder":
                saved[key] = value.to(torch.int32)
            elif not (shards and key.endswith("_scale")):
                saved[key] = value
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """A state_dict in which all states are float32 and nothing is unknown to the torch class of this name."""
        found = self.state_dict()
        known = {key for rule in RULES.values() for key in rule.states}
        states = {
            index: {k: _widened(self._read(k, s)) for k in s if k in known} | {"step": s["step"].to(torch.float32)}
            for index, s in ((index, _uncoded(s)) for index, s in found["state"].items())
        }
        ours = {*_KEPT, "seed", "decoupled_weight_decay"}.difference(self._torch_options)
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
        states, saved = self._rule_of(p, o).states, _uncoded(saved)
        state = {k: v for k, v in saved.items() if v is not None and k.removesuffix("_scale") not in states}
        if "step" in saved or any(k in saved for k in states):
            # torch's SGD and Muon count no steps; what they saved comes after the first one.
            step = float(saved.get("step", 1.0))
            if not (step >= 0 and step == int(step)):
                raise ValueError(f"bigkernels.optim.{type(self).__name__}: a saved step is {step}")
            state["step"] = torch.tensor(step, dtype=torch.float64, device=self._home(p))
        for key, dtype in self._expected(p, o).items():
            value = saved.get(key)
            if value is None:
                state.pop(key, None)
                continue
            if not isinstance(value, Tensor) or value.shape != p.shape:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                name = f"bigkernels.optim.{type(self).__name__}"
                raise ValueError(f"{name}: the saved {key} is {given}; its parameter is {tuple(p.shape)}")
            if hasattr(value, "to_local") != hasattr(p, "to_local"):
                name, are = f"bigkernels.optim.{type(self).__name__}", ("is not", "is")
                raise ValueError(
                    f"{name}: the saved {key} {are[hasattr(value, 'to_local')]} distributed and its parameter "
                    f"{are[hasattr(p, 'to_local')]}; torch.distributed.checkpoint.state_dict turns one into the other"
                )
            value = placed(value.to(self._home(p)), p)
            if value.dtype in _CODES:
                value = self._checked_codes(key, value, saved)
            elif key == "remainder" and value.dtype not in (torch.int16, torch.int32):
                raise ValueError(f"bigkernels.optim.{type(self).__name__}: the saved remainder is {value.dtype}")
            self._write(p, key, value, state, dtype)
        return state

    def _checked_codes(self, key: str, codes: Tensor, saved: dict) -> Tensor:
        """8-bit states as float32."""
        scale = saved.get(key + "_scale")
        if not isinstance(scale, Tensor) or scale.shape != (_formats.blocks(local(codes).numel()),):
            raise ValueError(f"bigkernels.optim.{type(self).__name__}: the saved {key} lacks the scales of its blocks")
        return self._read(key, {key: codes, key + "_scale": scale.to(codes.device)})

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
    return {k.removesuffix(_CODED): v for k, v in saved.items()}


class _Whole:
    """A state on its way through torch's load_state_dict, which would cast the tensors of a dictionary."""

    def __init__(self, state: dict):
        self.state = state


def _converted(optimizer: States, state_dict: dict[str, Any]) -> dict[str, Any]:
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


def _state_dtype(p: Tensor, unsigned: bool, o: dict) -> torch.dtype:
    if p.dtype in (torch.float64, torch.complex64, torch.complex128):
        return p.dtype
    if o["state_dtype"] == "int8":
        return torch.float32 if p.numel() < _formats.LEAST_8BIT else torch.uint8 if unsigned else torch.int8
    return o["state_dtype"]


def _widened(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))
