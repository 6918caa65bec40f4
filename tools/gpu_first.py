"""One call of each operator on a GPU, forward and backward, compared, synchronised and printed one by one.

The first thing to run on a new device or a new Triton: what it prints last is what it was doing when the process died.
`compute-sanitizer --tool memcheck python3 tools/gpu_first.py --dtypes bfloat16` finds what writes where it should not.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator

from gpu_device import Clock, arguments, device, facts  # isort: skip: it finds the checkout
import torch

from bigkernels import functional, optim, use
from bigkernels._compare import compare, worst
from bigkernels._samples import SAMPLES, Sample, widen
from bigkernels._samples.attention import attention_sample, varlen_sample
from bigkernels.triton import OPERATORS as KERNELS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Check = Callable[[], str | None]
"""Does something once; returns what is wrong."""


def chosen(operator: str) -> list[Sample]:
    """The first sample, and that with every option."""
    samples = SAMPLES[operator]
    picked = [samples[0], *(s for s in samples if s.name in ("everything", "residual", "interleaved, partial"))]
    return list({s.name: s for s in picked}.values())


def of_sample(sample: Sample, dtype: torch.dtype, where: str, rehearsed: bool, backend: str = "triton") -> Check:
    def check() -> str | None:
        inputs = sample.inputs(dtype, where)
        ours = sample.results(inputs, backend=backend)
        if rehearsed:
            return None
        torch.cuda.synchronize()
        plain = sample.results(inputs, backend="reference")
        exact = sample.results(widen(inputs), backend="reference")
        name, found = worst(sample.judge(ours, plain, exact))
        return None if found.ok else f"{name}: {found}"

    return check


def on_hopper() -> list[Sample]:
    """What the kernels for Hopper take."""
    return [
        attention_sample("causal", 2, 4, 2, 700, size=128, causal=True),
        attention_sample("window, softcap", 1, 4, 4, 500, size=64, causal=True, window=(200, 0), softcap=20.0),
        varlen_sample("packed", [300, 0, 1, 130], heads=4, groups=2, size=128, causal=True),
    ]


def of_quantized(config: str, tokens: int, where: str, rehearsed: bool) -> Check:
    """Few and many tokens go different ways: codes as they are, cuBLAS, integers, fp8."""

    def check() -> str | None:
        w = torch.randn(1024, 2048, device=where) / 45
        qweight = functional.quantize_weight(w, config)
        x = torch.randn(tokens, 2048, device=where).bfloat16().requires_grad_(tokens > 16)

        def run(backend: str, x: torch.Tensor) -> torch.Tensor:
            with use(backend):
                return functional.quantized_linear(x, qweight)

        ours = functional.quantized_linear(x, qweight) if not rehearsed else run("triton", x)
        if x.requires_grad:
            ours.backward(torch.ones_like(ours))
        if rehearsed:
            return None
        found = compare(ours, run("reference", x), run("reference", x.double()), roundings=2, scale="tensor")
        return None if found.ok else str(found)

    return check


def of_few(config: str, tokens: int, dtype: torch.dtype, where: str, rehearsed: bool) -> Check:
    """The CUDA kernels for a few tokens, which the table of routes does not choose before a GPU has run them."""

    def check() -> str | None:
        if rehearsed:  # they are not Triton's, whose driver is replaced
            return None
        qweight = functional.quantize_weight(torch.randn(1000, 2056, device=where) / 45, config)
        x = torch.randn(tokens, 2056, device=where).to(dtype)

        def run(backend: str, x: torch.Tensor) -> torch.Tensor:
            with use(backend):
                return functional.quantized_linear(x, qweight)

        found = compare(run("cuda", x), run("reference", x), run("reference", x.double()), roundings=2, scale="tensor")
        return None if found.ok else str(found)

    return check


def of_route(causal: bool, where: str, rehearsed: bool) -> Check:
    """Plain attention, by whom the table of routes says."""

    def check() -> str | None:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 700, 64, generator=draw).bfloat16().to(where) for h in (8, 2, 2))
        ours = functional.attention(q, k, v, causal=causal)
        if rehearsed:
            return None
        with use("reference"):
            plain, exact = (
                functional.attention(*(x.to(t) for x in (q, k, v)), causal=causal) for t in (q.dtype, torch.float64)
            )
        found = compare(ours, plain, exact, roundings=4, scale="tensor")
        return None if found.ok else str(found)

    return check


def of_optimizer(name: str, where: str, rehearsed: bool) -> Check:
    def check() -> str | None:
        mine, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 5000, device=where))] for _ in range(2))
        optimizer = getattr(optim, name)(mine, lr=1e-2)
        other = torch.optim.AdamW(theirs, lr=1e-2) if name == "AdamW" else None
        for _ in range(3):
            for p in (*mine, *theirs):
                p.grad = torch.sin(p.detach() * 9)
            optimizer.step()
            if other is not None:
                other.step()
        if other is not None and not rehearsed and (mine[0] - theirs[0]).abs().max() > 1e-5:
            return f"differs from torch's by {(mine[0] - theirs[0]).abs().max():.2e}"
        return None

    return check


def checks(where: str, dtypes: list[str], rehearsed: bool) -> Iterator[tuple[str, Check]]:
    for dtype in dtypes:
        for operator in KERNELS:
            for sample in chosen(operator) if operator in SAMPLES else ():
                yield f"{operator}, {sample.name}, {dtype}", of_sample(sample, DTYPES[dtype], where, rehearsed)
    if rehearsed or torch.cuda.get_device_capability()[0] == 9:
        for sample in on_hopper():
            yield (
                f"{sample.operator} by gluon, {sample.name}",
                of_sample(sample, torch.bfloat16, where, rehearsed, "gluon"),
            )
    for causal in (False, True):
        yield f"attention by its route, {'causal' if causal else 'plain'}", of_route(causal, where, rehearsed)
    for config in ("int8", "int8-dynamic", "int4", "nf4", "fp8"):
        for tokens in (1, 40, 600):
            yield f"quantized_linear, {config}, {tokens} tokens", of_quantized(config, tokens, where, rehearsed)
    for config in ("int4", "nf4", "int8", "fp8", "q4_1", "q8_0"):
        for tokens in (1, 12, 30, 64):
            for dtype in dtypes:
                if dtype != "float32":
                    yield (
                        f"quantized_linear in fragments, {config}, {tokens} tokens, {dtype}",
                        of_few(config, tokens, DTYPES[dtype], where, rehearsed),
                    )
    for name in ("AdamW", "Lion", "Muon"):
        yield f"{name}, three steps", of_optimizer(name, where, rehearsed)


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    args = parser.parse_args()
    facts()
    clock, wrong, done = Clock(args.seconds), [], 0
    with device(args.without_device) as where:
        for name, check in checks(where, args.dtypes, args.without_device):
            if clock.over():
                print(f"stopped after {clock.spent:.0f} s, before {name}")
                break
            print(f"{name} ... ", end="", flush=True)
            begin = time.perf_counter()
            try:
                failure = check()
                if where == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - the others are of interest too
                failure = f"raised {type(error).__name__}: {str(error)[:300]}"
                traceback.print_exc(limit=-3)
            done += 1
            print(
                f"{'ok' if failure is None else 'WRONG: ' + failure} ({time.perf_counter() - begin:.2f} s)", flush=True
            )
            wrong += [name] if failure else []
            if failure and where == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    print(f"the device is lost: {error}; run {name!r} alone under compute-sanitizer")
                    break
    print(f"{done} checks, {len(wrong)} wrong{': ' + '; '.join(wrong) if wrong else ''}")
    return min(len(wrong), 100)


if __name__ == "__main__":
    sys.exit(main())
