"""`Trainer` with `TrainerCallback`: patched models, optimizers by name, figures in the logs."""

from __future__ import annotations

import pickle

import pytest
import torch

import bigkernels
from bigkernels import optim
from bigkernels.nn import LoRALinear

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")
pytest.importorskip("transformers.trainer_optimizer")

from integrations import trained  # noqa: E402

from bigkernels.integrations.transformers import TrainerCallback, optimizer_cls_and_kwargs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(folder, model=None, callbacks=None, data=None, **options) -> transformers.Trainer:
    kept = {
        key: options.pop(key)
        for key in list(options)
        if key in ("optimizers", "optimizer_cls_and_kwargs", "model_init", "eval_dataset", "compute_loss_func")
    }
    if model is None and "model_init" not in kept:
        model = trained.llama()
    callbacks = [TrainerCallback()] if callbacks is None else callbacks
    return transformers.Trainer(
        model, trained.arguments(folder, **options), train_dataset=data or trained.rows(), callbacks=callbacks, **kept
    )


def parameters(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- optimizers by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "expected"),
    [
        ("adamw", None, optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-7, "lr": 0.01}),
        (
            "adamw_8bit",
            "cautious=true, ema_decay=0.9",
            optim.AdamW,
            {"state_dtype": "int8", "cautious": True, "ema_decay": 0.9},
        ),
        ("adam_16bit", "rounding=kahan", optim.Adam, {"state_dtype": torch.bfloat16, "rounding": "kahan"}),
        ("lion", None, optim.Lion, {"betas": (0.8, 0.95)}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", "alpha=0.5", optim.RMSprop, {"alpha": 0.5}),
        ("adagrad", "state_dtype=bfloat16", optim.Adagrad, {"state_dtype": torch.bfloat16}),
        ("lamb_8bit", None, optim.LAMB, {"eps": 1e-7, "state_dtype": "int8"}),
        ("muon", {"adamw_lr": 3e-4}, optim.Muon, {"lr": 0.01, "adamw_lr": 3e-4, "weight_decay": 0.25}),
    ],
    ids=str,
)
def test_optimizers_by_name(tmp_path, name: str, arguments, kind: type, expected: dict):
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.25}
    name = f"bigkernels_{name}"
    made = []
    text = arguments if isinstance(arguments, (str, type(None))) else ",".join(f"{k}={v}" for k, v in arguments.items())
    made.append(trainer(tmp_path, callbacks=[], optim=name, optim_args=text, **adam))
    made.append(trainer(tmp_path, callbacks=[TrainerCallback(False, optim=name, optim_args=arguments)], **adam))
    args = trained.arguments(tmp_path, **adam)
    if name != "bigkernels_muon":
        given = optimizer_cls_and_kwargs(name, args, None if text == arguments else arguments)
        if arguments is None or text != arguments:
            made.append(trainer(tmp_path, callbacks=[], optimizer_cls_and_kwargs=given, **adam))
    for t in made:
        found = t.create_optimizer()
        assert type(found) is kind
        assert {key: found.defaults[key] for key in expected} == expected
        assert {p for group in found.param_groups for p in group["params"]} == set(t.model.parameters())
        decays = {group["weight_decay"] for group in found.param_groups}
        assert decays == ({0.25} if kind is optim.Muon else {0.25, 0.0})  # the trainer leaves norms out


def test_the_numbers_are_those_of_torchs_adamw(tmp_path):
    runs = []
    for name in ("adamw_torch", "bigkernels_adamw"):
        t = trainer(tmp_path, callbacks=[], optim=name, weight_decay=0.1)
        t.train()
        runs.append(trained.losses(t))
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-5, atol=1e-5)


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="bigkernels_adamw_8bit"):
        TrainerCallback(optim="adamw_8bit")
    with pytest.raises(ValueError, match="optim is not"):
        TrainerCallback(optim_args={"momentum": 1})
    with pytest.raises(ValueError, match="bigkernels_nothing"):
        trained.arguments(tmp_path, optim="bigkernels_nothing")
    with pytest.raises(ValueError, match="accepted are"):
        optimizer_cls_and_kwargs("bigkernels_nothing", trained.arguments(tmp_path))
    with pytest.raises(ValueError, match="names and values"):
        optimizer_cls_and_kwargs("bigkernels_sgd", trained.arguments(tmp_path, optim_args="momentum"))
    with pytest.raises(TypeError, match="momentum"):
        trainer(tmp_path, optim="bigkernels_adamw", optim_args="momentum=1").create_optimizer()
    args = trained.arguments(tmp_path, optim="bigkernels_lion_8bit")
    assert pickle.loads(pickle.dumps(args)).optim == args.optim == "bigkernels_lion_8bit"
    assert args.to_dict()["optim"] == "bigkernels_lion_8bit"


def test_another_optimizer_than_asked_for_is_said(tmp_path):
    model = trained.llama()
    for given in (
        {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    ):
        t = trainer(tmp_path, model, [TrainerCallback(optim="bigkernels_adamw")], **given)
        with pytest.raises(ValueError, match="the trainer has a SGD"):
            t.train()
    t = trainer(
        tmp_path,
        model,
        [TrainerCallback(optim="bigkernels_adamw")],
        optimizers=(optim.AdamW(model.parameters(), 1e-3), None),
    )
    t.train()


# ---- patching --------------------------------------------------------------------------------------------------------


def test_a_patched_run_is_the_plain_one(tmp_path):
    plain = trainer(tmp_path, callbacks=[])
    plain.train()
    patched = trainer(tmp_path, callbacks=[TrainerCallback()])
    patched.train()
    torch.testing.assert_close(*(torch.tensor(trained.losses(t)) for t in (plain, patched)), rtol=1e-4, atol=1e-4)
    bigkernels.unpatch(patched.model)
    assert all("forward" not in module.__dict__ for module in patched.model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_the_trainer(tmp_path, options: dict):
    uncompiled = {key: value for key, value in options.items() if "compile" not in key}  # it takes seconds
    plain = trainer(tmp_path, trained.llama(num_hidden_layers=1), [], **uncompiled)
    plain.train()
    callback = TrainerCallback()
    found = trainer(tmp_path, trained.llama(num_hidden_layers=1), [callback], **options)
    found.train()
    assert callback.report.patched
    bound = 0.02 if "bf16" in options else 1e-3
    torch.testing.assert_close(*(torch.tensor(trained.losses(t)) for t in (plain, found)), rtol=bound, atol=bound)


def test_accumulated_batches_of_several_lengths_weigh_tokens(tmp_path):
    """`num_items_in_batch`: four short batches are one long one."""
    runs = []
    for options in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        t = trainer(tmp_path, max_steps=3, optim="sgd", learning_rate=0.5, **options)
        t.train()
        runs.append(parameters(t.model))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_of_ours_beside_theirs(tmp_path):
    runs = []
    for ours in (False, True):
        model = trained.llama()
        if ours:
            bigkernels.checkpointing.apply_checkpointing(model, "recompute")
        t = trainer(tmp_path, model, gradient_checkpointing=True)
        t.train()
        runs.append(trained.losses(t))
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_patched_stays_as_it_is(tmp_path):
    model = trained.llama()
    bigkernels.patch(model, attention=False, loss=False)
    before = {path: dict(m.__dict__) for path, m in model.named_modules()}
    callback = TrainerCallback()
    t = trainer(tmp_path, model, [callback])
    assert callback.report is None
    t.train()
    t.train()
    for path, m in model.named_modules():
        assert m.__dict__.get("forward") is before[path].get("forward")


def test_options_of_patch_and_none(tmp_path):
    callback = TrainerCallback(patch={"attention": False, "decode": False})
    trainer(tmp_path, callbacks=[callback])
    assert not any(row.what.startswith("attention") for row in callback.report.patched)
    model = trained.llama()
    trainer(tmp_path, model, [TrainerCallback(patch=False)])
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_models_that_the_trainer_makes(tmp_path):
    callback = TrainerCallback(optim="bigkernels_adamw_8bit")
    t = trainer(tmp_path, callbacks=[callback], model_init=lambda: trained.llama())
    first = t.model
    t.train()
    assert callback.report is not None and "forward" in t.model.__dict__
    assert t.model is not first
    assert isinstance(t.optimizer.optimizer, optim.AdamW)


def test_adapters_on_a_quantized_model(tmp_path):
    model = trained.llama()
    bigkernels.quantize(model, "nf4")
    codes = model.model.layers[0].mlp.up_proj.codes.clone()
    LoRALinear.add_to(model, ("*_proj",), rank=4)
    t = trainer(tmp_path, model, [TrainerCallback(optim="bigkernels_adamw")], max_steps=8, learning_rate=0.03)
    t.train()
    losses = trained.losses(t)
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(model.model.layers[0].mlp.up_proj.base.codes, codes)
    t.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        a, b = (m.eval()(trained.IDS).logits for m in (model, again))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pefts_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = trained.llama()
    bigkernels.quantize(model, "int8")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    callback = TrainerCallback(optim="bigkernels_adamw_16bit")
    t = trainer(tmp_path, model, [callback], max_steps=8, learning_rate=0.03)
    t.train()
    assert callback.report.patched and trained.losses(t)[-1] < trained.losses(t)[0] - 0.3


# ---- checkpoints and evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bigkernels_adamw", "bigkernels_adamw_8bit", "bigkernels_muon"])
def test_resumed_from_a_checkpoint(tmp_path, name: str):
    """Saved on the way and gone on with in another trainer, it is the run without a pause, bit by bit."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 5}
    whole = trainer(tmp_path / "a", callbacks=[TrainerCallback(optim=name)], **options)
    whole.train()
    half = tmp_path / "a" / "checkpoint-3"
    assert (half / "model.safetensors").exists() and (half / "optimizer.pt").exists()
    again = trainer(tmp_path / "b", trained.llama(), [TrainerCallback(optim=name)], **options)
    again.train(resume_from_checkpoint=str(half))
    assert same(parameters(whole.model), parameters(again.model))
    assert trained.losses(again)[-3:] == trained.losses(whole)[-3:]
    assert [e["tokens_per_second"] > 0 for e in again.state.log_history if "loss" in e][-1]
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert same(parameters(read), parameters(whole.model))


def test_evaluation_on_the_way_and_the_best_model(tmp_path):
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    found = []
    for callbacks in ([], [TrainerCallback()]):
        t = trainer(tmp_path / str(len(found)), callbacks=callbacks, eval_dataset=trained.rows(8), **options)
        t.train()
        found.append([e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] + [t.evaluate()["eval_loss"]])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-3, atol=1e-3)
    assert all("tokens_per_second" not in e for e in t.state.log_history if "eval_loss" in e)


# ---- figures ---------------------------------------------------------------------------------------------------------


class Seen(transformers.TrainerCallback):
    """What a reporter before ours is given, as TensorBoard's is."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_figures_reach_every_log(tmp_path):
    seen = Seen()
    t = trainer(tmp_path, callbacks=[seen, TrainerCallback()], logging_steps=2, max_steps=6)
    t.train()
    for logged in ([e for e in seen.logs if "loss" in e], [e for e in t.state.log_history if "loss" in e]):
        assert len(logged) == 3
        for entry in logged:
            assert entry["tokens_per_second"] > 0 and 0.05 < entry["peak_memory_gib"] < 1000
    assert t.state.num_input_tokens_seen == 6 * 4 * 12
    callback = next(c for c in t.callback_handler.callbacks if isinstance(c, TrainerCallback))
    t.remove_callback(callback)
    t.train()
    assert "tokens_per_second" not in seen.logs[-2]
    assert "tokens_per_second" not in next(e for e in reversed(t.state.log_history) if "loss" in e)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")
    t = trainer(tmp_path, report_to=["tensorboard"])
    t.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    found = events.EventAccumulator(str(file))
    found.Reload()
    assert {"train/tokens_per_second", "train/peak_memory_gib"} <= set(found.Tags()["scalars"])


def test_the_clock_leaves_out_what_lies_between_steps(monkeypatch):
    from bigkernels.integrations.transformers import _training

    now = [0.0]
    monkeypatch.setattr(_training.time, "perf_counter", lambda: now[0])
    clock = _training._Clock()
    clock.begin(transformers.TrainerState())
    assert clock.speed(0) is None

    def step(waiting: float, seconds: float) -> None:
        now[0] += waiting
        clock.step_begins()
        now[0] += seconds
        clock.step_ends()

    step(5, 1)  # what comes before the first step is not the steps'
    step(1, 1)  # and waiting for a batch is
    clock.interrupted()  # an evaluation
    step(7, 1)
    assert clock.speed(800) == 200
    step(0, 2)
    assert clock.speed(1000) == 100
    assert clock.speed(1000) is None


def test_what_the_user_says_of_counting_stays(tmp_path):
    t = trainer(tmp_path, include_num_input_tokens_seen="non_padding")
    t.train()
    assert t.state.num_input_tokens_seen < 4 * 4 * 12
    t = trainer(tmp_path, callbacks=[TrainerCallback(report=False)])
    t.train()
    assert t.args.include_num_input_tokens_seen == "no" and t.state.num_input_tokens_seen == 0
    assert not any("peak_memory_gib" in e for e in t.state.log_history)
