"""Fine-tune with TRL: adapters on a 4-bit model by SFT, then DPO, with this package's kernels, head and optimizers.

A tiny random Llama and a tokenizer of a few words, so that it runs in seconds without a download.

    pip install trl peft 'bigkernels[transformers]'
    python examples/trl_sft_dpo.py
"""

import tempfile
import warnings

import peft
import tokenizers
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bigkernels
from bigkernels.integrations.transformers import TrainerCallback
from bigkernels.integrations.trl import fuse

warnings.filterwarnings("ignore", category=FutureWarning)

WORDS = ["[PAD]", "[EOS]", *"what is the colour of sky grass snow a rose ? blue green white red".split()]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]"))
words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # the head is not trained, and a random one says little

ANSWERS = {"the sky": "blue", "grass": "green", "snow": "white", "a rose": "red"}
texts = Dataset.from_dict({"text": [f"what is the colour of {thing} ? {is_}" for thing, is_ in ANSWERS.items()] * 4})
pairs = [(thing, is_, wrong) for thing, is_ in ANSWERS.items() for wrong in ANSWERS.values() if wrong != is_]
preferences = Dataset.from_dict(
    {
        "prompt": [f"what is the colour of {thing} ?" for thing, _, _ in pairs],
        "chosen": [f" {is_}" for _, is_, _ in pairs],
        "rejected": [f" {wrong}" for _, _, wrong in pairs],
    }
)

with tempfile.TemporaryDirectory() as folder:
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "max_length": 32,
    }

    # QLoRA: the weights in 4 bits, low-rank adapters in the model's dtype. PEFT takes quantized layers as they are.
    bigkernels.quantize(model, "nf4")
    sft = trl.SFTTrainer(
        model,
        trl.SFTConfig(max_steps=40, learning_rate=2e-2, **arguments),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"),
        callbacks=[TrainerCallback(optim="bigkernels_adamw")],
    )
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    print(f"SFT: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < losses[0] - 0.3

    # DPO goes on with the adapters; without them the model is its own reference.
    dpo = trl.DPOTrainer(
        sft.model,
        args=trl.DPOConfig(max_steps=20, learning_rate=5e-3, **arguments),
        train_dataset=preferences,
        processing_class=tokenizer,
        callbacks=[TrainerCallback(optim="bigkernels_adamw_8bit")],
    )
    fuse(dpo)  # the loss by `bigkernels.losses`, and the reference's head too
    dpo.train()
    margins = [entry["rewards/margins"] for entry in dpo.state.log_history if "rewards/margins" in entry]
    print(f"DPO: margin of rewards {margins[0]:.2f} -> {margins[-1]:.2f}")
    assert margins[-1] > margins[0]
    print(
        {k: round(v, 1) for k, v in dpo.state.log_history[-2].items() if k in ("tokens_per_second", "peak_memory_gib")}
    )
