"""Public names follow the rules of `CONTRIBUTING.md`, and names that were given up work and warn."""

from __future__ import annotations

import pickle

import pytest
import torch

from bigkernels import functional, nn


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
