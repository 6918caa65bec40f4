"""What `patch` touches beside the instance: nothing, neither while it plans nor after `unpatch`."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bigkernels

SEEN: list = []
COUNT = {"calls": 0}


class Meter:
    def __init__(self):
        self.values = []

    def update(self, value):
        self.values.append(value)
        return value


METER = Meter()


def tracked(x):
    SEEN.append(x)
    METER.update(x)
    COUNT["calls"] += 1
    return x


class Norm(nn.Module):
    """Keeps what it sees, in every way."""

    def __init__(self, n):
        super().__init__()
        self.eps, self.weight, self.seen, self.meter = 1e-6, nn.Parameter(torch.ones(n)), [], Meter()
        self.total, self.table = torch.zeros(()), {}

    def forward(self, x):
        tracked(x)
        self.seen.append(x)
        self.meter.update(x)
        self.table["last"] = x
        self.total.add_(1)
        return self.note(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)))

    def note(self, y):
        self.seen.append(y)
        return tracked(y)


class QuietNorm(Norm):
    def forward(self, x):
        x = tracked(x)
        self.seen.append(x)
        self.table["last"] = x
        return self.note(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)))


class SiLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return F.silu(tracked(x))


def rotate_half(x):
    SEEN.append(x)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = tracked(cos).unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def token_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
    logits = tracked(logits).float().view(-1, vocab_size)
    labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class Model(nn.Module):
    def __init__(self, norm=QuietNorm):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.act = nn.Embedding(50, 16), norm(16), SiLU()
        self.gate, self.up, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.losses, self.batch = [], nn.BatchNorm1d(50)

    @property
    def loss_function(self):
        return self.__dict__.get("_loss_function", token_loss)

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value

    def forward(self, input_ids, labels=None, **kwargs):
        x = self.norm(self.embedding(input_ids))
        q = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        cos = sin = torch.ones(x.shape[0], x.shape[1], 8)
        q, _ = apply_rotary(q, q, cos, sin)
        x = q.transpose(1, 2).reshape(x.shape)
        x = self.act(self.gate(x)) * self.up(x)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=50, **kwargs)
            self.losses.append(self.noted(loss.item()))
        return loss, logits

    def noted(self, value):
        SEEN.append(value)
        return value


class Batched(Model):
    """A module with statistics of its own between the head and the loss."""

    def forward(self, input_ids, labels=None):
        x = self.norm(self.embedding(input_ids))
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            logits = self.batch(logits.view(-1, 50))
            loss = F.cross_entropy(logits, labels.view(-1))
        return loss, logits


def state(model):
    found = [
        len(SEEN),
        len(METER.values),
        COUNT["calls"],
        len(model.losses),
        len(model.act.seen),
        len(model.norm.seen),
        len(model.norm.meter.values),
        len(model.norm.table),
        model.norm.total.item(),
        torch.get_rng_state().sum(),
        *(b.double().sum().item() for b in model.buffers()),
    ]
    return [*map(float, found)]


@pytest.mark.parametrize("model", [Model, lambda: Model(Norm), Batched])
@pytest.mark.parametrize("training", [True, False])
def test_probes_reach_nothing(model, training):
    model = model().train(training)
    inputs = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    model(**inputs)
    before, keys = state(model), {n: set(vars(m)) for n, m in model.named_modules()}
    report = bigkernels.patch(model)
    assert state(model) == before
    bigkernels.unpatch(model)
    assert state(model) == before and {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert report.patched or report.skipped


def test_what_was_probed_is_still_recognised():
    """Isolation changes no decision: what keeps what it sees only for itself is patched, and keeps it."""
    model = Model()
    inputs = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    before = model(**inputs)
    report = bigkernels.patch(model)
    found = {row.what for row in report.patched}
    assert {"rope", "glu (silu)", "rms_norm", "cross_entropy (next token)"} <= found
    model.train()
    after = model(**inputs)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1].detach().add(0), before[1].detach())


def test_a_forward_that_calls_something_for_its_effect_is_left_alone():
    report = bigkernels.patch(Model(Norm))
    assert any("calls tracked for its effect" in row.what and row.path == "norm" for row in report.skipped)


def test_the_registry_of_masks():
    transformers = pytest.importorskip("transformers")
    from transformers import masking_utils

    registry = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = set(registry), dict(registry._global_mapping)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    models = [transformers.LlamaForCausalLM(config).eval() for _ in range(4)]
    for model in models:
        assert "attention mask" in [row.what for row in bigkernels.patch(model).patched]
    assert (set(registry), dict(registry._global_mapping)) == before
    ids, failures = torch.arange(12).view(2, 6) + 3, []

    def work(model):
        try:
            for _ in range(20):
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=torch.ones_like(ids).tril())
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures and (set(registry), dict(registry._global_mapping)) == before
    for model in models:
        bigkernels.unpatch(model)
    assert (set(registry), dict(registry._global_mapping)) == before
    assert set(transformers.AttentionMaskInterface()) == before[0]
