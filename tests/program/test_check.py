"""That a graph with a fault in one place is not given out, though weights are read once and mostly not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from program.models import any_build  # noqa: E402

import bigkernels  # noqa: E402
from bigkernels.program import _layers  # noqa: E402
from bigkernels.program._check import check  # noqa: E402
from bigkernels.program._find import find  # noqa: E402
from bigkernels.program._ir import Activate, Attend, Combine, Graph, Heads, HeadsOf, Norm, Product  # noqa: E402
from bigkernels.program._products import Drawn, Once  # noqa: E402
from bigkernels.program._trace import Refused  # noqa: E402


def _change(graph: Graph, kind: type, number: int, change: Callable) -> Graph:
    """A graph whose `number`th operation of a kind is another; operations that make the same values stay."""
    places = [i for i, op in enumerate(graph.operations) if isinstance(op, kind)]
    made = copy.copy(graph)
    made.operations = list(graph.operations)
    op = made.operations[places[number]]
    made.operations[places[number]] = change(made, op)
    assert made.operations[places[number]] != op
    return made


def _with(**changes: object) -> Callable:
    return lambda graph, op: replace(op, **changes)


def _other_row(graph: Graph, op: Product) -> Product:
    """Of the weight, by one part in a thousand."""
    module = copy.deepcopy(op.module)
    with torch.no_grad():
        module.weight[5] *= 1.001
    return replace(op, module=module)


def _other_base(graph: Graph, op: Heads) -> Heads:
    angles = graph.angles[op.angles]
    module = copy.deepcopy(angles.module)
    module.inv_freq = module.inv_freq * 1.001
    graph.angles = [*graph.angles, replace(angles, module=module)]
    return replace(op, angles=len(graph.angles) - 1)


def _swapped(graph: Graph, op: Heads) -> Heads:
    first, second, *rest = op.q.columns
    return replace(op, q=HeadsOf(op.q.x, (second, first, *rest), op.q.d))


# Of four layers, each with two norms, three products before and one after attention, two and one of its MLP, two sums.
FAULTS = {
    "eps": (Norm, 4, lambda graph, op: replace(op, spec=replace(op.spec, eps=2 * op.spec.eps))),
    "scale of a norm": (Norm, 5, _with(scale=1.001)),
    "scale of attention": (Attend, 2, lambda graph, op: replace(op, scale=1.01 * op.scale)),
    "window": (Attend, 2, _with(window=10)),
    "softcap": (Attend, 1, _with(softcap=50.0)),
    "rotary base": (Heads, 2, _other_base),
    "pairs of rotation": (Heads, 1, _with(interleaved=True)),
    "order of heads": (Heads, 2, _swapped),
    "activation": (Activate, 1, _with(act="gelu")),
    "weight of a sum": (
        Combine,
        3,
        lambda graph, op: replace(op, terms=((*op.terms[0][:1], 1.001, None), *op.terms[1:])),
    ),
    "a row of a layer": (Product, 7 * 2 + 4, _other_row),
    "a row of the head": (Product, -1, _other_row),
    "the weight of another layer": (
        Product,
        7 * 2,
        lambda graph, op: replace(op, module=[o for o in graph.operations if isinstance(o, Product)][7].module),
    ),
}


def _told(quantized: bool) -> tuple[nn.Module, Graph]:
    model = any_build("LlamaForCausalLM", num_hidden_layers=4, tie_word_embeddings=False)
    if quantized:
        bigkernels.quantize(model.model, bigkernels.quantization.Int8())
    graph = find(model)
    assert isinstance(graph, Graph), graph
    return model, graph


@pytest.fixture(scope="module")
def told() -> tuple[nn.Module, Graph]:
    return _told(False)


def test_what_was_found_passes(told):
    model, graph = told
    check(model, copy.copy(graph))
    assert graph.padded and graph.counted == (True, True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_place(told, fault):
    model, graph = told
    with pytest.raises(Refused, match="differs from the model"):
        check(model, _change(graph, *FAULTS[fault]))


def test_codes():
    model, graph = _told(True)
    check(model, copy.copy(graph))
    for fault in ("the weight of another layer", "a row of the head"):
        with pytest.raises(Refused, match="differs from the model"):
            check(model, _change(graph, *FAULTS[fault]))


def test_positions_that_are_not_those_of_places(told):
    """A model that counts from another number where positions are not given."""
    model, graph = told
    model, before = model.model, type(model.model)
    owner = told[0]

    class Odd(before):
        def forward(self, *args, position_ids=None, **kwargs):
            if position_ids is None:
                ids, past = kwargs["input_ids"], kwargs["past_key_values"].get_seq_length()
                places = torch.arange(past, past + ids.shape[1], dtype=torch.int64, device=ids.device)
                position_ids = (places * 2).expand(ids.shape[0], -1)
            return super().forward(*args, position_ids=position_ids, **kwargs)

    model.__class__ = Odd
    try:
        found = copy.copy(graph)
        check(owner, found)
        assert found.counted == (False, False)
    finally:
        model.__class__ = before


def test_weights_are_read_once(told, monkeypatch):
    model, graph = told
    read = []

    def computed(module, x, of=_layers.computed):
        read.append(module)
        return of(module, x)

    monkeypatch.setattr("bigkernels.program._products.computed", computed)
    assert isinstance(find(model), Graph)
    linear = [m for m in model.modules() if _layers.is_linear(m)]
    assert sorted(map(id, read)) == sorted(map(id, linear))


def test_once_computes_what_differs():
    seen = torch.tensor([[False, True, True], [True, True, True]])
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6, dtype=torch.float64)
    once = Once(seen)
    first = once(layer, x)
    other = x.clone()
    other[0, 0] += 1  # padding
    assert torch.equal(once(layer, other), first)
    other[1, 2, 4] += 1e-7
    expected = torch.nn.functional.linear(other, layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(once(layer, other), expected, rtol=1e-12, atol=1e-12)
    flat = once(layer, x.flatten(0, 1) * 2)
    torch.testing.assert_close(flat, _layers.computed(layer, 2 * x.flatten(0, 1)), rtol=1e-12, atol=1e-12)
    assert torch.equal(once(layer, x).view(-1, 5), first.view(-1, 5))
    nothing = torch.full_like(x, float("nan"))
    assert once(layer, nothing).isnan().all()


def test_drawn_products_differ_between_layers():
    drawn, x = Drawn(), torch.randn(2, 3, 6, dtype=torch.float64)
    layers = [nn.Linear(6, n) for n in (4, 6, 20)] + [nn.Linear(6, 6, bias=False)]
    for layer in layers:
        y = drawn(layer, x)
        assert y.shape == (2, 3, layer.out_features) and y.is_contiguous()
        assert torch.equal(drawn(layer, x), y)
        assert torch.equal(drawn(layer, x[:, 1:2]), y[:, 1:2])
    assert not torch.allclose(drawn(layers[1], x) - layers[1].bias.double(), drawn(layers[3], x))
