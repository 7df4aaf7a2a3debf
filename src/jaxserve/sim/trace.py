"""Writes a simulation as a trace for Chrome's viewer or Perfetto."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from jaxserve.core.cost import StepLoad
from jaxserve.core.plan import StepPlan
from jaxserve.sim.request import Completion

_US = 1e6


class TraceRecorder:
    """An observer that keeps every step, and writes steps and requests as trace events.

    Each replica is a process: its steps lie on one row, with what they held; requests lie below as
    spans of waiting, prefill (to the first token) and decoding.

    Source: the Trace Event Format of Chrome's tracing tools.
    """

    def __init__(self) -> None:
        """Start without steps."""
        self._steps: list[tuple[int, float, float, int, StepLoad]] = []

    def step(
        self, replica: int, begin: float, ends: Sequence[float], plan: StepPlan, load: StepLoad
    ) -> None:
        """Take note of one step, or of several with one plan."""
        del plan
        for index, end in enumerate(ends):
            grown = load._replace(context=load.context + index * load.decodes)
            self._steps.append((replica, begin, end, len(ends), grown))
            begin = end

    def write(self, file: TextIO, completions: Iterable[Completion]) -> None:
        """Write one JSON document.

        Args:
            file: Open for text.
            completions: What became of the requests.
        """
        events: list[dict[str, Any]] = [
            {
                "name": "step",
                "ph": "X",
                "pid": replica,
                "tid": 0,
                "ts": round(begin * _US, 3),
                "dur": round((end - begin) * _US, 3),
                "args": load._asdict(),
            }
            for replica, begin, end, _, load in self._steps
        ]
        names = {replica for replica, *_ in self._steps}
        for one in sorted(completions, key=lambda c: c.request.request_id):
            names.add(one.replica)
            events += _spans(one)
        events += [
            {"name": "process_name", "ph": "M", "pid": index, "args": {"name": f"replica {index}"}}
            for index in sorted(names)
        ]
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, sort_keys=True)


def _spans(one: Completion) -> list[dict[str, Any]]:
    request = one.request
    first = one.finished if one.first_token is None else one.first_token
    parts = [("to first token", request.arrival, first), ("decode", first, one.finished)]
    args = {
        "class": request.name,
        "prompt": request.prompt_len,
        "output": request.output_len,
        "kept": {name: bool(kept) for name, kept in one.outcome.readings().items()},
        "rejected": one.rejection.reason if one.rejection else None,
    }
    events: list[dict[str, Any]] = []
    for name, begin, end in parts:
        for phase, time in (("b", begin), ("e", end)):
            events.append(
                {
                    "name": name,
                    "cat": "request",
                    "ph": phase,
                    "id": request.request_id,
                    "pid": one.replica,
                    "tid": 1,
                    "ts": round(time * _US, 3),
                    "args": args if phase == "b" else {},
                }
            )
    return events
