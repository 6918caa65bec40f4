"""The program's copy of quantized weights: tokens are those of the codes as they are, and it goes when it should."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from decoders import CACHE, build, generate, given, prompt, uses_program
from torch import Tensor, nn

import bigkernels
from bigkernels.nn import QuantizedLinear
from bigkernels.program import _memory_words, _panels, _size
from bigkernels.program._state import KEY

FORMATS = ("int4", "q4_1", "q8_0", "int8", "nf4")
IDS = prompt(1, 6, seed=3)


def quantized(config: str = "q4_1", name: str = "llama", dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    model = build(name, dtype)
    bigkernels.quantize(model, config, skip=())
    bigkernels.patch(model, **options)
    return model


def steps(model: nn.Module):
    return model.__dict__[KEY]


def panels(model: nn.Module):
    """Of the current program; None before first use."""
    held = steps(model)._entries
    return held[0].program.panels if held and held[0].program is not None else None


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Of a prompt and of a token after it."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :-1], use_cache=True)
        return torch.cat([out.logits, model(input_ids=ids[:, -1:], **{CACHE: given(out)}).logits], dim=1)


def stored_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    bigkernels.patch(twin, decode="stored")
    return twin


def has_kernels() -> bool:
    return torch.ops.bigkernels.cpu_isa() in ("avx512", "amx")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.02 * b.float().abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", FORMATS)
def test_the_same_with_and_without(config: str, dtype: torch.dtype):
    model = quantized(config, dtype=dtype)
    twin = stored_twin(model)
    with uses_program(model, 2), uses_program(twin, 2):
        close(logits(model), logits(twin))
        many = prompt(3, 20, seed=4)
        close(logits(model, many), logits(twin, many))
    integers = dtype != torch.float32
    if config != "nf4" or has_kernels():
        assert (panels(model).nbytes > 0) == integers
    assert panels(twin).nbytes == 0
    assert panels(twin).why == ("as was asked for" if panels(model).nbytes else "")


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3_moe", "mistral"])
def test_other_models(name: str):
    model = quantized("int4", name)
    twin = stored_twin(model)
    with uses_program(model, 2), uses_program(twin, 2):
        close(logits(model), logits(twin))
    assert panels(model).nbytes and not panels(twin).nbytes


def _layer(model: nn.Module) -> QuantizedLinear:
    return model.model.layers[1].mlp.down_proj


def _in_place(model):
    _layer(model).codes.bitwise_not_()


def _scales(model):
    _layer(model).scale.mul_(-3)


def _new_buffer(model):
    _layer(model).codes = ~_layer(model).codes


def _new_data(model):
    _layer(model).codes.data = ~_layer(model).codes


def _loaded(model):
    other = build("llama", torch.bfloat16, seed=21)
    bigkernels.quantize(other, "q4_1", skip=())
    model.load_state_dict(other.state_dict())


def _assigned(model):
    other = build("llama", torch.bfloat16, seed=22)
    bigkernels.quantize(other, "q4_1", skip=())
    model.load_state_dict(other.state_dict(), assign=True)


def _another_layer(model):
    layer = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16, device="cpu")
    torch.manual_seed(5)
    nn.init.normal_(layer.weight, std=0.5)
    model.model.layers[1].mlp.down_proj = layer


def _dequantized(model):
    _layer(model).codes.bitwise_not_()
    bigkernels.dequantize(model)


COUNTED = [_in_place, _scales, _new_buffer, _new_data, _loaded, _assigned, _another_layer, _dequantized]


def _through_data(model):
    _layer(model).codes.data.bitwise_not_()


def _one_code(model):
    _layer(model).codes.data[3, 5] ^= 0x77
    _layer(model).scale.data[3] *= 50


def _by_numpy(model):
    _layer(model).codes.numpy()[:] ^= 255


@pytest.mark.parametrize("edit", [*COUNTED, _through_data, _one_code, _by_numpy], ids=lambda e: e.__name__.strip("_"))
def test_an_edit_is_seen_by_the_next_prompt(edit: Callable[[nn.Module], None]):
    model = quantized()
    before = logits(model)
    edit(model)
    with uses_program(model, 2):
        after = logits(model)
    close(after, logits(stored_twin(model)))
    assert (after - before).abs().max() > 0.05 * before.abs().max()


@pytest.mark.parametrize("edit", [*COUNTED, _through_data, _by_numpy], ids=lambda e: e.__name__.strip("_"))
def test_an_edit_is_seen_by_the_next_token(edit: Callable[[nn.Module], None]):
    """Of those that nobody counts, the ones that change a whole tensor."""
    model = quantized()
    with torch.no_grad():
        out = model(input_ids=IDS, use_cache=True)
        other = copy.deepcopy(given(out))
        edit(model)
        twin = stored_twin(model)
        step = torch.tensor([[7]])
        with uses_program(model):
            got = model(input_ids=step, **{CACHE: given(out)}).logits
        close(got, twin(input_ids=step, **{CACHE: other}).logits)


@pytest.mark.parametrize("edit", [_in_place, _scales, _through_data, _by_numpy], ids=lambda e: e.__name__.strip("_"))
def test_an_edit_is_seen_among_quick_calls(edit: Callable[[nn.Module], None]):
    """Once calls are answered without a look at modules."""
    model = quantized()
    step = torch.tensor([[7]])
    with torch.no_grad():
        out = model(input_ids=IDS, use_cache=True)
        for _ in range(4):
            model(input_ids=step, **{CACHE: given(out)})
        other = copy.deepcopy(given(out))
        edit(model)
        twin = stored_twin(model)
        with uses_program(model, 2):
            for _ in range(2):
                got = model(input_ids=step, **{CACHE: given(out)}).logits
                close(got, twin(input_ids=step, **{CACHE: other}).logits)


def test_without_words_of_memory(monkeypatch):
    monkeypatch.setattr(_panels, "same_words", lambda: None)
    model = quantized()
    logits(model)
    for edit in (_in_place, _through_data):
        edit(model)
        close(logits(model), logits(stored_twin(model)))


def test_versions_are_known_here():
    assert _memory_words.knows_versions()


def test_nothing_is_made_again_for_nothing():
    model = quantized()
    generate(model, IDS)
    first = panels(model)
    generate(model, prompt(2, 9))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # which is read where it is
    generate(model, IDS)
    assert panels(model) is first and first.nbytes


def test_tied_head_and_embedding_have_one_copy():
    model = build("llama", torch.bfloat16, tie_word_embeddings=True)
    bigkernels.quantize(model, "int4", skip=(), embeddings=True)
    bigkernels.patch(model)
    other = build("llama", torch.bfloat16)
    bigkernels.quantize(other, "int4", skip=(), embeddings=True)
    bigkernels.patch(other)
    logits(model), logits(other)
    assert panels(model).nbytes == panels(other).nbytes > 0
    close(logits(model), logits(stored_twin(model)))


def test_it_goes_with_unpatch_moves_and_training():
    model = quantized()

    def gone(change: Callable[[], object]) -> bool:
        logits(model)
        memory = weakref.ref(panels(model)._memory)
        assert memory() is not None
        change()
        return memory() is None

    assert gone(lambda: model.to(torch.float32))
    model.to(torch.bfloat16)
    assert gone(lambda: _train(model))
    report = bigkernels.patch(model)
    held = steps(model)

    assert gone(lambda: bigkernels.unpatch(model))
    assert held is report.programs[""] and "program" in str(report)


def _train(model: nn.Module) -> None:
    model.train()
    for p in model.parameters():
        p.requires_grad_(True)
    model(input_ids=IDS)
    model.eval()


def test_copies_and_files_do_not_hold_it(tmp_path):
    model = quantized()
    names, before = set(model.state_dict()), len(pickle.dumps(model))
    expected = logits(model)
    assert panels(model).nbytes and set(model.state_dict()) == names
    assert abs(len(pickle.dumps(model)) - before) < 4096
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert panels(other) is None
        assert torch.equal(logits(other), expected)


def test_the_report_says_what_it_takes():
    model = build("llama", torch.bfloat16)
    bigkernels.quantize(model, "q4_1", skip=())
    report = bigkernels.patch(model)
    logits(model)
    assert f"{panels(model).nbytes / 1e6:.1f} of them codes in panels" in str(report)
    report = bigkernels.patch(model, decode="stored")
    logits(model)
    assert "read as stored: as was asked for" in str(report)
    report = bigkernels.patch(model)
    logits(model)
    assert "codes in panels" in str(report)
    with pytest.raises(ValueError, match="decode is 'panels'"):
        bigkernels.patch(model, decode="panels")


@pytest.mark.parametrize("config", FORMATS)
def test_a_plan_knows_about_how_much(config: str):
    model = quantized(config)
    logits(model)
    if panels(model).nbytes:
        assert 0.85 * panels(model).nbytes < _size.panels(model) < 1.1 * panels(model).nbytes
    assert _size.panels(quantized(config, dtype=torch.float32)) == 0


def test_little_memory(monkeypatch):
    model = quantized()
    monkeypatch.setattr(_panels, "free_memory", lambda: 20_000)
    close(logits(model), logits(stored_twin(model)))
    assert panels(model).nbytes == 0 and "0 MB are free" in steps(model).status()


def test_no_memory(monkeypatch):
    def none(size: int):
        raise RuntimeError("out of memory")

    model = quantized()
    monkeypatch.setattr(_panels, "empty_on_huge_pages", none)
    logits(model)
    assert panels(model).nbytes == 0 and "no memory" in steps(model).status()


def test_codes_that_count_no_writes():
    with torch.inference_mode():
        model = build("llama", torch.bfloat16)
        bigkernels.quantize(model, "q4_1", skip=())
    bigkernels.patch(model)
    logits(model)
    assert panels(model).nbytes == 0 and "inference mode" in steps(model).status()
    with torch.inference_mode():
        _in_place(model)
    close(logits(model), logits(stored_twin(model)))


def test_free_memory():
    free = _panels.free_memory()
    assert free is None or 0 < free < 2**50


def test_adapters_keep_one_copy():
    peft = pytest.importorskip("peft")
    model = build("llama", torch.bfloat16)
    bigkernels.quantize(model, "q4_1", skip=())
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    base = model.get_base_model()
    bigkernels.patch(base)
    first = logits(base)
    with model.disable_adapter():
        second = logits(base)
        held = [e.program.panels for e in steps(base)._entries if e.program is not None]
        assert sum(p is not None and p.nbytes > 0 for p in held) <= 1
        close(second, logits(stored_twin(base)))
    assert not torch.allclose(first, second)
    close(logits(base), first)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_give_the_same_bits(threads: int):
    model = quantized("int4")
    expected = logits(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(logits(model), expected)
        bigkernels.patch(model)  # made by so many
        assert torch.equal(logits(model), expected)
    finally:
        torch.set_num_threads(before)


def test_generated_tokens():
    model = quantized("int4")
    twin = stored_twin(model)
    for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        with uses_program(model):
            ours = generate(model, prompt(1, 12), **options)
        assert ours.shape == generate(twin, prompt(1, 12), **options).shape
