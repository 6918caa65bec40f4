"""Random small encoders, patched: hidden states of random batches against those of the modules.

``python tests/program/fuzz_encoders.py --cases 300`` runs many; `test_encoders.py` runs a few. Each case is made from
one number, which a fault names.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

import bigkernels

ACTIVATIONS = ["gelu", "gelu_new", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh"]


def _sizes(r: random.Random) -> dict[str, Any]:
    heads = r.choice([1, 2, 3, 4, 6])
    return dict(
        hidden_size=heads * r.choice([2, 4, 8, 12, 16, 32, 64]),
        num_attention_heads=heads,
        intermediate_size=r.choice([1, 7, 32, 45, 64, 130]),
        num_hidden_layers=r.choice([1, 2, 3]),
        hidden_act=r.choice(ACTIVATIONS),
    )


def _text(r: random.Random) -> dict[str, Any]:
    return _sizes(r) | dict(
        vocab_size=101,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=r.choice(["sdpa", "sdpa", "eager"]),
    )


def _bert(r):
    return t.BertModel(t.BertConfig(**_text(r)))


def _roberta(r):
    return t.RobertaModel(t.RobertaConfig(**_text(r) | dict(max_position_embeddings=80)))


def _electra(r):
    return t.ElectraModel(t.ElectraConfig(**_text(r), embedding_size=r.choice([8, 24])))


def _mpnet(r):
    others = dict(max_position_embeddings=80, pad_token_id=1, attn_implementation="eager")
    return t.MPNetModel(t.MPNetConfig(**_text(r) | others))


def _distilbert(r):
    s = _text(r)
    return t.DistilBertModel(
        t.DistilBertConfig(
            dim=s["hidden_size"],
            hidden_dim=s["intermediate_size"],
            n_layers=s["num_hidden_layers"],
            n_heads=s["num_attention_heads"],
            vocab_size=101,
            pad_token_id=0,
            activation=r.choice(["gelu", "relu"]),
            attn_implementation=s["attn_implementation"],
        )
    )


def _albert(r):
    return t.AlbertModel(t.AlbertConfig(**_text(r), embedding_size=8))


def _modernbert(r):
    s = _text(r)
    return t.ModernBertModel(
        t.ModernBertConfig(
            **s,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=r.choice([2, 4, 6, 10]),
            global_attn_every_n_layers=r.choice([1, 2, 3]),
            attention_bias=r.random() < 0.3,
            mlp_bias=r.random() < 0.3,
            norm_bias=r.random() < 0.3,
        )
    )


def _nomic(r):
    return t.NomicBertModel(t.NomicBertConfig(**_text(r)))


def _clip(r):
    return t.CLIPTextModel(t.CLIPTextConfig(**_text(r)))


def _t5(r):
    s = _text(r)
    return t.T5EncoderModel(
        t.T5Config(
            d_model=s["hidden_size"],
            d_kv=r.choice([4, 8, 16, 24]),
            d_ff=s["intermediate_size"],
            num_layers=s["num_hidden_layers"] + 1,  # the first one runs its modules
            num_heads=s["num_attention_heads"],
            vocab_size=101,
            relative_attention_num_buckets=r.choice([8, 32]),
            relative_attention_max_distance=r.choice([16, 128]),
            feed_forward_proj=r.choice(["relu", "gated-gelu", "gated-silu"]),
            attn_implementation=s["attn_implementation"],
        )
    )


def _image(r):
    return _sizes(r) | dict(image_size=16, patch_size=r.choice([4, 8]), attn_implementation=r.choice(["sdpa", "eager"]))


def _vit(r):
    return t.ViTModel(t.ViTConfig(**_image(r)))


def _siglip(r):
    return t.SiglipVisionModel(t.SiglipVisionConfig(**_image(r)))


def _dinov2(r):
    s = _image(r)
    return t.Dinov2Model(
        t.Dinov2Config(**{k: v for k, v in s.items() if k != "intermediate_size"}, use_swiglu_ffn=r.random() < 0.3)
    )


TEXTS = [_bert, _roberta, _electra, _mpnet, _distilbert, _albert, _modernbert, _modernbert, _nomic, _clip, _t5, _t5]
IMAGES = [_vit, _siglip, _dinov2]


def _tokens(r: random.Random, g: torch.Generator) -> tuple[dict[str, Tensor], str]:
    batch, longest = r.choice([1, 1, 2, 3, 7]), r.choice([1, 2, 3, 8, 17, 33, 48])
    kind = r.choice(["none", "full", "right", "right", "right", "left", "holes", "empty"])
    ids = torch.randint(3, 100, (batch, longest), generator=g)
    if kind == "none":
        return dict(input_ids=ids), kind
    lengths = torch.randint(1, longest + 1, (batch, 1), generator=g)
    at = torch.arange(longest).expand(batch, -1)
    mask = {"full": at >= 0, "right": at < lengths, "left": at >= longest - lengths}.get(kind, at < lengths)
    if kind == "holes":
        mask = torch.rand(batch, longest, generator=g) < 0.7
        mask[:, 0] = True
    if kind == "empty":
        mask = mask.clone()
        mask[r.randrange(batch)] = False
    return dict(input_ids=ids, attention_mask=mask.long()), kind


def run(seed: int) -> str:
    """ "taken" or why not; AssertionError where the hidden states differ."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16])
    text = r.random() < 0.8
    make = r.choice(TEXTS if text else IMAGES)
    model: nn.Module = make(r).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    model = model.to(dtype)
    threads = torch.get_num_threads()
    note = f"case {seed}: {type(model).__name__} {dtype}"
    ours = copy.deepcopy(model)
    report = bigkernels.patch(ours, verify=False)
    only = copy.deepcopy(model)  # what is handed back has the patched modules' rounding
    bigkernels.patch(only, verify=False, encode=False)
    exact = copy.deepcopy(model).double()
    (stack,) = (s for s in report.programs.values() if hasattr(s, "layers"))
    try:
        torch.set_num_threads(r.choice([1, 1, 2, 3]))
        for _ in range(2):
            if text:
                given, kind = _tokens(r, g)
            else:
                given, kind = dict(pixel_values=torch.randn(r.choice([1, 3]), 3, 16, 16, generator=g)), "image"
            cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
            with torch.no_grad():
                want = exact(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})[0]
                theirs, made, modules = (m(**cast)[0].double() for m in (model, ours, only))
            mask = given.get("attention_mask")
            seen = torch.ones(want.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            if kind == "empty":  # a text of which nothing is seen: nobody says what it comes to
                seen = seen & seen.any(1, keepdim=True)
            if not seen.any():
                continue
            assert torch.isfinite(made[seen]).all(), f"{note}, {kind}: not finite"
            if not torch.isfinite(want[seen]).all():  # of a token that sees nothing, beside others
                want = theirs
            scale = want[seen].abs().max()
            own = max((x[seen] - want[seen]).abs().max() for x in (theirs, modules)) / scale
            error = (made[seen] - want[seen]).abs().max() / scale
            least = 1e-5 if dtype == torch.float32 else 1e-2
            assert error <= max(least, 3 * own), f"{note}, {kind} {tuple(seen.shape)}: {error:.1e}, modules {own:.1e}"
    finally:
        torch.set_num_threads(threads)
    return "taken" if stack.taken else f"{type(model).__name__}: {stack.why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    found: collections.Counter[str] = collections.Counter()
    faults = 0
    for seed in range(options.first, options.first + options.cases):
        try:
            found[run(seed)] += 1
        except Exception as error:  # noqa: BLE001
            faults += 1
            print(f"case {seed}: {type(error).__name__}: {error}", flush=True)
    for what, count in found.most_common():
        print(f"{count:5}  {what}")
    print(f"{faults} faults in {options.cases} cases")
    return faults > 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
