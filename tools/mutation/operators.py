"""Which tests are an operator's: the files that are mutated, and the tests that each of their mutants meets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

RECIPE, FUZZ, EXTREMES, ERRORS = (f"tests/ops/test_{name}.py" for name in ("recipe", "fuzz", "extremes", "errors"))
RAW = "tests/ops/test_raw_operators.py"  # of all operators, and quick
MODULE = "tests/nn/test_attention.py"
KERNELS, OPS, HEADERS = "csrc/cpu/kernels/", "csrc/cpu/ops/", "csrc/include/bigkernels/"
TRITON, INTERPRETED = "bigkernels/triton/", "tests/interpreter/test_kernels.py"


@dataclass(frozen=True)
class Operator:
    """Files from the project's root, and tests as {file or folder: pattern of their names}."""

    files: tuple[str, ...]
    tests: dict[str, str]
    interpreter: dict[str, str] = field(default_factory=dict)


def _files(kernels: str = "", ops: str = "", headers: str = "", triton: str = "") -> tuple[str, ...]:
    folders = ((KERNELS, kernels), (OPS, ops), (HEADERS, headers), (TRITON, triton))
    return tuple(folder + name for folder, names in folders for name in names.split())


def _row(name: str, also: str = "", **files: str) -> Operator:
    """An operator on rows: its samples, random shapes and extremes."""
    pattern = rf"\b{name}\b{also and '|' + also}"
    tests = {RECIPE: rf"\[{name}: ", FUZZ: f"test_{name}", EXTREMES: pattern, ERRORS: ""}
    return Operator(_files(**files), tests, {INTERPRETED: rf"\[{name}: |written|wrong|raw_operators|far_from"})


ROWS = "_norm|activations|stays_in_its_row|outside_its_view|vocabulary|logits|confident"

OPERATORS = {
    "rms_norm": _row(
        "rms_norm", "norms|nan_or|view", kernels="rms_norm.cpp", ops="rms_norm.cpp", triton="rms_norm.py _norm.py"
    ),
    "layer_norm": _row(
        "layer_norm",
        "norms|nan_or|view",
        kernels="layer_norm.cpp",
        ops="layer_norm.cpp",
        triton="layer_norm.py _norm.py",
    ),
    "glu": _row("glu", "activations", kernels="glu.cpp", ops="glu.cpp", triton="glu.py"),
    "rope": _row("rope", kernels="rope.cpp rotate.h", ops="rope.cpp", triton="rope.py"),
    "cross_entropy": Operator(
        _files("cross_entropy.cpp token_terms.h", "cross_entropy.cpp", triton="cross_entropy.py"),
        {RECIPE: r"\[cross_entropy: ", FUZZ: "test_cross_entropy", EXTREMES: "vocabulary|logits|confident", ERRORS: "",
         "tests/test_losses.py": ""},
        {INTERPRETED: r"\[cross_entropy: |ignored|outside", "tests/interpreter/test_cross_entropy.py": ""},
    ),
    "compress": Operator(
        _files("compress.cpp random.h", "compress.cpp", triton="compress.py"),
        {"tests/ops/test_compress.py": "", "tests/checkpointing/test_saver.py": ""},
        {"tests/interpreter/test_compress.py": ""},
    ),
    "attention": Operator(
        _files(
            "attention.h attention_fwd.cpp attention_bwd.cpp attention_bias_bwd.cpp gemm.h rotate.h",
            "attention.cpp",
            triton="_attention.py _attention_backward.py attention.py varlen_attention.py",
        ),
        {RECIPE: r"\[(varlen_)?attention: ", "tests/ops/test_attention.py": "", MODULE: "option|odd|packed"},
        {INTERPRETED: r"\[(varlen_)?attention: |packed_heads", "tests/interpreter/test_attention.py": ""},
    ),
    "decode_attention": Operator(
        _files(
            "append_kv.cpp decode_attention.cpp decode_blocks.h decode_tiles.h decode_vectors.h rotate.h",
            "decode_attention.cpp",
            triton="_append.py _decode.py decode_attention.py",
        ),
        {RECIPE: r"\[decode_attention: ", "tests/ops/test_decode.py": "", MODULE: "cache|generation|prompts"},
        {INTERPRETED: r"\[decode_attention: |caches_that", "tests/interpreter/test_decode.py": ""},
    ),
    "linear": Operator(
        _files(
            "linear.cpp linear_codes.h linear_dynamic.cpp linear_few.cpp linear_tiles.h weight_blocks.h gemm.h",
            "linear.cpp linear.h quantized_linear.cpp quantized_weight.h",
            triton="quantized_linear.py",
        ),
        {RECIPE: r"\[(quantized_)?linear: ", "tests/ops/test_linear.py": "", "tests/ops/test_quantized_linear.py": ""},
        {INTERPRETED: r"\[quantized_linear: "},
    ),
    "linear_cross_entropy": Operator(
        _files("linear_cross_entropy.cpp token_terms.h weight_blocks.h gemm.h", "linear_cross_entropy.cpp"),
        {RECIPE: r"\[linear_cross_entropy: ", "tests/ops/test_linear_cross_entropy.py": "",
         "tests/ops/test_linear_logprobs.py": "", "tests/ops/test_linear_distillation.py": ""},
    ),
    "optimizers": Operator(
        _files("optimizer.cpp optimizer_formats.h random.h", "optimizer.cpp", "update.h"),
        {"tests/optim/test_algorithms.py": "", "tests/optim/test_norms.py": "", "tests/optim/test_tensors.py": "",
         "tests/optim/test_ways.py": "", "tests/optim/test_training.py": ""},
    ),
    "shared": Operator(
        _files("", "common.cpp", "vec.h math.h stable.h", "_launch.py"),
        {RECIPE: r"test_kernel.*\[(rms_norm|layer_norm|glu|rope|cross_entropy|linear|attention|decode_attention): ",
         FUZZ: "", EXTREMES: ROWS, ERRORS: "", "tests/ops/test_compress.py": "", "tests/ops/test_linear.py": "",
         "tests/test_native.py": "", "tests/ops/test_linear_cross_entropy.py": "", "tests/ops/test_attention.py": ""},
        {INTERPRETED: r"\[(rms_norm|layer_norm|glu): |reach_every"},
    ),
}  # fmt: skip


def files_of(operator: Operator, root: Path) -> list[str]:
    return [path for path in operator.files if (root / path).exists()]
