"""A training loop of one's own with accelerate: patch first, then `prepare`.

`accelerate launch examples/accelerate_loop.py` runs it in several processes; the lines stay the same.

    pip install accelerate 'bigkernels[transformers]'
    python examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import bigkernels
from bigkernels import optim

TEXT = b"Tyger Tyger, burning bright, In the forests of the night; "

torch.manual_seed(0)
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
bigkernels.patch(model)  # before `prepare`, which wraps it
optimizer = optim.AdamW(model.parameters(), lr=5e-3, state_dtype="int8")
data = DataLoader([torch.tensor(list((TEXT * 2)[i : i + 32])) for i in range(48)], batch_size=4, shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

losses = []
for _ in range(4):
    for ids in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
accelerator.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] - 1

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)  # model, optimizer with its 8-bit states, random numbers
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    accelerator.load_state(folder)
    same = all(map(torch.equal, before, model.parameters()))
accelerator.print(f"loaded bit by bit: {same}")
assert same
