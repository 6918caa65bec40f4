"""What users do around generation: configurations that change, hooks that come and go, wrappers, other defaults."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from decoders import Pair, build, generate, pair, prompt, uses_modules, uses_program
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import masking_utils
from transformers.models.llama import modeling_llama

import bigkernels

IDS = prompt(2, 9, seed=5)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    allowed = 1e-4 if theirs.dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed * theirs.abs().max().item())


# ---- what changes between calls


def _rope_theta(model):
    """A new rotary module, as a longer context is set up."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)


def _attention_scaling(model):
    model.model.rotary_emb.attention_scaling = 0.5


def _eager(model):
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def _retied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight


def _pruned(model):
    prune.l1_unstructured(model.model.layers[0].mlp.down_proj, "weight", amount=0.5)


def _weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.parametrizations.weight.original0.mul_(2)


def _spectral_norm(model):
    nn.utils.parametrizations.spectral_norm(model.model.layers[1].self_attn.o_proj).eval()


def _low_memory_swap(model):
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone().T.contiguous().T * 1.5)


def _shared_memory(model):
    model.share_memory()
    model.lm_head.weight.data.neg_()


def _one_head_bias_of_another_dtype(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Softplus())


EDITS = [
    _rope_theta,
    _attention_scaling,
    _eager,
    _retied,
    _pruned,
    _weight_norm,
    _spectral_norm,
    _low_memory_swap,
    _shared_memory,
    _one_head_bias_of_another_dtype,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_edits(edit: Callable[[nn.Module], None]):
    models = pair("llama")
    before = _logits(models.theirs)
    _close(_logits(models.ours), before)
    for model in (models.theirs, models.ours):
        torch.manual_seed(0)
        edit(model)
    after = _logits(models.theirs)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3 * before.abs().max().item())
    for _ in range(2):
        _close(_logits(models.ours), after)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"])
def test_a_configuration_that_changes(name: str):
    """What the model's code reads at each call."""
    sizes = dict(sliding_window=8, final_logit_softcapping=5.0, attn_logit_softcapping=2.0)
    theirs = build("gemma3", **sizes)
    ours = copy.deepcopy(theirs)
    bigkernels.patch(ours)
    before = _logits(theirs)
    _close(_logits(ours), before)
    for model in (theirs, ours):
        setattr(model.config, name, 3 if name == "sliding_window" else 0.5)
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, 3 if name == "sliding_window" else 0.5)
    _close(_logits(ours), _logits(theirs))


def _mask_without_a_key(real):
    def mask(*args, **kwargs):
        made = real(*args, **kwargs | {"allow_is_causal_skip": False}).clone()
        made[..., 3] &= torch.eye(made.shape[-2], made.shape[-1], dtype=torch.bool)[:, 3]
        return made

    return mask


def _longer_queries(real):
    def rotated(q, k, *args, **kwargs):
        q, k = real(q, k, *args, **kwargs)
        return 1.5 * q, k

    return rotated


def _louder(real):
    return lambda *args, **kwargs: 1.5 * real(*args, **kwargs)


# A dictionary and a name there, and another function in its place.
FUNCTIONS: dict[str, Callable] = {
    "of the model's file": lambda: (vars(modeling_llama), "apply_rotary_pos_emb", _longer_queries),
    "of masks": lambda: (masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", _mask_without_a_key),
    "of torch": lambda: (vars(nn.functional), "scaled_dot_product_attention", _louder),
}


@pytest.mark.parametrize("which", FUNCTIONS)
def test_functions_that_files_look_up(which: str, monkeypatch):
    """Replaced after the first call, and put back."""
    models = pair("llama")
    where, name, other = FUNCTIONS[which]()
    before = _logits(models.theirs)
    _close(_logits(models.ours), before)
    with monkeypatch.context() as patched:
        patched.setitem(where, name, other(where[name]))
        after = _logits(models.theirs)
        _close(_logits(models.ours), after)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    with uses_program(models.ours):
        _close(_logits(models.ours), before)


def test_adapters_beside_layers_of_columns():
    """Both multiply the same tokens; GPT-2's layers are stored (in, out), and want a few of them in another order."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    wrapped, models = [], pair("gpt2")
    for model in (models.theirs, models.ours):
        torch.manual_seed(7)
        wrapped.append(peft.get_peft_model(model, config).eval())
    with uses_program(models.ours, 10):
        for tokens in (1, 3, 4, 5, 6, 7, 12, 15, 16, 17):
            with torch.no_grad():
                theirs, ours = (model(input_ids=prompt(1, tokens)).logits for model in wrapped)
            _close(ours, theirs)


def test_hooks_come_and_go():
    models = pair("llama")
    expected = models.same(generate)
    seen: list[int] = []
    handles = [m.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1)) for m in (models.ours,)]
    with uses_modules(models.ours):
        assert torch.equal(generate(models.ours), expected)
    assert seen
    for handle in handles:
        handle.remove()
    with uses_program(models.ours):
        assert torch.equal(generate(models.ours), expected)
    taken = len(seen)
    handle = models.ours.model.layers[0].register_full_backward_hook(lambda *_: None)  # not of a forward's numbers
    assert torch.equal(generate(models.ours), expected) and len(seen) == taken
    handle.remove()


# ---- wrappers


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_in_ddp(group):
    models = pair("llama")
    wrapped = nn.parallel.DistributedDataParallel(models.ours)
    with uses_program(models.ours), torch.no_grad():
        _close(wrapped(input_ids=IDS).logits, models.theirs(input_ids=IDS).logits)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for ours, theirs in zip(models.ours.parameters(), models.theirs.parameters(), strict=True):
            step = 0.1 * ours.grad
            ours -= step
            theirs -= step
    models.same(generate)


def test_sharded(group):
    """Parameters that are DTensors are the modules' to gather."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    models = pair("llama")
    expected = models.same(generate)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in models.ours.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(models.ours, mesh=mesh)
    with uses_modules(models.ours):
        assert torch.equal(generate(models.ours), expected)


def test_in_data_parallel_and_sequential():
    models = pair("llama")
    with torch.no_grad():
        theirs = models.theirs(input_ids=IDS).logits
        _close(nn.DataParallel(models.ours)(input_ids=IDS).logits, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str):
    """Compiled before and after a program was there; a compiled model generates."""
    models = pair("llama")
    expected = _logits(models.theirs)
    _close(_logits(torch.compile(models.ours, backend=backend)), expected)
    _close(_logits(models.ours), expected)
    torch._dynamo.reset()


def test_traced_by_jit():
    models = pair("llama")

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    _logits(models.ours)
    with torch.no_grad():
        try:
            traced = torch.jit.trace(Logits(models.theirs), IDS)
        except Exception:  # noqa: BLE001
            pytest.skip("transformers' model is not traced")
        ours = torch.jit.trace(Logits(models.ours), IDS)
        _close(ours(IDS.flip(1)), traced(IDS.flip(1)))


# ---- other defaults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype(dtype: torch.dtype):
    """At the first call, when everything is made, and afterwards."""
    models = pair("llama")
    torch.set_default_dtype(dtype)
    try:
        models.same(generate)
    finally:
        torch.set_default_dtype(torch.float32)
    with uses_program(models.ours):
        models.same(generate)


def test_a_default_device():
    """A device that is no device of the model's: what fails without patch fails with it, what works works."""
    models = pair("llama")
    torch.set_default_device("meta")
    try:
        results = []
        for model in (models.theirs, models.ours):
            try:
                results.append(_logits(model))
            except Exception as error:  # noqa: BLE001
                results.append(type(error))
    finally:
        torch.set_default_device(None)
    if isinstance(results[0], Tensor):
        assert results[0].device == results[1].device
        if results[0].device.type == "cpu":
            _close(results[1], results[0])
    else:
        assert results[0] is results[1]
    with uses_program(models.ours):
        models.same(generate)


def test_deterministic_algorithms_and_filled_memory():
    models = pair("qwen3_moe")
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(True)
    try:
        models.same(generate)
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before


def test_inference_tensors_of_a_first_call():
    """A first call in inference mode leaves nothing that a later one cannot use, and the other way round."""
    for first in (torch.inference_mode, torch.no_grad):
        models = pair("mistral")
        with first():
            theirs, ours = models.both(lambda m: m(input_ids=IDS).logits)
        _close(ours, theirs)
        models.ours.requires_grad_(False)
        models.theirs.requires_grad_(False)
        with uses_program(models.ours):
            models.same(generate)


def test_half_precision_and_back():
    models = Pair(build("llama"), build("llama"))
    bigkernels.patch(models.ours)
    models.same(generate)
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        for model in (models.theirs, models.ours):
            model.to(cast)
        with uses_program(models.ours):
            _close(_logits(models.ours), _logits(models.theirs))
