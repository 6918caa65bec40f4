"""Fine-tune a model in 4 bits: quantize its linear layers, train low-rank adapters through them, merge.

A tiny random Llama, so that it runs in seconds; `AutoModelForCausalLM.from_pretrained(...)` works the same way.

    pip install transformers
    python examples/qlora.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bigkernels
from bigkernels.nn import LoRALinear

TEXT = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?
"""

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
ids = torch.tensor([list(TEXT.encode())])

report = bigkernels.quantize(model, "nf4")
print(report)
bigkernels.patch(model)
names = LoRALinear.add_to(model, ("*_proj",), rank=16)
trained = [p for p in model.parameters() if p.requires_grad]
print(f"{len(names)} adapters, {sum(p.numel() for p in trained)} trained parameters")

optimizer = torch.optim.AdamW(trained, lr=5e-3)
losses = []
for step in range(40):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step}: loss {losses[-1]:.3f}")
assert losses[-1] < 0.7 * losses[0]

for module in model.modules():
    if isinstance(module, LoRALinear):
        module.merge()  # into the 4-bit weight, which is quantized again
with torch.no_grad():
    merged = model(input_ids=ids, labels=ids).loss.item()
print(f"merged: loss {merged:.3f}")
