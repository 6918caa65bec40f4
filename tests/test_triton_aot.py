"""Compiles every Triton kernel for GPUs that need not be here, and looks at what the compiler made of it.

What is compiled is what the launchers launch: each operator's `examples` run on meta tensors while `recording` collects
the launches. `bigkernels.triton._launch.Launch` holds arguments, constants and warps as a GPU would get them.
"""

import dataclasses
import functools
import importlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bigkernels.ops.codes import INT8
from bigkernels.triton import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("under TRITON_INTERPRET kernels cannot be compiled", allow_module_level=True)

from machine_code import products, resources, tensor_memory_products  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from bigkernels.triton._launch import recording, since  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODULES = {name: importlib.import_module(f"bigkernels.triton.{name}") for name in OPERATORS}


@pytest.fixture(autouse=True, scope="module")
def one_thread_parses():
    """CPython 3.11 loses count of its depth where two threads make syntax trees at once, and raises SystemError."""
    lock, parse = threading.Lock(), JITFunction.parse

    def locked(self):
        with lock:
            return parse(self)

    JITFunction.parse = locked
    yield
    JITFunction.parse = parse


@functools.cache
def launches(operator, dtype, capability=80):
    """The distinct launches of an operator's examples on GPUs of a compute capability."""
    with recording(capability) as recorded:
        for launcher, args in MODULES[operator].examples(dtype):
            launcher(*args)
    return list({str(source_of(launch)): launch for launch in recorded}.values())


def source_of(launch):
    """What Triton's launcher would compile: a constant for None and 1, pointers and integers divisible by 16 marked."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return launch.kernel.__name__, signature, constants, attributes, launch.num_warps


def describe(launch):
    sizes = {k: v for k, v in launch.args.items() if isinstance(v, int)}
    return f"{launch.kernel.__name__} with {launch.num_warps} warps, {sizes}"


def compiled(launch, capability, **options):
    _, signature, constants, attributes, warps = source_of(launch)
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options |= {"num_warps": warps, "maxnreg": launch.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


# Bytes of shared memory a program, by the compute capability for which tiles were chosen. What is compiled for sm_80
# runs on sm_86 and sm_89 as well, which have less.
SHARED = {80: 99 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Each dtype and each table of tiles once by default: a compilation of every launch takes minutes.
TARGETS = [
    ("float32", 80),
    ("bfloat16", 90),
    *(
        pytest.param(dtype, capability, marks=pytest.mark.slow)
        for capability in SHARED
        for dtype in DTYPES
        if (dtype, capability) not in (("float32", 80), ("bfloat16", 90))
    ),
]


@pytest.mark.parametrize("dtype, capability", TARGETS, ids=lambda v: f"sm_{v}" if isinstance(v, int) else v)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_compiler_makes_of_every_launch(operator, dtype, capability, tmp_path):
    """No spills, no more shared memory than there is, loads of 16 bytes, and no product that is computed twice."""
    made = launches(operator, DTYPES[dtype], capability)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler lets go of the interpreter
        kernels = list(pool.map(functools.partial(compiled, capability=capability), made))
    for launch, kernel in zip(made, kernels, strict=True):
        registers, stack = resources(kernel.asm["cubin"], tmp_path)
        assert stack == 0, f"{describe(launch)}: {registers} registers and {stack} bytes of spills"
        assert registers * 32 * launch.num_warps <= 65536, f"{describe(launch)}: {registers} registers do not fit"
        assert kernel.metadata.shared <= SHARED[capability], f"{describe(launch)}: {kernel.metadata.shared} bytes"
        # Rows that start on 16 bytes are read 16 bytes at a time.
        if "CHANNELS" in launch.args:  # of images, in planes or with channels innermost
            row = launch.args["C" if launch.args["ROWS"] else "S"]
        else:
            row = next(launch.args[name] for name in ("D", "V", "N", "DV") if name in launch.args)
        vectors = re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg.* 0x10", kernel.asm["ptx"])
        if launch.kernel.__name__ == "decode_weight":  # bound by what it writes, two to four times what it reads
            vectors = re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", kernel.asm["ptx"])
        if launch.kernel.__name__ == "merge" and since(3, 8):  # a thread sums a column: a warp reads 128 bytes in a row
            vectors = re.findall(r"ld\.global\S*\.b32", kernel.asm["ptx"]) if row % 16 == 0 else vectors
        assert bool(vectors) == (row % 16 == 0), f"{describe(launch)}: {len(vectors)} loads of 16 bytes"
        if operator in ("attention", "varlen_attention"):
            _check_products(launch, kernel, capability)


def _check_products(launch, kernel, capability):
    """The layout of attention's products, where tiles were chosen for it."""
    if "BLOCK_D" not in launch.args or launch.args["PRECISION"] is not None:
        return
    name, widest = launch.kernel.__name__, max(launch.args["D"], launch.args["DV"])
    if capability == 100:
        by_units, by_warps = tensor_memory_products(kernel)
        added_up = launch.args.get("Q_SUM") is not None  # the gradient of queries is transposed: by warps
        assert widest > 256 or (by_units and (added_up or not by_warps)), f"{describe(launch)}: {by_units}, {by_warps}"
        return
    found = products(kernel)
    assert found, describe(launch)
    assert not any(p.twice for p in found), f"{describe(launch)}: {[p for p in found if p.twice]}"
    if capability == 90 and widest <= 256:
        if name in ("attend", "backward_queries", "backward_bias") or launch.args["D"] <= 128:
            scores = [p for p in found if p.hopper and p.shape[1] in (launch.args["BLOCK_M"], launch.args["BLOCK_N"])]
            assert scores and min(p.width for p in scores) >= 16, f"{describe(launch)}: {found}"


def test_every_kernel_is_compiled():
    modules = [
        *MODULES.values(),
        *(
            importlib.import_module(f"bigkernels.triton.{n}")
            for n in ("_norm", "_channel_norm", "_attention", "_quantized_many")
        ),
    ]
    # A leading underscore marks a function that kernels call.
    functions = [item for module in modules for item in vars(module).items() if isinstance(item[1], JITFunction)]
    defined = {fn for name, fn in functions if not name.startswith("_")}
    covered = {launch.kernel for operator in OPERATORS for launch in launches(operator, torch.float32)}
    assert {fn.__name__ for fn in defined - covered} == set()
    assert len(defined) >= 10


HUGE = 2**17  # sequences of 16 heads: two million programs and more


def _huge_calls():
    """Calls with many more rows, sequences and heads than the second dimension of a grid has places."""
    bf16, f32, i32, i64 = torch.bfloat16, torch.float32, torch.int32, torch.int64

    def empty(*shape, dtype=bf16):
        return torch.empty(shape, dtype=dtype, device="meta")

    m = MODULES
    x, w, row = empty(2**22, 64), empty(64), empty(2**22, dtype=f32)
    yield m["rms_norm"].forward, (x, w, None, 1e-6, 0.0)
    yield m["rms_norm"].backward, (x, x, w, row, None, 0.0)
    yield m["layer_norm"].forward, (x, w, w, None, 1e-6)
    yield m["layer_norm"].backward, (x, x, w, w, row, row, None)
    yield m["glu"].forward, (x, x, 0)
    yield m["glu"].backward, (x, x, x, 0)
    q, angles = empty(HUGE, 16, 16, 64), empty(HUGE, 16, 64)
    yield m["rope"].forward, (q, q, angles, angles, False)
    target, options = empty(2**22, dtype=i64), (-100, 1, 0.0, 0.0, 0.0, 0.0)
    yield m["cross_entropy"].forward, (x, target, None, None, *options)
    yield m["cross_entropy"].backward, (empty(dtype=f32), x, target, None, None, row, empty(dtype=f32), *options)
    lse, options = empty(HUGE, 16, 16, dtype=f32), (-1, -1, 0.125, 0.0, 0.0)
    for bias in (None, empty(HUGE, 16, 16, 16), empty(16, 16, 16)[None]):
        extra = (bias, None, None, None, None, None)
        yield m["attention"].forward, (q, q, q, *extra, *options)
        for atomics in (False, True):
            yield m["attention"].backward_by, (atomics, q, None, q, q, q, q, lse, *extra, *options, bias is not None)
    one = empty(HUGE, 16, 1, 64)
    yield m["attention"].forward, (one, q, q, *(None,) * 6, *options)
    flat, ends = empty(2**20, 16, 64), empty(HUGE + 1, dtype=i32)
    rest = (ends, ends, None, None, None, None, 16, 16, *options)
    yield m["varlen_attention"].forward, (flat, flat, flat, *rest)
    yield m["varlen_attention"].backward, (flat, None, flat, flat, flat, flat, empty(16, 2**20, dtype=f32), *rest)
    cache, lengths = empty(HUGE, 64, 16, 64), empty(HUGE, dtype=i32)
    yield m["decode_attention"].infer, (one, cache, cache, lengths, *(None,) * 5, -1, 0.125, 0.0)
    yield m["decode_attention"].append, (q, q, q, cache, cache, lengths, *(None,) * 5, False)
    codes, scale = empty(64, 64, dtype=torch.int8), empty(64, dtype=f32)
    for dynamic in (False, True):
        yield m["quantized_linear"].forward, (x, codes, scale, None, None, None, None, 0, INT8.number, 64, dynamic)
    yield m["quantized_linear"].backward, (x, codes, scale, None, None, None, 0, INT8.number, 64)
    yield m["mlp"].forward, (x, None, None, 2, False)
    yield m["mlp"].backward, (x, None, x, 2, False)
    for pixels in ((), (2, 2)):  # of as many images
        image, channels = empty(HUGE, 8, *pixels), empty(8)
        groups, of_channels = empty(HUGE, 2, dtype=f32), empty(8, dtype=f32)
        yield m["group_norm"].forward, (image, channels, channels, 2, 1e-5, 0, False)
        yield m["group_norm"].backward, (image, image, channels, channels, groups, groups, 0, False)
        yield m["batch_norm"].forward, (image, channels, channels, image, None, None, 1e-5, 0, False)
        options = (of_channels, of_channels, 1e-5, 0, False, True, True)
        yield m["batch_norm"].backward, (image, image, channels, channels, image, *options)
    many = importlib.import_module("bigkernels.triton._quantized_many")
    yield many.rounded_tokens, (x, torch.uint8)
    yield many.scaled, (empty(2**22, 64, dtype=torch.int32), row, scale, None, x)
    yield many.decoded, (empty(2**22, 64, dtype=torch.int8), row, None, None, None, 0, INT8.number, 64, bf16)
    weight, many = (empty(512, 64, dtype=torch.int8), empty(512, dtype=f32), *(None,) * 3), empty(8, dtype=i32)
    yield m["grouped_linear"].forward, (x, many, *weight, 0, INT8.number, False)
    yield m["grouped_linear"].backward, (x, many, *weight, 0, INT8.number, 64)
    yield m["grouped_linear"].weight_backward, (empty(64, 4096), empty(64, 65536), empty(4096, dtype=i32))
    long = empty(2**33)
    yield m["compress"].infer, (long, True, False, 0)
    yield m["compress"].decompress, (empty(2**33, dtype=torch.uint8), empty(2**26, dtype=f32), True, bf16)


def test_huge_batches_stay_within_the_grid():
    """Only the first dimension of a grid goes beyond 65,535."""
    found = {}
    with recording() as recorded:
        for launcher, args in _huge_calls():
            launcher(*args)
    for launch in recorded:
        first, *rest = launch.grid
        assert 0 < first < 2**31 and max(rest, default=1) <= 65535, f"{launch.kernel.__name__}: {launch.grid}"
        found[launch.kernel] = max(found.get(launch.kernel, 0), first)
    largest = max(found.values())
    assert largest > 65535 * 16
    named = {launch.kernel for operator in OPERATORS for launch in launches(operator, torch.bfloat16)}
    # What is not reached has a program a row of a tile that is large already, or none more for more rows.
    apart = {"forward_long", "backward_long", "backward_columns", "add_parts"}
    assert {kernel.__name__ for kernel in named - found.keys()} <= apart


def test_spills_are_noticed(tmp_path):
    """The check itself: a tile far too large for its registers must show a stack."""
    launch = next(x for x in launches("rms_norm", torch.float32) if x.args["D"] == 8192)
    launch = dataclasses.replace(launch, num_warps=1)
    assert resources(compiled(launch, 90).asm["cubin"], tmp_path)[1] > 0


@pytest.mark.parametrize("check", [True, False])
def test_targets_are_asserted_in_debug_mode_alone(check):
    launch = launches("cross_entropy", torch.float32)[0]
    launch = dataclasses.replace(launch, args=launch.args | {"CHECK": check})
    assert ("__assertfail" in compiled(launch, 90, debug=check).asm["ptx"]) == check


def test_masks_of_padding_are_read_as_vectors():
    """A mask that is the same for every query takes the tiles of calls without a mask, and no address a score."""
    q = torch.empty(2, 2048, 8, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    options = (None, None, None, None, -1, 0, 0.1, 0.0, 0.0)
    masks = [torch.empty(2, 1, n, 2048, dtype=torch.bool, device="meta") for n in (1, 2048)]
    with recording(90) as recorded:
        for mask in (*masks, None):
            MODULES["attention"].forward(q, q, q, None, mask, *options)
    padded, full, plain = recorded
    assert padded.args["mask_row"] is None and padded.args["mask_key"] == 1 and full.args["mask_row"] == 2048
    sizes = ("BLOCK_M", "BLOCK_N", "STAGES")
    assert [padded.args[n] for n in sizes] == [plain.args[n] for n in sizes]
    by_row = dataclasses.replace(padded, args=padded.args | {"mask_row": 2048})
    short, long = (len(compiled(x, 90).asm["ptx"].splitlines()) for x in (padded, by_row))
    assert short < 0.85 * long, (short, long)
