"""How fast everything is on a GPU: one table a part, each figure beside what it competes with.

Times of the device are of replayed CUDA graphs, in microseconds, and `host` is what the host takes to queue a call.
`--json` writes what there is after each part, so that a part that dies takes no other with it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gpu_device import Clock, Timer, arguments, device, facts  # isort: skip: it finds the checkout
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bigkernels
from bigkernels import functional, optim, use
from bigkernels._info import info

BF16 = torch.bfloat16


class Probe:
    """Runs candidates and keeps what they took."""

    def __init__(self, where: str, rehearsed: bool, json_path: Path | None):
        self.where, self.rehearsed, self.path = where, rehearsed, json_path
        self.timer = Timer(rehearsed)
        self.rows: list[dict] = []
        self.part = ""

    def randn(self, *shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=self.where).to(dtype).requires_grad_(grad)

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.rehearsed else real

    def row(self, case: str, candidate: str, step: Callable[[], object], *, bytes: float = 0, flops: float = 0) -> None:
        found: dict = {"part": self.part, "case": case, "candidate": candidate}
        try:
            device_us, host_us = self.timer(step)
            found |= {"us": device_us, "host_us": host_us}
            if bytes:
                found["GB/s"] = bytes / device_us / 1e3
            if flops:
                found["TFLOP/s"] = flops / device_us / 1e6
        except Exception as error:  # noqa: BLE001 - a candidate that cannot is a row too
            found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
            if self.where == "cuda":
                torch.cuda.synchronize()
        self.note(found)

    def note(self, found: dict) -> None:
        self.rows.append(found)
        figures = [
            f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}"
            for k, v in found.items()
            if k not in ("part", "case", "candidate")
        ]
        print(f"  {found['case']:38s} {found['candidate']:28s} {'  '.join(figures)}", flush=True)

    def save(self) -> None:
        if self.path is None:
            return
        machine = {name: found for name, found in info().items() if name not in ("operators",)}
        from bigkernels.bench.report import commit

        content = {"commit": commit(), "machine": machine, "rehearsed": self.rehearsed, "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def limits(p: Probe) -> None:
    n = p.size(2**30, 2**16)
    source = p.randn(n // 2)
    target = torch.empty_like(source)
    p.row("copy, random values", "torch", lambda: target.copy_(source), bytes=2 * n)
    m = p.size(8192, 128)
    a, b = p.randn(m, m), p.randn(m, m)
    p.row(f"{m} cubed, bfloat16", "cuBLAS", lambda: a @ b, flops=2 * m**3)
    i, j = (torch.randint(-127, 127, (m, m), dtype=torch.int8, device=p.where) for _ in range(2))
    p.row(f"{m} cubed, int8", "torch._int_mm", lambda: torch._int_mm(i, j.t()), flops=2 * m**3)
    fa, fb = (t.to(torch.float8_e4m3fn) for t in (a, b))
    sa, sb = (torch.ones(s, dtype=torch.float32, device=p.where) for s in ((m, 1), (1, m)))
    p.row(
        f"{m} cubed, fp8 by rows",
        "torch._scaled_mm",
        lambda: torch._scaled_mm(fa, fb.t(), sa, sb, out_dtype=BF16),
        flops=2 * m**3,
    )


def _backends(p: Probe) -> dict[str, Callable]:
    def torch_by(backend: SDPBackend) -> Callable:
        def call(q, k, v, causal):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return call

    def ours(q, k, v, causal):
        with use("triton"):
            return functional.attention(q, k, v, causal=causal)

    def gluon(q, k, v, causal):
        with use("gluon"):
            return functional.attention(q, k, v, causal=causal)

    found = {
        "ours": ours,
        "ours, gluon": gluon,
        "by route": lambda q, k, v, causal: functional.attention(q, k, v, causal=causal),
    }
    found |= {"SDPA cuDNN": torch_by(SDPBackend.CUDNN_ATTENTION), "SDPA flash": torch_by(SDPBackend.FLASH_ATTENTION)}
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return found

    def flash4(q, k, v, causal):
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return found | {"flash-attn-4": flash4}


def attention(p: Probe) -> None:
    for size in (64, 128, 256):
        for length in (p.size(2048, 128), p.size(8192, 160)):
            heads = 2048 // size
            q, k, v = (p.randn(1, length, heads, size, grad=True) for _ in "qkv")
            grad = p.randn(1, heads, length, size)
            pairs = heads * length * length / 2
            for name, call in _backends(p).items():
                if size > 128 and name == "ours, gluon":
                    continue

                def forward(call=call, q=q, k=k, v=v):
                    with torch.no_grad():
                        return call(*(t.transpose(1, 2) for t in (q, k, v)), True)

                def both(call=call, q=q, k=k, v=v, grad=grad):
                    out = call(*(t.transpose(1, 2) for t in (q, k, v)), True)
                    return torch.autograd.grad(out, (q, k, v), grad)

                case = f"causal, D {size}, S {length}"
                p.row(case, name, forward, flops=4 * size * pairs)
                p.row(case + ", with backward", name, both, flops=14 * size * pairs)
            _both_tables(p, q.detach(), k.detach(), v.detach(), f"causal, D {size}, S {length}")


def _both_tables(p: Probe, q, k, v, case: str) -> None:
    """The tiles of each kind of GPU, whatever this one would choose."""
    from bigkernels.triton import _tiles, attention

    leaves = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.ones_like(q.transpose(1, 2))

    def step() -> object:
        with use("triton"):
            out = functional.attention(*(t.transpose(1, 2) for t in leaves), causal=True)
        return torch.autograd.grad(out, leaves, grad)

    chosen = attention.tiles
    for capability in (80, 90):
        attention.tiles = lambda kernel, head, wide, heavy, _, c=capability: _tiles.tiles(kernel, head, wide, heavy, c)
        _forget_tapes()
        p.row(case + ", with backward", f"ours, tiles of {capability}", step)
    attention.tiles = chosen
    _forget_tapes()


def _forget_tapes() -> None:
    """Prepared launches hold the tiles that they were made with."""
    from bigkernels.triton import _prepared

    for tapes in _prepared.all_tapes():
        tapes.clear()


def rows(p: Probe) -> None:
    tokens, width, hidden = p.size(16384, 32), 4096, p.size(14336, 512)
    x, w, g = p.randn(tokens, width, grad=True), p.randn(width, grad=True), p.randn(tokens, width)
    gate, up, gg = (p.randn(tokens, hidden, grad=i < 2) for i in range(3))
    one = 2 * tokens * width

    def eager_norm(x, w):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w

    for name, norm in (
        ("ours", functional.rms_norm),
        ("torch", lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
        ("as models write it", eager_norm),
    ):
        with torch.no_grad():
            p.row("rms_norm", name, lambda norm=norm: norm(x.detach(), w.detach()), bytes=2 * one)
        p.row(
            "rms_norm, with backward", name, lambda norm=norm: torch.autograd.grad(norm(x, w), (x, w), g), bytes=5 * one
        )
    for name, glu in (("ours", functional.glu), ("torch", lambda gate, up: F.silu(gate) * up)):
        p.row(
            "glu, with backward",
            name,
            lambda glu=glu: torch.autograd.grad(glu(gate, up), (gate, up), gg),
            bytes=8 * 2 * tokens * hidden,
        )
    q, k = (p.randn(1, p.size(8192, 32), h, 128).transpose(1, 2) for h in (32, 8))
    cos = p.randn(1, q.shape[2], 128)
    p.row("rope", "ours", lambda: functional.rope(q, k, cos, cos), bytes=4 * (q.numel() + k.numel()))
    vocabulary = p.size(128256, 4000)
    logits = p.randn(p.size(8192, 16), vocabulary, grad=True)
    target = torch.randint(vocabulary, logits.shape[:1], device=p.where)
    for name, loss in (("ours", functional.cross_entropy), ("torch", lambda x, t: F.cross_entropy(x.float(), t))):
        p.row(
            "cross_entropy, with backward",
            name,
            lambda loss=loss, x=logits: torch.autograd.grad(loss(x, target), x),
            bytes=3 * 2 * logits.numel(),
        )
    del logits
    head, states = p.randn(vocabulary, width, grad=True), p.randn(p.size(8192, 16), width, grad=True)
    for name, loss in (
        ("ours", functional.linear_cross_entropy),
        ("torch", lambda x, w, t: F.cross_entropy((x @ w.T).float(), t)),
    ):
        p.row(
            "linear_cross_entropy, with backward",
            name,
            lambda loss=loss: torch.autograd.grad(loss(states, head, target), (states, head)),
            flops=6 * states.numel() * vocabulary,
        )


def quantized(p: Probe) -> None:
    for n, k in ((4096, 4096), (14336, 4096)) if not p.rehearsed else ((256, 512),):
        _quantized(p, n, k)


def _quantized(p: Probe, n: int, k: int) -> None:
    dense = p.randn(n, k) / 64
    weights = {c: functional.quantize_weight(dense.float(), c) for c in ("int8", "int8-dynamic", "int4", "nf4", "fp8")}
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        x = p.randn(tokens, k)
        figures = {"bytes": 2 * n * k} if tokens <= 64 else {"flops": 2 * tokens * n * k}
        p.row(f"{tokens} x {k} to {n}", "bfloat16, cuBLAS", lambda x=x: F.linear(x, dense), **figures)
        for name, qweight in weights.items():
            size = {"bytes": qweight.nbytes} if tokens <= 64 else figures
            call = lambda x=x, qweight=qweight: functional.quantized_linear(x, qweight)  # noqa: E731
            p.row(f"{tokens} x {k} to {n}", f"{name}, by route", call, **size)
            if tokens <= 64 and name != "int8-dynamic" and not p.rehearsed:
                p.row(
                    f"{tokens} x {k} to {n}", f"{name}, in fragments", lambda call=call: _forced(call, "cuda"), **size
                )
            if tokens > 16:
                p.row(f"{tokens} x {k} to {n}", f"{name}, ours", lambda call=call: _forced(call), **size)


def _forced(call: Callable, backend: str = "triton") -> object:
    with use(backend):
        return call()


def optimizers(p: Probe) -> None:
    count = p.size(2**28, 2**12)
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("bfloat16, float32 states", BF16, {}),
        ("bfloat16, 8-bit states", BF16, {"state_dtype": "int8"}),
        ("float32, torch fused", torch.float32, None),
    ):
        parameter = torch.nn.Parameter(p.randn(count, dtype=dtype))
        parameter.grad = p.randn(count, dtype=dtype)
        try:
            if options is None:
                made = torch.optim.AdamW([parameter], lr=1e-3, fused=True, capturable=p.where == "cuda")
            else:
                made = optim.AdamW([parameter], lr=1e-3, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            p.note({"part": p.part, "case": f"AdamW, {count} elements", "candidate": name, "error": str(error)[:150]})
            continue
        p.row(f"AdamW, {count} elements", name, made.step)
        del parameter, made


def host(p: Probe) -> None:
    """One token of a Llama of 8 billion parameters: what the host takes for each place."""
    with torch.no_grad():
        x, w, g = p.randn(1, 1, 4096), p.randn(4096), p.randn(1, 1, 14336)
        q, k = (p.randn(1, 1, h, 128).transpose(1, 2) for h in (32, 8))
        cos, cache = p.randn(1, 1, 128), p.randn(1, 8, 1024, 128)
        mask = torch.ones(1, 1, 1, 1024, dtype=torch.bool, device=p.where)
        weights = {c: functional.quantize_weight(p.randn(p.size(4096, 64), 4096).float(), c) for c in ("int8", "int4")}
        forced = use("triton")
        with forced:
            for name, step in {
                "rms_norm": lambda: functional.rms_norm(x, w),
                "rms_norm with residual": lambda: functional.rms_norm(x, w, residual=x),
                "layer_norm": lambda: functional.layer_norm(x, w, w),
                "glu": lambda: functional.glu(g, g),
                "rope": lambda: functional.rope(q, k, cos, cos),
                "decode attention": lambda: functional.attention(q, cache, cache),
                "masked decode attention": lambda: functional.attention(q, cache, cache, mask=mask),
                **{f"quantized, {c}": lambda qw=qw: functional.quantized_linear(x, qw) for c, qw in weights.items()},
            }.items():
                p.row("a token", name, step)
        p.row("a token", "SDPA, GQA", lambda: F.scaled_dot_product_attention(q, cache, cache, enable_gqa=True))
        p.row("a token", "silu * up", lambda: F.silu(g) * g)
        p.row("a token", "torch.rms_norm", lambda: F.rms_norm(x, w.shape, w, 1e-6))


def model(p: Probe) -> None:
    import time

    import transformers

    sizes = dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=4096,
    )
    if p.rehearsed:
        sizes |= dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=200,
        )
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    tokens = p.size(64, 4)

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(p.where):
            return transformers.LlamaForCausalLM(config).to(BF16).eval()

    def wall(step: Callable[[], object], times: int = 3) -> float:
        best = float("inf")
        for _ in range(1 if p.rehearsed else times):
            if p.where == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            if p.where == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    prompt = torch.randint(config.vocab_size, (1, 32), device=p.where)

    def decode(made: torch.nn.Module, **options) -> Callable[[], object]:
        return lambda: made.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)

    def noted(case: str, candidate: str, step: Callable[[], object], work: float, unit: str) -> None:
        try:
            step()
            p.note({"part": p.part, "case": case, "candidate": candidate, unit: work / wall(step)})
        except Exception as error:  # noqa: BLE001
            message = f"{type(error).__name__}: {str(error)[:200]}"
            p.note({"part": p.part, "case": case, "candidate": candidate, "error": message})

    verify = {} if not p.rehearsed else {"verify": False}
    with torch.no_grad():
        for name, change in {
            "eager": lambda m: m,
            "patched": lambda m: (bigkernels.patch(m, **verify), m)[1],
            **{f"{c}": (lambda m, c=c: (bigkernels.quantize(m, c), m)[1]) for c in ("int8", "int4", "fp8")},
            "int4, patched": lambda m: (bigkernels.quantize(m, "int4"), bigkernels.patch(m, **verify), m)[2],
        }.items():
            made = change(fresh())
            noted("decode, dynamic cache", name, decode(made), tokens, "tokens/s")
            if not p.rehearsed:  # transformers compiles the forward pass, in CUDA graphs
                noted(
                    "decode, static cache, compiled",
                    name,
                    decode(made, cache_implementation="static"),
                    tokens,
                    "tokens/s",
                )
                torch._dynamo.reset()
            del made
    length = p.size(2048, 16)
    ids = torch.randint(config.vocab_size, (p.size(2, 1), length), device=p.where)
    for name in ("eager", "patched") if p.rehearsed else ("eager", "patched", "compiled", "patched, compiled"):
        made = fresh().train()
        if "patched" in name:
            bigkernels.patch(made, **verify)
        run = torch.compile(made) if "compiled" in name else made

        def step(run=run, made=made) -> None:
            run(ids, labels=ids, use_cache=False).loss.backward()
            made.zero_grad()

        noted(f"training step, {ids.numel()} tokens", name, step, ids.numel(), "tokens/s")
        torch._dynamo.reset()
        del made, run


PARTS = {f.__name__: f for f in (host, limits, attention, quantized, rows, model, optimizers)}


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    facts()
    clock, failed = Clock(args.seconds), 0
    with device(args.without_device) as where:
        p = Probe(where, args.without_device, args.json)
        for name in args.parts:
            if clock.over():
                print(f"stopped after {clock.spent:.0f} s, before {name}")
                break
            print(f"{name} ({clock.spent:.0f} s)", flush=True)
            p.part = name
            try:
                PARTS[name](p)
            except Exception:  # noqa: BLE001 - the other parts are worth having
                failed += 1
                traceback.print_exc(limit=-4)
            p.save()
    errors = sum("error" in r for r in p.rows)
    print(f"{len(p.rows)} rows in {clock.spent:.0f} s, {errors} with errors, {failed} parts failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
