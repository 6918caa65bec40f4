"""Models whose sequences are cut over ranks: the losses of a training are those of one process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import Checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import bigkernels
from bigkernels.distributed import ContextParallel, context_parallel

pytest.importorskip("transformers")

checks = Checks(__file__, ranks=4)
outcomes = checks.fixture()

LENGTH, VOCABULARY, STEPS = 37, 97, 5


def build(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )
    match kind:
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
        case "mistral":
            return transformers.MistralForCausalLM(transformers.MistralConfig(**options, sliding_window=7))
    options["attn_implementation"] = "eager"
    match kind:
        case "gemma2":
            return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options, sliding_window=5))
        case "gpt_oss":
            config = transformers.GptOssConfig(**options, sliding_window=5, num_local_experts=4, num_experts_per_tok=2)
            return transformers.GptOssForCausalLM(config)
    raise AssertionError(kind)


def batches(inputs: str, steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (1 if inputs == "packed" else 4, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        batch = {"input_ids": ids, "labels": labels, "use_cache": False}
        if inputs == "packed":
            batch["position_ids"] = torch.cat([torch.arange(n) for n in (11, 20, 6)])[None]
        if inputs == "padded":
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            mask[1, -9:] = 0
            labels[mask == 0] = -100
            labels[0, 5] = -100  # is predicted from padding
            batch["attention_mask"] = mask
        found.append(batch)
    return found


def train(model: nn.Module, data: list[dict], after=lambda: None) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for batch in data:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        after()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=2e-6), (found, expected)
    assert expected[0] - expected[-1] > 1e-3 or len(set(expected)) > 1


def mine(batch: dict, mesh) -> dict:
    """Of data parallelism: this rank's half of the sequences."""
    rank = mesh["data"].get_local_rank()
    return {n: t.chunk(2)[rank] if isinstance(t, torch.Tensor) else t for n, t in batch.items()}


@checks("llama, packed", "llama, padded", "mistral, whole", "mistral, packed", "gemma2, padded", "gpt_oss, whole")
def losses_of_one_process(case: str) -> None:
    kind, inputs = case.split(", ")
    data = batches(inputs)
    expected = train(build(kind), data)
    for strategy, order in (
        ("ring", "plain"),
        ("all_to_all", "plain"),
        ("ring", "patch first"),
        ("ring", "patch last"),
    ):
        if order != "plain" and kind == "gemma2":
            continue
        model = build(kind)
        if order == "patch first":
            bigkernels.patch(model)
        handle = context_parallel(model, strategy=strategy)
        if order == "patch last":
            bigkernels.patch(model)
        same(train(model, data, handle.average_gradients), expected)


POLICIES = ("none", "recompute", "selective", "int8")


@checks(*(f"{wrapper}, {policy}" for wrapper in ("ddp", "fsdp") for policy in POLICIES))
def on_a_mesh(case: str) -> None:
    """Two ranks of data by two of context."""
    from torch.distributed.fsdp import fully_shard

    wrapper, policy = case.split(", ")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    both = mesh["data", "context"]._flatten("both")
    data = batches("whole")
    reference = build("llama")
    expected = train(reference, data)
    for last in (False, True):
        model = build("llama")
        bigkernels.patch(model)
        if policy != "none":
            bigkernels.apply_checkpointing(model, policy)
        if not last:
            context_parallel(model, mesh["context"])
        called: nn.Module = model
        if wrapper == "ddp":
            called = nn.parallel.DistributedDataParallel(model, process_group=both.get_group())
        else:
            for layer in model.model.layers:
                fully_shard(layer, mesh=both)
            fully_shard(model, mesh=both)
        if last:
            context_parallel(called, mesh["context"], strategy="all_to_all")
        losses = torch.tensor(train(called, [mine(batch, mesh) for batch in data]))
        dist.all_reduce(losses, group=mesh["data"].get_group())
        found = (losses / 2).tolist()
        if policy == "int8":  # rounds what it keeps
            assert found == pytest.approx(expected, rel=2e-3)
        else:
            same(found, expected)


@checks()
def modules_of_our_own() -> None:
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.embed = nn.Embedding(VOCABULARY, 32)
            self.attention = bigkernels.nn.Attention(32, 4, num_kv_heads=2, rope=10000.0, window=(6, -1), sinks=True)
            self.head = nn.Linear(32, VOCABULARY)

        def forward(self, tokens, cu_seqlens=None):
            x = self.embed(tokens)
            return self.head(x + self.attention(x, cu_seqlens=cu_seqlens))

    for packed in (False, True):
        ids = torch.randint(VOCABULARY, (LENGTH,) if packed else (2, LENGTH))
        ends = torch.tensor([0, 10, 25, LENGTH]) if packed else None
        one, axis = Own(), 0 if packed else 1
        loss = nn.functional.cross_entropy(one(ids, ends).flatten(0, -2), ids.flatten())
        loss.backward()
        for strategy in ("ring", "all_to_all"):
            model = Own()
            handle = context_parallel(model, strategy=strategy, arguments={"tokens": axis})
            logits, labels = model(ids, ends), handle.shard(ids, axis)
            part = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / ids.numel()
            total = handle.reduce_loss(part)
            assert total.item() == pytest.approx(loss.item(), rel=1e-6)
            total.backward()
            handle.average_gradients()
            for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.allclose(handle.gather(logits, axis), one(ids, ends), atol=1e-5)
            handle.remove()
            assert torch.equal(model(ids, ends), one(ids, ends))


@checks()
def backward_of_an_earlier_forward() -> None:
    """Layers that are recomputed keep to the padding and the length of their own forward."""
    data = [batches(inputs, 1)[0] for inputs in ("padded", "whole")]
    data[1] = {n: t[:, :20] if isinstance(t, torch.Tensor) else t for n, t in data[1].items()}
    one, model = build("llama"), build("llama")
    bigkernels.apply_checkpointing(model, "recompute")
    handle = context_parallel(model)
    for m in (one, model):
        sum(m(**batch).loss for batch in data).backward()
    handle.average_gradients()
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@checks()
def copies_and_removal() -> None:
    model, batch = build("llama"), batches("whole", 1)[0]
    config = model.config
    expected = model(**batch).logits
    handle = context_parallel(model)
    assert config._attn_implementation == "sdpa", "the config may be another model's too"
    found = model(**batch)
    torch.testing.assert_close(handle.gather(found.logits), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="context parallel already"):
        context_parallel(model)
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="belongs to a copy"):
        copied(**batch)
    assert isinstance(handle, ContextParallel) and pickle.loads(pickle.dumps(handle)) is None
    handle.remove()
    assert torch.equal(model(**batch).logits, expected) and model.config is config


@checks()
def what_cannot_be_cut_is_refused() -> None:
    import transformers

    small = dict(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="encoder and a decoder"):
        context_parallel(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))
    with pytest.raises(ValueError, match="Sequential is no Hugging Face model"):
        context_parallel(nn.Sequential(nn.Linear(2, 2)))
    model = build("llama")
    with pytest.raises(ValueError, match="strategy is 'tree'"):
        context_parallel(model, strategy="tree")
    context_parallel(model)
    batch = batches("whole", 1)[0]
    ids = torch.arange(LENGTH)
    for given, message in (
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values is not supported"),
        ({"attention_mask": torch.ones(4, 1, LENGTH, LENGTH)}, "attention_mask has shape"),
        ({"position_ids": torch.cat([ids[:9], ids[:-9]])[None].expand(4, -1)}, "batch of 1"),
        ({"weights": torch.ones(4, LENGTH)}, "weights, of which it is not known"),
        ({"labels": batch["labels"][:, :-1]}, "has shape"),
    ):
        with pytest.raises(ValueError, match=f"bigkernels.distributed.context_parallel: .*{message}"):
            model(**batch | given)


@pytest.mark.parametrize("name", checks.names)
def test_four_processes(name: str, outcomes: dict) -> None:
    checks.judge(outcomes[name])


if __name__ == "__main__":
    checks.main()
