"""What users combine patching with: compilers, checkpointing, adapters, trainers, autocast and changes of dtype."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

import bigkernels


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "torch"])
def test_compiles_to_one_graph(get_case, name, run, assert_close):
    case = get_case(name)
    case.model.train() if name != "bert" else case.model.eval()  # BERT's dropout would draw other numbers
    before = run(case.model, case.inputs)
    bigkernels.patch(case.model)
    torch._dynamo.reset()
    # Without a code generator: what matters is that the whole patched model is traced.
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    options = {} if name in ("bert", "torch") else {"use_cache": False}
    after = run(compiled, case.inputs | options)
    after.gradients.update({k.removeprefix("_orig_mod."): after.gradients.pop(k) for k in list(after.gradients)})
    assert_close(after, before)


def test_patching_a_compiled_model(llama, run, assert_close):
    torch._dynamo.reset()
    compiled = torch.compile(llama.model, backend="eager")
    before = run(compiled, llama.inputs)
    bigkernels.patch(compiled)
    assert llama.model.model.norm.forward.func is not None
    assert_close(run(compiled, llama.inputs), before)
    bigkernels.unpatch(compiled)
    assert_close(run(compiled, llama.inputs), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["patch", "checkpointing"])
def test_gradient_checkpointing(llama, run, assert_close, reentrant, first):
    llama.model.train()
    before = run(llama.model, llama.inputs)
    calls = []

    def enable():
        llama.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    if first == "checkpointing":
        enable()
    bigkernels.patch(llama.model)
    if first == "patch":
        enable()
    llama.model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    assert_close(run(llama.model, llama.inputs), before)
    assert len(calls) == 2  # once forward, once recomputed


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora(llama, run, assert_close, first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "gate_proj", "down_proj", "lm_head"],
        lora_dropout=0.0,
        init_lora_weights=False,
        modules_to_save=["norm"],
    )
    if first == "patch":
        bigkernels.patch(llama.model)
    torch.manual_seed(3)
    model = peft.get_peft_model(llama.model, config)
    if first == "peft":
        report = bigkernels.patch(model)
        (row,) = report.skipped
        assert "the logits come from lm_head, a peft." in row.what
        assert any(row.path.endswith("layers.0.mlp") for row in report.patched)
    ours = run(model, llama.inputs)
    assert any("lm_head.lora_A" in name for name in ours.gradients)
    assert any("modules_to_save" in name for name in ours.gradients)
    bigkernels.unpatch(model)
    assert_close(ours, run(model, llama.inputs))


def test_trainer(llama, tmp_path, assert_bitwise):
    """Two steps with gradient accumulation, patched and not, give the same losses and weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"input_ids": torch.arange(i, i + 10), "labels": torch.arange(i, i + 10)} for i in range(3, 11)]
    start = {k: v.clone() for k, v in llama.model.state_dict().items()}
    losses, weights = [], []
    for patched in (False, True):
        llama.model.load_state_dict(start)
        if patched:
            bigkernels.patch(llama.model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=llama.model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        weights.append({k: v.clone() for k, v in llama.model.state_dict().items()})
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-5)


def test_dtype_changed_after_patching(case, run):
    """Nothing in a patch remembers a dtype: as exact as a model patched afterwards."""
    bigkernels.patch(case.model)
    case.model.bfloat16()
    early = run(case.model, case.inputs, torch.bfloat16)
    bigkernels.patch(case.model)
    late = run(case.model, case.inputs, torch.bfloat16)
    assert early.logits.dtype == late.logits.dtype
    assert torch.equal(early.logits, late.logits)
    assert torch.equal(early.loss, late.loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "vit", "torch"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(get_case, name, weights, run):
    """Dtypes are those of the unpatched model, and values differ by bfloat16 rounding."""
    case = get_case(name)
    case.model.to(weights)
    dtypes = {}

    def record(path, seen):
        return lambda module, args, out: seen.__setitem__(path, getattr(out, "dtype", None))

    steps = []
    for patched in (False, True):
        if patched:
            bigkernels.patch(case.model)
        seen = dtypes.setdefault(patched, {})
        handles = [
            m.register_forward_hook(record(path, seen))
            for path, m in case.model.named_modules()
            if "Norm" not in type(m).__name__
        ]
        with torch.autocast("cpu", torch.bfloat16):
            steps.append(run(case.model, case.inputs, weights))
        for handle in handles:
            handle.remove()
    common = set(dtypes[False]) & set(dtypes[True])
    assert len(common) > 5
    assert {p: dtypes[True][p] for p in common} == {p: dtypes[False][p] for p in common}
    theirs, ours = steps
    assert ours.logits.dtype == theirs.logits.dtype
    assert ours.loss.dtype == theirs.loss.dtype
    assert (ours.logits - theirs.logits).abs().max() < 0.05 * theirs.logits.abs().max()


def test_mixed_dtypes_keep_the_promoted_result(llama, get_case):
    """float32 weights and bfloat16 activations: Llama's norm promotes, Gemma's returns the input's dtype."""
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    for case in (llama, get_case("gemma2")):
        norm = case.model.model.norm
        before = norm(x)
        bigkernels.patch(case.model)
        assert torch.equal(norm(x), before)
        assert norm(x).dtype == before.dtype


def test_forward_under_vmap_and_jvp(llama):
    norm = llama.model.model.norm
    x, tangent = torch.randn(2, 4, 3, 64)
    rows = [torch.func.vmap(norm)(x), torch.func.jvp(norm, (x,), (tangent,))[1]]
    bigkernels.patch(llama.model)
    torch.testing.assert_close(torch.func.vmap(norm)(x), rows[0])
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (tangent,))[1], rows[1])


def test_functional_call_uses_the_given_parameters(llama):
    bigkernels.patch(llama.model)
    doubled = {name: 2 * p.detach() for name, p in llama.model.named_parameters()}
    call = functools.partial(torch.func.functional_call, llama.model, doubled, (llama.inputs["input_ids"],))
    ours = call().logits
    bigkernels.unpatch(llama.model)
    torch.testing.assert_close(ours, call().logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_accelerate_wraps_and_unwraps_a_rewritten_forward(get_case, run, name):
    """Mixed precision puts a wrapper around the whole model's forward, which here is a rewritten one, or has a step
    program around it."""
    accelerate = pytest.importorskip("accelerate")
    case = get_case(name)
    signature = inspect.signature(case.model.forward)
    bigkernels.patch(case.model)
    assert "forward" in vars(case.model)
    reset = functools.partial(accelerate.state.AcceleratorState._reset_state, reset_partial_state=True)
    reset()  # it is one for the process
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    try:
        wrapped = accelerator.prepare(case.model)
        assert list(inspect.signature(wrapped.forward).parameters) == list(signature.parameters)
        loss = run(wrapped, case.inputs).loss
        unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        torch.testing.assert_close(run(unwrapped, case.inputs).loss, loss, rtol=0.02, atol=0)
    finally:
        reset()
    bigkernels.unpatch(case.model)
    assert "forward" not in vars(case.model)
