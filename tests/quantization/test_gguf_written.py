"""Models that came from no GGUF file, written into one: the same logits for `load_gguf` and for transformers."""

from __future__ import annotations

import json

import pytest
import torch

import bigkernels

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IDS = torch.arange(3, 27).view(2, 12)
MODELS = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "a tied llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_theta": 30000.0}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma2": ("Gemma2", {"head_dim": 256, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", {}),
    "stablelm": ("StableLm", {}),
    # Sizes that transformers reads from no file.
    "phi3": ("Phi3", {"vocab_size": 32064, "sliding_window": None, "num_key_value_heads": 4, "hidden_size": 32}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 3, "num_experts_per_tok": 2, "hidden_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "head_dim": 128, "norm_topk_prob": True}),
}


def make(name: str, **options):
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = config(**SIZES | more | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.3)
    return model


def loaded(path):
    ours = bigkernels.load_gguf(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return ours.eval(), theirs.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_the_same(name: str, tmp_path):
    model = make(name)
    path = tmp_path / "model.gguf"
    bigkernels.save_gguf(model, path)
    expected = logits(model)
    for again in loaded(path):
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(model.parameters(), loaded(path)[0].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-7, atol=1e-7)  # Gemma's norms are stored with 1 added


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types(type: str, tmp_path):
    model = make("llama")
    path = tmp_path / "model.gguf"
    bigkernels.save_gguf(model, path, type)
    ours, theirs = loaded(path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=2e-2)
    reader = gguf.GGUFReader(path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == type and kinds["output_norm.weight"] == "F32"
    # Rows of q_proj in the file's order, rounded by the package.
    raw = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    wide = gguf.quants.dequantize(raw.data, raw.tensor_type)
    rounded = gguf.quants.dequantize(
        gguf.quants.quantize(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), raw.tensor_type),
        raw.tensor_type,
    )
    torch.testing.assert_close(torch.from_numpy(wide.copy()), torch.from_numpy(rounded))
    found = theirs.model.layers[0].self_attn.q_proj.weight
    step = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(type, 0.15)
    assert (found - model.model.layers[0].self_attn.q_proj.weight).abs().max() < step


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "mxfp4", "nf4", "int8"])
@pytest.mark.parametrize("head", [False, True], ids=["head", "tied"])
def test_codes_are_kept(format: str, head: bool, tmp_path):
    model = make("llama", tie_word_embeddings=head)
    bigkernels.quantize(model, format, skip=(), embeddings=True)
    path = tmp_path / "model.gguf"
    bigkernels.save_gguf(model, path)
    ours, _ = loaded(path)
    if format in ("q8_0", "q4_1", "mxfp4"):
        assert torch.equal(logits(ours), logits(model))
        held = ours.model.layers[1].self_attn.k_proj.qweight.tensors
        assert all(
            torch.equal(held[key], t) for key, t in model.model.layers[1].self_attn.k_proj.qweight.tensors.items()
        )
    else:
        torch.testing.assert_close(logits(ours), logits(model), rtol=1e-3, atol=3e-2)
        q = model.model.layers[0].self_attn.q_proj
        torch.testing.assert_close(ours.model.layers[0].self_attn.q_proj.weight, q.qweight.dequantize(), rtol=0, atol=0)
    bigkernels.save_gguf(ours, tmp_path / "again.gguf")
    tensors = [
        {t.name: bytes(t.data) for t in gguf.GGUFReader(tmp_path / f).tensors} for f in ("model.gguf", "again.gguf")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "int4"])
def test_codes_of_experts(format: str, tmp_path):
    model = make("qwen3_moe")
    bigkernels.quantize(model, format, skip=(), filter=lambda name, module: "expert" in name)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, bigkernels.nn.QuantizedExperts)
    bigkernels.save_gguf(model, tmp_path / "model.gguf")
    ours, theirs = loaded(tmp_path / "model.gguf")
    expected = logits(model)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
    torch.testing.assert_close(logits(ours), expected, **tolerance)
    torch.testing.assert_close(logits(theirs), expected, **tolerance)
    for name in ("gate_up_proj", "down_proj"):
        held, ours_held = (getattr(m.model.layers[1].mlp.experts, name) for m in (model, ours))
        values = ours_held if format == "int4" else ours_held.dequantize()
        assert torch.equal(values, held.dequantize())


def scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def epsilon(model):
    model.model.norm.variance_epsilon = 0.1


def activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def angles(model):
    model.model.rotary_emb.inv_freq *= 0.5


def configuration(model):  # read when modules are made, so that the model computes as before
    model.config.rms_norm_eps = 0.1


@pytest.mark.parametrize("edit", [scaling, epsilon, activation, angles, configuration])
@pytest.mark.parametrize("source", ["anew", "a file"])
def test_edits_that_no_tensor_holds_are_refused(edit, source: str, tmp_path):
    model, path = make("llama"), tmp_path / "model.gguf"
    bigkernels.save_gguf(model, path)
    if source == "a file":
        model = bigkernels.load_gguf(path)
        assert bigkernels.save_gguf(model, path) is None
    bytes_before = path.read_bytes()
    edit(model)
    with pytest.raises(ValueError, match="readers of the file take"):
        bigkernels.save_gguf(model, path)
    assert path.read_bytes() == bytes_before and list(tmp_path.iterdir()) == [path]


def test_a_patched_and_packed_model_is_written(tmp_path):
    model, path = make("qwen3"), tmp_path / "model.gguf"
    expected = logits(model)
    bigkernels.patch(model)
    bigkernels.pack(model)
    logits(model)
    bigkernels.save_gguf(model, path)
    torch.testing.assert_close(logits(loaded(path)[0]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_is_written(dtype, tmp_path):
    """Whose angles the cast has rounded; a file has the exact ones."""
    model, path = make("qwen3").to(dtype), tmp_path / "model.gguf"
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    bigkernels.save_gguf(model, path)
    read = loaded(path)[0]
    for (name, ours), theirs in zip(model.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs.float()), name
    bigkernels.save_gguf(model.float(), path)
    model.model.rotary_emb.inv_freq *= 1.01
    with pytest.raises(ValueError, match="inv_freq"):
        bigkernels.save_gguf(model, path)


def test_pieces_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["the quick brown fox", "jumps over", "the lazy dogs of winter", "quickly brownish foxes", "überall"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    count = pieces.vocab_size()
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    config["added_tokens_decoder"] = {str(count): {"content": "<extra>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "written" / "model.gguf"
    path.parent.mkdir()
    bigkernels.save_gguf(make("llama", vocab_size=count + 2), path, tokenizer=tmp_path)
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:count] == [pieces.id_to_piece(i) for i in range(count)]
    assert tokens[count:] == ["<extra>", f"[PAD{count + 1}]"]
    assert fields["tokenizer.ggml.token_type"].contents()[-2:] == [3, 5]
    assert fields["tokenizer.ggml.scores"].contents()[:count] == [pieces.get_score(i) for i in range(count)]
    assert fields["tokenizer.ggml.add_space_prefix"].contents() and fields["tokenizer.ggml.model"].contents() == "llama"
    read = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the brown fox jumps überquick ß"
    assert read(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def tokenizer(folder, **changes):
    tokens = [chr(c) for c in range(33, 127)] + ["t0", "t0t", "Ġ"]
    cuts = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    read = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [["t", "0"], ["t0", "t"]]},
        "added_tokens": [{"id": 97, "content": "<|end|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
    }
    (folder / "tokenizer.json").write_text(json.dumps(read | changes))
    config = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_vocabulary_from_a_folder_and_from_a_file(tmp_path):
    model, path, other = make("qwen2"), tmp_path / "model.gguf", tmp_path / "other.gguf"
    bigkernels.save_gguf(model, path, "Q8_0", tokenizer=tokenizer(tmp_path))
    fields = gguf.GGUFReader(path).fields
    said = {
        key: fields[f"tokenizer.{key}"].contents()
        for key in (
            "ggml.model",
            "ggml.pre",
            "ggml.tokens",
            "ggml.merges",
            "ggml.token_type",
            "ggml.eos_token_id",
            "chat_template",
        )
    }
    assert said["ggml.model"] == "gpt2" and said["ggml.pre"] == "smollm" and said["ggml.eos_token_id"] == 97
    assert said["ggml.tokens"][94:] == ["t0", "t0t", "Ġ", "<|end|>", "[PAD98]"]
    assert said["ggml.merges"] == ["t 0", "t0 t"] and said["ggml.token_type"][-3:] == [1, 3, 5]
    assert said["chat_template"] == "{{ messages }}"
    bigkernels.save_gguf(model, other, tokenizer=path)
    again = gguf.GGUFReader(other).fields
    assert all(again[key].contents() == fields[key].contents() for key in fields if key.startswith("tokenizer."))
    ours, _ = loaded(other)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "the rotary embedding is"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_no_file_says_is_refused(options, message: str, tmp_path):
    with pytest.raises(ValueError, match=message):
        bigkernels.save_gguf(make("llama", **options), tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


def test_refused(tmp_path):
    path, model = tmp_path / "no.gguf", make("llama")
    for call, message in (
        (lambda: bigkernels.save_gguf(model, path, "Q4_K"), "type is 'Q4_K'"),
        (lambda: bigkernels.save_gguf(model, path, tokenizer=tmp_path), "has no tokenizer.json"),
        (lambda: bigkernels.save_gguf(make("mistral", sliding_window=32), path), "sliding_window is 32"),
        (lambda: bigkernels.save_gguf(torch.nn.Linear(2, 2), path), "Linear came from no GGUF file"),
        (
            lambda: bigkernels.save_gguf(
                model, path, tokenizer=tokenizer(tmp_path, pre_tokenizer={"type": "Whitespace"})
            ),
            "is not known here",
        ),
        (lambda: bigkernels.save_gguf(make("llama", vocab_size=50), path, tokenizer=tokenizer(tmp_path)), "98 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="has no place for model.layers.0.mlp.extra.weight"):
        bigkernels.save_gguf(model, path)
    assert not path.exists()


def lfm2(path, architecture="lfm2"):
    """An LFM2 of short convolutions and attention, written tensor by tensor."""
    from bigkernels.gguf._state import _names

    config = transformers.Lfm2Config(
        **SIZES | {"num_hidden_layers": 3},
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
    )
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    parameters, writer = dict(model.named_parameters()), gguf.GGUFWriter(path, architecture)
    for key, value in {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "vocab_size": 99,
        "attention.head_count": 4,
        "shortconv.l_cache": config.conv_L_cache,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_array(f"{architecture}.attention.head_count_kv", [0, 2, 0])
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(99)])
    for name, target in _names("lfm2", 3, parameters).items():
        values = parameters[target].detach().numpy()
        values = values.squeeze(1) if "shortconv.conv" in name else values
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 and values.shape[1] % 32 == 0 else None
        writer.add_tensor(name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(not hasattr(transformers, "Lfm2Config"), reason="this version of transformers has no LFM2")
def test_short_convolutions(tmp_path):
    path = tmp_path / "model.gguf"
    lfm2(path)
    ours, theirs = loaded(path)
    assert isinstance(ours.model.layers[0].conv.in_proj, bigkernels.nn.QuantizedLinear)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    bigkernels.save_gguf(ours, tmp_path / "again.gguf")
    tensors = [{t.name: bytes(t.data) for t in gguf.GGUFReader(p).tensors} for p in (path, tmp_path / "again.gguf")]
    assert tensors[0] == tensors[1]


def test_conversions_that_are_not_known_are_refused(tmp_path):
    pytest.importorskip("transformers.integrations.gguf")
    path = tmp_path / "model.gguf"
    lfm2(path, "qwen35")
    with pytest.raises(ValueError, match="the architecture qwen35, whose tensors are converted in ways"):
        bigkernels.load_gguf(path)
