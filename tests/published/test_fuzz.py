"""Files that are damaged: tensors, or a ValueError, and nothing else."""

from __future__ import annotations

import json
import random
import resource

import pytest
import torch

from bigkernels.published import _load
from bigkernels.published._methods import method_of
from bigkernels.published._packed import Packed

safetensors = pytest.importorskip("safetensors.torch")

from published import folders  # noqa: E402

FILES = 2000


def compressed(n: int, k: int):
    codes = torch.randint(0, 16, (n, k))
    return {
        "weight_packed": folders.words(codes.T, 4).T,
        "weight_scale": torch.rand(n, k // 32),
        "weight_shape": torch.tensor([n, k]),
    }, None


def bitsandbytes(n: int, k: int):
    from bigkernels.quantization import NF4, quantize_weight

    tensors = quantize_weight(torch.randn(n, k), NF4(double_quant=False)).tensors
    said = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [n, k]}).encode()
    return {
        "weight": tensors["codes"].view(-1, 1),
        "weight.absmax": tensors["scale"].flatten(),
        "weight.quant_map": torch.tensor(NF4.values),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(said), dtype=torch.uint8),
    }, None


def mxfp4(n: int, k: int):
    return {
        "blocks": torch.randint(0, 256, (2, n, k // 32, 16), dtype=torch.uint8),
        "scales": torch.randint(100, 130, (2, n, k // 32), dtype=torch.uint8),
    }, None


KINDS = {
    "gptq": (folders.gptq(4, 32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}),
    "gptq3": (folders.gptq(3, 32, act_order=True), {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False}),
    "awq": (folders.awq(32, "gemm"), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "gemv": (folders.awq(32, "gemv"), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "llm.int8": (folders.int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "compressed": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}
            },
        },
    ),
    "hqq": (folders.hqq(4, 32), {"quant_method": "hqq"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
    "torchao": (folders.torchao("Int8Tensor", 32), {"quant_method": "torchao", "kind": "Int8Tensor", "size": 32}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, kind: str):
    """Bytes of the header or of tensors are changed, or the file is cut."""
    torch.manual_seed(0)
    layer, said = KINDS[kind]
    join = "_" if kind == "mxfp4" else "."
    path, method = tmp_path / "model.safetensors", method_of(said)
    tensors = {f"layer{join}{part}": t.contiguous() for part, t in layer(32, 64)[0].items()}
    safetensors.save_file(tensors, path, {"format": "pt"} | folders.header("layer", tensors, said))
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    chance, outcomes = random.Random(0), {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(FILES):
        broken = bytearray(data)
        if i % 4 == 0:
            del broken[chance.randrange(len(data)) :]
        else:
            end = header if i % 2 else len(data)
            for _ in range(chance.choice((1, 1, 2, 5))):
                broken[chance.randrange(end)] = chance.choice((0, 34, 44, 48, 57, 255, chance.randrange(256)))
        path.write_bytes(broken)
        try:
            weights = _load.weights(_load.State([path]), method)
            for held in weights.values():
                found = held[...] if isinstance(held, _load.Layer) else None
                if isinstance(found, Packed):
                    found.qweight(torch.float32)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > FILES / 20, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3, "KiB"
