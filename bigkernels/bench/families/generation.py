"""Prefill and decoding of a real language model: as it comes, ours in every format, and by other packages.

A step of a decoding case is one token of each sequence, within `model.generate` as transformers has it: the median of a
few behind a prompt that is in the cache. Models are compared before they are timed: the losses of some tokens of text,
read one by one, with those of the same weights in float32 by the modules.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..._compare import Comparison
from ..._info import cores
from ...quantization import Int4, Int8
from ..case import EAGER, OURS, Candidate, Case, Contest, Missing, Settings
from ..generation import (
    ALONE,
    BEFORE,
    BIG,
    EAGER32,
    FP8,
    GGUF,
    INT4,
    INT8,
    INT8_CACHE,
    KNOWN,
    LOOKUP,
    MODULES,
    NF4,
    ONNX,
    OPENVINO,
    OURS32,
    Q4_0,
    Q4_0_HEAD,
    Q4_1,
    SCORED,
    LineUp,
    line_up,
)
from ..memory import extra_peak
from . import linear, quantized

_OURS = (OURS, OURS32, MODULES, INT4, INT8, NF4, FP8, GGUF)
_PEERS = (Q4_1, Q4_0, Q4_0_HEAD, ONNX, OPENVINO)
_ALL = (EAGER, EAGER32, *_OURS, *BEFORE.values(), *_PEERS)
_LONG = (EAGER, OURS, OURS32, INT8_CACHE, INT4, GGUF, Q4_1, Q4_0_HEAD)
_OPERATOR = re.compile(r"(?:(\w+), )?(\d+) x (\d+) to ")
_ALLOWED = 0.25  # nats: the mean distance of a token's loss from that of the same weights in float32
_ANEW = 2.0  # and where another package rounds the weights once more, which a small model hardly survives


def cases(settings: Settings) -> list[Case]:
    most = cores()
    some = sorted({1, min(2, most), most})
    cases = []
    for threads in some:
        cases += [_prefill(settings, 512, threads, _ALL), _decode(settings, 64, threads, _ALL)]
        cases += [_decode(settings, 512, threads, _ALL)]
    cases += [_prefill(settings, length, most, _LONG) for length in (64, 4096)]
    cases += [_decode(settings, 4096, threads, _LONG) for threads in some]
    cases += [_decode(settings, 64, most, _ALL, batch=8), _decode(settings, 512, most, _LONG, batch=8)]
    cases += [_decode(settings, 512, threads, (EAGER, *_OURS), way="decode") for threads in some]
    cases += [_decode(settings, 64, threads, (BIG,), what="Llama 1 B, ") for threads in some]
    cases += [_lookup(settings, most), _disturbed(settings, most)]
    size = 128 if settings.quick else 4096
    few = [(1, Int4(64)), (16, Int4(64)), (1, Int8())]
    alone = [quantized.case(settings, tokens, size, size, config) for tokens, config in few]
    alone += [linear.case(settings, 16, size, size, torch.bfloat16)]
    cases += [_beside(settings, case, most) for case in alone]
    return [case for case in cases if case.candidates]


def _case(
    settings: Settings,
    name: str,
    names: Sequence[str],
    make: Callable[[LineUp, str], Candidate],
    *,
    threads: int,
    tokens: int,
) -> Case:
    chosen = settings.candidates
    names = [n for n in names if not chosen or n.removesuffix(LOOKUP).removesuffix(ALONE) in chosen]

    def prepare() -> Contest:
        models, candidates, missing = line_up(settings), [], {}
        for each in names:
            try:
                candidates.append(make(models, each))
            except Missing as reason:
                missing[each] = str(reason)
            except Exception as error:  # noqa: BLE001 - told in the row of this candidate
                candidates.append(Candidate(each, partial(_raise, error), partial(_raise, error)))
        exact = {"losses": torch.zeros(SCORED - KNOWN, dtype=torch.float64, device="cpu")}
        return Contest(candidates, lambda: exact, lambda: exact, missing, compare=_compare)

    plural = "s" if threads > 1 else ""
    return Case(
        "generation",
        f"{name}, {threads} thread{plural}",
        "cpu",
        "bfloat16",
        False,
        tuple(names),
        prepare,
        metric="tokens/s",
        tokens=tokens,
        cold=False,
        only_read=True,
        threads=threads,
    )


def _raise(error: Exception) -> None:
    raise error


def _compare(results: dict[str, Tensor], *_: object, **__: object) -> dict[str, Comparison]:
    return {
        name: Comparison(errors.abs().mean().item(), _ALLOWED if name == "losses" else _ANEW)
        for name, errors in results.items()
    }


def _checked(models: LineUp, name: str) -> dict[str, Tensor]:
    """How far the losses of a text's tokens are from what they should be."""
    model = models.get(name)
    if model.error is None:
        window, expected = models.windows[0][:SCORED], model.expected or models.get(_same_codes(name)).expected
        losses = model.ask("score", ids=window, known=KNOWN, threads=1)["losses"]
        model.error = [a - b for a, b in zip(losses, expected[KNOWN - 1 :], strict=True)]
    kind = "losses of weights that were rounded again" if name in (Q4_0, Q4_0_HEAD, ONNX, OPENVINO) else "losses"
    return {kind: torch.tensor(model.error, dtype=torch.float64, device="cpu")}


def _same_codes(name: str) -> str:
    """The model of ours whose weights one of another process has, but for what that rounds again."""
    now = {before: ours for ours, before in BEFORE.items()}
    return now.get(name) or (GGUF if name.startswith("llama.cpp") or name == OPENVINO else EAGER)


def _prompts(models: LineUp, context: int, batch: int) -> list[list[int]]:
    text, length = models.given.text, len(models.given.text)
    starts = (i * (length - context) // max(batch, 2) for i in range(batch))
    return [text[start : start + context] for start in starts]


def _decode(
    settings: Settings,
    context: int,
    threads: int,
    names: Sequence[str],
    *,
    batch: int = 1,
    way: str = "generate",
    what: str = "",
) -> Case:
    steps = 4 if settings.quick else 16
    context = context // 8 if settings.quick else context

    def make(models: LineUp, name: str) -> Candidate:
        model, spent = models.get(name), []
        ours = name.startswith((OURS, EAGER))

        def results() -> dict[str, Tensor]:
            checked = _checked(models, name)
            model.ask("prefill", ids=_prompts(models, context, batch), threads=cores())
            return checked

        def step() -> float:
            answer = model.ask(way if ours else "decode", steps=steps, threads=threads)
            spent.append(answer["cpu"] / len(answer["seconds"]))
            return statistics.median(answer["seconds"])

        return Candidate(
            name,
            results,
            step,
            bytes=model.bytes + batch * (context + steps // 2) * model.cache,
            timed=True,
            figures=lambda: {"cpu": statistics.median(spent)},
            remark=model.remark,
        )

    where = f"B {batch}, context {context}" + ("" if way == "generate" else ", without generate")
    return _case(settings, f"{what}decode {where}", names, make, threads=threads, tokens=batch)


def _prefill(settings: Settings, length: int, threads: int, names: Sequence[str], *, batch: int = 1) -> Case:
    length = length // 8 if settings.quick else length

    def make(models: LineUp, name: str) -> Candidate:
        model, ids = models.get(name), _prompts(models, length, batch)
        what = {"ids": ids if model.other else torch.tensor(ids, dtype=torch.int64, device="cpu"), "threads": threads}

        def figures() -> dict[str, float]:
            peak = (
                model.other.memory
                if model.other
                else model.held + extra_peak(partial(model.ask, "prefill", **what), "cpu")
            )
            losses = [
                model.ask("losses", ids=window, threads=cores())["losses"]
                for window in models.windows
                if names is _ALL and threads == cores() and not model.other
            ]
            figures = {"peak": peak} | ({"perplexity": _perplexity(losses)} if losses else {})
            if losses and (expected := models.losses_of_modules(name)):
                figures["perplexity of the modules in float32"] = _perplexity(expected)
            return figures

        return Candidate(
            name,
            partial(_checked, models, name),
            lambda: model.ask("prefill", **what)["seconds"],
            slow=length > 1024,
            timed=True,
            remark=model.remark,
            figures=figures,
        )

    return _case(settings, f"prefill B {batch}, {length} tokens", names, make, threads=threads, tokens=batch * length)


def _perplexity(losses: list[list[float]]) -> float:
    flat = list(chain.from_iterable(losses))
    return math.exp(math.fsum(flat) / len(flat))


def _lookup(settings: Settings, threads: int) -> Case:
    """Text that is copied, with and without proposals from the prompt."""
    length, steps = (24, 8) if settings.quick else (96, 96)

    def make(models: LineUp, name: str) -> Candidate:
        model, options = models.get(name.removesuffix(LOOKUP)), {}
        if name.endswith(LOOKUP):
            options = {"prompt_lookup_num_tokens": 10}
        passage = models.given.text[:length]

        def results() -> dict[str, Tensor]:
            checked = _checked(models, name.removesuffix(LOOKUP))
            model.ask("prefill", ids=[passage * 3 + passage[: length // 8]], threads=threads)
            return checked

        ask = partial(model.ask, "generate", steps=steps, threads=threads, **options)
        return Candidate(name, results, lambda: ask()["whole"], timed=True, remark=model.remark)

    names = [name + suffix for name in (EAGER, OURS, INT4, GGUF) for suffix in ("", LOOKUP)]
    return _case(settings, f"copying, {steps} tokens", names, make, threads=threads, tokens=1)


def _beside(settings: Settings, case: Case, threads: int) -> Case:
    """A case of operators; those of the baseline compete, too."""
    before = BEFORE[OURS]
    kind, tokens, size = _OPERATOR.match(case.name).groups()

    def prepare() -> Contest:
        contest = case.prepare()
        ours = next(c for c in contest.candidates if c.name == OURS)
        try:
            ask = line_up(settings).get(before).ask
        except Missing as reason:
            contest.missing[before] = str(reason)
            return contest
        what = {"kind": kind or "", "tokens": int(tokens), "size": int(size), "threads": threads}
        step = lambda: ask("operator", **what)["seconds"]  # noqa: E731
        contest.candidates.append(Candidate(before, ours.results, step, timed=True))
        return contest

    return replace(
        case,
        family="generation",
        name=f"operator alone, {case.name}",
        prepare=prepare,
        threads=threads,
        candidates=(*case.candidates, before),
    )


def _disturbed(settings: Settings, threads: int) -> Case:
    """Another process takes one of the cores."""
    context, steps = (24, 4) if settings.quick else (512, 16)

    def make(models: LineUp, name: str) -> Candidate:
        if threads < 2:
            raise Missing("there is one core only")
        model, alone = models.get(name.removesuffix(ALONE)), name.endswith(ALONE)
        busy = None if alone else models.busy()
        ours = name.startswith((OURS, EAGER))

        def results() -> dict[str, Tensor]:
            checked = _checked(models, name.removesuffix(ALONE))
            model.ask("prefill", ids=_prompts(models, context, 1), threads=threads)
            return checked

        def step() -> float:
            ask = partial(model.ask, "generate" if ours else "decode", steps=steps)
            if alone:
                return statistics.mean(ask(threads=1)["seconds"])
            with busy:
                return statistics.mean(ask(threads=threads)["seconds"])

        slow = not ours and not alone  # llama.cpp falls to a twentieth of its speed
        return Candidate(name, results, step, slow=slow, timed=True, remark=model.remark)

    names = [name + suffix for name in (EAGER, OURS, INT4, GGUF, Q4_1) for suffix in ("", ALONE)]
    return _case(settings, f"decode, one core taken, context {context}", names, make, threads=threads, tokens=1)
