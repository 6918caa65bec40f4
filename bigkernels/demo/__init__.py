"""`bigkernels demo`: a pretrained model on real text, eager and patched: results, speed and memory of each."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._assets import HELD_OUT, Unavailable, load_model, model_folder, plays, require_extras
from .._terminal import progress, table
from .measure import VARIANTS, Generation, Training, generate, perplexity, random_batches, train, windows
from .report import dtype_name, figure, gain, print_speed_and_memory

QUESTION = "Write a short letter in the voice of Prince Hamlet to his friend Horatio."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEARNING_RATE = 5e-5
PERPLEXITY_BOUND = 5e-4  # equal to three decimals
# How far the curves may be apart, in nats per token. Both runs round differently, and AdamW turns the rounding noise
# of a gradient near zero into a full step of either sign, so the distance grows with the steps.
LOSS_BOUND = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass
class Input:
    """What the demo works on: a causal language model in float32, token ids (N,), a prompt (1, S), and a decoder."""

    model: nn.Module
    training_ids: Tensor
    held_out_ids: Tensor
    prompt: Tensor
    decode: Callable[[list[int]], str]


@dataclass
class Check:
    """One thing that must hold, and what was seen."""

    name: str
    passed: bool
    seen: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.description = (
        "Fine-tune and run SmolLM2-135M-Instruct on Shakespeare, eager and patched, and compare results, speed and "
        "memory. Exit code 0: everything agrees; 1: a check failed; 2: something is missing and cannot be fetched."
    )
    parser.add_argument(
        "--steps", type=_at_least(1), default=20, help="fine-tuning steps, at most (default %(default)s)"
    )
    parser.add_argument("--batch", type=_at_least(1), default=2, help="sequences in a step (default %(default)s)")
    parser.add_argument("--seq", type=_at_least(2), default=256, help="tokens in a sequence (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, otherwise cpu")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "both"),
        default="both",
        help="dtype of the weights in fine-tuning (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=240.0,
        help="fewer steps are taken if the demo would last longer (default %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for demo.png and demo.json (default ./%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a few short steps only: shows that everything runs")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    started = time.perf_counter()
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("there is no CUDA device here")
        require_extras()
        given = _real_input()
    except Unavailable as error:
        print(f"bigkernels demo: {error}", file=sys.stderr)
        return 2
    return demonstrate(given, args, started)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def _real_input() -> Input:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion draws bars that no option of transformers turns off
    with progress(2) as steps:
        steps.begin("the text")
        texts = plays()
        steps.begin("the model; the first time it is fetched and converted, about half a minute")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model, tokenizer = load_model(model_folder())
    held_out = texts.pop(HELD_OUT)
    # The text is longer than the model's context; it is cut into windows, so the tokenizer's warning does not apply.
    encode = tokenizer.backend_tokenizer.encode
    training = "\n\n".join(list(texts.values())[:8])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids = (
        torch.tensor(encode(text, add_special_tokens=False).ids, dtype=torch.int64, device="cpu")
        for text in (training, held_out, prompt)
    )
    training_ids, held_out_ids, prompt_ids = ids
    return Input(
        model,
        training_ids,
        held_out_ids,
        prompt_ids[None],
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
    )


def demonstrate(given: Input, args: argparse.Namespace, started: float | None = None) -> int:
    """Everything after loading: compare, check, print, draw. Returns 0 if every check passed, else 1.

    `started` is when the demo began by `time.perf_counter()`, now by default.
    """
    started = started or time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count, seq, held_out, new_tokens = args.steps, args.seq, 8, 48
    if args.quick:
        count, seq, held_out, new_tokens = min(count, 4), min(seq, 64), 2, 16

    batches = windows(given.held_out_ids, held_out, seq)
    with progress(3) as steps:
        steps.begin("patching a copy of the model")
        models, report = _eager_and_patched(given.model, torch.float32, device)
        steps.begin("perplexity")
        perplexities = {name: perplexity(model, batches) for name, model in models.items()}
        steps.begin("generating text")
        generation = generate(models, given.prompt, new_tokens)
    del models
    checks = [_check_patched(report), _check_perplexity(perplexities), _check_text(generation)]
    print(f"What was patched\n{report}\n")
    print(
        f"Perplexity on {batches.numel()} tokens of held-out text, float32: eager {perplexities['eager']:.5f}, "
        f"patched {perplexities['patched']:.5f}\n"
    )
    for name in VARIANTS[:1] if checks[-1].passed else VARIANTS:
        who = "by both" if checks[-1].passed else f"by {name}"
        print(f"Greedy text, {new_tokens} tokens, {who}:\n{given.decode(generation.tokens[name])}\n")

    dtypes = [DTYPES[name] for name in (DTYPES if args.dtype == "both" else [args.dtype])]
    trainings = []
    for done, dtype in enumerate(dtypes):
        models, _ = _eager_and_patched(given.model, dtype, device)
        data = random_batches(given.training_ids, count, args.batch, seq)
        now = time.perf_counter()
        deadline = now + (started + args.seconds - now) / (len(dtypes) - done)
        with progress(count) as steps:
            what = f"fine-tuning in {str(dtype).removeprefix('torch.')}"
            steps.begin(what)
            for record in train(models, data, lr=LEARNING_RATE, deadline=deadline):
                if not record.working:
                    steps.begin(f"{what}, loss {record.losses['patched'][-1]:.3f}")
        trainings.append(record)
        del models
    checks += [_check_curves(record) for record in trainings]
    print_speed_and_memory(trainings, generation)

    args.output.mkdir(parents=True, exist_ok=True)
    figure(args.output / "demo.png", trainings, generation)
    (args.output / "demo.json").write_text(
        json.dumps(_figures(perplexities, generation, trainings, checks), indent=2) + "\n"
    )
    table("Checks", ("what", "seen", "result"), [(c.name, c.seen, "ok" if c.passed else "FAILED") for c in checks])
    print(
        f"Written: {args.output / 'demo.png'}, {args.output / 'demo.json'}; "
        f"{time.perf_counter() - started:.0f} s on {_machine(device)}"
    )
    passed = all(check.passed for check in checks)
    print(gain(generation, trainings, passed))
    return 0 if passed else 1


def _eager_and_patched(model: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, nn.Module], Any]:
    from .. import patch

    eager = copy.deepcopy(model).to(device, dtype)
    patched = copy.deepcopy(eager)
    report = patch(patched)
    return dict(zip(VARIANTS, (eager, patched), strict=True)), report


def _check_patched(report: Any) -> Check:
    # Without this the other checks would compare the model with itself.
    return Check("something was patched", len(report.patched) > 0, f"{len(report.patched)} places")


def _check_perplexity(found: dict[str, float]) -> Check:
    difference = abs(found["eager"] - found["patched"])
    seen = f"difference {difference:.1e}, bound {PERPLEXITY_BOUND:g}"
    return Check("perplexity equal to 3 decimals", difference <= PERPLEXITY_BOUND, seen)


def _check_text(generation: Generation) -> Check:
    pairs = zip(*generation.tokens.values(), strict=True)
    differing = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    compared = f"{len(generation.tokens['eager'])} tokens compared"
    seen = compared if differing is None else f"{compared}, number {differing + 1} differs"
    return Check("the same greedy text", differing is None, seen)


def _check_curves(record: Training) -> Check:
    bound = LOSS_BOUND[record.dtype]
    seen = f"largest difference {record.difference:.1e} nats, bound {bound:g}"
    return Check(f"loss curves agree in {dtype_name(record)}", record.difference <= bound, seen)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}"


def _figures(found: dict, generation: Generation, trainings: list[Training], checks: list[Check]) -> dict:
    return {
        "perplexity": found,
        "generation": {"tokens_per_second": generation.speed, "tokens": generation.tokens},
        "training": [
            {
                "dtype": dtype_name(t),
                "tokens_per_step": t.tokens,
                "losses": t.losses,
                "seconds": t.seconds,
                "tokens_per_second": t.speed,
                "resting_bytes": t.resting,
                "working_bytes": t.working,
            }
            for t in trainings
        ],
        "checks": [vars(check) for check in checks],
    }
