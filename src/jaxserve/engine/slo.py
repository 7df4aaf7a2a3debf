"""Judges, token by token, whether a completion keeps its service-level objectives."""

from jaxserve.core.event import SloOutcome
from jaxserve.core.request import Slo

_PER_SECOND = 1000


class SloTracker:
    """Follows one completion; constant work and memory per token.

    Args:
        slo: The objectives.
        arrival: Clock time of the request's arrival in seconds.
    """

    __slots__ = (
        "_arrival", "_count", "_first", "_is_gap_kept", "_is_pace_kept", "_last", "_slo", "_tpot",
    )  # fmt: skip

    def __init__(self, slo: Slo, arrival: float) -> None:
        """Start before the first token."""
        self._slo = slo
        self._arrival = arrival
        self._tpot = None if slo.tpot_ms is None else slo.tpot_ms / _PER_SECOND
        self._count = 0
        self._first = arrival
        self._last = arrival
        self._is_pace_kept = True
        self._is_gap_kept = True

    def token(self, now: float) -> None:
        """Take note of the next token.

        Args:
            now: Clock time at which it was known, in seconds.
        """
        if self._count == 0:
            self._first = now
        elif self._tpot is not None:
            self._is_gap_kept &= now - self._last <= self._tpot
            self._is_pace_kept &= now <= self._start() + self._count * self._tpot
        self._last = now
        self._count += 1

    def _start(self) -> float:
        """Return when the first token is due, from which the others' deadlines are counted."""
        if self._slo.ttft_ms is None:
            return self._first
        return self._arrival + self._slo.ttft_ms / _PER_SECOND

    def outcome(self, *, finished: float, is_whole: bool) -> SloOutcome:
        """Judge at the end.

        Args:
            finished: Clock time of the end in seconds.
            is_whole: Whether the completion came to its own end; what is open otherwise is missed.

        Returns:
            Which objectives were kept.
        """
        slo, tpot = self._slo, self._tpot
        e2e = None if slo.e2e_ms is None else is_whole and self._keeps(slo.e2e_ms, finished)
        ttft = None
        if slo.ttft_ms is not None:
            # One that ends without a token, since all had been generated before, needs no first.
            first = self._first if self._count else finished
            ttft = (is_whole or self._count > 0) and self._keeps(slo.ttft_ms, first)
        if tpot is None:
            return SloOutcome(ttft=ttft, e2e=e2e)
        is_mean_kept = self._last - self._first <= tpot * max(0, self._count - 1)
        return SloOutcome(
            ttft=ttft,
            tpot=is_whole and self._is_pace_kept,
            tpot_gap=is_whole and self._is_gap_kept,
            tpot_mean=is_whole and is_mean_kept,
            e2e=e2e,
        )

    def _keeps(self, target_ms: float, time: float) -> bool:
        return time - self._arrival <= target_ms / _PER_SECOND


def missed(slo: Slo) -> SloOutcome:
    """Return the outcome of a request that was refused: nothing was kept."""
    return SloTracker(slo, 0.0).outcome(finished=0.0, is_whole=False)
