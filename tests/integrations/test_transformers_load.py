"""`from_pretrained` that quantizes what it reads, and what it says of damaged folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import bigkernels
from bigkernels.nn import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from bigkernels.quantization import Int4

transformers = pytest.importorskip("transformers", minversion="5")

from integrations import models_saved as models  # noqa: E402

from bigkernels.integrations.transformers import Config  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(models.IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Plain models by kind."""
    folder = tmp_path_factory.mktemp("plain")
    for kind in ("plain", "tied", "experts"):
        models.plain(kind).save_pretrained(folder / kind, max_shard_size="60KB")
    return folder


@pytest.mark.parametrize("name", models.FORMATS)
@pytest.mark.parametrize("kind", ["plain", "tied", "experts"])
def test_as_quantized_by_hand(folders, name: str, kind: str):
    expected = models.made(name, kind)
    model = AutoModel.from_pretrained(folders / kind, quantization_config=Config(name, **models.options(kind)))
    assert torch.equal(logits(model), logits(expected))
    state = model.state_dict()
    for key, t in expected.state_dict().items():
        assert torch.equal(state[key], t), key
    assert model.is_quantized and not model.training
    if kind == "tied":
        assert model.lm_head.shares(model.model.embed_tokens) and isinstance(model.lm_head, QuantizedLinear)
    if kind == "experts":
        assert isinstance(model.model.layers[0].mlp.experts.down_proj, QuantizedExperts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("where", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_dtypes_and_devices(folders, tmp_path, dtype, where: dict):
    model = AutoModel.from_pretrained(
        folders / "tied", quantization_config=Config("int4", skip=(), embeddings=True), dtype=dtype, **where
    )
    wanted = torch.float32 if dtype == "auto" else dtype
    assert model.model.embed_tokens.dtype == model.model.layers[1].mlp.up_proj.dtype == wanted == logits(model).dtype
    by_hand = AutoModel.from_pretrained(folders / "tied", dtype=dtype)
    bigkernels.quantize(by_hand, "int4", skip=(), embeddings=True)
    assert torch.equal(logits(model), logits(by_hand))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path, **where)), logits(model))
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, **where)
    assert again.model.layers[0].mlp.up_proj.dtype == logits(again).dtype == torch.bfloat16
    assert again.model.layers[0].mlp.up_proj.scale.dtype == torch.float16


def test_patterns_options_and_names_of_formats(folders, tmp_path):
    formats = {"*mlp*": Int4(32, "rtn"), "*v_proj": None, "*": "nf4"}
    model = AutoModel.from_pretrained(
        folders / "plain", quantization_config=Config(formats, skip=("k_proj", "lm_head"))
    )
    expected = models.plain("plain")
    bigkernels.quantize(expected, formats, skip=("k_proj", "lm_head"))
    assert torch.equal(logits(model), logits(expected))
    config = Config.from_dict(json.loads(json.dumps(Config(formats, skip="k_proj").to_dict())))
    assert config.format == Config(formats).format and config.skip == ("k_proj",)
    assert Config.from_dict({"config": {"format": "int4", "group_size": 64}}).format == Int4(64)


def test_two_tied_weights_in_the_files(folders, tmp_path):
    """Older files have the weight of the embedding and of the head; where they differ, they are no tied ones."""
    from safetensors.torch import load_file, save_file

    model = models.plain("tied")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = Config("int8", skip=(), embeddings=True)
    for head in (state["model.embed_tokens.weight"].clone(), torch.randn(99, 64)):
        save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
        if torch.equal(head, state["model.embed_tokens.weight"]):
            again = AutoModel.from_pretrained(tmp_path, quantization_config=config)
            assert torch.equal(logits(again), logits(models.made("int8", "tied")))
        else:
            with pytest.raises((ValueError, RuntimeError)):
                AutoModel.from_pretrained(tmp_path, quantization_config=config)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(again.model.embed_tokens, QuantizedEmbedding)
    assert torch.equal(logits(again), logits(models.made("int8", "tied")))


def test_layers_that_no_file_has_stay_plain(folders):
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folders / "plain", quantization_config=Config("int8", skip=()), num_labels=3)
    assert type(model.score) is torch.nn.Linear and model.score.weight.std() > 0
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_peak_memory_is_the_quantized_model_and_two_layers(tmp_path):
    for name, width, layers in (("small", 64, 1), ("large", 384, 10)):
        config = transformers.LlamaConfig(
            vocab_size=99,
            hidden_size=width,
            intermediate_size=3 * width,
            head_dim=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
        for p in model.parameters():
            p.data = p.data[:1].expand_as(p).contiguous() if p.dim() > 1 else p.data
        model.save_pretrained(tmp_path / name)
        del model
    # Blocks are mapped one by one, so that what is freed is given back and what is kept apart is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    script = models.__file__.replace("models_saved", "peak_of_reading")
    found = subprocess.run(
        [sys.executable, script, str(tmp_path / "small"), str(tmp_path / "large"), *models.FORMATS],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [line.split() for line in found.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(models.FORMATS)
    for name, *numbers in lines:
        peak, held, layer = map(int, numbers)
        plain = 10 * layer
        assert held < 0.3 * plain and layer < 0.11 * plain, "the test would show nothing"
        assert peak <= held + 2 * layer, (name, peak, held, layer)


def test_refused_configurations(folders):
    for config, message in ((Int4(64, "gptq"), "is calibrated"), ("int5", "accepted are"), (None, "names no format")):
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(folders / "plain", quantization_config=Config(config))
    with pytest.raises(ValueError, match="newer bigkernels"):
        Config(version=99)
    with pytest.raises(ValueError, match="no such options"):
        Config({"format": "int8", "group_size": 3})


def damaged(folder, change) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.scale"), "has no tensor model.layers.1.mlp.up_proj.scale"),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.codes": s["model.layers.1.mlp.up_proj.codes"][:5].clone()}),
            "model.layers.1.mlp.up_proj.codes is torch.uint8 of shape",
        ),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.scale": s["model.layers.1.mlp.up_proj.scale"].float()}),
            "model.layers.1.mlp.up_proj.scale is torch.float32 of shape",
        ),
        (
            lambda s: s["model.layers.0.mlp.up_proj.scale"].fill_(float("nan")),
            "up_proj.scale holds a value that is not",
        ),
        (lambda s: s["model.layers.0.mlp.up_proj.format"].add_(1), "config.json and .*up_proj.format do not agree"),
    ],
    ids=["missing", "shape", "dtype", "nan", "format"],
)
def test_damaged_tensors_are_named(tmp_path, what, message: str):
    models.made("int4", "plain").save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_damaged_files_and_configs(tmp_path):
    models.made("int4", "lora").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    quantization = said["quantization_config"]
    for change in (
        {"formats": 3},
        {"formats": [{"format": "int4"}]},
        {"formats": [{"format": "int9", "layers": ["*"]}]},
        {"formats": [quantization["formats"][0] | {"group_size": 0}]},
        {"adapters": [{"rank": 1, "layers": quantization["adapters"][0]["layers"]}]},
        {"adapters": [quantization["adapters"][0] | {"dtype": "nn"}]},
        {"formats": [quantization["formats"][0] | {"format": "int8"}]},
        {"surprise": 1},
    ):
        (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": quantization | change}))
        with pytest.raises((ValueError, TypeError)):
            AutoModel.from_pretrained(tmp_path)


def test_attention_by_name(folders):
    """Also where scores are capped (Gemma 2), heads have sinks (gpt-oss), and a prompt is padded."""
    mask = torch.ones_like(models.IDS)
    mask[0, :3] = 0
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
    }
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    for model in (
        models.plain("plain"),
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, attn_logit_softcapping=0.3)),
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts)),
    ):
        model = model.eval()
        model.set_attn_implementation("eager")
        expected = model(models.IDS, attention_mask=mask).logits[:, 3:]
        model.set_attn_implementation("bigkernels")
        assert model.config._attn_implementation == "bigkernels"
        torch.testing.assert_close(model(models.IDS, attention_mask=mask).logits[:, 3:], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(
            model.generate(models.IDS, max_new_tokens=4, do_sample=False),
            (model.set_attn_implementation("eager"), model.generate(models.IDS, max_new_tokens=4, do_sample=False))[1],
        )
    model = AutoModel.from_pretrained(folders / "plain", attn_implementation="bigkernels")
    with pytest.raises(ValueError, match="no attention weights"):
        model(models.IDS, output_attentions=True)


def test_models_without_values(folders):
    """A skeleton on the meta device says what it would hold, and takes a state dict."""
    config = transformers.AutoConfig.from_pretrained(folders / "tied")
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config)
    bigkernels.quantize(skeleton, "nf4", skip=(), embeddings=True)
    filled = models.made("nf4", "tied")
    assert skeleton.hf_quantizer.quantization_config.to_dict() == filled.hf_quantizer.quantization_config.to_dict()
    skeleton.load_state_dict(filled.state_dict(), assign=True)
    assert all(torch.equal(t, filled.state_dict()[name]) for name, t in skeleton.state_dict().items())
