"""What a simulation says: attainment, latencies, and a log that is the same for the same run."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from jaxserve.sim.request import Completion

Reading = Literal["tpot", "tpot_gap", "tpot_mean"]
"""How the target per token is read: as deadlines, for every gap, or for the mean gap."""
READINGS: tuple[Reading, ...] = ("tpot", "tpot_gap", "tpot_mean")


def is_attained(one: Completion, reading: Reading) -> bool:
    """Tell whether a request kept every objective, with one reading of the time per token."""
    outcome = one.outcome
    if one.rejection is not None or outcome.ttft is False or outcome.e2e is False:
        return False
    return getattr(outcome, reading) is not False


def attainment(done: Iterable[Completion], reading: Reading, *, skip: int = 0) -> float:
    """Return the share of requests that kept every objective; those refused did not.

    Args:
        done: What became of the requests.
        reading: How the target per token is read.
        skip: Requests to leave out, the first to arrive.
    """
    flags = [is_attained(one, reading) for one in done if one.request.request_id >= skip]
    return sum(flags) / len(flags) if flags else 1.0


def latencies(done: Sequence[Completion]) -> dict[str, float]:
    """Return mean and 99th percentile of TTFT, TPOT and end-to-end latency in seconds.

    Requests of one token have no time per output token.
    """
    longer = [one for one in done if one.request.output_len > 1]
    samples = {
        "ttft": [one.ttft for one in done],
        "tpot": [one.tpot for one in longer],
        "e2e": [one.e2e for one in done],
    }
    return {
        f"{name}_{what}": float(measure(np.array(values or [0.0])))
        for name, values in samples.items()
        for what, measure in (("mean", np.mean), ("p99", lambda v: np.quantile(v, 0.99)))
    }


def log_lines(done: Iterable[Completion]) -> str:
    """Return one JSON line per request, in the order of their ends."""
    return "".join(
        json.dumps(
            {
                "id": one.request.request_id,
                "replica": one.replica,
                "arrival": one.request.arrival,
                "first_token": one.first_token,
                "finished": one.finished,
                "kept": one.outcome.readings(),
                "preemptions": one.preemptions,
                "rejected": one.rejection and one.rejection.reason,
            },
            sort_keys=True,
        )
        + "\n"
        for one in done
    )


def digest(done: Iterable[Completion]) -> str:
    """Return a hash of the log, by which runs can be compared."""
    return hashlib.sha256(log_lines(done).encode()).hexdigest()
