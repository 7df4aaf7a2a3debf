"""A plain stream beside random schemas and regular expressions, and beside plain requests."""

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np

from benchmarks.robustness.random_grammars import Constraint, draw
from benchmarks.robustness.traffic import COMPLETIONS, Connection, Outcome, complete, wait_until
from benchmarks.robustness.verdict import Verdict
from benchmarks.server import Server, metrics

FLAGS = (
    "--max-model-len=1024",
    "--max-num-seqs=8",
    "--warmup=full",
    "--disable-uvicorn-access-log",
)
NEIGHBOURS = 3
"""Requests beside the stream at any time."""
LENGTH = 12
ROUNDS = 4
STREAM = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
MAX_RATIO = 5.0
"""Most that the stream's median and 99th percentile may grow beside grammars."""
MAX_GAP_S = 2.0
"""Longest gap of the stream that is not yet a stall."""


async def beside(server: Server, *, count: int, seed: int) -> Verdict:
    """Measure the gaps of a stream beside plain requests and beside constrained ones, in turn.

    Args:
        server: Started with `FLAGS`.
        count: Constraints.
        seed: Of the constraints.
    """
    constraints = draw(count, seed)
    bodies = [_body(number, one.fields) for number, one in enumerate(constraints)]
    plain = [_body(number, None) for number in range(count // 4)]
    gaps: dict[str, list[float]] = {"plain": [], "grammars": []}
    outcomes: list[Outcome] = []
    await _round(server.url, plain[:NEIGHBOURS])  # nothing is new afterwards
    seconds = 0.0
    for number in range(ROUNDS):
        found, _ = await _round(server.url, plain[number::ROUNDS])
        gaps["plain"] += found
        start = time.perf_counter()
        low, high = (count * n // ROUNDS for n in (number, number + 1))
        found, some = await _round(server.url, bodies[low:high])
        seconds += time.perf_counter() - start
        gaps["grammars"] += found
        outcomes += some
    verdict = Verdict()
    verdict.facts = {
        "constraints": count,
        "neighbours": NEIGHBOURS,
        "seconds beside grammars": round(seconds, 1),
        **_spread(gaps),
        "statuses by kind": _statuses(constraints, outcomes),
        "slowest answer, s": round(max(o.arrivals[-1] for o in outcomes), 2),
    }
    _judge_gaps(verdict)
    _judge_outcomes(verdict, constraints, outcomes)
    left = metrics(server.url)["num_requests_running"]
    verdict.require(not left, f"{left:g} requests are left over")
    return verdict


def _body(number: int, constraint: dict[str, Any] | None) -> dict[str, Any]:
    body = {"prompt": f"Number {number}:", "max_tokens": LENGTH, "temperature": 0}
    return body if constraint is None else body | {"structured_outputs": constraint}


async def _round(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[float], list[Outcome]]:
    """Send requests, a few at a time, beside a stream; return its gaps and what came of them."""
    arrivals: list[list[float]] = []
    stream = asyncio.create_task(_stream(url, arrivals))
    await wait_until(lambda: arrivals and len(arrivals[-1]) > 2, timeout_s=60)
    begin = time.perf_counter()
    gate = asyncio.Semaphore(NEIGHBOURS)

    async def go(body: dict[str, Any]) -> Outcome:
        async with gate:
            start = time.perf_counter()
            outcome = await complete(url, body)
            outcome.arrivals = [time.perf_counter() - start]
            return outcome

    outcomes = await asyncio.gather(*map(go, bodies))
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    gaps = [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if earlier >= begin
    ]
    return gaps, outcomes


async def _stream(url: str, arrivals: list[list[float]]) -> None:
    """Stream plain text until cancelled, and note when each event came."""
    while True:
        connection = Connection(url, COMPLETIONS, STREAM)
        await connection.open()
        arrivals.append([])
        try:
            async for _ in connection.events():
                arrivals[-1].append(time.perf_counter())
        finally:
            connection.kill(with_reset=False)


def _spread(gaps: dict[str, list[float]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, values in gaps.items():
        ms = 1000 * np.asarray(values)
        facts |= {
            f"gaps beside {name}": len(values),
            f"gap beside {name}, median ms": round(float(np.median(ms)), 1),
            f"gap beside {name}, p99 ms": round(float(np.percentile(ms, 99)), 1),
            f"gap beside {name}, most ms": round(float(ms.max()), 1),
        }
    for name in ("median", "p99"):
        both = [facts[f"gap beside {kind}, {name} ms"] for kind in ("grammars", "plain")]
        facts[f"ratio of {name}"] = round(both[0] / both[1], 2)
    return facts


def _judge_gaps(verdict: Verdict) -> None:
    facts = verdict.facts
    for name in ("median", "p99"):
        ratio = facts[f"ratio of {name}"]
        verdict.require(ratio <= MAX_RATIO, f"the {name} gap grew {ratio} times")
    most = facts["gap beside grammars, most ms"]
    verdict.require(most <= 1000 * MAX_GAP_S, f"the stream stalled for {most:g} ms")


def _statuses(constraints: Sequence[Constraint], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    found = Counter(
        (one.kind, str(outcome.status)) for one, outcome in zip(constraints, outcomes, strict=True)
    )
    return {f"{kind} {status}": count for (kind, status), count in sorted(found.items())}


def _judge_outcomes(
    verdict: Verdict, constraints: Sequence[Constraint], outcomes: Sequence[Outcome]
) -> None:
    wrong: list[str] = []
    for one, outcome in zip(constraints, outcomes, strict=True):
        wanted = {"valid": {200}, "invalid": {400}, "pathological": {200, 400}}[one.kind]
        problem = "" if outcome.status in wanted else f"status {outcome.status}"
        if outcome.status == 200:
            problem = problem or _mismatch(one, outcome)
        if problem:
            shown = json.dumps(one.fields)[:200]
            wrong.append(f"{one.kind} {shown}: {problem} {outcome.error[:200]}")
    verdict.facts["wrong answers"] = len(wrong)
    verdict.problems += wrong[:10]


def _mismatch(one: Constraint, outcome: Outcome) -> str:
    """Tell how a complete output breaks its constraint; empty if it does not."""
    if outcome.error or outcome.reasons not in (["stop"], ["length"]):
        return f"ended with {outcome.reasons}: {outcome.error}"
    if outcome.reasons != ["stop"] or one.kind != "valid":
        return ""
    if "regex" in one.fields:
        ok = re.fullmatch(one.fields["regex"], outcome.text)
        return "" if ok else f"{outcome.text!r} does not match"
    try:
        jsonschema.validate(json.loads(outcome.text), one.fields["json"])
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{outcome.text!r}: {str(error)[:100]}"
    return ""
