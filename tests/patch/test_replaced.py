"""A method of a class that is replaced after `patch` is what runs: other libraries patch classes, too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bigkernels

transformers = pytest.importorskip("transformers")

from transformers.models.gemma3 import modeling_gemma3  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

_SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
_TOKENS = torch.tensor([[5, 9, 2, 33, 17, 60, 1, 8]])
_MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, modeling_llama, "Llama"),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, modeling_gemma3, "Gemma3"),
}


def _model(kind: str) -> nn.Module:
    cls, config, *_ = _MODELS[kind]
    torch.manual_seed(0)
    return cls(config(**_SIZES)).eval()


def _louder(original):
    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5

    return forward


def _replace(monkeypatch, kind: str, what: str) -> None:
    _, _, file, prefix = _MODELS[kind]
    if what == "norm's method":
        # Gemma's norm has its arithmetic in `_norm`; where there is none it is the forward that changes.
        cls, name = getattr(file, f"{prefix}RMSNorm"), "_norm" if kind == "gemma3" else "forward"
    elif what == "activation":
        cls, name = type(_model(kind).model.layers[0].mlp.act_fn), "forward"
    elif what == "linear":
        cls, name = nn.Linear, "forward"
    else:
        cls, name = getattr(file, prefix + {"norm": "RMSNorm", "mlp": "MLP", "attention": "Attention"}[what]), "forward"
    monkeypatch.setattr(cls, name, _louder(getattr(cls, name)))


@pytest.mark.parametrize("kind", list(_MODELS))
@pytest.mark.parametrize("what", ["norm", "norm's method", "mlp", "attention", "activation", "linear"])
def test_what_took_a_methods_place_runs(monkeypatch, kind, what):
    model, own = _model(kind), _model(kind)
    bigkernels.patch(model, linear=True if what == "linear" else None)
    with torch.no_grad():
        before = model(_TOKENS).logits
        _replace(monkeypatch, kind, what)
        expected = own(_TOKENS).logits
        assert (expected - before).abs().max() > 1e-3
        for options in ({}, {"use_cache": False}):
            torch.testing.assert_close(model(_TOKENS, **options).logits, expected, rtol=1e-4, atol=1e-5)
    model.train(), own.train()
    losses = [m(_TOKENS, labels=_TOKENS).loss for m in (model, own)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_so_it_does_in_a_copy(monkeypatch, make):
    model, own = _model("llama"), _model("llama")
    bigkernels.patch(model, decode=False)
    model = make(model)
    assert "forward" in vars(model.model.norm)
    _replace(monkeypatch, "llama", "norm")
    with torch.no_grad():
        torch.testing.assert_close(model(_TOKENS).logits, own(_TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_copy_made_after_it_follows_too(monkeypatch):
    model, own = _model("gemma3"), _model("gemma3")
    bigkernels.patch(model, decode=False)
    _replace(monkeypatch, "gemma3", "norm")
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(_TOKENS).logits, own(_TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_patched_anew_it_takes_what_is_there(monkeypatch):
    """A norm without its arithmetic is left alone; a forward put back is patched again."""
    model, own = _model("llama"), _model("llama")
    assert "forward" in vars(model.model.norm) if bigkernels.patch(model, decode=False) else True
    with monkeypatch.context() as replaced:
        replaced.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x.tanh() * self.weight)
        report = bigkernels.patch(model, decode=False)
        assert not any("rms_norm" in row.what for row in report.patched)
        with torch.no_grad():
            torch.testing.assert_close(model(_TOKENS).logits, own(_TOKENS).logits, rtol=1e-4, atol=1e-5)
    report = bigkernels.patch(model, decode=False)
    assert any("rms_norm" in row.what for row in report.patched)
    with torch.no_grad():
        torch.testing.assert_close(model(_TOKENS).logits, own(_TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_loss_follows(monkeypatch):
    model = nn.Sequential(nn.CrossEntropyLoss())
    bigkernels.patch(model)
    assert "forward" in vars(model[0])
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda self, x, y: x.sum())
    assert model[0](torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)) == 12


def test_attention_follows(monkeypatch):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    bigkernels.patch(module)
    assert "forward" in vars(module)
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, *args, **kwargs: ("mine", None))
    assert module(*[torch.ones(1, 3, 8)] * 3, need_weights=False)[0] == "mine"


def test_a_compiled_graph_is_whole():
    model = _model("gemma3")
    bigkernels.patch(model, decode=False)
    with torch.no_grad():
        expected = model(_TOKENS, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(_TOKENS, use_cache=False).logits, expected)
