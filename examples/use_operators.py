"""The operators as functions: fused options, gradients, torch.compile, and who serves a call.

python examples/use_operators.py
"""

import torch

import bigkernels
import bigkernels.functional as bk

torch.manual_seed(0)

# A norm with the residual addition fused in gives both results in one pass; gradients flow through both.
x, residual = torch.randn(2, 4, 256, requires_grad=True), torch.randn(2, 4, 256)
weight = torch.ones(256, requires_grad=True)
normed, total = bk.rms_norm(x, weight, 1e-6, residual=residual)
(normed.square().mean() + total.mean()).backward()
print("rms_norm:", tuple(normed.shape), "gradient of the weight:", tuple(weight.grad.shape))

# Rotary embedding of grouped heads: eight for queries, two for keys. cos and sin carry both halves.
angle = torch.outer(torch.arange(16.0), 10_000.0 ** -(torch.arange(0, 64, 2) / 64)).repeat(1, 2)[None]
q, k = bk.rope(torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), angle.cos(), angle.sin())
print("rope:", tuple(q.shape), tuple(k.shape))

# A gated MLP's middle, on the two halves of one packed projection: no copy is made.
gate, up = torch.randn(4, 2 * 512, dtype=torch.bfloat16).chunk(2, -1)
print("glu:", tuple(bk.glu(gate, up, activation="gelu_tanh").shape))

# Cross entropy of 16-bit logits without a float32 copy; ignored tokens, z-loss and soft capping are part of it.
logits = torch.randn(8, 1000, dtype=torch.bfloat16, requires_grad=True)
target = torch.randint(0, 1000, (8,))
target[0] = -100
loss = bk.cross_entropy(logits, target, z_loss=1e-4, softcap=30.0)
loss.backward()
print(f"cross_entropy: {loss.item():.4f}, no gradient for the ignored token:", not logits.grad[0].any().item())

# Which implementations serve float32 on this machine's CPU, and why others do not.
for name, devices in bigkernels.info()["operators"].items():
    print(name, devices["cpu"]["float32"])

# Force one implementation in a block; where it cannot serve, the error says why.
with bigkernels.use("reference"):
    plain = bk.layer_norm(x.detach(), weight.detach())
try:
    with bigkernels.use("cpu"):
        fused = bk.layer_norm(x.detach(), weight.detach())
    print(f"layer_norm: kernel and reference differ by at most {(fused - plain).abs().max().item():.1e}")
except RuntimeError as error:
    print(error)

# Wrong arguments are named.
try:
    bk.rms_norm(x, torch.ones(255))
except ValueError as error:
    print(error)
