"""Compiles every Triton kernel for GPUs that need not be here, and looks at what the compiler made of it.

What is compiled is what the launchers launch: each operator's `examples` run on meta tensors while `recording` collects
the launches. `bigkernels.triton._launch.Launch` holds arguments, constants and warps as a GPU would get them.
"""

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bigkernels.triton import OPERATORS

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("under TRITON_INTERPRET kernels cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from bigkernels.triton._launch import recording  # noqa: E402

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
def launches(operator, dtype):
    """The distinct launches of an operator's examples."""
    with recording() as recorded:
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
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options |= {"num_warps": warps, "maxnreg": launch.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin, folder):
    """(registers a thread, bytes of stack a thread); a stack means that registers were spilled."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


# Each dtype and each capability once by default: a compilation of every launch takes minutes.
TARGETS = [
    ("float32", 80),
    ("bfloat16", 90),
    pytest.param("float32", 90, marks=pytest.mark.slow),
    pytest.param("bfloat16", 80, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype, capability", TARGETS, ids=lambda v: f"sm_{v}" if isinstance(v, int) else v)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_compile_without_spills_and_load_16_bytes(operator, dtype, capability, tmp_path):
    made = launches(operator, DTYPES[dtype])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler lets go of the interpreter
        kernels = list(pool.map(functools.partial(compiled, capability=capability), made))
    for launch, kernel in zip(made, kernels, strict=True):
        registers, stack = resources(kernel.asm["cubin"], tmp_path)
        assert stack == 0, f"{describe(launch)}: {registers} registers and {stack} bytes of spills"
        assert registers * 32 * launch.num_warps <= 65536, f"{describe(launch)}: {registers} registers do not fit"
        if capability == 80:  # sm_86 and sm_89 run its code with the least shared memory: 99 KB a program
            assert kernel.metadata.shared <= 99 * 1024, f"{describe(launch)}: {kernel.metadata.shared} bytes"
        # Rows that start on 16 bytes are read 16 bytes at a time.
        row = next(launch.args[name] for name in ("D", "V", "N", "DV") if name in launch.args)
        vectors = re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg.* 0x10", kernel.asm["ptx"])
        assert bool(vectors) == (row % 16 == 0), f"{describe(launch)}: {len(vectors)} loads of 16 bytes"


def test_every_kernel_is_compiled():
    modules = [*MODULES.values(), *(importlib.import_module(f"bigkernels.triton.{n}") for n in ("_norm", "_attention"))]
    # A leading underscore marks a function that kernels call.
    functions = [item for module in modules for item in vars(module).items() if isinstance(item[1], JITFunction)]
    defined = {fn for name, fn in functions if not name.startswith("_")}
    covered = {launch.kernel for operator in OPERATORS for launch in launches(operator, torch.float32)}
    assert {fn.__name__ for fn in defined - covered} == set()
    assert len(defined) >= 10


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
