"""Short random programs of what users do to a quantized model, against what its weights must then be.

Fifty programs in the default run; a thousand longer ones with `-m slow`.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import bigkernels
from bigkernels.functional import quantize_weight
from bigkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear
from bigkernels.nn.quantized import Quantized
from bigkernels.quantization import Int4, prepare_qat, resolve_format

FORMATS = ("int8", "int8-dynamic", Int4(32, "rtn"), Int4(64), "nf4", "fp4", "fp8", "q4_1", "q8_0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("table", "a", "b", "output")
IDS = torch.arange(24).view(2, 12) % 20


class Net(nn.Module):
    """One layer has two names; the head may share the table's weight."""

    def __init__(self, tied: bool):
        super().__init__()
        self.table, self.a, self.b = (
            nn.Embedding(20, 48, padding_idx=0),
            nn.Linear(48, 48),
            nn.Linear(48, 48, bias=False),
        )
        self.again, self.output = self.b, nn.Linear(48, 20, bias=False)
        if tied:
            self.output.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.a(self.table(ids)))
        return self.output(x + self.again(torch.relu(self.b(x))))


def rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    return w.to(dtype).double()


class Programs(RuleBasedStateMachine):
    """`weights` is what each layer's weight must be, in float64; `formats` what it is stored in."""

    @initialize(tied=st.booleans(), seed=st.integers(0, 3))
    def start(self, tied: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.tied, self.dtype = Net(tied).eval(), tied, torch.float32
        self.weights = {name: self.base(name).weight.detach().double() for name in NAMES}
        self.bias = self.model.a.bias.detach().double()
        self.formats = dict.fromkeys(NAMES)
        self.merged: dict[str, tuple] = {}  # what `unmerge` must bring back
        self.prepared = None

    def layer(self, name: str) -> nn.Module:
        return getattr(self.model, name)

    def base(self, name: str) -> nn.Module:
        layer = self.layer(name)
        return layer.base if isinstance(layer, LoRALinear) else layer

    def plain(self, name: str) -> bool:
        return self.formats[name] is None

    # ---- the programs ----

    @precondition(lambda self: not self.merged)
    @rule(config=st.sampled_from(FORMATS), embeddings=st.booleans(), skip=st.sampled_from(("a", "b", "output", ())))
    def quantize(self, config, embeddings: bool, skip) -> None:
        config = resolve_format(config)
        if self.prepared is not None:  # what was prepared
            config, embeddings, skip = self.prepared, True, ()
        report = bigkernels.quantize(self.model, config, embeddings=embeddings, skip=skip)
        adapted = isinstance(self.layer(skip), LoRALinear) if skip else False
        left = {skip} if skip and not adapted else set()  # the path of an adapter's base is another
        left |= set() if embeddings else {"table"}
        if self.tied and left & {"table", "output"}:
            left |= {"table", "output"}
        chosen = [name for name in NAMES if self.plain(name) and name not in left]
        assert sorted(row.path.removesuffix(".base") for row in report.quantized) == sorted(chosen)
        for name in chosen:
            stored = quantize_weight(self.weights[name].to(self.dtype), config)
            self.weights[name], self.formats[name] = stored.dequantize(torch.float64), config
        self.prepared = None

    @rule()
    def dequantize(self) -> None:
        bigkernels.dequantize(self.model)
        for name in NAMES:
            self.weights[name], self.formats[name] = rounded(self.weights[name], self.dtype), None
        self.merged = {name: (rounded(w, self.dtype), None) for name, (w, _) in self.merged.items()}
        assert not any(isinstance(m, Quantized) for m in self.model.modules())

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype, self.bias = dtype, rounded(self.bias, dtype)
        for name in NAMES:
            if self.plain(name):
                self.weights[name] = rounded(self.weights[name], dtype)
        self.merged = {name: (w if f else rounded(w, dtype), f) for name, (w, f) in self.merged.items()}

    @rule(how=st.sampled_from(("deepcopy", "pickle", "save", "clone", "share", "cpu")))
    def move(self, how: str) -> None:
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        elif how == "save":
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        elif how == "clone":
            self.model._apply(lambda t: t.clone())
        elif how == "share":
            self.model.share_memory()
        else:
            self.model.to("cpu")

    @rule(assign=st.booleans(), through=st.sampled_from(("memory", "file", "meta", "emptied")))
    def load(self, assign: bool, through: str) -> None:
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        if through == "file":
            file = io.BytesIO()
            torch.save(self.model.state_dict(), file)
            file.seek(0)
            state = torch.load(file)
        other = copy.deepcopy(self.model)
        if through in ("meta", "emptied"):
            other.to("meta")
            assign = assign or through == "meta"
        if through == "emptied":
            other.to_empty(device="cpu")
        for t in (*other.parameters(), *(b for n, b in other.named_buffers() if not n.endswith("format"))):
            if not t.is_meta:
                t.data.view(torch.uint8).fill_(0)
        other.load_state_dict(state, assign=assign)
        if self.tied and self.plain("table"):
            other.output.weight = other.table.weight  # as torch has it, they may be two now
        self.model = other

    @precondition(
        lambda self: (
            not self.tied
            and self.formats["table"] == self.formats["output"]
            and not self.prepared
            and type(self.layer("output")) in (nn.Linear, QuantizedLinear)
        )
    )
    @rule()
    def tie(self) -> None:
        self.model.output.weight = self.model.table.weight
        self.weights["output"], self.tied = self.weights["table"], True

    @precondition(lambda self: self.prepared is None)
    @rule(name=st.sampled_from(("a", "b")), seed=st.integers(0, 3))
    def adapt(self, name: str, seed: int) -> None:
        if isinstance(self.layer(name), LoRALinear):
            return
        assert LoRALinear.add_to(self.model, name, rank=2) == [name]
        torch.manual_seed(seed)
        nn.init.normal_(self.layer(name).lora_b, std=0.05)

    @rule(name=st.sampled_from(("a", "b")))
    def merge(self, name: str) -> None:
        layer = self.layer(name)
        if not isinstance(layer, LoRALinear) or name in self.merged:
            return
        layer.merge()
        self.merged[name] = self.weights[name], self.formats[name]
        new = (self.weights[name].float() + layer.delta()).to(self.dtype)
        config = self.formats[name]
        self.weights[name] = new.double() if config is None else quantize_weight(new, config).dequantize(torch.float64)

    @rule(name=st.sampled_from(("a", "b")))
    def unmerge(self, name: str) -> None:
        if name in self.merged:
            self.layer(name).unmerge()
            self.weights[name], self.formats[name] = self.merged.pop(name)

    @rule(name=st.sampled_from(NAMES), how=st.sampled_from(("data", "in place", "row")))
    def write(self, name: str, how: str) -> None:
        def change(w: Tensor) -> None:
            if how == "data":
                w.data.mul_(0.5)
            elif how == "in place":
                with torch.no_grad():
                    w.mul_(0.5)
            else:
                w.data[1].mul_(0.5)

        if not self.plain(name):
            with pytest.raises(RuntimeError, match="would write to a weight"):
                change(self.base(name).weight)
            return
        change(self.base(name).weight)
        names = ("table", "output") if self.tied and name in ("table", "output") else (name,)
        new = self.weights[name].clone()
        (new[1] if how == "row" else new).mul_(0.5)
        for each in names:
            self.weights[each] = rounded(new, self.dtype)

    @precondition(
        lambda self: (
            all(map(self.plain, NAMES))
            and self.dtype == torch.float32
            and not any(isinstance(m, LoRALinear) for m in self.model.modules())
        )
    )
    @rule(config=st.sampled_from(FORMATS[:3]))
    def prepare(self, config) -> None:
        prepare_qat(self.model, config, embeddings=True, skip=())
        self.prepared = resolve_format(config)
        self.model(IDS).square().mean().backward()
        self.model.zero_grad()
        with torch.no_grad():
            self.model.a.weight.mul_(0.75)
        self.weights["a"] = rounded(self.weights["a"] * 0.75, self.dtype)

    # ---- what must hold ----

    @invariant()
    def weights_are_what_they_must_be(self) -> None:
        if not hasattr(self, "model"):
            return
        for name in NAMES:
            weight = self.base(name).weight
            assert weight.dtype == self.dtype and weight.shape == self.weights[name].shape, name
            assert torch.equal(weight.detach().double(), rounded(self.weights[name], self.dtype)), name
            assert isinstance(self.base(name), Quantized) != self.plain(name), name
        assert self.model.b is self.model.again
        if self.tied:
            table, output = self.model.table, self.model.output
            if self.plain("table"):
                assert table.weight is output.weight
            else:
                assert isinstance(table, QuantizedEmbedding) and output.shares(table)
                assert output.codes.data_ptr() == table.codes.data_ptr()
        if self.plain("table") and self.prepared is None:
            assert type(self.model.table) is nn.Embedding and self.model.table.padding_idx == 0

    @invariant()
    def outputs_are_theirs(self) -> None:
        if not hasattr(self, "model"):
            return
        weights = {}
        for name in NAMES:
            w, layer = self.weights[name], self.layer(name)
            if self.prepared is not None:
                w = quantize_weight(w.float(), self.prepared).dequantize(torch.float64)
            if isinstance(layer, LoRALinear) and name not in self.merged:
                w = w + layer.delta().double()
            weights[name] = w
        x = torch.relu(weights["table"][IDS] @ weights["a"].T + self.bias)
        x = (x + torch.relu(x @ weights["b"].T) @ weights["b"].T) @ weights["output"].T
        with torch.no_grad():
            found = self.model(IDS).double()
        dynamic = any(f is not None and f.dynamic for f in (*self.formats.values(), self.prepared))
        allowed = {torch.bfloat16: 0.05, torch.float16: 0.02}.get(self.dtype, 1e-4)
        assert (found - x).abs().max() <= (0.1 if dynamic else allowed) * x.abs().max() + 1e-9


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_fifty_programs():
    run(50, 8)


@pytest.mark.slow
def test_a_thousand_programs():
    run(1000, 15)
