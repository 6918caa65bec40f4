"""GGUF files for the tests: blocks of any type, whose scales are sensible, and small Llamas of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from bigkernels.quantization.ggml import BLOCK_TYPES

CODED = [name for name, row in BLOCK_TYPES.items() if not row.is_numbers]
SIZE, HIDDEN = 256, 512  # blocks of the K-quants are of 256
SHAPES = {
    "attn_q": (SIZE, SIZE),
    "attn_k": (128, SIZE),
    "attn_v": (128, SIZE),
    "attn_output": (SIZE, SIZE),
    "ffn_gate": (HIDDEN, SIZE),
    "ffn_up": (HIDDEN, SIZE),
    "ffn_down": (SIZE, HIDDEN),
}
_LARGE = {"Q3_K": 2, "Q6_K": 16, "IQ4_XS": 16}  # what their integer scales make of a weight


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Bytes of rows of a type, (..., bytes of a row): codes are random, scales small."""
    row, draw = BLOCK_TYPES[kind], np.random.default_rng(seed)
    if row.is_numbers:
        values = (draw.normal(size=shape) * 0.1).astype(np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])).view(np.uint8)
    count = int(np.prod(shape)) // row.block
    made = draw.integers(0, 256, (count, row.nbytes), dtype=np.uint8)
    for at in row.scales:
        scale = (draw.normal(size=count) * 0.002 / _LARGE.get(kind, 1)).astype(np.float16)
        made[:, at : at + 2] = scale[:, None].view(np.uint8)
    if kind == "MXFP4":
        made[:, 0] = draw.integers(119, 124, count)
    return made.reshape(*shape[:-1], -1)


def llama(path: Path, kind: str, table: str = "Q8_0", head: bool = False, layers: int = 1) -> Path:
    """A Llama of 64 tokens with all matrices of a type, and its embedding of another."""
    made = {
        "token_embd.weight": (blocks(table, (64, SIZE)), table),
        "output_norm.weight": (np.ones(SIZE, np.float32).view(np.uint8), "F32"),
    }
    if head:
        made["output.weight"] = blocks(kind, (64, SIZE), 99), kind
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            made[f"blk.{i}.{name}.weight"] = np.ones(SIZE, np.float32).view(np.uint8), "F32"
        for j, (name, shape) in enumerate(SHAPES.items()):
            made[f"blk.{i}.{name}.weight"] = blocks(kind, shape, 10 * i + j), kind
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "embedding_length": SIZE,
        "block_count": layers,
        "feed_forward_length": HIDDEN,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": 64,
        "rope.dimension_count": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(64)])
    for name, (raw, raw_kind) in made.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
