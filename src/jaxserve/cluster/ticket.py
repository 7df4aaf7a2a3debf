"""A request on its way through a fleet, from replica to replica if need be."""

import dataclasses
from collections.abc import Sequence

from jaxserve.cache.pages import PageHash
from jaxserve.core.event import FinishReason, SloOutcome, TokenEvent
from jaxserve.core.request import Request, RequestId, Slo
from jaxserve.core.view import SequenceView
from jaxserve.engine.inbox import Sink
from jaxserve.engine.slo import SloTracker, missed

_SEEDS = 1 << 64


class Part:
    """One completion of a request. Written by the thread of the replica that it is with.

    Args:
        index: Which of the request's completions.
        number: Identity in the views of the fleet.
        slo: Its objectives.
        arrival: Clock time of its request's arrival in seconds.

    Attributes:
        tokens: Output so far, from all replicas.
        leg: The replica that it is with, by the hand-over to it; None while it waits.
        num_moves: How often a replica has failed it.
        is_done: Whether it has had its last event.
        first_token_time: Clock time of its first token.
        has_prompt_logprobs: Whether those of the prompt have been sent.
        num_cached: Prompt tokens that the first replica found in its cache.
        outcome: Which objectives it kept, once it has ended.
    """

    def __init__(self, index: int, number: int, slo: Slo | None, arrival: float) -> None:
        """Start before the first token."""
        self.index = index
        self.number = number
        self.tokens: list[int] = []
        self.leg: Leg | None = None
        self.num_moves = 0
        self.is_done = False
        self.first_token_time: float | None = None
        self.has_prompt_logprobs = False
        self.num_cached: int | None = None
        self.outcome: SloOutcome | None = None
        self._slo = None if slo is None else SloTracker(slo, arrival)

    def take(self, event: TokenEvent, now: float) -> None:
        """Take note of what an event brings."""
        self.has_prompt_logprobs |= event.prompt_logprobs is not None
        if not event.token_ids:
            return
        self.tokens.extend(event.token_ids)
        if self.first_token_time is None:
            self.first_token_time = now
            self.num_cached = event.num_cached_tokens
        if self._slo is not None:
            for _ in event.token_ids:
                self._slo.token(now)

    def judge(self, event: TokenEvent, now: float) -> SloOutcome | None:
        """Tell which objectives were kept, at the end; the engine knows if there was only one."""
        if self._slo is None:
            return None
        if not self.num_moves and event.metrics is not None:
            return event.metrics.slo
        is_whole = event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return self._slo.outcome(finished=now, is_whole=is_whole)


class Leg:
    """Completions of a request that a replica has been handed.

    Args:
        slot: Number of the replica.
        request: What the replica was asked for.
        parts: The completions, in the order in which the replica numbers them.

    Attributes:
        begun: Tokens that the first of them had already.
        is_over: Whether whatever the replica still says is to be passed over.
    """

    def __init__(self, slot: int, request: Request, parts: Sequence[Part]) -> None:
        """Begin."""
        self.slot = slot
        self.request = request
        self.parts = tuple(parts)
        self.begun = len(self.parts[0].tokens)
        self.is_over = False

    @property
    def open_parts(self) -> list[tuple[int, Part]]:
        """Those that have not ended and are still with the replica, with their numbers there."""
        return [(i, part) for i, part in enumerate(self.parts) if part.leg is self]


class Ticket:
    """A request that a fleet has taken.

    Args:
        request: What was asked for; its seed is known, so that any replica draws the same tokens.
        sink: Where its events go.
        hashes: Names of the full pages of its prompt.
        first_number: Identity of its first completion in the views of the fleet.
        max_total_len: Most tokens of a completion with its prompt.

    Attributes:
        parts: Its completions.
        num_open: Those that have not ended.
        is_cancelled: Whether it is to end.
        tier: Seconds per token of its tier; None without tiers.
        is_unpromised: Whether it has been counted as served without a promise.
    """

    def __init__(
        self,
        request: Request,
        sink: Sink,
        *,
        hashes: Sequence[PageHash],
        first_number: int,
        max_total_len: int,
    ) -> None:
        """Start with every completion open and with nobody."""
        self.request = request
        self.sink = sink
        self.hashes = tuple(hashes)
        self.max_total_len = max_total_len
        self.parts = tuple(
            Part(i, first_number + i, request.slo, request.arrival)
            for i in range(request.sampling.n)
        )
        self.num_open = len(self.parts)
        self.is_cancelled = False
        self.tier: float | None = None
        self.is_unpromised = False

    @property
    def due(self) -> float:
        """Clock time at which the first token is due; its arrival tells if nothing is."""
        slo = self.request.slo
        if slo is None or slo.ttft_ms is None:
            return float("inf")
        return self.request.arrival + slo.ttft_ms / 1000

    def view(self, part: Part) -> SequenceView:
        """Return a completion that waits, as policies see it."""
        request = self.request
        total = len(request.prompt_token_ids) + len(request.output_token_ids) + len(part.tokens)
        return SequenceView(
            seq_id=part.number,
            arrival=request.arrival,
            priority=request.priority,
            prompt_len=len(request.prompt_token_ids),
            num_tokens=total,
            num_computed=0,
            max_total_len=self.max_total_len,
            num_pages=0,
            is_running=False,
            slo=request.slo,
            first_token_time=part.first_token_time,
            adapter="" if request.adapter is None else request.adapter.key,
        )

    def request_for(self, parts: Sequence[Part]) -> Request:
        """Return what to ask a replica for: all completions, or the rest of a single one.

        Args:
            parts: All of them, none of which has begun; or one.
        """
        if not any(part.num_moves for part in parts):
            return self.request
        (part,) = parts
        request = self.request
        sampling, name = request.sampling, request.request_id
        changes: dict[str, object] = {"n": 1}
        if sampling.n > 1:
            name = RequestId(f"{name}/{part.index}")
            if sampling.seed is not None:
                low = _SEEDS // 2
                changes["seed"] = (sampling.seed + part.index + low) % _SEEDS - low
        if part.has_prompt_logprobs or part.index:
            changes["prompt_logprobs"] = None
        return dataclasses.replace(
            request,
            request_id=name,
            sampling=sampling.replace(**changes),
            output_token_ids=(*request.output_token_ids, *part.tokens),
            slo=_remaining(request.slo, has_begun=bool(part.tokens)),
        )

    def translated(self, part: Part, event: TokenEvent, now: float) -> TokenEvent:
        """Return an event as if the request had always been with one replica.

        Args:
            part: The completion that it is about; has taken the event in.
            event: What a replica says.
            now: Clock time in seconds.
        """
        if event.finish_reason is not None:
            part.outcome = part.judge(event, now)
        if not part.num_moves:
            return event
        times = event.metrics
        if times is not None:
            times = dataclasses.replace(
                times, first_token_time=part.first_token_time, slo=part.outcome
            )
        cached = event.num_cached_tokens if part.num_cached is None else part.num_cached
        return dataclasses.replace(
            event,
            request_id=self.request.request_id,
            index=part.index,
            num_cached_tokens=cached,
            metrics=times,
        )

    @property
    def outcome(self) -> SloOutcome | None:
        """What all completions kept alike, once they have ended; None without objectives."""
        slo = self.request.slo
        if slo is None:
            return None
        found = [part.outcome or missed(slo) for part in self.parts]
        whole = found[0]
        for other in found[1:]:
            whole = whole.both(other)
        return whole


def _remaining(slo: Slo | None, *, has_begun: bool) -> Slo | None:
    """Return the objectives of a request that goes on; it is not refused any more."""
    if slo is None:
        return None
    if not has_begun:
        return dataclasses.replace(slo, on_decline="best_effort")
    if slo.tpot_ms is None and slo.e2e_ms is None:
        return None
    return dataclasses.replace(slo, ttft_ms=None, on_decline="best_effort")
