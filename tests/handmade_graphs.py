"""The graph of a model of transformers' Llama, by hand."""

from __future__ import annotations

from torch import nn

from bigkernels.program import _ir as ir


def llama(model: nn.Module) -> ir.Graph:
    """Of a `LlamaForCausalLM`, with or without adapters of `bigkernels.nn.LoRALinear` on it."""
    config, graph = model.config, ir.Graph()
    width, d = config.hidden_size, model.model.layers[0].self_attn.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    eps = config.rms_norm_eps
    graph.hidden = graph.value(width)
    graph.layers = len(model.model.layers)
    graph.embed = lambda ids, positions: model.model.embed_tokens(ids) if ids.dim() == 2 else ids
    graph.modules = [m for m in model.modules() if m is not model.model.embed_tokens]
    graph.angles = [ir.Angles(model.model.rotary_emb, (), d, True)]
    operations = graph.operations

    def product(x, module):
        if type(module).__name__ == "LoRALinear":
            base = product(x, module.base)
            inner = graph.value(module.rank)
            a, b = (_Layer(getattr(module, name)) for name in ("lora_a", "lora_b"))
            operations.append(ir.Product(x, inner, a))
            update, out = graph.value(module.out_features), graph.value(module.out_features)
            operations.append(ir.Product(inner, update, b))
            operations.append(ir.Combine(out, ((base, 1.0, None), (update, module.alpha / module.rank, None))))
            return out
        out = graph.value(module.out_features)
        operations.append(ir.Product(x, out, module))
        return out

    def norm(x, module):
        out = graph.value(width)
        operations.append(ir.Norm(x, out, ir.NormSpec("rms", width, eps, ir.Stored(module, "weight"))))
        return out

    def add(a, b):
        out = graph.value(width)
        operations.append(ir.Combine(out, ((a, 1.0, None), (b, 1.0, None))))
        return out

    def of(value, count):
        return ir.HeadsOf(value, tuple(i * d for i in range(count)), d)

    x = graph.hidden
    for i, layer in enumerate(model.model.layers):
        y, att = norm(x, layer.input_layernorm), layer.self_attn
        q, k, v = (product(y, p) for p in (att.q_proj, att.k_proj, att.v_proj))
        rotated, mixed = graph.value(heads * d), graph.value(heads * d)
        operations.append(ir.Heads(of(q, heads), of(k, groups), of(v, groups), rotated, i, angles=0, rotary=d))
        operations.append(ir.Attend(rotated, mixed, i, heads, groups, d, d, att.scaling))
        x = add(x, product(mixed, att.o_proj))
        y = norm(x, layer.post_attention_layernorm)
        gate, up = product(y, layer.mlp.gate_proj), product(y, layer.mlp.up_proj)
        inner = graph.value(config.intermediate_size)
        operations.append(ir.Activate(gate, inner, "silu", config.intermediate_size, up))
        x = add(x, product(inner, layer.mlp.down_proj))
    kept = graph.value(width)
    operations.append(ir.Keep(x, kept))
    graph.logits = product(norm(kept, model.model.norm), model.lm_head)
    return graph


class _Layer(nn.Module):
    """A linear layer of another module's parameter."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.weight, self.bias = weight, None
        self.out_features, self.in_features = weight.shape
