"""Public names follow the rules of `CONTRIBUTING.md`, and names that were given up work and warn."""

from __future__ import annotations

import pickle

import pytest
import torch

import bigkernels
from bigkernels import checkpointing, functional, nn, quantization


def renamed(old: str, new: str):
    return pytest.warns(DeprecationWarning, match=f"{old}.* is deprecated, use {new}")


def test_arguments_by_their_old_names():
    logits, target, weight = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1]), torch.rand(7)
    expected = functional.cross_entropy(logits, target, class_weight=weight)
    with renamed("functional.cross_entropy: the argument weight", "class_weight"):
        assert torch.equal(functional.cross_entropy(logits, target, weight=weight), expected)
    with renamed("linear_logprobs: the argument entropy", "return_entropy"):
        _, entropy = functional.linear_logprobs(torch.randn(5, 4), torch.randn(7, 4), target, entropy=True)
    assert entropy.shape == (5,)
    with pytest.raises(TypeError, match="weight and class_weight are given"):
        functional.cross_entropy(logits, target, weight, weight=weight, class_weight=weight)


def test_append_kv_in_its_old_order():
    q, new, lengths = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.tensor([3, 5])
    expected, positional, by_name = (torch.zeros(2, 6, 2, 8) for _ in range(3))
    functional.append_kv_(q, expected, expected.clone(), lengths, new, new)
    assert expected.any()
    with renamed("append_kv_: the order q, k, v, k_cache", "q, k_cache"):
        functional.append_kv_(q, new, new, positional, positional.clone(), lengths)
    with renamed("append_kv_: the order", "q, k_cache"):
        functional.append_kv_(q, new, new, k_cache=by_name, v_cache=by_name.clone(), cache_seqlens=lengths)
    assert torch.equal(positional, expected) and torch.equal(by_name, expected)


def test_class_weights_of_saved_losses():
    loss = nn.CrossEntropyLoss(torch.rand(7))
    with renamed("CrossEntropyLoss: the attribute weight", "class_weight"):
        assert loss.weight is loss.class_weight
    other = nn.CrossEntropyLoss(torch.zeros(7))
    other.load_state_dict({"weight": loss.class_weight})  # as versions before saved it
    assert torch.equal(other.class_weight, loss.class_weight)
    before = pickle.loads(pickle.dumps(loss))
    before.__setstate__({**loss.__dict__, "_buffers": {"weight": loss.class_weight}})
    assert torch.equal(before.class_weight, loss.class_weight)


@pytest.mark.parametrize("kind, given, before", [
    (nn.Attention, {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
     {"dim": 8, "heads": 4, "key_heads": 2, "head_size": 6}),
    (nn.RMSNorm, {"hidden_size": 8}, {"size": 8}),
    (nn.LayerNorm, {"hidden_size": 8}, {"size": 8}),
    (nn.RotaryEmbedding, {"rotary_dim": 8}, {"size": 8}),
])  # fmt: skip
def test_sizes_of_modules(kind, given, before):
    module = kind(**given)
    with pytest.warns(DeprecationWarning) as warned:
        other = kind(**before)
    assert [str(w.message).split(": ")[0] for w in warned] == [f"bigkernels.nn.{kind.__name__}"] * len(given)
    assert repr(module) == repr(other)
    for (new, value), old in zip(given.items(), before, strict=True):
        with renamed(f"the attribute {old}", new):
            assert getattr(module, old) == getattr(module, new) == value
    pickled = module.__getstate__() if hasattr(module, "__getstate__") else dict(module.__dict__)
    names = dict(zip(given, before, strict=True))
    module.__setstate__({names.get(name, name): value for name, value in pickled.items()})
    assert repr(module) == repr(other) and not before.keys() & vars(module).keys()


def test_sizes_of_modules_without_attributes():
    with renamed("GatedMLP: the argument size", "hidden_size"):
        assert nn.GatedMLP(size=4, intermediate_size=6).down_proj.out_features == 4
    with pytest.warns(DeprecationWarning, match="KVCache"):
        cache = nn.KVCache(2, 8, key_heads=1, head_size=4, value_size=6, page_size=4, pages=5)
    assert cache.keys.shape == (5, 4, 1, 4) and cache.values.shape == (5, 4, 1, 6)


def test_formats_by_their_old_names():
    model, w = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(8, 64)
    with renamed("bigkernels.quantize: the argument config", "format"):
        bigkernels.quantize(model, config="int8")
    with renamed("the attribute config", "weight_format"):
        assert model[0].config == model[0].weight_format == quantization.Int8()
    with pytest.warns(DeprecationWarning, match="quantize_weight: the argument (w|config) is"):
        q = functional.quantize_weight(w=w, config="int8")
    with pytest.warns(DeprecationWarning, match="fake_quantize: the argument (w|config) is"):
        assert torch.equal(quantization.fake_quantize(w=w, config="int8"), q.dequantize())
    with renamed("QuantizedWeight: the attribute config", "format"):
        assert q.config == q.format
    with renamed("QuantizedWeight: the argument config", "format"):
        other = quantization.QuantizedWeight(config=q.format, shape=q.shape, dtype=q.dtype, tensors={})
    assert other.format == q.format
    with renamed("quantization: named", "resolve_format"):
        assert quantization.named("int8") == quantization.resolve_format("int8")
    with renamed("checkpointing: named", "resolve_policy"):
        assert checkpointing.named("int8") == checkpointing.resolve_policy("int8")
    experts = torch.randn(3, 64, 8)
    with renamed("from_parameter: the argument turned", "transposed"):
        made = nn.QuantizedExperts.from_parameter(experts, "int8", turned=True)
    assert made.shape == experts.shape and made.num_experts == 3
    with renamed("the attribute turned", "transposed"):
        assert made.turned
    restored = nn.QuantizedExperts.from_parameter(torch.zeros(3, 64, 8), "int8", transposed=True)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored.dequantize(), made.dequantize())
    assert b'"turned": 1' in bytes(made.state_dict()["format"].tolist())  # a name in saved files
