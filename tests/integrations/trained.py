"""Small things to train: a model of transformers, a tokenizer and texts."""

from __future__ import annotations

from pathlib import Path

import torch

IDS = torch.arange(3, 27).view(2, 12)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**options):
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options))


def rows(count: int = 16) -> list[dict]:
    """Sequences of tokens that count up, of several lengths, padded."""
    made = []
    for i in range(count):
        length = 6 + i % 7
        ids = torch.tensor([3 + (i + k) % 9 for k in range(length)] + [0] * (12 - length))
        mask = (torch.arange(12) < length).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)})
    return made


def arguments(folder: Path, kind: str = "TrainingArguments", **options):
    import transformers

    usual = {
        "output_dir": str(folder),
        "max_steps": 4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if kind != "TrainingArguments":
        import trl

        return getattr(trl, kind)(**usual | {"bf16": False} | options)
    return transformers.TrainingArguments(**usual | options)


def tokenizer():
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def text(i: int, length: int = 10) -> str:
    return " ".join(f"w{3 + (i + k) % 9}" for k in range(length))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
