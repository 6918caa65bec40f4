"""Every language model of transformers that builds with a tiny configuration: patched, it computes what it did.

Slow, and left out of the default run (`pytest -m slow`): about 150 architectures in two minutes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bigkernels

transformers = pytest.importorskip("transformers")
auto = transformers.models.auto.modeling_auto

from architectures import MODELS, build  # noqa: E402

pytestmark = pytest.mark.slow

# Rows that a mask of the least number hides whole get no gradient for queries and keys from us; an eager softmax gives
# them that of equal weights. In a recurrent model padded rows matter to others.
PADDING_MATTERS = {"RecurrentGemmaForCausalLM"}


def _step(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    kept = mask.bool()
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits.float()[kept].square().mean().backward()
    found = {"logits": logits.detach()[kept]}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.numel()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_patched_is_the_same(name: str, implementation: str):
    model = build(name, implementation)
    ids = torch.randint(3, 150, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    try:
        before = _step(model, ids, mask)
    except Exception as error:
        pytest.skip(f"does not run: {type(error).__name__}: {str(error)[:80]}")
    bigkernels.patch(model)
    after = _step(model, ids, mask)
    assert after.keys() == before.keys()
    largest = max(g.abs().max() for key, g in before.items() if key != "logits")
    for key, theirs in before.items():
        scale, allowed = theirs.abs().max(), 2e-5 if key == "logits" else 2e-3
        if key != "logits" and (scale < 1e-7 * largest or name in PADDING_MATTERS):
            continue
        assert (after[key] - theirs).abs().max() <= allowed * scale, key


CAUSAL = {
    model.__name__
    for models in auto.MODEL_FOR_CAUSAL_LM_MAPPING.values()
    for model in (models if isinstance(models, tuple) else (models,))
}


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_a_training_step_without_logits(name: str):
    """Where the loss is computed from hidden states, it and its gradients are those of the model's own code."""
    model = build(name, "sdpa").train()
    report = bigkernels.patch(model, attention=False, norm=False, rope=False, mlp=False)
    if not any(row.what == "linear_cross_entropy" for row in report.patched):
        pytest.skip("; ".join(row.what for row in report.skipped) or "its head is no linear layer")
    ids = torch.randint(3, 150, (2, 12))
    labels = ids.masked_fill(torch.arange(12) == 3, -100)

    def step():
        torch.manual_seed(7)  # dropout
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}

    try:
        out, grads = step()
    except Exception as error:
        bigkernels.unpatch(model)
        with pytest.raises(type(error)):
            step()
        pytest.skip(f"does not run: {type(error).__name__}: {str(error)[:80]}")
    assert type(out.logits).__name__ == "Logits" and out.logits.made is None
    ours = out.logits.detach()
    bigkernels.unpatch(model)
    expected, theirs = step()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, expected.logits, rtol=0, atol=1e-5 * expected.logits.abs().max().item())
    assert grads.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for key, g in theirs.items():
        assert (grads[key] - g).abs().max() <= 1e-4 * max(g.abs().max(), 1e-3 * largest), key
