"""Every family end to end: the report, outputs, loss, all gradients, and generation with a cache."""

from __future__ import annotations

import copy

import pytest
import torch

import bigkernels


def test_report_counts(case, count):
    report = bigkernels.patch(case.model)
    assert count(report) == case.family.patched
    assert report.skipped == []
    assert all(row.error is not None and row.error < 0.02 for row in report.patched)


def test_float32_step(case, run, assert_close):
    before = run(case.model, case.inputs)
    bigkernels.patch(case.model)
    assert_close(run(case.model, case.inputs), before)


def test_float32_step_in_training_mode(case, run, assert_close):
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = run(case.model, case.inputs)
    bigkernels.patch(case.model)
    assert_close(run(case.model, case.inputs), before)


def test_bfloat16_step_is_as_exact_as_before(case, run):
    """Against a float64 run, by the root mean square of each tensor's error."""
    exact = run(copy.deepcopy(case.model).double(), case.inputs, torch.float64)
    model = case.model.bfloat16()
    theirs = run(model, case.inputs, torch.bfloat16)
    bigkernels.patch(model)
    ours = run(model, case.inputs, torch.bfloat16)
    floor = 1e-3 * max(g.abs().max() for g in exact.gradients.values())
    for (name, a), (_, b), (_, e) in zip(ours.tensors(), theirs.tensors(), exact.tensors(), strict=True):
        assert a.dtype == b.dtype, name
        mine, base = ((t.double() - e).square().mean().sqrt() for t in (a, b))
        scale = max(e.square().mean().sqrt(), floor if name in exact.gradients else 0)
        assert mine <= 2 * base + 2**-8 * scale, name


def test_generation_with_a_cache(decoder):
    prompt = {"input_ids": decoder.inputs["input_ids"], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    prompt["attention_mask"][0, :4] = 0  # padded on the left
    options = dict(
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    before = decoder.model.generate(**prompt, **options)
    bigkernels.patch(decoder.model)
    after = decoder.model.generate(**prompt, **options)
    assert torch.equal(after.sequences, before.sequences)
    for ours, theirs in zip(after.logits, before.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("labels", ["shift_labels", "num_items_in_batch", "both"])
def test_loss_arguments(decoder, run, assert_close, labels):
    inputs = dict(decoder.inputs)
    if labels != "num_items_in_batch":
        inputs["shift_labels"] = inputs["labels"].roll(-1, 1)
    if labels != "shift_labels":
        inputs["num_items_in_batch"] = torch.tensor(31)
    before = run(decoder.model, inputs)
    bigkernels.patch(decoder.model)
    assert_close(run(decoder.model, inputs), before)


def test_no_float32_copy_of_the_logits(decoder, run):
    """The largest tensors that a bfloat16 loss makes are the logits' own size in bytes, or smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.numel() >= 24 * 199:
                    Largest.size = max(Largest.size, t.numel() * t.element_size())
            return out

    if torch.ops.bigkernels.cross_entropy_fwd is None or not _has_kernel():
        pytest.skip("the compiled library was not built")
    model = decoder.model.bfloat16()
    report = bigkernels.patch(model)
    assert any("cross_entropy" in row.what for row in report.patched)
    logits = torch.randn(2, 12, 199, dtype=torch.bfloat16, requires_grad=True)
    with Largest():
        model.loss_function(logits=logits, labels=decoder.inputs["labels"], vocab_size=199).backward()
    assert 0 < Largest.size <= 24 * 199 * 2


def _has_kernel() -> bool:
    from bigkernels._load import cpu_library

    return cpu_library().reason is None
