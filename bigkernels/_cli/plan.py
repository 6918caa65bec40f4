"""`bigkernels plan`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .._terminal import DEVICE_HELP, default_device, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with the config.json of a transformers model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters (default bfloat16)")
    parser.add_argument("--autocast", metavar="DTYPE", help="run inside autocast to this dtype")
    parser.add_argument("--mode", choices=("train", "inference"), default="train")
    parser.add_argument("--new-tokens", type=int, default=0, help="after the prompt, in inference")
    parser.add_argument(
        "--optimizer", default="adamw", help="a class of bigkernels.optim, or torch.NAME, or none (default adamw)"
    )
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16", "int8"), help="of the optimizer's states")
    parser.add_argument("--checkpointing", metavar="POLICY", help="recompute, selective, int8, selective+int8, ...")
    parser.add_argument(
        "--patch", choices=("no", "loss", "yes"), default="yes", help="by bigkernels.patch (default yes; no: as it is)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    parser.add_argument("--limit", metavar="SIZE", help="such as 24GB: look for policies that fit")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="plan for this and --tflops, not this machine")
    parser.add_argument("--tflops", type=float, help="of matrix products, whatever the dtype")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    from ..planning import plan
    from ..planning._report import tables

    if (args.bandwidth is None) != (args.tflops is None):
        return _refuse("--bandwidth and --tflops go together")
    limits = None
    if args.bandwidth is not None:
        matrix = dict.fromkeys(("float32", "bfloat16", "float16"), args.tflops * 1e12)
        limits = {"copy": args.bandwidth * 1e9, "matrix": matrix}
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            return _refuse(f"--plot needs matplotlib (pip install 'bigkernels[bench]'): {error}")
    try:
        result = plan(
            args.model,
            batch=args.batch,
            seq=args.seq,
            dtype=args.dtype,
            autocast=args.autocast,
            mode=args.mode,
            new_tokens=args.new_tokens,
            optimizer=None if args.optimizer == "none" else args.optimizer,
            state_dtype=args.state_dtype,
            checkpointing=args.checkpointing,
            patch=args.patch,
            device=args.device or default_device(),
            limit=args.limit,
            limits=limits,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return _refuse(str(error).removeprefix("bigkernels.plan: "))
    for title, columns, rows, right in tables(result):
        table(title, columns, rows, right=right)
    if args.json:
        result.to_json(args.json)
        print(f"wrote {args.json}")
    if args.plot:
        result.plot(args.plot)
        print(f"wrote {args.plot}")
    return 1 if result.reason else 0


def _refuse(message: str) -> int:
    print(f"bigkernels plan: {message}", file=sys.stderr)
    return 2
