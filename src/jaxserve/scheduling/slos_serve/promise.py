"""What the planner remembers about each request, and how it reads its objectives."""

import math
from bisect import bisect_right, insort
from dataclasses import dataclass
from enum import Enum

from jaxserve.core.request import Slo
from jaxserve.core.view import SequenceView
from jaxserve.scheduling.slos_serve.config import Pace, SlosServeConfig

_PER_SECOND = 1000
_ENOUGH = 20
"""Lengths to have seen before a quantile of them is believed."""
_REMEMBERED = 512


class Standing(Enum):
    """How a request stands with the planner."""

    NEW = "new"
    PROMISED = "promised"
    BEST_EFFORT = "best_effort"


@dataclass(slots=True)
class Record:
    """What is remembered about one request.

    Attributes:
        standing: Whether anything was promised.
        deadline: Clock time of its first token in seconds; infinite without objectives.
        tau: Seconds per further token.
        tier: Name under which its lengths are counted.
        generated: Output tokens when it was last seen.
        last_token: Clock time at which the latest of them was first seen.
        has_missed: Whether a deadline has passed, so that nothing is left to keep.
        as_soon_as_possible: Whether it goes before others without a promise.
        idle_s: Seconds to its first token on an idle server.
        is_noted: Whether it has been told of as one without a promise.
    """

    standing: Standing
    deadline: float
    tau: float
    tier: str
    generated: int = 0
    last_token: float = -math.inf
    has_missed: bool = False
    as_soon_as_possible: bool = False
    idle_s: float = 0.0
    is_noted: bool = False

    def due(self, pace: Pace, first_token: float | None) -> float:
        """Return when the next token of a decoding request is due."""
        if pace == "tpot_gap":
            return self.last_token + self.tau
        start = self.deadline
        if pace == "tpot_mean" and first_token is not None:
            start = first_token
        return start + self.generated * self.tau


class OutputLengths:
    """Guesses how long an output will be, by those that have ended in the same tier.

    Args:
        quantile: Which quantile of their lengths is reckoned with.
        initial: Length to reckon with before enough have ended.
    """

    def __init__(self, quantile: float, initial: int) -> None:
        """Start without lengths."""
        self._quantile = quantile
        self._initial = initial
        self._latest: dict[str, list[int]] = {}
        self._sorted: dict[str, list[int]] = {}

    def observe(self, tier: str, length: int) -> None:
        """Take note of an output that has ended."""
        latest, ordered = self._latest.setdefault(tier, []), self._sorted.setdefault(tier, [])
        latest.append(length)
        insort(ordered, length)
        if len(latest) > _REMEMBERED:
            ordered.remove(latest.pop(0))

    def guess(self, tier: str, generated: int, limit: int) -> int:
        """Return the length to reckon with.

        Args:
            tier: Tier of the request.
            generated: Tokens that it has already; the guess is among those that were longer.
            limit: Most tokens that it can have.
        """
        ordered = self._sorted.get(tier, ())
        if len(ordered) < _ENOUGH:
            guess = max(self._initial, generated + generated // 4 + 1)
            return min(guess, limit)
        low = bisect_right(ordered, generated) if generated else 0
        if low >= len(ordered):
            return min(limit, generated + generated // 4 + 1)
        place = low + int(self._quantile * (len(ordered) - 1 - low))
        return max(generated + 1, min(limit, ordered[place]))


def record_of(sequence: SequenceView, config: SlosServeConfig, idle_s: float) -> Record:
    """Read the objectives of a request that has just been seen for the first time.

    Args:
        sequence: The request.
        config: The planner's settings.
        idle_s: Seconds to its first token on an idle server.

    Returns:
        Its record. Where there is only a time to the end, what is left of it after the first token
        is shared out evenly over the tokens.
    """
    slo = sequence.slo
    if slo is None:
        return Record(Standing.BEST_EFFORT, math.inf, math.inf, "")
    tau, ttft = _targets(sequence, slo, config, idle_s)
    return Record(
        Standing.NEW,
        sequence.arrival + ttft,
        tau,
        slo.tier,
        as_soon_as_possible=slo.on_decline == "asap",
        idle_s=idle_s,
    )


def _targets(
    sequence: SequenceView, slo: Slo, config: SlosServeConfig, idle_s: float
) -> tuple[float, float]:
    """Return seconds per token, and seconds to the first."""
    output = min(config.initial_output, max(1, sequence.max_total_len - sequence.prompt_len))
    tau = math.inf if slo.tpot_ms is None else slo.tpot_ms / _PER_SECOND
    ttft = math.inf if slo.ttft_ms is None else slo.ttft_ms / _PER_SECOND
    if slo.e2e_ms is not None:
        whole = slo.e2e_ms / _PER_SECOND
        ttft = min(ttft, max(whole / 2, whole - output * tau) if tau < math.inf else whole / 2)
        tau = min(tau, (whole - ttft) / output)
    if ttft == math.inf:
        ttft = 10 * idle_s
    return (1.0 if tau == math.inf else tau), ttft
