"""Train with transformers' Trainer: one object patches the model, chooses the optimizer, and reports speed and memory.

A tiny random Llama, so that it runs in seconds; `AutoModelForCausalLM.from_pretrained(...)` works the same way, and so
do several processes (torchrun), `bf16=True`, `gradient_checkpointing=True` and `report_to="tensorboard"`.

    pip install 'bigkernels[transformers]'
    python examples/trainer.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bigkernels.integrations.transformers import TrainerCallback

TEXT = b"Tyger Tyger, burning bright, In the forests of the night; "


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


rows = [torch.tensor(list((TEXT * 2)[i : i + 32])) for i in range(48)]
data = [{"input_ids": ids, "labels": ids} for ids in rows]

with tempfile.TemporaryDirectory() as folder:
    arguments = {
        "output_dir": folder,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 5,
        "save_steps": 10,
        "report_to": [],
        "disable_tqdm": True,
    }
    # States in 8 bits: 2 bytes a parameter, where AdamW has 8. "bigkernels_adamw" keeps float32.
    callback = TrainerCallback(optim="bigkernels_adamw_8bit")
    trainer = Trainer(make_model(), TrainingArguments(**arguments), train_dataset=data, callbacks=[callback])
    trainer.train()  # its logs have tokens_per_second and peak_memory_gib
    print(callback.report)

    # The optimizer can be named in the arguments as well; from a checkpoint the run goes on bit by bit.
    args = TrainingArguments(**arguments, optim="bigkernels_adamw_8bit")
    again = Trainer(make_model(), args, train_dataset=data, callbacks=[TrainerCallback()])
    again.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-10"))
    same = all(map(torch.equal, trainer.model.parameters(), again.model.parameters()))
    print(f"resumed bit by bit: {same}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert same and losses[-1] < losses[0] - 1
