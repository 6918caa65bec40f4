"""Train a language model with bigkernels: one line, this model only, reversible.

A tiny random Llama, so that it runs in seconds; `AutoModelForCausalLM.from_pretrained(...)` works the same way.

    pip install transformers
    python examples/patch_llm.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bigkernels

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
ids = torch.randint(0, config.vocab_size, (2, 64))

with torch.no_grad():
    before = model(input_ids=ids, labels=ids).loss

report = bigkernels.patch(model)
print(report)

with torch.no_grad():
    after = model(input_ids=ids, labels=ids).loss
print(f"loss before {before:.6f}, patched {after:.6f}")
assert abs(before - after) < 1e-5

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
assert loss < after

bigkernels.unpatch(model)  # the model is what it was, with the trained weights
with bigkernels.patched(model), torch.no_grad():  # or patched inside a block only
    print(model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False)[0].tolist())
