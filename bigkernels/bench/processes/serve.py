"""How a script answers: a line of JSON a question on its standard input, {"do": name, ...}, and a line for each answer.

What a model's script knows: `load` (model, and what else it takes; gives `bytes`, those of the weights that a token
reads, and `cache`, those that a token of context adds), `prefill` (ids, threads; fills its cache and gives `seconds`),
`decode` (steps, threads; one token after the other behind what prefill left, forgotten again at the end; gives
`seconds`, one value a token, and `cpu`, the processor seconds of all), and `score` (ids of one sequence, known,
threads; gives `losses`, the negative log likelihood of each token behind the first `known`). Other `ids` are rows of
token ids, one a sequence.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable


def serve(answers: dict[str, Callable[..., dict]]) -> None:
    """Answer until the input ends. What answers raise is told, as `error`, and the next question is waited for."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = answers[question.pop("do")](**question)
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asked decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps({"memory": peak_memory(), **answer}) + "\n")
        replies.flush()


def peak_memory() -> int:
    """The most bytes that were resident in this process so far; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
