"""Small encoders of many families with random weights, and inputs with padding, for tests of their step program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

_SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
_TEXT = _SIZES | dict(vocab_size=99)
_IMAGE = _SIZES | dict(image_size=32, patch_size=8)


def _whisper() -> nn.Module:
    return t.WhisperModel(
        t.WhisperConfig(
            d_model=48,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=96,
            max_source_positions=20,
            vocab_size=99,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).encoder


def _wav2vec2() -> nn.Module:
    return t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            **_SIZES,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
        )
    )


def _t5(activation: str, **others: Any) -> nn.Module:
    sizes = dict(d_model=48, d_kv=12, d_ff=80, num_layers=3, num_heads=4, vocab_size=99)
    return t.T5EncoderModel(t.T5Config(**sizes, feed_forward_proj=activation, **others))


TEXTS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertModel(t.BertConfig(**_TEXT)),
    "bert-eager": lambda: t.BertModel(t.BertConfig(**_TEXT, attn_implementation="eager")),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**_TEXT)),
    "xlm-roberta": lambda: t.XLMRobertaModel(t.XLMRobertaConfig(**_TEXT)),
    "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**_TEXT)),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(dim=48, hidden_dim=80, n_layers=2, n_heads=4, vocab_size=99)
    ),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(**_TEXT, embedding_size=24)),
    "albert": lambda: t.AlbertModel(t.AlbertConfig(**_TEXT, embedding_size=24)),
    "modernbert": lambda: t.ModernBertModel(
        t.ModernBertConfig(
            **_TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=6
        )
    ),
    "nomic": lambda: t.NomicBertModel(t.NomicBertConfig(**_TEXT)),
    "clip-text": lambda: t.CLIPTextModel(t.CLIPTextConfig(**_TEXT, bos_token_id=1, eos_token_id=2)),
    "t5": lambda: _t5("relu"),
    "t5-gated": lambda: _t5("gated-gelu", attn_implementation="eager"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "clip-vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**_IMAGE)),
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**_IMAGE)),
    "vit": lambda: t.ViTModel(t.ViTConfig(**_IMAGE)),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**_IMAGE)),
    "dinov2": lambda: t.Dinov2Model(
        t.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    ),
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return (TEXTS | OTHERS)[name]().eval().to(dtype)


def texts(lengths: list[int], longest: int = 12, left: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Tokens of texts of some lengths, with padding on one side."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), longest), generator=g)
    at = torch.arange(longest).expand(len(lengths), -1)
    n = torch.tensor(lengths)[:, None]
    mask = (at >= longest - n if left else at < n).long()
    return dict(input_ids=ids.masked_fill(mask == 0, 1), attention_mask=mask)


def inputs(name: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    if name in TEXTS:
        return texts([12, 9, 1])
    if name == "whisper":
        return dict(input_features=torch.randn(2, 80, 40, generator=g))
    if name == "wav2vec2":
        return dict(input_values=torch.randn(2, 400, generator=g))
    return dict(pixel_values=torch.randn(2, 3, 32, 32, generator=g))


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
