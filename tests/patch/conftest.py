"""Tiny random models of every family that patching must support, built once, and how to run and compare them."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 199, 64, 2
DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ENCODER = dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4)


class TorchTransformer(nn.Module):
    """A classifier of sequences from plain torch.nn, its blocks with the norm after and before the sum.

    Its activation is smooth: the gradient of relu jumps where rounding moves a value across zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(HIDDEN, 4, 96, 0.0, "gelu", batch_first=True), LAYERS, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(HIDDEN, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True),
            LAYERS,
            norm=nn.LayerNorm(HIDDEN),
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        memory = self.encoder(self.embedding(input_ids))
        logits = self.head(self.decoder(self.embedding(input_ids), memory))
        if labels is None:
            return {"logits": logits}
        return {"loss": self.criterion(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _text() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3] = labels[1, :2] = -100
    return {"input_ids": ids, "labels": labels}


def _sentences() -> dict[str, Tensor]:
    return {"input_ids": _text()["input_ids"], "labels": torch.tensor([2, 0])}


def _images() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([1, 0])}


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    patched: dict[str, int]  # how often each kernel has to be in the report
    generates: bool = False


def _decoder(name: str, model: str, config: str, patched: dict[str, int], **options: Any) -> Family:
    return Family(name, _hf(model, config, **DECODER | options), _text, patched, generates=True)


ATTENTION = {"attention": 2, "attention mask": 1}
LOSS = {"cross_entropy (next token)": 1, "linear_cross_entropy": 1}
LLAMA = {"rms_norm": 5, "add + rms_norm": 2, "rope": 2, "glu (silu)": 2} | LOSS | ATTENTION
GEMMA = {"add + rms_norm (weight + 1)": 2, "rope": 2, "glu (gelu_tanh)": 2} | LOSS | ATTENTION
FAMILIES = {
    family.name: family
    for family in (
        _decoder("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA),
        _decoder("mistral", "MistralForCausalLM", "MistralConfig", LLAMA, sliding_window=5),
        _decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA),
        _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"rms_norm": 9}),
        _decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", GEMMA | {"rms_norm (weight + 1)": 9},
                 final_logit_softcapping=5.0, attn_logit_softcapping=10.0, query_pre_attn_scalar=16),
        _decoder("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | {"rms_norm (weight + 1)": 13},
                 query_pre_attn_scalar=16),
        _decoder("granite", "GraniteForCausalLM", "GraniteConfig", LLAMA, logits_scaling=4.0, residual_multiplier=1.0),
        _decoder("phi3", "Phi3ForCausalLM", "Phi3Config", LLAMA),
        _decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config",
                 {"rms_norm": 9, "rope": 2, "glu (silu)": 2} | LOSS | ATTENTION),
        _decoder("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", LLAMA, no_rope_layers=[1, 0]),
        Family("gpt2", _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS,
                           n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                           bos_token_id=1, eos_token_id=2),
               _text, {"layer_norm": 5} | LOSS | ATTENTION, generates=True),
        Family("gpt_neox", _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", vocab_size=VOCABULARY,
                               max_position_embeddings=64, bos_token_id=1, eos_token_id=2, rotary_pct=0.25,
                               use_parallel_residual=False,
                               **ENCODER),
               _text, {"layer_norm": 5, "rope": 2, "linear + gelu": 2} | LOSS | ATTENTION, generates=True),
        Family("bert", _hf("BertForMaskedLM", "BertConfig", vocab_size=VOCABULARY, max_position_embeddings=64,
                           **ENCODER),
               _text, {"layer_norm": 6, "add + layer_norm": 5, "cross_entropy": 1, "attention": 2, "linear + gelu": 3}),
        Family("bert_classifier", _hf("BertForSequenceClassification", "BertConfig", vocab_size=VOCABULARY,
                                      num_labels=3, max_position_embeddings=64, **ENCODER),
               _sentences, {"layer_norm": 5, "add + layer_norm": 5, "cross_entropy": 1, "attention": 2,
                            "linear + gelu": 2, "linear + tanh": 1}),
        Family("vit", _hf("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, num_labels=3,
                          **ENCODER),
               _images, {"layer_norm": 5, "add + layer_norm": 2, "linear + gelu": 2} | ATTENTION),
        Family("torch", TorchTransformer, _text,
               {"layer_norm": 11, "add + layer_norm": 10, "cross_entropy": 1, "attention": 6}),
    )
}  # fmt: skip


@functools.cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norm weights of exactly 0 or 1 would hide an offset
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass(frozen=True)
class Case:
    """A family and a copy of its model that a test may change."""

    family: Family
    model: nn.Module
    inputs: dict[str, Tensor]


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[request.param]
    return Case(family, copy.deepcopy(_built(request.param)), family.inputs())


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.generates])
def decoder(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[request.param]
    return Case(family, copy.deepcopy(_built(request.param)), family.inputs())


@pytest.fixture
def llama() -> Case:
    return Case(FAMILIES["llama"], copy.deepcopy(_built("llama")), FAMILIES["llama"].inputs())


@pytest.fixture
def get_case() -> Callable[[str], Case]:
    return lambda name: Case(FAMILIES[name], copy.deepcopy(_built(name)), FAMILIES[name].inputs())


@dataclass(frozen=True)
class Step:
    """What a forward and a backward pass gave."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "loss", self.loss
        yield "logits", self.logits
        yield from self.gradients.items()


def _run(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Step:
    model.zero_grad()
    if dtype is not None:
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(5)
    out = model(**inputs)
    out["loss"].backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(out["loss"].detach().clone(), out["logits"].detach().clone(), gradients)


@pytest.fixture
def run() -> Callable[..., Step]:
    return _run


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Equal up to float32 rounding, relative to each tensor's scale (gradients: at least 1e-3 of the largest)."""

    def check(ours: Step, theirs: Step, tolerance: float = 2e-5) -> None:
        assert set(ours.gradients) == set(theirs.gradients)
        floor = 1e-3 * max(g.abs().max() for g in theirs.gradients.values())
        for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert a.dtype == b.dtype, name
            scale = b.abs().max() if name in ("loss", "logits") else max(b.abs().max(), floor)
            assert scale > 0, name
            assert (a - b).abs().max() <= tolerance * scale, name

    return check


@pytest.fixture
def assert_bitwise() -> Callable[[Step, Step], None]:
    def check(ours: Step, theirs: Step) -> None:
        assert set(ours.gradients) == set(theirs.gradients)
        for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(a, b), name

    return check


@pytest.fixture
def count() -> Callable[[Any], dict[str, int]]:
    """How often each kernel is in a report."""
    return lambda report: dict(collections.Counter(row.what for row in report.patched))
