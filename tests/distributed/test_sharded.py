"""A patched model under fully_shard on two ranks, wrapped in either order: the losses of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Checks
from torch.utils._python_dispatch import TorchDispatchMode

import bigkernels

transformers = pytest.importorskip("transformers", minversion="5")

checks = Checks(__file__, ranks=2)
STEPS = 6


def data(step: int) -> torch.Tensor:
    return torch.randint(0, 99, (2, 2, 17), generator=torch.Generator().manual_seed(step))


def llama(tied: bool = False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).train()


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


class Fused(TorchDispatchMode):
    """Counts losses that were computed of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "bigkernels.linear_cross_entropy" in str(func)
        return func(*args, **kwargs or {})


def losses(model, optimizer, whole: bool = False) -> list[float]:
    stepper, found = optimizer(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        ids = data(step).flatten(0, 1) if whole else data(step)[dist.get_rank()]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        loss = loss.detach().clone()
        if not whole:
            dist.all_reduce(loss)
            loss /= 2
        found.append(loss.item())
    return found


@checks("patch, shard", "shard, patch", "patch, shard, tied", "shard, patch, tied")
def losses_are_fused_in_either_order(case: str) -> None:
    tied = case.endswith("tied")
    expected = losses(llama(tied), torch.optim.AdamW, whole=True)
    model = llama(tied)
    for what in case.split(", ")[:2]:
        shard(model) if what == "shard" else bigkernels.patch(model, verify=False)
    with Fused() as fused:
        found = losses(model, bigkernels.optim.AdamW)
    assert fused.count >= STEPS
    assert found == pytest.approx(expected, abs=5e-6)


@checks("recompute", "selective")
def checkpointing(policy: str) -> None:
    expected = losses(llama(), torch.optim.AdamW, whole=True)
    for first in (True, False):
        model = llama()
        if not first:
            shard(model)
        bigkernels.patch(model, verify=False)
        bigkernels.apply_checkpointing(model, policy)
        if first:
            shard(model)
        assert losses(model, torch.optim.AdamW) == pytest.approx(expected, abs=5e-6)


@checks()
def weights_that_are_freed_keep_their_logits() -> None:
    ids = data(0)[dist.get_rank()]
    expected = llama()(input_ids=ids, labels=ids).logits
    for options in ({}, {"reshard_after_forward": True}):
        model = llama()
        bigkernels.patch(model, verify=False)
        shard(model, **options)
        with Fused() as fused:
            output = model(input_ids=ids, labels=ids)
        assert (fused.count > 0) is not bool(options)
        torch.testing.assert_close(output.logits.float(), expected, rtol=1e-5, atol=1e-5)
        output.loss.backward()


@checks()
def logits_that_are_read_too_late_are_refused() -> None:
    ids = data(0)[dist.get_rank()]
    model = llama()
    bigkernels.patch(model, verify=False)
    output = shard(model)(input_ids=ids, labels=ids)
    output.loss.backward()
    with pytest.raises(RuntimeError, match="read `logits` before `backward`"):
        output.logits.float().sum()


@checks()
def quantize_refuses_sharded_weights() -> None:
    model = shard(llama())
    with pytest.raises(ValueError, match="quantize it before fully_shard"):
        bigkernels.quantize(model, "int8")
    assert not any(isinstance(m, bigkernels.nn.QuantizedLinear) for m in model.modules())


@checks()
def gradients_of_several_batches_and_of_a_loss_of_ones_own() -> None:
    for own in (False, True):
        sharded, plain = llama(), llama()
        bigkernels.patch(sharded, verify=False)
        shard(sharded)
        for model in (sharded, plain):
            for step in range(2):
                ids = data(step)[dist.get_rank()]
                if model is sharded:
                    model.set_requires_gradient_sync(step == 1)
                output = model(input_ids=ids, labels=ids)
                (output.logits.float().logsumexp(-1).mean() if own else output.loss).backward()
        for (name, a), b in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            dist.all_reduce(b.grad)
            torch.testing.assert_close(a.grad.full_tensor(), b.grad / 2, rtol=1e-4, atol=1e-6, msg=name)


@checks()
def lower_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    exact, eager = (
        losses(llama(), torch.optim.AdamW, whole=True),
        losses(shard(llama(), mp_policy=policy), torch.optim.AdamW),
    )
    model = llama()
    bigkernels.patch(model, verify=False)
    found = losses(shard(model, mp_policy=policy), torch.optim.AdamW)
    error, allowed = (max(abs(a - b) for a, b in zip(exact, other, strict=True)) for other in (found, eager))
    assert error < 3 * allowed + 1e-4


outcomes = checks.fixture()


@pytest.mark.parametrize("name", checks.names)
def test_ranks(name, outcomes):
    checks.judge(outcomes[name])


if __name__ == "__main__":
    checks.main()
