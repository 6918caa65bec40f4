"""Who computes what on GPUs: the table's logic, with devices that are not there."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import bigkernels
from bigkernels import _cli, allow_nondeterministic, functional
from bigkernels._compare import compare
from bigkernels._replaced import Watched
from bigkernels.ops import registry, routes
from bigkernels.ops.attention import OPERATOR
from bigkernels.ops.registry import Implementation

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
BF16 = torch.bfloat16


@pytest.fixture
def device(monkeypatch):
    """CPU tensors that pass for those of a GPU; sets its capability, and gives the calls of PyTorch's attention."""
    calls: list[dict] = []
    original = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        order = [int(b) for b in torch._C._get_sdp_priority_order()]
        calls.append(options | {"shape": tuple(q.shape), "first": SDPBackend(order[0]) if order[0] >= 0 else None})
        return original(q, k, v, **options)

    monkeypatch.setattr(routes.F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(routes, "_logged", set())

    def of(capability):
        monkeypatch.setattr(routes, "capability_of", lambda t: capability)
        return calls

    return of


def heads(length=40, size=64, dtype=BF16, h=4, hk=4, keys=None, grad=False):
    draw = torch.Generator().manual_seed(length)
    shapes = ((2, h, length, size), (2, hk, keys or length, size), (2, hk, keys or length, size))
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_(grad) for s in shapes]


def test_every_call_has_one_row_on_every_gpu():
    calls = {(row.operator, row.call) for row in routes.TABLE}
    for (operator, call), capability in itertools.product(calls, CAPABILITIES):
        rows = [r for r in routes.routes(capability) if (r.operator, r.call) == (operator, call)]
        assert len(rows) == 1, (operator, call, capability)
        assert routes.find(operator, call, capability) is rows[0]
    for row in routes.TABLE:
        assert row.evidence in ("measured", "published", "predicted") and row.source
        if row.evidence == "measured":  # by whom it can be looked up
            assert "benchmarks/results" in row.source


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("causal, hk", [(False, 4), (True, 4), (True, 1)])
def test_plain_attention_goes_to_pytorch(device, capability, causal, hk):
    calls = device(capability)
    q, k, v = heads(hk=hk)
    found = functional.attention(q, k, v, causal=causal, scale=0.2)
    assert [(c["is_causal"], c["enable_gqa"], c["scale"]) for c in calls] == [(causal, hk != 4, 0.2)]
    with bigkernels.use("reference"):
        plain = functional.attention(q, k, v, causal=causal, scale=0.2)
        exact = functional.attention(q.double(), k.double(), v.double(), causal=causal, scale=0.2)
    assert compare(found, plain, exact, roundings=4, scale="tensor").ok


@pytest.mark.parametrize(
    "options",
    [
        {"window": (5, 0)},
        {"softcap": 20.0},
        {"sinks": torch.zeros(4)},
        {"alibi_slopes": torch.ones(4)},
        {"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool)},
        {"bias": torch.zeros(1, 4, 40, 40)},
        {"prefix_lengths": torch.ones(2, dtype=torch.int32)},
        {"dropout_p": 0.1},
        {"return_lse": True},
        {"window": (-1, 3)},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_are_ours(device, options):
    calls = device((9, 0))
    functional.attention(*heads(dtype=torch.float32), **options)
    assert calls == []


@pytest.mark.parametrize("sizes", [{"size": 68}, {"size": 264}, {"keys": 50}], ids=str)
def test_so_are_shapes_that_pytorch_pads_or_aligns_otherwise(device, sizes):
    calls = device((9, 0))
    functional.attention(*heads(**sizes), causal=True)
    assert calls == []


def test_one_query_sees_all_keys_when_it_is_causal(device):
    calls = device((9, 0))
    q, k, v = heads(length=1, keys=33)
    found = functional.attention(q, k, v, causal=True)
    assert [c["is_causal"] for c in calls] == [False]
    assert compare(
        found,
        F.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
        roundings=4,
    ).ok


def test_gradients_stay_deterministic_unless_that_is_given_up(device):
    calls = device((9, 0))
    functional.attention(*heads(grad=True), causal=True).sum().backward()
    assert calls == []
    allow_nondeterministic()
    try:
        q, k, v = heads(grad=True)
        functional.attention(q, k, v, causal=True).square().sum().backward()
        assert len(calls) == 1
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        with bigkernels.use("reference"):
            functional.attention(*wide, causal=True).square().sum().backward()
        for t, w in zip((q, k, v), wide, strict=True):
            torch.testing.assert_close(t.grad.double(), w.grad, rtol=0.05, atol=0.05)
        torch.use_deterministic_algorithms(True)
        functional.attention(*heads(grad=True), causal=True)
        assert len(calls) == 1
    finally:
        torch.use_deterministic_algorithms(False)
        allow_nondeterministic(False)


def test_cudnn_comes_first_where_that_is_worth_setting(device, monkeypatch):
    monkeypatch.setattr(routes, "_MUCH", 80 * 80 * 8 * 64)
    for capability, first in (((9, 0), SDPBackend.CUDNN_ATTENTION), ((8, 0), SDPBackend.FLASH_ATTENTION)):
        calls = device(capability)
        functional.attention(*heads(length=80))
        functional.attention(*heads(length=70))
        assert calls[-2]["first"] == first
        assert calls[-1]["first"] == SDPBackend.FLASH_ATTENTION  # torch's order
    # FlashAttention 4 in the place of torch's, by `torch.nn.attention.activate_flash_attention_impl`.
    calls = device((9, 0))
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    functional.attention(*heads(length=80))
    assert calls[-1]["first"] == SDPBackend.FLASH_ATTENTION


def test_use_goes_before_the_table(device, monkeypatch):
    calls = device((9, 0))
    with bigkernels.use("cpu"):
        functional.attention(*heads())
    assert calls == []
    with pytest.raises(RuntimeError, match="'torch' was forced but runs on cuda tensors, not cpu"):
        with bigkernels.use("torch"):
            functional.attention(*heads())
    monkeypatch.setattr(OPERATOR, "implementations", (*OPERATOR.implementations[:2], Implementation("torch", "cpu")))
    monkeypatch.setattr(OPERATOR, "_choices", {})
    monkeypatch.setattr(OPERATOR, "_on_cpu", {})
    with bigkernels.use("torch"):
        functional.attention(*heads(grad=True, size=68))
        assert len(calls) == 1
        with pytest.raises(RuntimeError, match="'torch' was forced but this call is one with options"):
            functional.attention(*heads(), window=(3, 0))


def test_who_switched_fused_attention_off_gets_ours(device):
    calls = device((9, 0))
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        functional.attention(*heads())
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert calls == []


@pytest.mark.parametrize("broken", [{"k": (1, 4, 40, 64)}, {"v": (2, 4, 39, 64)}, {"k": (2, 3, 40, 64)}], ids=str)
def test_wrong_arguments_are_named_as_elsewhere(device, broken):
    device((9, 0))
    given = dict(zip("qkv", heads(), strict=True)) | {n: torch.ones(s, dtype=BF16) for n, s in broken.items()}
    with pytest.raises(ValueError, match="bigkernels.functional.attention: "):
        functional.attention(**given)


def test_the_first_choice_of_each_kind_is_logged(device, caplog):
    device((9, 0))
    with caplog.at_level(logging.INFO, logger="bigkernels"):
        for _ in range(2):
            functional.attention(*heads(length=200))
            functional.attention(*heads(), window=(3, 0))
    lines = [r.message for r in caplog.records if " on a GPU of capability 9.0" in r.message]
    assert [line.split(" (")[0] for line in lines] == ["attention, plain: cudnn", "attention, with options: triton"]
    assert "FlashAttention 3 paper" in lines[0]


def test_info_prints_the_table(capsys):
    assert {row["by"] for row in bigkernels.info()["routes"]} >= {"cudnn", "flash", "triton", "cublas", "_int_mm"}
    assert _cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "Routes on GPUs" in printed and "FlashAttention 3" in printed


def test_a_patched_model_keeps_what_it_had(device, monkeypatch):
    """Its own attention is PyTorch's: plain calls stay there, and those with padding come to our kernels."""
    from bigkernels.patch.rules import attention

    monkeypatch.setattr(attention, "_WATCHED", Watched())  # what notes the calls is no replacement of a user's
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 12))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    expected = [model(ids, attention_mask=m).logits for m in (None, padding)]
    bigkernels.patch(model)
    calls = device((9, 0))
    calls.clear()
    found = model(ids).logits
    assert len(calls) == 2 and calls[0]["is_causal"]
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    model.train()(ids, labels=ids).loss.backward()  # gradients too: the model promised no deterministic ones
    assert len(calls) == 4
    model.eval()
    found = model(ids, attention_mask=padding).logits
    assert len(calls) == 4
    torch.testing.assert_close(found[1], expected[1][1], rtol=1e-4, atol=1e-5)
    with bigkernels.use("cpu"):
        model(ids)
    assert len(calls) == 4


def test_nothing_changes_without_a_gpu():
    assert routes.capability_of(torch.ones(1)) is None and registry._forced is None
