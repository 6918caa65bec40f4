"""Unmodified `generate` of patched models gives the tokens of the models as transformers has them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from decoders import MODELS, VOCABULARY, WINDOW, Pair, build, generate, prompt, shared_pair, transformers, uses_program

import bigkernels

# In a batch padded left, the prompts' first tokens.
PADDED = prompt(3, 9).masked_fill(torch.arange(9) < torch.tensor([[0], [3], [6]]), 0)
REPETITIVE = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return shared_pair(request.param)


WAYS = {
    "greedy": dict(),
    "one token of prompt": dict(ids=prompt(1, 1)),
    "a long prompt": dict(ids=prompt(1, 70), new=5),
    "past the window": dict(new=3 * WINDOW),
    "padded left": dict(ids=PADDED),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=30, top_p=0.9),
    "several samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beams of a padded batch": dict(ids=PADDED, num_beams=2),
    "sampled beams": dict(num_beams=2, do_sample=True),
    "prompt lookup": dict(ids=REPETITIVE, prompt_lookup_num_tokens=3, new=16),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "guidance": dict(guidance_scale=1.5),
    "a prompt in chunks": dict(ids=prompt(1, 11), prefill_chunk_size=4),
    "without a cache": dict(use_cache=False, new=4),
    "static cache": dict(cache_implementation="static"),
    "static cache of a padded batch": dict(ids=PADDED, cache_implementation="static"),
    "static cache past the window": dict(new=3 * WINDOW, cache_implementation="static"),
    "offloaded cache": dict(cache_implementation="offloaded", new=4),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(pair: Pair, way: str):
    if way == "offloaded cache" and not torch.cuda.is_available():
        pytest.skip("transformers offloads to the CPU from GPUs")
    # A static window that has moved is the modules'.
    moves = "static" in way and getattr(pair.ours.config, "sliding_window", None)
    with contextlib.nullcontext() if moves else uses_program(pair.ours):
        pair.same(lambda model: generate(model, **WAYS[way]))


def test_sequences_that_end(pair: Pair):
    """Rows that met their end are padded; the others go on."""
    ids = prompt(4)
    ends = generate(pair.theirs, ids)[0, 7:9].tolist()
    made = pair.same(lambda model: generate(model, ids, eos_token_id=ends))
    assert (made == 0).any()


@pytest.mark.parametrize("assistant", ["patched", "itself", "early exit"])
def test_assistants(pair: Pair, assistant: str):
    """A draft model proposes tokens: several are checked at once, and the cache is cut back where they are wrong."""
    if assistant == "early exit":
        if not hasattr(getattr(pair.ours, "model", None), "layers"):
            pytest.skip("early exits are of models whose layers are model.layers")
        options = {"assistant_early_exit": 1}
        theirs, ours = pair.both(lambda model: _or_error(lambda: generate(model, **options)))
        assert torch.equal(theirs, ours) if isinstance(theirs, torch.Tensor) else theirs == ours
        return
    draft = pair.ours
    if assistant == "patched":
        draft = build("llama", seed=4)
        bigkernels.patch(draft)
    pair.same(lambda model: generate(model, assistant_model=draft, new=16))


def _or_error(run):
    try:
        return run()
    except Exception as error:  # noqa: BLE001  what the unpatched model raises, the patched one has to
        return type(error)


def test_streamer(pair: Pair):
    class Tokens:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    def run(model):
        streamer = Tokens()
        generate(model, streamer=streamer)
        return streamer.seen

    theirs, ours = pair.both(run)
    assert ours == theirs and len(ours) == 7 + 12 + 1


def test_embeddings_for_tokens(pair: Pair):
    def run(model):
        given = model.get_input_embeddings()(prompt(2))
        return generate(model, inputs_embeds=given, attention_mask=torch.ones(2, 7, dtype=torch.long))

    with uses_program(pair.ours):
        pair.same(run)


def test_scores_and_logits_that_are_returned(pair: Pair):
    def run(model):
        return generate(model, prompt(2), output_logits=True, output_scores=True, return_dict_in_generate=True)

    theirs, ours = pair.both(run)
    assert torch.equal(ours.sequences, theirs.sequences) and len(ours.logits) == 12
    for a, b in zip(ours.logits + ours.scores, theirs.logits + theirs.scores, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert len({logits.data_ptr() for logits in ours.logits}) == 12  # each has memory of its own


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_what_only_modules_can_give(pair: Pair, asked: str):
    def run(model):
        model.set_attn_implementation("eager")
        try:
            return generate(model, return_dict_in_generate=True, **{asked: True})
        finally:
            model.set_attn_implementation("sdpa")

    theirs, ours = pair.both(run)
    assert torch.equal(ours.sequences, theirs.sequences)
    name = asked.removeprefix("output_")
    for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_inference_mode(pair: Pair):
    @torch.inference_mode()
    def run(model):
        return generate(model, return_dict_in_generate=True)

    theirs, ours = pair.both(run)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(generate(pair.ours), ours.sequences)


def test_logits_to_keep(pair: Pair):
    ids = prompt(2)
    for keep in (0, 1, 3, torch.tensor([1, 4])):
        with torch.no_grad():
            theirs, ours = pair.both(lambda model, keep=keep: model(input_ids=ids, logits_to_keep=keep).logits)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")

    def run(model):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        made = pipe(["w5 w9", "w7 w8 w9 w10 w11"], batch_size=2, max_new_tokens=6, do_sample=False)
        return [line["generated_text"] for (line,) in made]

    theirs, ours = shared_pair("llama").both(run)
    assert ours == theirs and len(set(ours)) == 2


def test_custom_code_in_the_loop(pair: Pair):
    """Logits processors and stopping criteria see, and may write, what they are given."""

    def processor(ids, scores):
        scores[:, ids[0, -1]] = float("-inf")
        return scores

    def run(model):
        seen = []
        stop = transformers.StoppingCriteriaList([lambda ids, scores, **_: seen.append(ids.shape[1]) or len(seen) > 6])
        processors = transformers.LogitsProcessorList([processor])
        return generate(model, logits_processor=processors, stopping_criteria=stop)

    assert pair.same(run).shape[1] == 7 + 7


def test_tuples_and_positional_arguments(pair: Pair):
    ids = prompt()
    with torch.no_grad():
        theirs, ours = pair.both(lambda model: model(ids, return_dict=False))
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
