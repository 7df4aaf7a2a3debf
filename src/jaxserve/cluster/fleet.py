"""A fleet: takes requests as an engine does, and sees to it that each ends at some replica.

Requests are placed on the thread that submits them. What has to be done later is done by the
fleet's own thread, the pilot: it places those that wait, lets requests go on elsewhere whose
replica has failed, asks the scaler, and starts replicas again.

The fleet decides nothing: routers and scalers are those of `scheduling`, and see frozen views.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.cache.pages import chain_hashes, salt_hash
from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.cluster.prefixes import PrefixIndex
from jaxserve.cluster.roster import Roster, Slot
from jaxserve.cluster.ticket import Leg, Part, Ticket
from jaxserve.core.errors import CapacityError, EngineDeadError, RequestError
from jaxserve.core.event import FinishReason, TokenEvent
from jaxserve.core.plan import DeclineReason, Rejection, RoutePlan
from jaxserve.core.protocols import Clock, QueueingRouter, Scaler
from jaxserve.core.request import Request
from jaxserve.core.view import FleetView, SequenceView
from jaxserve.engine.inbox import Sink
from jaxserve.engine.slo import missed
from jaxserve.scheduling.fleet_log import FleetLogWriter

logger = logging.getLogger(__name__)

RETRY_S = 0.02
"""Seconds after which those who wait are offered again, if nothing happens before."""
LOOK_S = 0.2
"""Seconds between looks at whether replicas live."""
_SEED_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Completions that wait at the router; ordered by when the first token is due."""

    due: float
    number: int
    ticket: Ticket
    parts: tuple[Part, ...]

    def __lt__(self, other: "_Waiting") -> bool:
        return (self.due, self.number) < (other.due, other.number)

    @property
    def is_moving(self) -> bool:
        """Whether a replica has failed it; then it is not refused any more."""
        return any(part.num_moves for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetParts:
    """What a fleet is made of.

    Attributes:
        router: Places requests.
        scaler: Changes roles; None leaves them as they are.
        check_s: Seconds between questions to the scaler.
        log: Where decisions are written; None writes none.
        check: Refuses requests that no replica could serve; from any thread.
        page_size: Tokens per page of the prefix caches.
        max_model_len: Most tokens of prompt and output together.
        max_moves: How often a completion may go on with another replica.
        max_queued: Most requests that wait at the router; None is no limit.
        seed: Seeds the streams of requests without a seed.
    """

    router: QueueingRouter
    scaler: Scaler | None
    check_s: float
    log: FleetLogWriter | None
    check: Callable[[Request], None]
    page_size: int
    max_model_len: int
    max_moves: int
    max_queued: int | None
    seed: int


class Fleet:
    """Several replicas behind one door.

    Args:
        roster: The replicas.
        parts: What else it is made of.
        clock: Where time comes from.
        lock: Guards places and decisions; also the roster's.
        metrics: Counters.

    Attributes:
        roster: The replicas.
        metrics: Counters.
        prefixes: Which replica has seen which prompt.
    """

    def __init__(
        self,
        roster: Roster,
        parts: FleetParts,
        *,
        clock: Clock,
        lock: threading.RLock,
        metrics: FleetMetrics,
    ) -> None:
        """Start the pilot."""
        self.roster = roster
        self.metrics = metrics
        self.prefixes = PrefixIndex()
        self._parts = parts
        self._clock = clock
        self._lock = lock
        self._random = np.random.default_rng(parts.seed)
        self._numbers = itertools.count(1)
        self._tickets: dict[str, Ticket] = {}
        self._queue: list[_Waiting] = []
        self._failed: deque[tuple[Ticket, Part, TokenEvent]] = deque()
        self._done: deque[SequenceView] = deque()
        self._open = threading.Condition()
        self._num_open = 0
        self._wake = threading.Event()
        self._is_closing = False
        self._next_check = clock.now() + parts.check_s
        self._pilot = threading.Thread(target=self._run, name="jaxserve-fleet", daemon=True)
        self._pilot.start()

    @property
    def num_unfinished(self) -> int:
        """Completions that have been accepted and have not ended."""
        return self._num_open

    # The door ----------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request, or refuse it at once; see `Inbox.submit`.

        Raises:
            RequestError: If it can never be served, or no idle replica could keep its objectives.
            CapacityError: If every replica, or the router's queue, is full.
            EngineDeadError: If no replica is left.
        """
        if self._is_closing:
            raise EngineDeadError("the fleet has been closed.")
        self._parts.check(request)
        ticket = self._ticket(request, sink)
        waiting = _Waiting(ticket.due, next(self._numbers), ticket, ticket.parts)
        name = request.request_id
        with self._lock:
            if name in self._tickets:
                raise RequestError(
                    f"request id {name!r} is already in use.", param="request_id"
                )  # fmt: skip
            if not self.roster.is_hopeful:
                raise EngineDeadError("no replica is left; restart the server.")
            self._tickets[name] = ticket
            self._count(len(ticket.parts))
            try:
                plan = self._place(waiting)
                if plan.route is None:
                    self._refuse_the_impossible(ticket, plan)
                    self._let_wait(waiting, plan)
            except BaseException:
                del self._tickets[name]
                self._count(-len(ticket.parts))
                raise

    def _ticket(self, request: Request, sink: Sink) -> Ticket:
        sampling = request.sampling
        if sampling.seed is None and not sampling.is_greedy and request.pooling is None:
            # Whichever replica goes on must draw what the first would have drawn.
            with self._lock:
                seed = int(self._random.integers(0, _SEED_LIMIT))
            request = dataclasses.replace(request, sampling=sampling.replace(seed=seed))
        adapter = "" if request.adapter is None else request.adapter.key
        root = salt_hash(request.cache_salt, adapter=adapter)
        hashes = chain_hashes(request.prompt_token_ids, self._parts.page_size, root=root)
        longest = self._parts.max_model_len
        if sampling.max_tokens is not None:
            longest = min(longest, len(request.prompt_token_ids) + sampling.max_tokens)
        number = next(self._numbers)
        for _ in range(sampling.n - 1):
            next(self._numbers)
        return Ticket(
            request, sink, hashes=hashes, first_number=number, max_total_len=longest
        )  # fmt: skip

    def _refuse_the_impossible(self, ticket: Ticket, plan: RoutePlan) -> None:
        slo = ticket.request.slo
        if plan.reason != "idle_server" or slo is None:
            return
        self.metrics.declined(slo.tier, plan.reason, is_served=False)
        self.metrics.request_judged(-1, slo.tier, missed(slo))
        tier, tpot = ticket.tier, slo.tpot_ms
        if tier is not None and tpot is not None and tpot < 1000 * tier * (1 - 1e-9):
            raise RequestError(
                f"{tpot:g} ms per token were asked for, and the tightest tier of this fleet is "
                f"{1000 * tier:g} ms; ask for that, or leave slo.tpot_ms out.",
                param="slo.tpot_ms",
            )
        objective = "tpot_ms" if slo.ttft_ms is None else "ttft_ms"
        raise RequestError(
            f"slo.{objective}={getattr(slo, objective):g} is less than even an idle replica needs "
            f"for a prompt of {len(ticket.request.prompt_token_ids)} tokens, by its cost model; "
            "ask for more time.",
            param=f"slo.{objective}",
        )

    def cancel(self, request_id: str) -> None:
        """Ask for a request to end; its completions finish with reason `abort`."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None:
                return
            ticket.is_cancelled = True
            for leg in {part.leg for part in ticket.parts if part.leg is not None}:
                replica = self.roster.slots[leg.slot].replica
                if replica is not None:
                    replica.cancel(leg.request.request_id)
        self._wake.set()

    def cancel_all(self) -> None:
        """Ask for every request to end."""
        for name in list(self._tickets):
            self.cancel(name)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no completion is under way.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether everything has ended.
        """
        with self._open:
            return self._open.wait_for(lambda: not self._num_open, timeout_s)

    def check_health(self) -> None:
        """Raise if no replica serves.

        Raises:
            CapacityError: If replicas are being started.
            EngineDeadError: If none is left.
        """
        if self.roster.living:
            return
        if self.roster.is_hopeful:
            raise CapacityError(
                "Every replica is being started again; try again soon.", retry_after_s=5.0
            )
        raise EngineDeadError("no replica is left; restart the server.")

    def close(self) -> None:
        """End what is under way, stop the pilot and close every replica."""
        if self._is_closing:
            return
        self._is_closing = True
        self.cancel_all()
        self._wake.set()
        self._pilot.join()
        self.roster.close()
        for ticket in list(self._tickets.values()):
            for part in ticket.parts:
                self._end(ticket, part, FinishReason.ABORT)
        if self._parts.log is not None:
            self._parts.log.close()

    # Placing: with the lock --------------------------------------------------------------------

    def _place(self, waiting: _Waiting, *, must: bool = False) -> RoutePlan:
        """Ask the router about completions, and hand them over if there is a place.

        Args:
            waiting: They.
            must: Whether they are placed even if no replica can promise anything.

        Returns:
            What the router answered.

        Raises:
            CapacityError: If every replica is full or paused.
        """
        ticket, parts = waiting.ticket, waiting.parts
        slots = self.roster.present
        if not slots:
            return RoutePlan(route=None, reason="compute")
        size = self._parts.page_size
        cached = [size * self.prefixes.match(slot.index, ticket.hashes) for slot in slots]
        fleet = self.roster.view(slots, cached)
        sequence = ticket.view(parts[0])
        ticket.tier = self._parts.router.tier_of(sequence)
        plan = self._parts.router.plan(sequence, fleet)
        if self._parts.log is not None:
            self._parts.log.routed(sequence, fleet, plan)
        # An idle replica lets nobody wait, whatever is promised.
        if plan.route is None and (must or (ticket.due == math.inf and _is_idle(fleet))):
            waits, plan = plan, self._parts.router.send_home(fleet, plan)
            if self._parts.log is not None:
                self._parts.log.sent_home(fleet, waits, plan)
        self.roster.carry_out(slots, plan.actions)
        if plan.route is None:
            return plan
        if not plan.route.is_promised:
            self._note_unpromised(ticket, plan.route.reason)
        first = slots[plan.route.replica]
        others = sorted(
            (s for s in slots if s.role.state == "serving" and s is not first),
            key=lambda s: (s.num_open, s.index),
        )
        if self._hand_over([first, *others], ticket, parts):
            return plan
        return RoutePlan(route=None, reason="compute")

    def _note_unpromised(self, ticket: Ticket, reason: DeclineReason | None) -> None:
        slo = ticket.request.slo
        if slo is not None and reason is not None and not ticket.is_unpromised:
            ticket.is_unpromised = True
            self.metrics.declined(slo.tier, reason, is_served=True)

    def _hand_over(self, slots: Sequence[Slot], ticket: Ticket, parts: Sequence[Part]) -> bool:
        """Hand completions to the first replica that takes them; tells whether one did."""
        request = ticket.request_for(parts)
        full: CapacityError | None = None
        for slot in slots:
            replica = slot.replica
            if replica is None:
                continue
            leg = Leg(slot.index, request, parts)
            for part in parts:
                part.leg = leg
            slot.legs.add(leg)
            try:
                replica.submit(
                    request, lambda event, leg=leg: self._take(ticket, leg, event)
                )  # fmt: skip
            except (CapacityError, EngineDeadError) as error:
                for part in parts:
                    part.leg = None
                slot.legs.discard(leg)
                full = error if isinstance(error, CapacityError) else full
                continue
            except BaseException:
                for part in parts:
                    part.leg = None
                slot.legs.discard(leg)
                raise
            self.prefixes.placed(slot.index, ticket.hashes)
            self.metrics.routed[slot.index] += 1
            if ticket.is_cancelled:
                replica.cancel(request.request_id)
            return True
        if full is not None:
            raise full
        return False

    def _let_wait(self, waiting: _Waiting, plan: RoutePlan) -> None:
        """Put completions into the router's queue, or end them if waiting will not help."""
        most = self._parts.max_queued
        if most is not None and not waiting.is_moving and len(self._queue) >= most:
            self.metrics.rejected("max_num_queued_reqs")
            slo = waiting.ticket.request.slo
            if slo is not None:
                self.metrics.request_judged(-1, slo.tier, missed(slo))
            raise CapacityError(
                f"{len(self._queue)} requests wait at the router and at most {most} are accepted. "
                "Try again later.",
                retry_after_s=1.0,
            )
        tier = waiting.ticket.tier
        if tier is not None and self._parts.scaler is not None:
            self._parts.scaler.refused(tier)
            if self._parts.log is not None:
                self._parts.log.refused(tier)
        if plan.reason in ("expired", "idle_server") and self._settle_late(waiting, plan.reason):
            return
        insort(self._queue, waiting)
        self.metrics.num_queued = len(self._queue)
        self._wake.set()

    def _settle_late(self, waiting: _Waiting, reason: DeclineReason) -> bool:
        """Serve without a promise, or refuse, what no replica could serve in time any more.

        Returns:
            Whether it does not wait any more.
        """
        ticket = waiting.ticket
        slo = ticket.request.slo
        if slo is None or slo.on_decline != "reject" or waiting.is_moving:
            return self._place(waiting, must=True).route is not None
        self.metrics.declined(slo.tier, reason, is_served=False)
        objective = "tpot_ms" if slo.ttft_ms is None else "ttft_ms"
        where = "no replica" if ticket.tier is None else (
            f"no replica of the tier of {1000 * ticket.tier:g} ms per token, or of a tighter one,"
        )  # fmt: skip
        detail = (
            f"slo.{objective}={getattr(slo, objective):g} was asked for, and {where} had room in "
            f"time; {len(self._queue)} other requests wait."
        )
        for part in waiting.parts:
            rejection = Rejection(
                seq_id=part.number, reason=reason, objective=objective, detail=detail
            )
            self._end(ticket, part, FinishReason.DECLINED, rejection=rejection)
        return True

    # Events: on a replica's thread ---------------------------------------------------------------

    def _take(self, ticket: Ticket, leg: Leg, event: TokenEvent) -> None:
        if leg.is_over:
            return
        part = leg.parts[event.index]
        if part.leg is not leg:
            return
        is_failure = event.finish_reason is FinishReason.ERROR and event.error_param is None
        if is_failure and not self._is_closing:
            # Not here: this may be the last act of an engine's thread.
            self._failed.append((ticket, part, event))
            self._wake.set()
            return
        now = self._clock.now()
        is_first = not part.tokens
        part.take(event, now)
        told = ticket.translated(part, event, now)
        if event.finish_reason is not None:
            self._ended(ticket, part)
        ticket.sink(told)
        if self._queue and (event.finish_reason is not None or (is_first and part.tokens)):
            self._wake.set()

    def _ended(self, ticket: Ticket, part: Part) -> None:
        """Take note of the end of a completion, whoever has told its client."""
        leg, part.leg, part.is_done = part.leg, None, True
        ticket.num_open -= 1
        slot = -1
        if leg is not None:
            slot = leg.slot
            if not leg.open_parts:
                leg.is_over = True
                self.roster.slots[slot].legs.discard(leg)
        if not ticket.num_open:
            self._tickets.pop(ticket.request.request_id, None)
            slo, outcome = ticket.request.slo, ticket.outcome
            if slo is not None and outcome is not None:
                self.metrics.request_judged(slot, slo.tier, outcome)
        if part.tokens and ticket.request.pooling is None:
            self._done.append(ticket.view(part))
        self._count(-1)

    def _observe(self) -> None:
        """Tell the router what has ended."""
        with self._lock:
            while self._done:
                sequence = self._done.popleft()
                self._parts.router.observe(sequence)
                if self._parts.log is not None:
                    self._parts.log.ended(sequence)

    def _end(
        self,
        ticket: Ticket,
        part: Part,
        reason: FinishReason,
        *,
        error: str | None = None,
        rejection: Rejection | None = None,
    ) -> None:
        """End a completion that is with no replica."""
        if part.is_done:
            return
        event = TokenEvent(
            request_id=ticket.request.request_id,
            index=part.index,
            finish_reason=reason,
            num_prompt_tokens=len(ticket.request.prompt_token_ids),
            error=error,
            rejection=rejection,
            retry_after_s=None if rejection is None else 1.0,
        )
        now = self._clock.now()
        told = ticket.translated(part, event, now)
        self._ended(ticket, part)
        with contextlib.suppress(Exception):  # a receiver that fails is no reason to lose others
            ticket.sink(told)

    def _count(self, change: int) -> None:
        with self._open:
            self._num_open += change
            if not self._num_open:
                self._open.notify_all()

    # The pilot -----------------------------------------------------------------------------------

    def news(self) -> None:
        """Have the pilot look at what has changed; from any thread."""
        self._wake.set()

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.wait(RETRY_S if self._queue else LOOK_S)
            self._wake.clear()
            try:
                self._turn()
            except Exception:
                logger.exception("a turn of the fleet's pilot failed; it goes on")

    def _turn(self) -> None:
        for slot in self.roster.find_dead():
            self.prefixes.forget(slot.index)
        self._observe()
        self._move_failed()
        self.roster.start_wanted()
        self._retry()
        if self._parts.scaler is not None and self._clock.now() >= self._next_check:
            self._next_check = self._clock.now() + self._parts.check_s
            self._scale(self._parts.scaler)

    def _move_failed(self) -> None:
        """Let completions go on elsewhere whose replica has failed."""
        while self._failed:
            ticket, part, event = self._failed.popleft()
            with self._lock:
                leg = part.leg
                if leg is None or part.is_done:
                    continue
                part.leg = None
                if not leg.open_parts:
                    leg.is_over = True
                    self.roster.slots[leg.slot].legs.discard(leg)
                part.num_moves += 1
                self.metrics.moved[leg.slot] += 1
                if ticket.is_cancelled:
                    self._end(ticket, part, FinishReason.ABORT)
                elif part.num_moves > self._parts.max_moves or not self.roster.is_hopeful:
                    self._end(ticket, part, FinishReason.ERROR, error=event.error)
                else:
                    logger.warning(
                        "request %s goes on elsewhere after %d tokens: replica %d failed (%s)",
                        ticket.request.request_id, len(part.tokens), leg.slot, event.error,
                    )  # fmt: skip
                    waiting = _Waiting(ticket.due, next(self._numbers), ticket, (part,))
                    insort(self._queue, waiting)
                    self.metrics.num_queued = len(self._queue)

    def _retry(self) -> None:
        """Offer those that wait once more, whoever is due first in each tier."""
        with self._lock:
            queue, self._queue = self._queue, []
            stuck: set[float | None] = set()
            try:
                while queue:
                    waiting = queue.pop(0)
                    if not self._offer(waiting, stuck):
                        insort(self._queue, waiting)
            finally:
                for waiting in queue:
                    insort(self._queue, waiting)
                self.metrics.num_queued = len(self._queue)

    def _offer(self, waiting: _Waiting, stuck: set[float | None]) -> bool:
        """Offer one; tells whether it does not wait any more.

        Args:
            waiting: The one.
            stuck: Tiers of which somebody before it has found no place; written.
        """
        ticket = waiting.ticket
        if ticket.is_cancelled:
            for part in waiting.parts:
                self._end(ticket, part, FinishReason.ABORT)
            return True
        if not self.roster.is_hopeful:
            for part in waiting.parts:
                self._end(ticket, part, FinishReason.ERROR, error="no replica is left to serve it.")
            return True
        if ticket.tier in stuck and not waiting.is_moving:
            return False
        try:
            plan = self._place(waiting, must=waiting.is_moving)
            if plan.reason in ("expired", "idle_server") and plan.route is None:
                return self._settle_late(waiting, plan.reason)
        except CapacityError:
            stuck.add(ticket.tier)  # every replica is full or paused
            return False
        except RequestError as error:
            for part in waiting.parts:
                self._end(ticket, part, FinishReason.ERROR, error=str(error))
            return True
        if plan.route is not None:
            return True
        stuck.add(ticket.tier)
        return False

    def _scale(self, scaler: Scaler) -> None:
        with self._lock:
            slots = self.roster.present
            if not slots:
                return
            ratios = [slot.replica.metrics.drift for slot in slots if slot.replica is not None]
            if ratios:
                ratio = sum(ratios) / len(ratios)
                self._parts.router.drifted(ratio)
                if self._parts.log is not None:
                    self._parts.log.drifted(ratio)
            fleet = self.roster.view(slots)
            plan = scaler.plan(fleet)
            if self._parts.log is not None:
                self._parts.log.scaled(fleet, plan)
            self.roster.carry_out(slots, plan.actions)
        if plan.actions:
            self._wake.set()


def _is_idle(fleet: FleetView) -> bool:
    """Tell whether some replica has nothing to do."""
    return any(
        not replica.running and not replica.waiting
        for replica, role in zip(fleet.replicas, fleet.roles, strict=True)
        if role.state in ("serving", "pooled")
    )
