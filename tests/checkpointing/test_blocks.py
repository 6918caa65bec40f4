"""`apply_checkpointing` on models: which blocks it finds, the same results, and a model that stays what it was."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from segments import ALL, EXACT, relative
from torch import Tensor, nn

import bigkernels
from bigkernels import apply_checkpointing, remove_checkpointing
from bigkernels.checkpointing import _blocks, resolve_policy, selective
from bigkernels.memory import peak

transformers = pytest.importorskip("transformers")


@cache
def _made(name: str) -> tuple[nn.Module, dict, int]:
    """A model, its inputs, and how many blocks it has."""
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 24))
    text = {"input_ids": ids, "labels": ids}
    small = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    T = transformers
    if name == "Llama":
        return T.LlamaForCausalLM(T.LlamaConfig(**small, num_key_value_heads=2)), text, 3
    if name == "GPT-2":
        config = T.GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
        return T.GPT2LMHeadModel(config), text, 3
    if name == "BERT":
        return T.BertForMaskedLM(T.BertConfig(**small)), text | {"attention_mask": ids.ne(5).long()}, 3
    if name == "T5":
        config = T.T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        return T.T5ForConditionalGeneration(config), text, 6
    if name == "Mixtral":
        config = T.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        return T.MixtralForCausalLM(config), text | {"output_router_logits": True}, 3
    if name == "ViT":
        config = T.ViTConfig(**{k: v for k, v in small.items() if k != "vocab_size"}, image_size=32, patch_size=8)
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
        return T.ViTForImageClassification(config), inputs, 3
    config = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    return T.ResNetForImageClassification(config), inputs, 5


def made(name: str) -> tuple[nn.Module, dict, int]:
    model, inputs, blocks = _made(name)
    return copy.deepcopy(model).train(), inputs, blocks


MODELS = ["Llama", "GPT-2", "BERT", "T5", "Mixtral", "ViT", "ResNet"]
models = pytest.mark.parametrize("name", MODELS)


def step(model: nn.Module, inputs: dict, **more) -> list[Tensor]:
    """The loss, and the gradients of all parameters, with the same random numbers."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of gradients that are not all noise: a key's bias has none, and rounding alone decides it."""
    largest = max(float(e.abs().max()) for e in expected[1:])
    return [relative(f, e) for f, e in zip(found, expected, strict=True) if e.abs().max() > 1e-4 * largest]


# ---- results ---------------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("policy", ["recompute", "selective", "offload", "int8", "recompute+int8"])
def test_models(name: str, policy: str) -> None:
    model, inputs, blocks = made(name)
    cache = {"use_cache": True} if name in ("Llama", "GPT-2", "T5", "Mixtral") else {}
    expected = step(model, inputs)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert len(apply_checkpointing(model, policy)) == blocks
    for _ in range(2):
        if name == "ResNet":  # a second run updates the running statistics of batch norms again, as torch's does
            model.load_state_dict(buffers, strict=False)
        found = step(model, inputs, **cache)
        if policy in EXACT:
            assert errors(found, expected) == [0.0] * len(errors(found, expected))
        else:
            assert torch.equal(found[0], expected[0])
            # T5 and ResNet have ReLU, whose backward asks whether a saved value is above zero: small ones are not.
            assert max(errors(found, expected)) < 0.2
            assert torch.tensor(errors(found, expected)).median() < 0.05


@models
@pytest.mark.parametrize("patch_first", [True, False])
def test_patched_models(name: str, patch_first: bool) -> None:
    model, inputs, blocks = made(name)
    if patch_first:
        bigkernels.patch(model)
        expected = step(model, inputs)
        assert len(apply_checkpointing(model, "recompute")) == blocks
    else:
        patched = copy.deepcopy(model)
        bigkernels.patch(patched)
        expected = step(patched, inputs)
        assert len(apply_checkpointing(model, "recompute")) == blocks
        bigkernels.patch(model)
    found = step(model, inputs)
    assert max(errors(found, expected)) == 0
    bigkernels.unpatch(model)
    remove_checkpointing(model)
    plain, *_ = made(name)
    assert max(errors(step(model, inputs), step(plain, inputs))) == 0


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL.keys())
def test_policies_of_llama(policy) -> None:
    model, inputs, _ = made("Llama")
    expected = step(model, inputs)
    apply_checkpointing(model, policy)
    for _ in range(3):
        found = errors(step(model, inputs), expected)
        assert max(found) == 0 if policy.code is None else max(found) < 0.15


@pytest.mark.parametrize("policy", ["recompute", "selective", "int8"])
def test_accumulation_in_one_autocast(policy: str) -> None:
    """Converted weights are remembered from one part of the batch to the next."""
    model, inputs, _ = made("Llama")

    def steps() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                model(**inputs).loss.backward()
        return [torch.zeros(()), *(p.grad for p in model.parameters())]

    expected = steps()
    apply_checkpointing(model, policy)
    for _ in range(2):
        assert max(errors(steps(), expected)) <= (0.0 if policy in EXACT else 0.1)


def test_evaluation_costs_nothing() -> None:
    model, inputs, _ = made("Llama")
    model.eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    apply_checkpointing(model, "recompute")
    with torch.no_grad():
        found = model(ids, use_cache=True)
        assert torch.equal(found.logits, expected.logits)
        assert found.past_key_values.get_seq_length() == ids.shape[1]
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)


@models
def test_hooks_of_blocks_are_called(name: str) -> None:
    model, inputs, blocks = made(name)
    names = apply_checkpointing(model, "recompute")
    calls = []
    for n in names:
        model.get_submodule(n).register_forward_hook(lambda *a: calls.append(1))
    step(model, inputs)
    assert blocks <= len(calls) <= 2 * blocks


# ---- the model stays what it was -------------------------------------------------------------------------------------


def description(model: nn.Module) -> list:
    return [(n, type(m), sorted(m.__dict__), m._forward_hooks) for n, m in model.named_modules()]


@models
def test_removed(name: str) -> None:
    model, inputs, _ = made(name)
    before, keys = description(model), list(model.state_dict())
    apply_checkpointing(model, "int8")
    assert list(model.state_dict()) == keys
    assert [d[:2] for d in description(model)] == [d[:2] for d in before]
    apply_checkpointing(model, "recompute", every=2)  # in place of the first
    remove_checkpointing(model)
    assert description(model) == before
    remove_checkpointing(model)
    assert description(model) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("policy", ["recompute", selective(budget=0.5), "int8+offload"])
def test_copies(how: str, policy) -> None:
    """A copy has segments of its own, which know nothing of the original."""
    model, inputs, _ = made("Llama")
    expected = step(model, inputs)
    apply_checkpointing(model, policy)
    for _ in range(2):
        step(model, inputs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    inside = [m.__dict__["_call_impl"].module for m in other.modules() if "_call_impl" in m.__dict__]
    assert inside == list(other.model.layers)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    remove_checkpointing(model)
    found = errors(step(other, inputs), expected)
    assert max(found) == 0 if "int8" not in str(policy) else 0 < max(found) < 0.2
    remove_checkpointing(other)
    assert max(errors(step(other, inputs), expected)) == 0


def test_moved() -> None:
    model, inputs, _ = made("Llama")
    apply_checkpointing(model, "recompute")
    model.to(torch.float64)
    found = step(model, inputs)
    plain, *_ = made("Llama")
    assert max(errors(found, step(plain.to(torch.float64), inputs))) == 0
    assert found[1].dtype == torch.float64


@pytest.mark.parametrize("before", [True, False])
def test_peft(before: bool) -> None:
    peft = pytest.importorskip("peft")
    model, inputs, blocks = made("Llama")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
    found = None
    torch.manual_seed(5)
    if before:
        apply_checkpointing(model, "recompute")
    model = peft.get_peft_model(model, config)
    if not before:
        assert len(apply_checkpointing(model, "recompute")) == blocks
    found = step(model, inputs)
    remove_checkpointing(model)
    assert max(errors(found, step(model, inputs))) == 0 and len(found) == 1 + 2 * 2 * blocks


def test_which_modules() -> None:
    model, *_ = made("Llama")
    assert apply_checkpointing(model) == [f"model.layers.{i}" for i in range(3)]
    assert apply_checkpointing(model, every=2) == ["model.layers.0", "model.layers.2"]
    assert apply_checkpointing(model, modules=["model.layers.1"]) == ["model.layers.1"]
    assert apply_checkpointing(model, modules=[model.model.layers[2].mlp]) == ["model.layers.2.mlp"]
    kind = type(model.model.layers[0].self_attn)
    assert apply_checkpointing(model, modules=kind) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert sum("_call_impl" in m.__dict__ for m in model.modules()) == 3, "what was applied before is still there"
    for wrong in (["model.layers.7"], [nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match="is not in the model"):
            apply_checkpointing(model, modules=wrong)
    with pytest.raises(ValueError, match="no list of modules"):
        apply_checkpointing(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    for f in (apply_checkpointing, remove_checkpointing):
        with pytest.raises(TypeError, match="torch.nn.Module"):
            f([nn.Linear(2, 2)])


def test_nested_segments_of_a_model() -> None:
    """Blocks and their parts, by name."""
    model, inputs, _ = made("Llama")
    expected = step(model, inputs)
    names = [f"model.layers.{i}{part}" for i in range(3) for part in ("", ".mlp")]
    for policy in ("recompute", "int8"):
        assert sorted(apply_checkpointing(model, policy, modules=names)) == names
        assert max(errors(step(model, inputs), expected)) <= (0 if policy == "recompute" else 0.15)


def test_blocks_are_found_by_structure() -> None:
    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.inner = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(3))

        def forward(self, x):
            for m in self.inner:
                x = x + m(x)
            return x

    model = nn.Module()
    model.stages = nn.ModuleDict({"a": nn.Sequential(Block(4), Block(4)), "b": nn.Sequential(Block(8), Block(8))})
    found = _blocks._blocks(model)
    names = {m: n for n, m in model.named_modules()}
    assert [names[m] for m in found] == ["stages.a.0", "stages.a.1", "stages.b.0", "stages.b.1"]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, part", [("recompute", 0.5), ("int8", 0.65), ("recompute+int8", 0.5)])
def test_peak_falls(policy: str, part: float) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(64, (2, 256))
    inputs = {"input_ids": ids, "labels": ids}
    figures = []
    for p in (None, resolve_policy(policy)):
        if p is not None:
            apply_checkpointing(model, p)
        step(model, inputs)
        for q in model.parameters():
            q.grad = None
        with peak() as measured:
            loss = model(**inputs).loss
            held = measured.end
            loss.backward()
        figures.append(measured.bytes - sum(q.nbytes for q in model.parameters()) + held)
    assert figures[1] <= part * figures[0], figures
