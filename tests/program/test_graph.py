"""What `find` makes of models: the operations, run by the reference interpreter, against the models in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from decoders import spread  # noqa: E402
from program.models import any_build, causal, small  # noqa: E402

import bigkernels  # noqa: E402
from bigkernels.program._find import find  # noqa: E402
from bigkernels.program._ir import Activate, Attend, Call, Combine, Experts, Graph, Heads, Keep, Norm  # noqa: E402
from bigkernels.program._record import arguments  # noqa: E402
from bigkernels.program._reference import Cache, run  # noqa: E402

NAMED = """
LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM
Gemma3ForCausalLM Phi3ForCausalLM Olmo2ForCausalLM SmolLM3ForCausalLM GraniteForCausalLM CohereForCausalLM
GPT2LMHeadModel GPTNeoXForCausalLM Starcoder2ForCausalLM FalconForCausalLM MixtralForCausalLM Qwen2MoeForCausalLM
Qwen3MoeForCausalLM
""".split()
MORE = """
PhiForCausalLM StableLmForCausalLM OPTForCausalLM BloomForCausalLM MptForCausalLM GptOssForCausalLM GPTJForCausalLM
GPTBigCodeForCausalLM Cohere2ForCausalLM NanoChatForCausalLM PersimmonForCausalLM ApertusForCausalLM GlmForCausalLM
BertLMHeadModel
""".split()

TWO = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
FOUR = {"SmolLM3ForCausalLM", "Cohere2ForCausalLM"}  # whose fourth layer is another


def found(model: nn.Module) -> Graph:
    graph = find(model)
    assert isinstance(graph, Graph), graph
    return graph


def assert_computes(model: nn.Module, graph: Graph, pieces=(9, 1, 3), starts=None, tolerance=1e-5) -> None:
    """The graph's logits are those of a copy of the model in float64, call after call with a cache."""
    exact = copy.deepcopy(model).double() if starts is None else copy.deepcopy(model)  # hidden rows are NaN in float64
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # grouped products know no float64
    theirs, ours, past = transformers.DynamicCache(), Cache(graph.layers), 0
    batch = 2 if starts is not None else 1
    generator = torch.Generator().manual_seed(3)
    name = arguments(model)["cache"]
    for length in pieces:
        ids = torch.randint(8, 150, (batch, length), generator=generator)
        positions = torch.arange(past, past + length).expand(batch, -1)
        given = {"input_ids": ids, name: theirs, "use_cache": True}
        seen = torch.ones(batch, length, dtype=torch.bool)
        if starts is not None:
            given["attention_mask"] = (torch.arange(past + length) >= starts[:, None]).long()
            seen = torch.arange(past, past + length) >= starts[:, None]
            if graph.position_ids:
                positions = (positions - starts[:, None]).clamp_min(0)
        if graph.position_ids:
            given["position_ids"] = positions
        with torch.no_grad():
            want = exact(**given).logits
            got = run(graph, graph.embed(ids, positions).double(), positions, ours, starts=starts)
        assert (got - want)[seen].abs().max() <= tolerance * want[seen].abs().max()
        past += length


def test_norms_of_heads_with_weights_of_their_own():
    """Weights (heads, d), which scale what a norm without a weight gives."""
    for groups in (1, 2, 4):
        sizes = dict(num_attention_heads=4, num_key_value_heads=groups, use_qk_norm=True)
        model = spread(any_build("CohereForCausalLM", **TWO, **sizes))
        graph = found(model)
        assert any(isinstance(op, Combine) and any(c is not None for *_, c in op.terms) for op in graph.operations)
        assert_computes(model, graph)


def test_windows_of_one_token():
    """Which caches of transformers do not keep; the attention is the modules', or all is."""
    model = any_build("MistralForCausalLM", **TWO, sliding_window=1)
    reason = find(model)
    if isinstance(reason, Graph):
        assert not any(isinstance(op, Attend) for op in reason.operations)
    else:
        assert "sees itself alone" in reason


@pytest.mark.parametrize("name", NAMED + MORE)
def test_family(name):
    model = any_build(name, **({} if name in FOUR else TWO))
    graph = found(model)
    assert_computes(model, graph)
    assert_computes(model, graph, (7, 1), torch.tensor([3, 0]), 1e-4)
    assert sum(isinstance(op, Attend) for op in graph.operations) == graph.layers
    assert sum(isinstance(op, Keep) for op in graph.operations) == 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_nothing_is_left_to_modules(name):
    assert not any(isinstance(op, Call) for op in found(any_build(name)).operations)


@pytest.mark.parametrize(
    "old",
    [
        {"new_decoder_architecture": False, "multi_query": True},
        {"alibi": True},
        {"new_decoder_architecture": True},
        {"parallel_attn": False},
    ],
)
def test_falcon(old):
    model = any_build("FalconForCausalLM", **old)
    graph = found(model)
    assert_computes(model, graph)
    attends = [op for op in graph.operations if isinstance(op, Attend)]
    assert all((op.alibi is not None) == bool(old.get("alibi")) for op in attends)


def test_head_norms_and_rotation_are_the_heads_own():
    graph = found(any_build("Qwen3ForCausalLM"))
    heads = [op for op in graph.operations if isinstance(op, Heads)]
    assert all(h.q_norm is not None and h.k_norm is not None and h.rotary == 16 and not h.interleaved for h in heads)
    assert len(graph.angles) == 1 and graph.angles[0].table


def test_windows_and_sinks():
    attends = [op for op in found(any_build("GptOssForCausalLM")).operations if isinstance(op, Attend)]
    assert {op.window for op in attends} == {0, 5}
    assert all(op.sinks is not None for op in attends)


def test_a_window_longer_than_what_was_recorded():
    model = any_build("MistralForCausalLM", sliding_window=40, max_position_embeddings=128)
    graph = found(model)
    assert {op.window for op in graph.operations if isinstance(op, Attend)} == {40}
    assert_computes(model, graph, (60, 1))


def test_partly_rotated_interleaved_heads():
    heads = [op for op in found(any_build("GlmForCausalLM")).operations if isinstance(op, Heads)]
    assert all(h.interleaved and h.rotary == 8 and h.q.d == 16 for h in heads)


def test_experts():
    graph = found(any_build("MixtralForCausalLM"))
    experts = [op for op in graph.operations if isinstance(op, Experts)]
    assert experts and all(op.act == "silu" and op.renormalize and op.logits is not None for op in experts)


def test_scales_of_a_model():
    options = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 7.0,
    }
    model = any_build("GraniteForCausalLM", **options)
    graph = found(model)
    assert_computes(model, graph)
    assert {op.scale for op in graph.operations if isinstance(op, Attend)} == {0.3}


def test_softcaps():
    model = any_build("Gemma2ForCausalLM", final_logit_softcapping=11.0, attn_logit_softcapping=7.0)
    graph = found(model)
    assert {op.softcap for op in graph.operations if isinstance(op, Attend)} == {7.0}
    assert graph.operations[-1].softcap == 11.0 and isinstance(graph.operations[-1], Activate)


@pytest.mark.parametrize(
    "kind",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_angles_of_other_kinds(kind):
    model = any_build("LlamaForCausalLM", rope_parameters={"rope_theta": 1e4, **kind}, max_position_embeddings=16)
    graph = found(model)
    assert graph.angles[0].table == (kind["rope_type"] != "dynamic")
    assert_computes(model, graph, (9, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """In a model of 16 bits, constants are rounded as the model rounds them; the rest is exact."""
    model = any_build("Gemma3ForCausalLM").to(dtype)
    found(model)


def test_patched_and_unpatched_models_have_one_graph():
    model = any_build("LlamaForCausalLM")
    plain = found(model)
    bigkernels.patch(model)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    patched = found(model)
    assert [type(op) for op in patched.operations] == [type(op) for op in plain.operations]
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    bigkernels.unpatch(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_quantized(format):
    model = any_build("LlamaForCausalLM")
    bigkernels.quantize(model, format)
    found(model)


def test_adapters():
    peft = pytest.importorskip("peft")
    model = any_build("LlamaForCausalLM")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval().base_model.model
    graph = found(model)
    assert_computes(model, graph)


def test_nothing_is_kept_and_generators_stay():
    model = any_build("LlamaForCausalLM")
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    state = torch.get_rng_state()
    found(model)
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


# ---- what looks like a known model and is none


def refused(model: nn.Module, *words: str) -> None:
    reason = find(model)
    assert isinstance(reason, str)
    assert all(word in reason for word in words), reason


def test_a_bias_that_depends_on_the_position():
    model = any_build("LlamaForCausalLM")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)

    class Odd(kind):
        def forward(self, x):
            return super().forward(x) + 0.01 * torch.arange(x.shape[1])[:, None]

    mlp.__class__ = Odd
    refused(model)


def test_a_bias_that_depends_on_the_number_of_tokens():
    model = any_build("LlamaForCausalLM")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)

    class Odd(kind):
        def forward(self, x):
            return super().forward(x) * (1 + 0.01 * x.shape[1])

    mlp.__class__ = Odd
    refused(model)


def test_a_mixture_of_tokens():
    model = any_build("LlamaForCausalLM")
    mlp = model.model.layers[2].mlp
    kind = type(mlp)

    class Odd(kind):
        def forward(self, x):
            return super().forward(x.cumsum(1))

    mlp.__class__ = Odd
    refused(model)


def test_a_layer_that_sees_the_future_is_the_models_own():
    model = any_build("LlamaForCausalLM")
    attention = model.model.layers[0].self_attn
    kind = type(attention)

    class Odd(kind):
        def forward(self, *args, attention_mask=None, **kwargs):
            return super().forward(*args, attention_mask=torch.zeros(1, 1, 1, 1), **kwargs)

    attention.__class__ = Odd
    graph = found(model)
    assert graph.owned == {0} and [op.path for op in graph.operations if isinstance(op, Call)] == [
        "model.layers.0.self_attn"
    ]


def test_a_code_path_that_numbers_choose():
    model = any_build("LlamaForCausalLM")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)

    class Odd(kind):
        def forward(self, x):
            return super().forward(x) if x.abs().max() < 1e6 else x

    mlp.__class__ = Odd
    refused(model, "model.layers.1.mlp", "looks at numbers")


def test_hooks_and_other_forwards():
    model = any_build("LlamaForCausalLM")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out * 2)
    refused(model, "model.layers.1.mlp", "hooks")
    handle.remove()
    model.model.layers[0].mlp.forward = lambda x: x
    refused(model, "model.layers.0.mlp", "replaced")


def test_layers_that_are_one_module():
    """Two layers share all weights, and so the cache: the second reads what the first wrote."""
    model = any_build("LlamaForCausalLM")
    model.model.layers[1] = model.model.layers[0]
    graph = find(model)
    if isinstance(graph, Graph):
        assert_computes(model, graph)


def test_weights_that_are_shared():
    model = any_build("LlamaForCausalLM", tie_word_embeddings=True)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.down_proj.weight = first.down_proj.weight
    assert_computes(model, found(model))


def test_a_changed_model_has_another_graph():
    model = any_build("LlamaForCausalLM")
    found(model)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.25
    graph = found(model)
    assert 0.25 in {op.spec.eps for op in graph.operations if isinstance(op, Norm)}
    model.model.layers[2].self_attn.scaling = 0.5
    graph = found(model)
    assert [op.scale for op in graph.operations if isinstance(op, Attend)][2] == 0.5


def test_what_is_no_language_model():
    refused(nn.Linear(3, 3), "input_ids")


@pytest.mark.slow  # three minutes
def test_breadth(capsys):
    """How many of the causal language models of transformers that build small have a graph; prints why the others do
    not.
    """
    rows, count = [], 0
    for name in causal():
        try:
            model = small(name)
        except pytest.skip.Exception as skip:
            rows.append((name, f"not built: {skip}"))
            continue
        graph = find(model)
        count += isinstance(graph, Graph)
        rows.append((name, "found" if isinstance(graph, Graph) else graph))
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:45} {row.splitlines()[0][:160]}" for name, row in rows))
        print(f"{count} found")
    assert count >= 135
