"""The loop of a worker process: one JSON request per line in, one JSON answer per line out.

A request is `{"op": name, ...arguments}`; the answer is what the worker's method of that name
returned, or `{"error": text}`. Runs on Python 3.11 too, and needs the standard library only.
"""

import json
import os
import statistics
import sys
import traceback
from typing import Any, Protocol


class Worker(Protocol):
    """An engine that can be measured.

    Times are seconds. Every method is called with equal token ids in every engine.
    """

    def load(self, **settings: Any) -> dict[str, Any]:  # noqa: ANN401  each has its own
        """Load the model; answer with versions and settings."""
        ...

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Answer with `seconds` from a prompt to its first token."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Answer with `tokens_per_s` of decoding all prompts side by side."""
        ...

    def burst(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Answer with `seconds`, `ttft_s` and `tpot_s` of serving all prompts from start to end."""
        ...


def burst_result(started: float, first: float, ended: float, count: int, steps: int) -> dict:
    """Describe a batch whose sequences start and end together.

    Args:
        started: Instant at which the prompts were handed over.
        first: Instant at which every sequence had its first token.
        ended: Instant of the last token.
        count: Sequences.
        steps: Tokens per sequence.
    """
    return {
        "seconds": ended - started,
        "ttft_s": [first - started] * count,
        "tpot_s": [(ended - first) / (steps - 1)] * count,
        "tokens_per_s": count * steps / (ended - started),
    }


def decode_result(step_seconds: list[float], count: int) -> dict[str, Any]:
    """Describe decode steps that gave one token to each of `count` sequences."""
    return {
        "tokens_per_s": count * len(step_seconds) / sum(step_seconds),
        "median_step_s": statistics.median(step_seconds),
        "steps": len(step_seconds),
    }


def serve(worker: Worker) -> None:
    """Answer requests until standard input ends.

    Standard output belongs to the protocol alone; whatever libraries print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            answer = getattr(worker, op)(**request)
        except Exception as error:  # noqa: BLE001  whatever it is, the other side must hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
