"""Token accuracy and z-loss of a patched model's loss, which makes no logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import bigkernels
from bigkernels.patch._metrics import WATCHED

transformers = pytest.importorskip("transformers", minversion="5")
from integrations import trained  # noqa: E402


def patched(dtype=torch.float32, **options):
    model = trained.llama(**options).to(dtype).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    bigkernels.patch(model)
    return model


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 99, (2, 12))
    labels = ids.clone()
    labels[0, :5] = labels[1, 9:] = -100
    return ids, labels


def written_out(model, ids, labels, z_loss=0.0):
    """(loss with z, right ones, sum of z, labels that count) of logits in float64."""
    logits = model(input_ids=ids).logits[:, :-1].double()
    target = labels[:, 1:]
    kept = target != -100
    lse = logits.logsumexp(-1)[kept]
    loss = F.cross_entropy(logits[kept], target[kept]) + z_loss * lse.square().mean()
    return loss, (logits.argmax(-1) == target)[kept].sum(), z_loss * lse.square().sum(), kept.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_and_gradients(dtype, z_loss):
    model = patched(dtype)
    exact = copy.deepcopy(trained.llama()).double().train()
    exact.load_state_dict(model.state_dict())
    metrics = bigkernels.LossMetrics(model, z_loss=z_loss)
    assert metrics.tokens == 0 and metrics.token_accuracy is None and metrics.z_loss is None
    right = z = count = 0
    for seed in range(3):
        ids, labels = batch(seed)
        if seed == 2:  # some that are right
            labels[:, 1:] = torch.where(labels[:, 1:] < 0, -100, model(input_ids=ids).logits[:, :-1].argmax(-1))
        out = model(input_ids=ids, labels=labels)
        expected = written_out(exact, ids, labels, z_loss)
        torch.testing.assert_close(
            out.loss.double(), expected[0], rtol=2e-5 if dtype == torch.float32 else 0.02, atol=1e-4
        )
        assert out.logits.untouched is not None, "no logits were made"
        right, z, count = right + expected[1], z + expected[2], count + expected[3]
    model.zero_grad()
    out.loss.backward()
    expected[0].backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * q.grad.norm(), name
    assert metrics.tokens == count
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert metrics.token_accuracy == pytest.approx(float(right / count), abs=close)
    assert metrics.z_loss == pytest.approx(float(z / count), rel=max(close, 0.02), abs=1e-9)
    metrics.reset()
    assert metrics.tokens == 0


def test_sums_over_more_than_a_batch():
    """As the Trainer asks for with accumulated batches."""
    model = patched()
    metrics = bigkernels.LossMetrics(model, z_loss=0.02)
    ids, labels = batch()
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    mean, _, z, count = written_out(model, ids, labels, 0.02)
    torch.testing.assert_close(loss.double(), mean * count / 40, rtol=1e-5, atol=1e-5)
    assert metrics.z_loss == pytest.approx(float(z / count), rel=1e-4)
    none = torch.full_like(labels, -100)
    model(input_ids=ids, labels=none).loss.backward()
    assert metrics.tokens == count


def test_gradients_of_gradients_have_the_z_loss():
    model = patched().eval()
    model.train()
    bigkernels.LossMetrics(model, z_loss=0.05)
    ids, labels = batch()
    found = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, model.lm_head.weight, create_graph=True)[0]
    expected = torch.autograd.grad(written_out(model, ids, labels, 0.05)[0], model.lm_head.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_it_ends_and_what_is_not_counted():
    model = patched()
    ids, labels = batch()
    with bigkernels.LossMetrics(model, z_loss=0.5) as metrics:
        inside = model(input_ids=ids, labels=labels).loss
        with torch.no_grad():
            model(input_ids=ids, labels=labels)
        model.eval()(input_ids=ids, labels=labels)
        model.train()
        assert metrics.tokens == (labels[:, 1:] != -100).sum()
    assert WATCHED not in model.__dict__ and metrics.tokens
    assert model(input_ids=ids, labels=labels).loss < inside - 0.5
    other = patched()
    first, second = bigkernels.LossMetrics(other), bigkernels.LossMetrics(other)
    first.close()
    other(input_ids=ids, labels=labels)
    assert not first.tokens and second.tokens
    copied = copy.deepcopy(other)
    copied(input_ids=ids, labels=labels)
    assert second.tokens == copied.__dict__[WATCHED].tokens // 2


def test_adapters_and_a_quantized_head():
    peft = pytest.importorskip("peft")
    model = trained.llama()
    bigkernels.quantize(model, "int8", skip=())
    bigkernels.patch(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    metrics = bigkernels.LossMetrics(model, z_loss=0.01)
    ids, labels = batch()
    model(input_ids=ids, labels=labels).loss.backward()
    _, right, z, count = written_out(model, ids, labels, 0.01)
    assert metrics.tokens == count and metrics.z_loss == pytest.approx(float(z / count), rel=1e-3)


def test_refused():
    model = trained.llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no loss that bigkernels.patch has fused"):
        bigkernels.LossMetrics(model)
    bigkernels.patch(model, loss=False)
    with pytest.raises(ValueError, match="has no loss"):
        bigkernels.LossMetrics(model)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        bigkernels.LossMetrics(None)
    bigkernels.patch(model)
    with pytest.raises(ValueError, match="z_loss is -1"):
        bigkernels.LossMetrics(model, z_loss=-1)
    ids, labels = batch()
    model.train()
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    metrics = bigkernels.LossMetrics(model)
    model(input_ids=ids, labels=labels)
    assert metrics.tokens == 0, "the logits are there, and nothing was counted"
    bigkernels.LossMetrics(model, z_loss=0.1)
    with pytest.raises(RuntimeError, match="its loss would have no z_loss"):
        model(input_ids=ids, labels=labels)
    hook.remove()
    model(input_ids=ids, labels=labels)
