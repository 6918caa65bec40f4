"""Records made of graphs: run by an emulator that reads their addresses, they give what the model gives."""

from __future__ import annotations

import copy

import pytest
import torch
from handmade_graphs import llama
from record_emulator import Emulator
from torch import nn

import bigkernels
from bigkernels.nn import LoRALinear
from bigkernels.program import _ir as ir
from bigkernels.program import _records as records
from bigkernels.program import _reference
from bigkernels.program._fuse import Products, fuse
from bigkernels.program._lower import Lowered
from bigkernels.program._trace import Refused

transformers = pytest.importorskip("transformers")
BATCH, TOKENS = 2, 5


def _model(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    sizes = dict(
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=51,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval().to(dtype)


class _Run:
    """A `Run` of BATCH x TOKENS new tokens, by attributes."""

    def __init__(self, graph: ir.Graph, lowered: Lowered, keep: int = TOKENS) -> None:
        self.batch, self.tokens, self.past, self.keep, self.starts = BATCH, TOKENS, 0, keep, None
        self.held = torch.arange(TOKENS).expand(BATCH, -1).contiguous()
        self.positions = self.held.data_ptr()
        self.tables = [
            tuple(t[0].float().contiguous() for t in a.module(torch.zeros(1), torch.arange(9)[None]))
            for a in graph.angles
        ]
        self.angles = [records.AngleTable(c.data_ptr(), s.data_ptr(), 0, 0, c.shape[1], 9) for c, s in self.tables]
        attends = [o for o in graph.operations if isinstance(o, ir.Attend)]
        self.memory = [[torch.zeros(BATCH, o.groups, TOKENS, n) for n in (o.d, o.dv)] for o in attends]
        self.caches = [
            records.LayerCache(k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3], 0, TOKENS, 0)
            for k, v in self.memory
        ]


def _logits(graph: ir.Graph, lowered: Lowered, ids, keep: int = TOKENS):
    run = _Run(graph, lowered, keep)
    with torch.no_grad():
        return Emulator(lowered).run(graph.embed(ids, run.held), run, run.caches)


def _check(model: nn.Module, allowed: float = 1e-5) -> Lowered:
    ids = torch.randint(51, (BATCH, TOKENS))
    graph = llama(model)
    lowered = Lowered(graph, model.dtype)
    with torch.no_grad():
        expected = model(ids).logits.float()
    assert (_logits(graph, lowered, ids) - expected).abs().max() < allowed * expected.abs().max()
    return lowered


def _kinds(lowered: Lowered) -> list[int]:
    return [r.op for r in lowered.records]


def test_a_model():
    lowered = _check(_model())
    layer = [records.NORM, records.PRODUCT, records.HEADS, records.ATTEND, records.PRODUCT, records.NORM]
    layer += [records.PRODUCT, records.PRODUCT]
    assert _kinds(lowered) == 2 * layer + [records.KEEP, records.NORM, records.PRODUCT]
    products = [r.product for r in lowered.records if r.op == records.PRODUCT]
    assert [p.count for p in products] == [3, 1, 2, 1] * 2 + [1]
    assert [p.gated for p in products] == [0, 0, 1, 0] * 2 + [0]
    assert [p.residual >= 0 for p in products] == [False, True, False, True] * 2 + [False]
    assert not any(p.integers for p in products)
    assert len(lowered.widths) == len({v for v in range(len(lowered.widths))}) and lowered.widths[lowered.logits] == 51


def test_the_last_rows():
    model = _model()
    graph = llama(model)
    lowered = Lowered(graph, torch.float32)
    ids = torch.randint(51, (BATCH, TOKENS))
    torch.testing.assert_close(_logits(graph, lowered, ids, 2), _logits(graph, lowered, ids)[:, -2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype):
    _check(_model(dtype), 0.05)


def test_biases_of_another_dtype_and_tied_heads():
    model = _model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    for m in model.modules():
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.normal_(m.bias)
    _check(model)
    lowered = Lowered(llama(model.to(torch.bfloat16)), torch.bfloat16)
    assert {r.product.bias[0].type for r in lowered.records if r.op == records.PRODUCT and r.product.bias[0].data} == {
        1
    }


FORMATS = ["int8", "int4", "nf4", "fp4", "fp8", "q4_1", "q8_0", "int8-dynamic"]


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str):
    model = _model()
    bigkernels.quantize(model, name, skip=())
    lowered = _check(model, 0.15 if name == "int8-dynamic" else 1e-5)
    products = [r.product for r in lowered.records if r.op == records.PRODUCT]
    assert {p.integers for p in products} == {int(name == "int8-dynamic")}
    assert lowered.reads.formats == {name: 15}
    halves = Lowered(llama(model.to(torch.bfloat16)), torch.bfloat16)
    assert all(r.product.integers == 1 for r in halves.records if r.op == records.PRODUCT)
    assert Lowered(llama(model), torch.bfloat16, False).rounds == (name == "int8-dynamic")


def test_scaled_inputs():
    """AWQ's inputs are multiplied before the product, once for layers that share them."""
    model = _model()
    data = [torch.randint(51, (2, 16)) for _ in range(2)]
    bigkernels.quantize(model, bigkernels.quantization.Int4(32, "awq"), calibration=data)
    assert records.COMBINE in _kinds(_check(model))


def test_adapters():
    model = _model()
    LoRALinear.add_to(model, ("*q_proj", "*v_proj", "*down_proj"), rank=4)
    for m in model.modules():
        if isinstance(m, LoRALinear):
            nn.init.normal_(m.lora_b, std=0.3)
    lowered = _check(model)
    assert records.COMBINE not in _kinds(lowered)  # sums are in products


def test_rows_of_one_weight_as_gate_and_up():
    """Phi-3 has both in one layer."""
    model = _model()
    graph = ir.Graph()
    graph.hidden, joined, inner = graph.value(64), graph.value(144), graph.value(72)
    layer = nn.Linear(64, 144)
    for name in (None, "int8", "int4", "nf4", "q4_1", "q8_0", "fp8"):
        if name is not None:
            holder = nn.Sequential(copy.deepcopy(layer))
            bigkernels.quantize(holder, name)
        module = layer if name is None else holder[0]
        graph.operations = [
            ir.Product(graph.hidden, joined, module),
            ir.Activate(joined, inner, "gelu", 72, joined, 72, 0),
        ]
        graph.logits = inner
        lowered = Lowered(graph, torch.float32)
        assert _kinds(lowered) == [records.PRODUCT] and lowered.records[0].product.gated
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            expected = _reference.run(graph, x, torch.zeros(2, 3), _reference.Cache(0))
            made = Emulator(lowered).run(x, None, [])
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert model is not None


def test_views_of_weights_and_what_cannot_be_read():
    graph = ir.Graph()
    graph.hidden, graph.logits = graph.value(6), graph.value(4)
    layer = nn.Linear(6, 4, bias=False)

    def run():
        graph.operations = [ir.Product(graph.hidden, graph.logits, layer)]
        return Emulator(Lowered(graph, torch.float32)).run(x, None, [])

    x = torch.randn(1, 2, 6)
    values = torch.randn(4, 6)
    for view in (
        values.clone(),
        values.T.contiguous().T,
        torch.randn(4, 9)[:, 2:8].copy_(values),
        torch.randn(8, 6)[::2].copy_(values),
    ):
        layer.weight = nn.Parameter(view)
        torch.testing.assert_close(run(), x @ values.T)
    for view in (torch.randn(4, 12)[:, ::2], values.double(), values.to("meta")):
        layer.weight = nn.Parameter(view)
        with pytest.raises(Refused):
            run()


def test_sums():
    """A sum of three is two residuals; what is read twice, or stands for itself, is made."""
    product, other = nn.Linear(4, 4), nn.Linear(4, 4)
    widths = [4] * 6

    def fused(*operations, kept):
        return fuse(list(operations), list(widths), kept)

    a, b = ir.Product(0, 1, product), ir.Product(0, 2, other)
    both = fused(a, b, ir.Combine(3, ((0, 2.0, None), (1, 3.0, None), (2, 0.5, None))), kept=3)
    assert [type(o) for o in both] == [Products, Products]
    assert both[0].residual == 0 and both[0].out_scale == 3.0 and both[0].residual_scale == 2.0
    assert both[1].residual == both[0].outs[0] and both[1].out_scale == 0.5 and both[1].outs == (3,)
    first = ir.Combine(3, ((0, 1.0, None), (1, 1.0, None)))
    read_twice = fused(a, first, ir.Combine(4, ((1, 1.0, None), (3, 1.0, None))), kept=4)
    assert [type(o) for o in read_twice] == [Products, ir.Combine] and read_twice[1].terms[1:] == first.terms
    assert [type(o) for o in fused(a, first, kept=1)] == [Products, ir.Combine]
    norm = ir.Norm(1, 2, ir.NormSpec("rms", 4, 1e-5))
    posted = fused(a, norm, ir.Combine(3, ((0, 1.0, None), (2, 1.0, None))), kept=3)
    assert [type(o) for o in posted] == [Products, ir.Norm] and posted[1].residual == 0 and posted[1].out == 3
    activated = fused(a, ir.Activate(1, 2, "gelu", 4), kept=2)
    assert [o.act for o in activated] == ["gelu"]
    capped = fused(a, ir.Activate(1, 2, "identity", 4, softcap=3.0), kept=2)
    assert [type(o) for o in capped] == [Products, ir.Activate]


def test_many_products_of_one_input():
    widths = [4] * 8
    made = fuse([ir.Product(0, i + 1, nn.Linear(4, 4)) for i in range(6)], widths, 6)
    assert [len(o.outs) for o in made] == [4, 2]
