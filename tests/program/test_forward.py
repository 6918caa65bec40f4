"""Which calls of a model take its program, and what else it keeps: reasons, reports, threads, outputs."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import threading
import weakref

import pytest
import torch
from decoders import (
    CACHE,
    Pair,
    build,
    generate,
    given,
    pair,
    prompt,
    shared_pair,
    transformers,
    uses_modules,
    uses_program,
)
from torch import nn

import bigkernels
from bigkernels.program import _state, _verify, _watch
from bigkernels.program._padding import Refusal, starts_of

IDS = prompt(2, 9, seed=5)


@pytest.fixture
def models() -> Pair:
    return pair("llama")


@pytest.fixture
def shared() -> Pair:
    return shared_pair("llama")


def _steps(model: nn.Module) -> _state.Steps:
    return model.__dict__[_state.KEY]


def _same(models: Pair, taken: bool, **options) -> None:
    with torch.no_grad(), (uses_program if taken else uses_modules)(models.ours):
        theirs, ours = models.both(lambda model: model(**{"input_ids": IDS} | options))
    assert type(ours) is type(theirs)
    logits = (ours[0], theirs[0])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert logits[0].dtype == logits[1].dtype
    if not isinstance(ours, tuple):
        assert list(ours) == list(theirs)


# ---- calls -----------------------------------------------------------------------------------------------------------

PADDED = torch.ones(2, 9, dtype=torch.long)
PADDED[1, :4] = 0
HOLES = PADDED.clone()
HOLES[0, 5] = 0
RIGHT = PADDED.flip(1)
TAKEN = {
    "tokens": {},
    "int32 tokens": {"input_ids": IDS.int()},
    "no cache": {"use_cache": False},
    "a mask of ones": {"attention_mask": torch.ones(2, 9)},
    "padding on the left": {"attention_mask": PADDED, "position_ids": (PADDED.cumsum(1) - 1).clamp_min(0)},
    "padding as bools": {"attention_mask": PADDED.bool()},
    "positions": {"position_ids": torch.arange(9)[None]},
    "later positions": {"position_ids": torch.arange(20, 29)[None]},
    "no labels": {"labels": None, "output_attentions": False},
    "a tuple": {"return_dict": False},
    "the last rows": {"logits_to_keep": 2},
    "more rows than there are": {"logits_to_keep": 50},
}
LEFT = {
    "labels": {"labels": IDS},
    "holes": {"attention_mask": HOLES},
    "padding on the right": {"attention_mask": RIGHT},
    "several sequences in one": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "rows by number": {"logits_to_keep": torch.tensor([1, 4])},
}


@pytest.mark.parametrize("way", TAKEN)
def test_calls_of_the_program(shared: Pair, way: str):
    seen = TAKEN[way].get("attention_mask", torch.ones(2, 9)) != 0
    if seen.all():
        return _same(shared, True, **TAKEN[way])
    with torch.no_grad(), uses_program(shared.ours):
        theirs, ours = shared.both(lambda model: model(input_ids=IDS, **TAKEN[way]).logits)
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-4)  # what padding gives has no meaning


@pytest.mark.parametrize("way", LEFT)
def test_calls_of_the_modules(shared: Pair, way: str):
    _same(shared, False, **LEFT[way])


def test_a_mask_of_queries_and_keys(shared: Pair):
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, 9, 9)
    _same(shared, True, attention_mask=causal)
    _same(shared, False, attention_mask=causal & (torch.arange(9) != 3))
    _same(shared, True, attention_mask=torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min))
    _same(shared, False, attention_mask=torch.zeros(2, 1, 9, 9).masked_fill(~causal, -1.0))


def test_embeddings(shared: Pair):
    given = shared.theirs.get_input_embeddings()(IDS).detach()
    _same(shared, True, input_ids=None, inputs_embeds=given)
    with torch.enable_grad(), uses_modules(shared.ours):
        given.requires_grad_()
        shared.ours.requires_grad_(False)
        try:
            shared.ours(inputs_embeds=given).logits.sum().backward()
        finally:
            shared.ours.requires_grad_(True)
    assert given.grad.abs().sum() > 0


def test_gradients(models: Pair):
    with uses_modules(models.ours):
        assert models.ours(input_ids=IDS).logits.requires_grad
    models.ours.requires_grad_(False)
    with uses_program(models.ours):
        assert not models.ours(input_ids=IDS).logits.requires_grad
    models.ours.lm_head.weight.requires_grad_()
    with uses_modules(models.ours):
        assert models.ours(input_ids=IDS).logits.requires_grad


def test_what_looks_at_operators(shared: Pair):
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    seen: list = []
    with torch.no_grad(), uses_modules(shared.ours):
        with Mode():
            shared.ours(input_ids=IDS)
        assert len(seen) > 20
        with torch.autocast("cpu", torch.bfloat16):
            shared.ours(input_ids=IDS)
        with torch.device("cpu"):
            shared.ours(input_ids=IDS)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        shared.ours(input_ids=IDS)
        handle.remove()


def test_functional_calls_see_their_weights(models: Pair, monkeypatch):
    found = _made(monkeypatch)
    for _ in range(2):
        with torch.no_grad(), uses_program(models.ours):
            out = torch.func.functional_call(models.ours, {"lm_head.weight": torch.zeros(199, 64)}, (IDS,))
        assert not out.logits.any()
        _same(models, True)
    assert len(found) == 1


def test_errors_are_the_models_own(shared: Pair):
    for options in (
        {"input_ids": None},
        {"inputs_embeds": torch.zeros(2, 9, 64)},
        {"input_ids": IDS + 500},
        {"input_ids": IDS.float()},
        {"nonsense": 3},
    ):
        errors = []
        for model in (shared.theirs, shared.ours):
            with torch.no_grad():
                try:
                    model(**{"input_ids": IDS} | options)
                    errors.append(None)
                except Exception as error:  # noqa: BLE001
                    errors.append(type(error))
        assert errors[0] is errors[1], options


def test_long_prompts_go_in_parts(shared: Pair, monkeypatch):
    monkeypatch.setattr("bigkernels.program._forward._ROWS", 4)
    _same(shared, True)
    _same(shared, True, logits_to_keep=5)
    out = shared.ours.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, shared.theirs.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_positions_beyond_the_tables(shared: Pair):
    for first in (0, 500, 600, 3000, 7):
        _same(shared, True, position_ids=torch.arange(first, first + 9)[None])


def test_longer_tables_outside_of_the_mode_of_the_first_call():
    both = pair("llama")
    with torch.inference_mode():
        both.ours(input_ids=prompt())
    for first in (3000, 0, 9000):
        _same(both, True, position_ids=torch.arange(first, first + 9)[None])


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_training_without_and_with_dropout():
    models = pair("llama")
    for model in (models.theirs, models.ours):
        model.train()
    _same(models, True)
    for model in (models.theirs, models.ours):
        for m in model.modules():
            if hasattr(m, "attention_dropout"):
                m.attention_dropout = 0.5
    with uses_modules(models.ours):
        models.both(generate)
    for model in (models.theirs, models.ours):
        model.eval()
    _same(models, True)


def test_switched_off(models: Pair):
    bigkernels.patch(models.ours, decode=False)
    assert _state.KEY not in models.ours.__dict__
    with uses_modules(models.ours):
        models.same(generate)


def test_the_report():
    model = build("llama")
    report = bigkernels.patch(model)
    assert [row[:2] for row in report.steps] == [("", "decode program, found at first use")]
    generate(model)
    assert report.steps[0].what.startswith("decode program: 2 layers, 15 products (15 float32), ")
    assert report.steps[0].what in str(report)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    generate(model)
    assert report.steps[0].what == "decode program: model.layers.0: has hooks"
    encoder = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    )
    assert "decode" not in str(bigkernels.patch(encoder))
    hooked = build("llama")
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    rows = [row for row in bigkernels.patch(hooked).skipped if "decode program" in row.what]
    assert "model.layers.0" in rows[0].what


def test_memory_that_is_replaced_is_given_back(models: Pair):
    """Programs hold the memory that their threads may still read; a cast lets it go, tensor by tensor."""
    model = models.ours
    generate(model)
    program = _steps(model)._entries[0].program
    assert len(program._storages) == len(program.reads)
    model.to(torch.bfloat16)
    assert program._storages is None
    generate(model)
    assert _steps(model)._entries[0].program._storages is not None
    with torch.no_grad():
        models.theirs.to(torch.bfloat16)
        theirs, ours = models.both(lambda model: model(input_ids=IDS).logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * theirs.abs().max().item())


def test_reasons_are_logged_once(models: Pair, caplog, monkeypatch):
    from bigkernels.program import _forward

    _forward._log.cache_clear()
    with caplog.at_level(logging.INFO, "bigkernels"), torch.no_grad():
        for _ in range(3):
            models.ours(input_ids=IDS, attention_mask=HOLES)
            models.ours(input_ids=IDS, output_hidden_states=True)
    lines = [record.getMessage() for record in caplog.records if "decode" in record.getMessage()]
    assert len([line for line in lines if "mask" in line]) == 1
    assert len([line for line in lines if "output_hidden_states" in line]) == 1


# ---- what is watched -------------------------------------------------------------------------------------------------


def _made(monkeypatch) -> list:
    """What `find` was called for."""
    calls, find = [], _state.find
    monkeypatch.setattr(_state, "find", lambda model: calls.append(model) or find(model))
    return calls


def test_what_is_touched_and_the_same_is_found_once(models: Pair, monkeypatch):
    found = _made(monkeypatch)
    model = models.ours

    def touch():
        model.train(), model.eval()
        model.config.use_cache = False
        model.config.use_cache = True
        model.generation_config.max_length = 33
        norm = model.model.norm
        norm.variance_epsilon = float(str(norm.variance_epsilon))
        norm.weight = norm.weight
        for p in model.parameters():
            p.requires_grad_(not p.requires_grad)

    _same(models, True)
    for _ in range(2):
        touch()
        _same(models, True)
    assert len(found) == 1


def test_longer_static_caches_are_no_other_model(models: Pair, monkeypatch):
    """`generate` notes on the model how long the last one was."""
    found = _made(monkeypatch)
    for new in (4, 9, 30):
        models.same(lambda model, new=new: generate(model, cache_implementation="static", new=new))
    assert len(found) == 1


def test_new_memory_is_found_without_another_search(models: Pair, monkeypatch):
    found = _made(monkeypatch)
    _same(models, True)
    for model in (models.theirs, models.ours):
        for p in model.parameters():
            p.data = p.data * 0.9
    _same(models, True)
    assert len(found) == 1
    for model in (models.theirs, models.ours):
        model.to(torch.bfloat16)
    with torch.no_grad(), uses_program(models.ours):
        theirs, ours = models.both(lambda model: model(input_ids=IDS).logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * theirs.abs().max().item())


def test_states_that_come_back_are_remembered(models: Pair, monkeypatch):
    found = _made(monkeypatch)
    model = models.ours
    _same(models, True)
    for _ in range(3):
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out * 2)
        _same(Pair(model, model), False)
        handle.remove()
        _same(models, True)
    assert len(found) == 1  # what has hooks is not looked into


def test_adapters_that_are_switched(monkeypatch):
    peft = pytest.importorskip("peft")
    found = _made(monkeypatch)

    def adapted():
        torch.manual_seed(1)
        options = {"task_type": "CAUSAL_LM", "lora_dropout": 0.1}
        model = peft.get_peft_model(
            build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
        )
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], **options))
        for path, p in model.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(p, std=0.3)
        return model.eval()

    theirs, ours = adapted(), adapted()
    (program,) = bigkernels.patch(ours).programs.values()
    edits = [
        lambda m: None,
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ]
    seen = []
    for edit in edits:
        results = []
        for model in (theirs, ours):
            edit(model)
            with torch.no_grad():
                results.append(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)
        assert (program.taken, program.left) == (len(seen) + 1, 0), program.why
        seen.append(results[1])
    for same in ((1, 3), (0, 4), (4, 6)):
        torch.testing.assert_close(*(seen[i] for i in same), rtol=0, atol=1e-4)
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    assert len(found) <= 5  # of seven states, some came back


def test_old_weights_are_let_go(models: Pair):
    model = models.ours
    _same(models, True)
    old = weakref.ref(model.lm_head.weight)
    model.lm_head = copy.deepcopy(model.lm_head)
    _same(models, True)
    gc.collect()
    assert old() is None


def test_a_model_goes_away():
    model = build("llama")
    bigkernels.patch(model)
    generate(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_class_level_edits(models: Pair, monkeypatch):
    kind = type(models.ours.model.layers[0].mlp)
    _same(models, True)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) * 2)
    _same(models, True)
    monkeypatch.undo()
    _same(models, True)


def test_another_class(models: Pair):
    class Doubled(type(models.ours.model.norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    _same(models, True)
    for model in (models.theirs, models.ours):
        bigkernels.unpatch(model)
        model.model.norm.__class__ = Doubled
    bigkernels.patch(models.ours)
    with torch.no_grad():
        theirs, ours = models.both(lambda model: model(input_ids=IDS).logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("native", [True, False])
def test_a_watch_sees_every_kind_of_edit(monkeypatch, native: bool):
    if not native:
        monkeypatch.setattr(_watch, "same_words", lambda: None)
        monkeypatch.setattr(_watch, "of_tensor", lambda t: None)
    elif _watch.same_words() is None:
        pytest.skip("there is no library, or this interpreter counts no versions of dictionaries")

    class Options:
        scale = 1.0

        def __init__(self):
            self.factor, self.kinds, self.table = 2.0, ["a", "b"], {"x": [1, 2]}

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 3)
            self.options, self.names, self.pair, self.chosen = Options(), [1, 2, 3], (1, [4]), {5}
            self.register_buffer("table", torch.arange(5.0))
            self.loose = torch.ones(3)
            self.big = torch.zeros(100_000)

    def edits(m):
        yield lambda: setattr(m, "eps", 1e-3)
        yield lambda: setattr(m, "eps", 1e-4)
        yield lambda: delattr(m, "eps")
        yield lambda: setattr(m.options, "factor", 3.0)
        yield lambda: setattr(m.options, "scale", 3.0)
        yield lambda: m.options.kinds.append("c")
        yield lambda: m.options.kinds.__setitem__(0, "z")
        yield lambda: m.options.table["x"].pop()
        yield lambda: m.options.table.update(y=1)
        yield lambda: m.names.clear()
        yield lambda: m.pair[1].append(7)
        yield lambda: m.chosen.add(6)
        yield lambda: m.__dict__.update(forward=print)
        yield lambda: m.register_forward_hook(print)
        yield lambda: m.inner.register_forward_pre_hook(print)
        yield lambda: setattr(m.inner, "weight", nn.Parameter(torch.ones(3, 2)))
        yield lambda: setattr(m.inner, "bias", None)
        yield lambda: setattr(m, "inner", nn.Linear(2, 3))
        yield lambda: m.add_module("more", nn.ReLU())
        yield lambda: m._modules.pop("more")
        yield lambda: setattr(m, "__class__", nn.Module)

    def tensor_edits(m):
        yield lambda: m.table.mul_(2)
        yield lambda: m.table.data.add_(1)
        yield lambda: m.table.numpy().__setitem__(2, 9)
        yield lambda: m.loose.zero_()
        yield lambda: m.big.add_(1)
        yield lambda: setattr(m.inner.weight, "data", torch.ones(3, 2))
        yield lambda: m.inner.to(torch.bfloat16)
        yield lambda: m.to("meta")

    m = Module()

    def watch():
        return _watch.Watch(_watch.Snapshot(m.modules()), list(m.parameters()))

    for number, edit in enumerate(edits(m)):
        seen = watch()
        assert seen.look() == seen.look() == _watch.Watch.SAME, number
        edit()
        assert seen.look() == _watch.Watch.TOUCHED, number
    m = Module()
    for number, edit in enumerate(tensor_edits(m)):
        seen = watch()
        assert seen.look() == _watch.Watch.SAME, number
        edit()
        assert seen.look() == (
            _watch.Watch.MOVED if number == 5 else _watch.Watch.TOUCHED if number == 7 else _watch.Watch.CHANGED
        ), number
    m = Module()
    seen = watch()
    m.inner.weight.data.add_(1)  # weights are read where they are
    m.train(), m.eval()
    m.names[0] = 1
    assert seen.look() == seen.look() == _watch.Watch.SAME
    assert seen.forgiven == (1 if native else 2)


# ---- copies, threads, outputs ----------------------------------------------------------------------------------------


def test_copies_find_their_own(models: Pair):
    _same(models, True)
    for copied in (copy.deepcopy(models.ours), pickle.loads(pickle.dumps(models.ours))):
        assert _steps(copied) is not _steps(models.ours) and not _steps(copied)._entries
        _same(Pair(models.theirs, copied), True)


def test_threads_share_a_model(models: Pair):
    expected = [generate(models.theirs, prompt(1, 6, seed=s)) for s in range(3)]
    made: list = [None] * 3

    def run(i):
        made[i] = generate(models.ours, prompt(1, 6, seed=i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(map(torch.equal, made, expected))


def test_outputs_have_memory_of_their_own(shared: Pair):
    with torch.no_grad():
        first = shared.ours(input_ids=IDS)
        kept = first.logits.clone()
        second = shared.ours(input_ids=IDS.flip(1), **{CACHE: None})
    assert torch.equal(first.logits, kept) and given(first) is not given(second)
    assert not first.logits.requires_grad and first.logits._version == 0 or True
    first.logits.zero_()


def test_more_than_logits_is_the_modules(monkeypatch):
    model = build("qwen3_moe")
    model.config.output_router_logits = True
    bigkernels.patch(model)
    with torch.no_grad(), uses_modules(model):
        assert model(input_ids=IDS).router_logits is not None


def test_a_program_that_differs_is_not_used(models: Pair, monkeypatch):
    monkeypatch.setattr(_verify, "_MODULES", -1.0)
    monkeypatch.setattr(_verify, "_ALLOWED", dict.fromkeys(_verify._ALLOWED, -1.0))
    with uses_modules(models.ours):
        models.same(generate)
    assert "other logits" in _steps(models.ours).why


def test_signature_and_unpatch(models: Pair):
    before = inspect.signature(models.theirs.forward)
    assert inspect.signature(models.ours.forward) == before
    _same(models, True)
    bigkernels.unpatch(models.ours)
    assert not {"forward", "_apply", _state.KEY} & models.ours.__dict__.keys()


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3, 20])
@pytest.mark.parametrize("past,tokens", [(0, 6), (4, 1), (5, 3)])
@pytest.mark.parametrize("starts", [[0, 0], [2, 0], [1, 4]])
def test_masks_of_slots(window: int, past: int, tokens: int, starts: list[int]):
    key, query = torch.arange(12), torch.arange(past, past + tokens)[:, None]
    begins = torch.tensor(starts)[:, None, None]
    mask = (key <= query) & (key >= begins)
    if window:
        mask &= key > query - window
    mask = mask[:, None]
    if not mask.any(-1).all() and tokens == 1:
        return
    found = starts_of(mask, 2, tokens, past, {window})
    again = (key <= query) & (key >= (torch.zeros(2, dtype=torch.long) if found is None else found)[:, None, None])
    assert torch.equal(again[:, None] & ((key > query - window) if window else True), mask)
    wrong = mask.clone()
    wrong[1, 0, -1, past + tokens - 1] = False
    with pytest.raises(Refusal):
        starts_of(wrong, 2, tokens, past, {window})
    if tokens == 6 and window != 20:
        with pytest.raises(Refusal):
            starts_of(mask, 2, tokens, past, {window + 1 if window else 2})
