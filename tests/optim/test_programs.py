"""Programs of edits between steps: groups, options, states, dtypes, memory, copies, saved and loaded states.

In one kind all is done alike to this package's optimizer by kernels, by the reference, and to torch's in float64. In
the other the formats of this package are edited too, and what the kernels do is compared with what the reference does.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from optimizer_formulas import FORMULAS

import bigkernels
from bigkernels import optim

SHAPES = ((5,), (3, 4), (4, 3), (), (70,))
LARGE = (*SHAPES, (4100,))  # in 8 bits
STARTS = {
    "AdamW": {"amsgrad": True},
    "Adam": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {"lr_decay": 0.1},
}
OPTIONS = {
    "AdamW": {"amsgrad": (True, False), "betas": ((0.8, 0.9), (0.5, 0.99))},
    "Adam": {"amsgrad": (True, False), "maximize": (True, False)},
    "SGD": {"momentum": (0.0, 0.9), "dampening": (0.0, 0.5), "maximize": (True, False)},
    "RMSprop": {"centered": (True, False), "momentum": (0.0, 0.5)},
    "Adagrad": {"lr_decay": (0.0, 0.1)},
}
# What torch makes at the first step only, and misses where an option is switched on later.
LATER = {"AdamW": ("max_exp_avg_sq",), "Adam": ("max_exp_avg_sq",), "RMSprop": ("grad_avg", "momentum_buffer")}
FORMATS = {
    "state_dtype": (torch.float32, torch.bfloat16, "int8"),
    "rounding": ("nearest", "stochastic", "kahan"),
    "ema_decay": (None, 0.5),
}


class Side:
    """One optimizer with its parameters, in the order in which they came."""

    def __init__(self, make, dtype: torch.dtype, values: list, options: dict, backend: str | None):
        self.dtype, self.backend, self.make = dtype, backend, make
        self.params = [self.new(v) for v in values]
        half = len(values) // 2
        groups = [{"params": self.params[:half]}, {"params": self.params[half:], "lr": 0.02}]
        self.optimizer = make(groups, lr=0.05, **options)

    def new(self, value: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.to(self.dtype))

    def state(self, index: int) -> dict:
        return self.optimizer.state.get(self.params[index], {})

    def step(self) -> None:
        with bigkernels.use(self.backend) if self.backend else contextlib.nullcontext():
            self.optimizer.step()


class Programs(RuleBasedStateMachine):
    """What is done to every side alike."""

    sides: list[Side]
    name = "AdamW"

    def begin(self, name: str, count: int, seed: int) -> None:
        self.name, self.generator = name, torch.Generator().manual_seed(seed)
        self.values = [self.random(self.shape(i)) for i in range(count)]

    def shape(self, i: int) -> tuple[int, ...]:
        return self.shapes[i % len(self.shapes)]

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(torch.bfloat16)

    def pick(self, number: int) -> int:
        return number % len(self.sides[0].params)

    def stepped(self, index: int) -> bool:
        return all(side.state(index) for side in self.sides)

    def check(self) -> None:
        raise NotImplementedError

    @rule(steps=st.integers(1, 3), idle=st.integers(0, 7))
    def step(self, steps: int, idle: int) -> None:
        for _ in range(steps):
            for i, p in enumerate(self.sides[0].params):
                g = self.random(tuple(p.shape))
                for side in self.sides:
                    side.params[i].grad = None if i == idle else g.to(side.params[i].dtype)
            for side in self.sides:
                side.step()
        self.check()

    # ---- groups -----------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 9))
    def replace_a_parameter(self, number: int) -> None:
        index = self.pick(number)
        value = self.random(tuple(self.sides[0].params[index].shape))
        for side in self.sides:
            old, new = side.params[index], side.new(value)
            side.params[index] = new
            for group in side.optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]

    @rule(number=st.integers(0, 9))
    def take_a_parameter_out(self, number: int) -> None:
        index = self.pick(number)
        for side in self.sides:
            for group in side.optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if p is not side.params[index]]

    @rule(number=st.integers(0, 9), to=st.integers(0, 3))
    def move_a_parameter(self, number: int, to: int) -> None:
        index = self.pick(number)
        self.take_a_parameter_out(index)
        for side in self.sides:
            groups = side.optimizer.param_groups
            groups[to % len(groups)]["params"].append(side.params[index])

    @precondition(lambda self: len(self.sides[0].params) < 8)
    @rule(lr=st.sampled_from([0.01, 0.1]))
    def add_a_group(self, lr: float) -> None:
        value = self.random(self.shape(len(self.sides[0].params)))
        for side in self.sides:
            side.params.append(side.new(value))
            side.optimizer.add_param_group({"params": [side.params[-1]], "lr": lr})

    @rule(how=st.sampled_from(["reverse", "copy"]))
    def change_the_list_of_groups(self, how: str) -> None:
        for side in self.sides:
            groups = side.optimizer.param_groups
            side.optimizer.param_groups = groups[::-1] if how == "reverse" else [dict(group) for group in groups]

    @rule(number=st.integers(0, 3), lr=st.sampled_from([0.0, 0.03, 0.1]), decay=st.sampled_from([0.0, 0.2]))
    def change_numbers(self, number: int, lr: float, decay: float) -> None:
        for side in self.sides:
            groups = side.optimizer.param_groups
            groups[number % len(groups)].update(lr=lr, weight_decay=decay)

    @rule(number=st.integers(0, 3), data=st.data())
    def change_an_option(self, number: int, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.options())))
        value = data.draw(st.sampled_from(self.options()[key]))
        for side in self.sides:
            groups = side.optimizer.param_groups
            groups[number % len(groups)][key] = value

    def options(self) -> dict:
        return OPTIONS[self.name]

    # ---- states -----------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 9), how=st.sampled_from(["empty", "clear", "delete"]))
    def reset_a_state(self, number: int, how: str) -> None:
        index = self.pick(number)
        if self.name == "Adagrad" or not self.stepped(index):  # torch makes Adagrad's with the optimizer
            return
        for side in self.sides:
            p, states = side.params[index], side.optimizer.state
            if how == "empty":
                states[p] = {}
            elif how == "clear":
                states[p].clear()
            else:
                del states[p]

    @rule(number=st.integers(0, 9), how=st.sampled_from(["assign", "data", "set", "share", "zero", "dict"]))
    def change_tensors_of_a_state(self, number: int, how: str) -> None:
        index = self.pick(number)
        if not self.stepped(index):
            return
        for side in self.sides:
            state = side.state(index)
            for key, t in list(state.items()):
                if not isinstance(t, torch.Tensor):
                    continue
                if how == "assign":
                    state[key] = t.clone()
                elif how == "data":
                    t.data = t.data.clone()
                elif how == "set":
                    t.set_(t.clone())
                elif how == "share":
                    t.share_memory_()
                elif how == "zero" and key in ("exp_avg", "momentum_buffer", "grad_avg"):
                    t.zero_()
            if how == "dict" and state:
                side.optimizer.state[side.params[index]] = dict(state)

    @rule(
        number=st.integers(0, 9),
        count=st.integers(0, 40),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
        shape=st.sampled_from([(), (1,)]),
    )
    def set_a_counter(self, number: int, count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        index = self.pick(number)
        if self.name == "SGD" or not self.stepped(index):  # torch's counts no steps
            return
        for side in self.sides:
            side.state(index)["step"] = torch.full(shape, count, dtype=dtype)

    @rule(number=st.integers(0, 9))
    def roll_a_state_back(self, number: int) -> None:
        index = self.pick(number)
        if not self.stepped(index):
            return
        kept = [copy.deepcopy(side.state(index)) for side in self.sides]
        self.step(1, 9)
        for side, state in zip(self.sides, kept, strict=True):
            side.optimizer.state[side.params[index]] = state

    # ---- memory -----------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 9), how=st.sampled_from(["clone", "write", "strides", "set"]))
    def change_the_memory_of_a_parameter(self, number: int, how: str) -> None:
        index = self.pick(number)
        value = self.random(tuple(self.sides[0].params[index].shape))
        for side in self.sides:
            p = side.params[index]
            if how == "clone":
                p.data = p.data.clone()
            elif how == "write":
                p.data.copy_(value)
            elif how == "strides":
                p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
            else:
                with torch.no_grad():
                    p.set_(p.detach().clone())

    @rule(a=st.integers(0, 9), b=st.integers(0, 9))
    def swap_two_parameters(self, a: int, b: int) -> None:
        a, b = self.pick(a), self.pick(b)
        for side in self.sides:
            p, q = side.params[a], side.params[b]
            if p.shape == q.shape and p.dtype == q.dtype:
                p.data, q.data = q.data, p.data

    # ---- copies -----------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        for side in self.sides:
            both = (side.params, side.optimizer)
            side.params, side.optimizer = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))

    def strangers(self) -> bool:
        """Whether there are states of parameters in no group: then there is no state_dict, torch's neither."""

        def strange(o: torch.optim.Optimizer) -> bool:
            return bool(set(o.state) - {p for group in o.param_groups for p in group["params"]})

        return any(strange(side.optimizer) for side in self.sides)

    @precondition(lambda self: not self.strangers())
    @rule()
    def save_and_load(self) -> None:
        for side in self.sides:
            file = io.BytesIO()
            torch.save(side.optimizer.state_dict(), file)
            file.seek(0)
            side.optimizer.load_state_dict(torch.load(file, weights_only=True))


class AgainstTorch(Programs):
    shapes = SHAPES

    @initialize(name=st.sampled_from(sorted(STARTS)), count=st.integers(2, 6), seed=st.integers(0, 2**20))
    def start(self, name: str, count: int, seed: int) -> None:
        self.begin(name, count, seed)
        ours, theirs = getattr(optim, name), getattr(torch.optim, name)
        # A large eps, as without one a step is a sign, of whatever float32 has left.
        options = {**STARTS[name], **({} if name == "SGD" else {"eps": 1e-3})}
        self.sides = [
            Side(ours, torch.float32, self.values, options, None),
            Side(ours, torch.float32, self.values, options, "reference"),
            Side(theirs, torch.float64, self.values, options, None),
        ]

    def check(self) -> None:
        *ours, theirs = self.sides
        for i, p in enumerate(theirs.params):
            for side in ours:
                torch.testing.assert_close(side.params[i].double(), p, rtol=1e-4, atol=1e-4)

    @rule(steps=st.integers(1, 3), idle=st.integers(0, 7))
    def step(self, steps: int, idle: int) -> None:
        for group in self.sides[-1].optimizer.param_groups:
            for p in group["params"]:
                if self.name == "Adagrad" and p not in self.sides[-1].optimizer.state:  # made with the optimizer only
                    zero = torch.zeros_like(p.detach())
                    self.sides[-1].optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), "sum": zero}
                state = self.sides[-1].optimizer.state.get(p, {})
                for key in LATER.get(self.name, ()) if state else ():
                    state.setdefault(key, torch.zeros_like(p.detach()))
        super().step(steps, idle)

    @rule(number=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast_a_parameter(self, number: int, dtype: torch.dtype) -> None:
        index = self.pick(number)
        for side in self.sides[:-1]:
            side.params[index].grad = None
            side.params[index].data = side.params[index].data.to(dtype)

    @rule(number=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast_a_state(self, number: int, dtype: torch.dtype) -> None:
        index = self.pick(number)
        for side in self.sides[:-1]:
            state = side.state(index)
            for key in state.keys() - {"step"}:
                state[key] = state[key].to(dtype)

    @precondition(lambda self: not self.strangers())
    @rule()
    def load_what_torch_saved(self) -> None:
        saved = copy.deepcopy(self.sides[-1].optimizer.state_dict())
        for side in self.sides[:-1]:
            side.optimizer.load_state_dict(copy.deepcopy(saved))


class KernelsAndReference(Programs):
    shapes = LARGE

    @initialize(
        name=st.sampled_from(sorted(set(FORMULAS) - {"Adam", "Muon"})),
        count=st.integers(2, 4),
        seed=st.integers(0, 2**20),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    )
    def start(self, name: str, count: int, seed: int, dtype: torch.dtype) -> None:
        self.begin(name, count, seed)
        options = {"ema_decay": 0.5, "seed": 1, "rounding": "kahan", **STARTS.get(name, {})}
        seed = options.pop("seed")
        self.sides = [Side(getattr(optim, name), dtype, self.values, options, b) for b in (None, "reference")]
        for side in self.sides:
            for group in side.optimizer.param_groups:
                group["seed"] = seed

    def options(self) -> dict:
        return {**FORMATS, **OPTIONS.get(self.name, {})}

    def check(self) -> None:
        mine, other = self.sides
        for p, q in zip(mine.params, other.params, strict=True):
            assert p.isfinite().all()
            # A sum on the other side of a tie goes to the next number of 16 bits, or of 8 in a state.
            difference = (p.double() - q.double()).abs()
            bound = 0.02 * q.double().abs() + 0.1
            assert (difference <= bound).all() and difference.mean() <= 0.01 * q.double().abs().mean() + 5e-3
            a, b = (side.optimizer.state.get(t, {}) for side, t in ((mine, p), (other, q)))
            assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}

    @rule(number=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def cast_a_parameter(self, number: int, dtype: torch.dtype) -> None:
        index = self.pick(number)
        for side in self.sides:
            side.params[index].grad = None
            side.params[index].data = side.params[index].data.to(dtype)


def run(machine: type[Programs], programs: int) -> None:
    checked = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=programs,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=checked,
            phases=phases,
        ),
    )


MACHINES = [AgainstTorch, KernelsAndReference]


@pytest.mark.parametrize("machine", MACHINES)
def test_programs(machine: type[Programs]) -> None:
    run(machine, 50)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_a_thousand_programs(machine: type[Programs]) -> None:
    run(machine, 1000)
