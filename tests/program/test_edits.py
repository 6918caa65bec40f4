"""Models that are changed between calls, in every way users have: the next token is that of the changed model."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from decoders import CACHE, MODELS, Pair, build, generate, given, pair, prompt, transformers, uses_modules, uses_program
from torch import Tensor, nn

import bigkernels

IDS = prompt(2, 9, seed=5)


def _logits(model: nn.Module) -> Tensor:
    """Of a prompt and a token after it, both by the program where there is one."""
    with torch.no_grad():
        out = model(input_ids=IDS[:, :8], use_cache=True)
        return torch.cat([out.logits, model(input_ids=IDS[:, 8:], **{CACHE: given(out)}).logits], dim=1)


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    allowed = 1e-4 if theirs.dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed * theirs.abs().max().item())


def _projections(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in path}


def _one(model: nn.Module, end: str) -> nn.Module:
    return next(m for path, m in model.named_modules() if path.endswith(end))


def _in_place(model):
    with torch.no_grad():
        _one(model, "1.mlp.down_proj").weight.mul_(-1.5)


def _through_data(model):
    _one(model, "0.self_attn.q_proj").weight.data *= 2
    model.get_input_embeddings().weight.data += 0.25


def _by_numpy(model):
    _one(model, "0.self_attn.v_proj").weight.detach().numpy()[:] *= -1


def _new_data(model):
    p = _one(model, "1.mlp.up_proj").weight
    p.data = p.data.flip(0).clone()


def _new_parameter(model):
    layer = _one(model, "1.self_attn.o_proj")
    layer.weight = nn.Parameter(layer.weight.detach().flip(1).clone())


def _loaded(model):
    model.load_state_dict(build("llama", seed=11).state_dict())


def _assigned(model):
    model.load_state_dict(build("llama", seed=12).state_dict(), assign=True)


def _norm_weight(model):
    _one(model, "0.input_layernorm").weight.data.neg_()
    _one(model, "model.norm").weight.data *= 3


def _eps(model):
    for m in model.modules():
        if hasattr(m, "variance_epsilon"):
            m.variance_epsilon = 0.7


def _scaling(model):
    for path, m in model.named_modules():
        if path.endswith("self_attn"):
            m.scaling *= 3


def _another_activation(model):
    for path, m in model.named_modules():
        if path.endswith(".mlp"):
            m.act_fn = nn.GELU()


def _another_layer(model):
    old = _one(model, "0.mlp.gate_proj")
    model.get_submodule("model.layers.0.mlp").gate_proj = nn.Sequential(old, nn.Tanh())


def _another_block(model):
    model.model.layers[1] = copy.deepcopy(build("llama", seed=13).model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def _fewer_blocks(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def _blocks_in_another_order(model):
    first, second = model.model.layers
    model.model.layers = nn.ModuleList([second, first])
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i


def _another_head(model):
    model.lm_head = nn.Linear(64, 23, bias=True, dtype=model.dtype, device="cpu")
    torch.manual_seed(0)
    nn.init.normal_(model.lm_head.weight)
    nn.init.normal_(model.lm_head.bias)


def _tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def _a_bias(model):
    layer = _one(model, "0.mlp.up_proj")
    layer.bias = nn.Parameter(torch.linspace(-1, 1, 96, dtype=model.dtype, device="cpu"))


def _resized(model):
    torch.manual_seed(0)
    model.resize_token_embeddings(211, mean_resizing=False)


def _another_class_of_forward(model):
    layer = _one(model, "1.mlp")
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)


def _a_forward_of_a_leaf(model):
    layer = _one(model, "1.self_attn.k_proj")
    layer.forward = lambda x: -nn.functional.linear(x, layer.weight, layer.bias)


def _a_hook(model):
    _one(model, "0.mlp").register_forward_hook(lambda _, args, out: out * 1.5)


def _a_pre_hook(model):
    _one(model, "0.self_attn.q_proj").register_forward_pre_hook(lambda _, args: (args[0].flip(-1),))


def _a_hook_of_the_head(model):
    model.lm_head.register_forward_hook(lambda _, args, out: out.tanh())


def _a_hook_of_the_embedding(model):
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out + 0.5)


def _a_hook_of_the_model(model):
    def double(module, args, kwargs, out):
        out.logits = out.logits * 2
        return out

    model.register_forward_hook(double, with_kwargs=True)


def _a_parametrization(model):
    class Negated(nn.Module):
        def forward(self, x):
            return -x

    nn.utils.parametrize.register_parametrization(_one(model, "0.mlp.down_proj"), "weight", Negated())


def _to_bfloat16(model):
    model.to(torch.bfloat16)


def _to_bfloat16_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def _one_layer_in_bfloat16(model):
    layer = _one(model, "0.mlp.down_proj").to(torch.bfloat16)
    layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    layer.register_forward_hook(lambda _, args, out: out.float())


def _rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _frozen_and_trained(model):
    _one(model, "mlp.down_proj").requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _window(model):
    model.config.sliding_window = 3
    for m in model.modules():
        if hasattr(m, "sliding_window"):
            m.sliding_window = 3


EDITS = [
    _in_place,
    _through_data,
    _by_numpy,
    _new_data,
    _new_parameter,
    _loaded,
    _assigned,
    _norm_weight,
    _eps,
    _scaling,
    _another_activation,
    _another_layer,
    _another_block,
    _fewer_blocks,
    _blocks_in_another_order,
    _another_head,
    _tied,
    _a_bias,
    _resized,
    _another_class_of_forward,
    _a_forward_of_a_leaf,
    _a_hook,
    _a_pre_hook,
    _a_hook_of_the_head,
    _a_hook_of_the_embedding,
    _a_hook_of_the_model,
    _a_parametrization,
    _to_bfloat16,
    _to_bfloat16_and_back,
    _one_layer_in_bfloat16,
    _rope,
    _frozen_and_trained,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_the_next_call_sees_it(edit: Callable[[nn.Module], None]):
    models = pair("llama")
    before = _logits(models.theirs)
    with uses_program(models.ours):
        _close(_logits(models.ours), before)
    edit(models.theirs)
    edit(models.ours)
    after = _logits(models.theirs)
    assert after.shape != before.shape or not torch.allclose(after.float(), before, rtol=0, atol=1e-3 * before.max())
    _close(_logits(models.ours), after)
    _close(_logits(models.ours), after)  # again, with what the first call may have made anew


@pytest.mark.parametrize("edit", [_window], ids=["window"])
def test_the_next_call_of_another_model_sees_it(edit: Callable[[nn.Module], None]):
    models = pair("mistral")
    before = _logits(models.theirs)
    _close(_logits(models.ours), before)
    edit(models.theirs)
    edit(models.ours)
    _close(_logits(models.ours), _logits(models.theirs))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_between_calls(name: str):
    models = pair(name)

    def run(model):
        _logits(model)
        _some_training(model)
        return _logits(model)

    theirs, ours = models.both(run)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


def _some_training(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_patch_and_unpatch_between_calls(name: str):
    models = pair(name)
    expected = generate(models.theirs)
    assert torch.equal(generate(models.ours), expected)
    bigkernels.unpatch(models.ours)
    with uses_modules(models.ours):
        assert torch.equal(generate(models.ours), expected)
    assert "forward" not in models.ours.__dict__
    bigkernels.patch(models.ours)
    with uses_program(models.ours):
        assert torch.equal(generate(models.ours), expected)
    bigkernels.patch(models.ours)
    assert torch.equal(generate(models.ours), expected)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "deepcopy unused"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_copies_of_a_patched_model(name: str, copied: str):
    """A copy has weights of its own: edits of one are not seen by the other, in either direction."""
    models = pair(name)
    expected = generate(models.theirs) if copied == "deepcopy unused" else models.same(generate)
    other = pickle.loads(pickle.dumps(models.ours)) if copied == "pickle" else copy.deepcopy(models.ours)
    edited = copy.deepcopy(models.theirs)
    for model in (edited, models.ours):
        for p in model.parameters():
            p.data.neg_()
    assert torch.equal(generate(other), expected)
    assert torch.equal(generate(models.ours), generate(edited)) and not torch.equal(generate(edited), expected)
    for p in other.parameters():
        p.data.neg_()
    assert torch.equal(generate(other), generate(edited))


def test_a_signature_that_generate_looks_at():
    model = build("llama")
    before = inspect.signature(model.forward)
    bigkernels.patch(model)
    assert inspect.signature(model.forward) == before


def test_saved_and_loaded(tmp_path):
    models = pair("llama")
    expected = models.same(generate)
    models.ours.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(generate(loaded), expected)
    assert set(loaded.state_dict()) == set(models.ours.state_dict()) == set(models.theirs.state_dict())


def test_a_model_inside_another():
    """The whole is patched; the language model in it generates."""
    models = pair("llama")

    class Holder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    bigkernels.unpatch(models.ours)
    holder = Holder(models.ours)
    bigkernels.patch(holder)
    models.same(generate)
    bigkernels.unpatch(holder)
    models.same(generate)


def test_weights_that_are_gone():
    """A model that was moved to the meta device raises as it does without patch, and works again with weights."""
    models = pair("llama")
    models.same(generate)
    state = {k: v.clone() for k, v in models.theirs.state_dict().items()}
    results = []
    for model in (models.theirs, models.ours):
        model.to("meta")
        try:
            results.append(_logits(model).device.type)
        except Exception as error:  # noqa: BLE001
            results.append(type(error))
    assert results[0] == results[1]
    for model in (models.theirs, models.ours):
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    models.same(generate)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_half_precision(name: str):
    models = pair(name, torch.float16)
    _close(_logits(models.ours), _logits(models.theirs))


def test_odd_sizes():
    """Nothing is a multiple of a vector."""
    changes = dict(
        vocab_size=131, hidden_size=45, intermediate_size=77, num_attention_heads=3, num_key_value_heads=1, head_dim=14
    )
    theirs = build("llama", **changes)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    ids = prompt(3, 5) % 131
    with uses_program(ours):
        Pair(theirs, ours).same(lambda model: generate(model, ids))


def test_autocast():
    models = pair("llama")
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = models.both(_logits)
    _close(ours, theirs)
    assert ours.dtype == theirs.dtype


def test_torch_compile():
    """A compiled call of a patched model is a call of it."""
    models = pair("llama")
    compiled = torch.compile(models.ours, backend="eager")
    with torch.no_grad():
        _close(compiled(input_ids=IDS).logits, models.theirs(input_ids=IDS).logits)


def test_default_dtype_and_device():
    models = pair("llama")
    torch.set_default_dtype(torch.float64)
    try:
        models.same(generate)
    finally:
        torch.set_default_dtype(torch.float32)
