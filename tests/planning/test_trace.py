"""Counts that can be made by hand, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigkernels import plan
from bigkernels.planning._flops import pairs

LIMITS = {"copy": 1e9, "matrix": {"float32": 1e12, "bfloat16": 2e12}}
BATCH, IN, HIDDEN, OUT = 8, 96, 64, 32


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def planned(model, size=IN, **options):
    options = {"inputs": torch.empty(BATCH, size), "limits": LIMITS, "optimizer": "torch.AdamW"} | options
    return plan(model, **options)


WEIGHTS = IN * HIDDEN + HIDDEN + HIDDEN * OUT + OUT


def test_two_linear_layers_to_the_byte():
    found = planned(Stack())
    assert found.parameters == 4 * WEIGHTS
    assert found.gradients == 4 * WEIGHTS
    assert found.optimizer_state == 2 * 4 * WEIGHTS + 4 * 4  # and a step counter of float32 for each parameter
    assert found.held["inputs"] == 4 * BATCH * IN
    # relu saves what it gives, which the second layer saves too; and the loss, a number.
    assert found.activations == 4 * BATCH * HIDDEN + 4
    assert found.logits == found.kv_cache == 0


def test_the_peak_is_where_the_optimizer_takes_temporaries():
    found = planned(Stack())
    largest = 4 * IN * HIDDEN
    # Two for the largest parameter: the root of the second moment, and that divided.
    held = found.parameters + found.gradients + found.optimizer_state + found.held["inputs"]
    assert found.peak == held + 2 * largest
    assert found.at_peak["temporary"] == 2 * largest
    assert found.peak == sum(found.at_peak.values()) == max(p.peak for p in found.phases)


def test_operations_of_two_linear_layers():
    forward, backward, optimizer = planned(Stack()).phases
    products = 2 * BATCH * IN * HIDDEN, 2 * BATCH * HIDDEN * OUT
    assert forward.flops == sum(products)
    assert backward.flops == products[0] + 2 * products[1]  # nobody asks for the gradient of the inputs
    assert optimizer.flops == 0


def test_seconds_are_the_larger_of_two():
    product = nn.Linear(256, 512, bias=False)
    slow = planned(product, 256, limits={"copy": 1e30, "matrix": {"float32": 1.0}}).phases[0]
    assert slow.seconds == pytest.approx(2 * BATCH * 256 * 512)
    narrow = planned(product, 256, limits={"copy": 1.0, "matrix": {"float32": 1e30}}).phases[0]
    assert narrow.seconds == pytest.approx(narrow.bytes)
    moved = BATCH * 256 + 256 * 512 + BATCH * 512  # of the product
    assert narrow.bytes == 4 * (moved + BATCH * 512 + 1)  # and of the sum


@pytest.mark.parametrize("bytes_a_state", [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1.0 + 4 / 256)])
def test_states_of_our_optimizer(bytes_a_state):
    name, each = bytes_a_state
    model = nn.Linear(256, 512, bias=False)
    found = planned(model, 256, optimizer="AdamW", state_dtype=name)
    assert found.optimizer_state == 2 * each * 256 * 512 + 8  # and a step counter of float64
    assert found.state_dtype == name


def test_small_tensors_keep_float32_states():
    found = planned(nn.Linear(8, 8), 8, optimizer="adamw", state_dtype="int8")
    assert found.optimizer_state == 2 * 4 * (64 + 8) + 2 * 8


def test_half_the_dtype_half_the_bytes():
    whole, half = planned(Stack()), planned(Stack(), dtype="bfloat16", inputs=torch.empty(BATCH, IN).bfloat16())
    assert 2 * half.parameters == whole.parameters
    assert 2 * half.gradients == whole.gradients
    assert 2 * (half.activations - 2) == whole.activations - 4
    assert half.dtype == "bfloat16"


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = Stack()
    model.first.requires_grad_(False)
    found = planned(model)
    trained = HIDDEN * OUT + OUT
    assert found.gradients == 4 * trained
    assert found.optimizer_state == 2 * 4 * trained + 2 * 4


def test_a_tied_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    found = planned(Tied(), 48)
    assert found.parameters == found.gradients == 4 * 48 * 48


class Blocks(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.Sigmoid(), nn.Linear(256, 64)) for _ in range(6)
        )
        self.wrap = wrap

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.wrap else block(x)
        return x


def test_torchs_checkpoint_keeps_the_inputs_of_blocks():
    kept, again = planned(Blocks(False), 64), planned(Blocks(True), 64)
    number = 4  # the loss
    # The first block's input is the model's, and counts as such; what the last gives, only a sum reads.
    assert kept.activations == 4 * BATCH * (6 * 256 + 5 * 64) + number
    assert again.activations >= 4 * BATCH * 5 * 64 + number
    assert again.activations < kept.activations / 3
    assert again.phases[1].flops == kept.phases[1].flops + kept.phases[0].flops - 6 * 2 * BATCH * 256 * 64


@pytest.mark.parametrize(
    ("window", "count"),
    [((-1, -1), 7 * 9), ((-1, 0), sum(range(3, 10))), ((1, 0), 7 * 2), ((0, 0), 7), ((2, 1), 6 * 4 + 3)],
)
def test_pairs_of_a_window(window, count):
    left, right = window
    brute = sum(
        (left < 0 or key >= at - left) and (right < 0 or key <= at + right) for at in range(2, 9) for key in range(9)
    )
    assert pairs(7, 9, left, right) == brute
    assert brute == count


def test_nothing_of_the_model_changes():
    model = Stack()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.eval()
    planned(model)
    assert not model.training
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert torch.random.initial_seed() == 0


def test_a_model_on_the_meta_device_and_dropout():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, OUT))
    state = torch.get_rng_state()
    found = planned(model)
    assert found.parameters == 4 * WEIGHTS
    # On CPU the mask of dropout is of its input's dtype; and what it gave.
    assert found.activations == 2 * 4 * BATCH * HIDDEN + 4
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_saves_16_bit_activations():
    plain, cast = planned(Stack()), planned(Stack(), autocast="bfloat16")
    assert cast.parameters == plain.parameters
    assert cast.autocast == "bfloat16"
    # 16-bit copies of the second weight (the first makes no gradient of its inputs), of inputs and of what relu gave.
    assert cast.activations == 2 * (HIDDEN * OUT + BATCH * IN + BATCH * HIDDEN) + 2
