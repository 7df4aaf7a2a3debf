"""The replicas of a fleet: which are there, what each is for, and what comes after one has died."""

import logging
import threading
from collections.abc import Callable, Sequence

from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.cluster.replica import Replica, ReplicaMaker
from jaxserve.cluster.ticket import Leg
from jaxserve.core.plan import ScaleAction
from jaxserve.core.protocols import Clock
from jaxserve.core.view import (
    FleetView,
    ReplicaRole,
    ReplicaState,
    ReplicaStatus,
    ReplicaView,
    SequenceView,
)

logger = logging.getLogger(__name__)

ON: tuple[ReplicaState, ...] = ("serving", "pooled", "draining")
RESTART_DELAY_S = 1.0
"""Seconds before a replica that has died more than once is started again, for each time."""


class Slot:
    """A place for a replica.

    Args:
        index: Its number.

    Attributes:
        replica: Who is there; None while nobody is.
        role: What it is for.
        legs: Completions that are with it.
        num_deaths: How often a replica has died here.
        failure: Why the last one did.
        is_removed: Whether nobody will come here any more.
    """

    def __init__(self, index: int) -> None:
        """Start empty."""
        self.index = index
        self.replica: Replica | None = None
        self.role = ReplicaRole(state="off")
        self.legs: set[Leg] = set()
        self.num_deaths = 0
        self.failure: str | None = None
        self.is_removed = False

    @property
    def num_open(self) -> int:
        """Completions that are with it."""
        return sum(len(leg.open_parts) for leg in list(self.legs))

    @property
    def is_on(self) -> bool:
        """Whether a replica is there and lives."""
        return self.replica is not None and self.replica.failure is None

    def status(self) -> ReplicaStatus:
        """Tell how it stands."""
        return ReplicaStatus(
            index=self.index,
            state="removed" if self.is_removed else self.role.state,
            tier=self.role.tier,
            num_open=self.num_open,
            deaths=self.num_deaths,
            failure=self.failure,
        )


class Roster:
    """Keeps the replicas and carries out what a scaler decides. Guarded by the fleet's lock.

    Args:
        count: Places.
        make: Starts a replica.
        clock: Where time comes from.
        lock: The fleet's.
        idle: State of a replica that has just come up.
        max_restarts: How often a replica is started again in a place where one has died.
        min_on: Replicas that stay on.
        on_change: Called without the lock when a replica has come or gone.

    Attributes:
        slots: All places.
        metrics: Told about deaths and restarts; set by the fleet.
        holds: Returns whether nobody is started for now.
        on_death: Told about each replica that has died, before it is closed.
        on_start: Brings a replica that has come up to where the others are, before it serves; if it
            raises, the replica counts as not started.
    """

    def __init__(
        self,
        count: int,
        make: ReplicaMaker,
        *,
        clock: Clock,
        lock: threading.RLock,
        idle: ReplicaState,
        max_restarts: int,
        min_on: int,
        on_change: Callable[[], None],
    ) -> None:
        """Start with empty places."""
        self.slots = [Slot(i) for i in range(count)]
        self.metrics: FleetMetrics | None = None
        self.holds: Callable[[], bool] = lambda: False
        self.on_death: Callable[[Replica], None] = lambda _: None
        self.on_start: Callable[[Replica], None] = lambda _: None
        self._make = make
        self._clock = clock
        self._lock = lock
        self._idle: ReplicaState = idle
        self._max_restarts = max_restarts
        self._min_on = min_on
        self._on_change = on_change
        self._wanted: dict[int, float] = {}
        """Places for which somebody is to be started, and when at the earliest."""
        self._epoch = 0
        self._is_closing = False
        self._threads: set[threading.Thread] = set()

    def fill(self, replicas: Sequence[Replica]) -> None:
        """Put replicas that are ready into the first places."""
        with self._lock:
            for slot, replica in zip(self.slots, replicas, strict=False):
                slot.replica, slot.role = replica, ReplicaRole(state=self._idle)

    @property
    def present(self) -> list[Slot]:
        """Places that have not been given up; what a view shows."""
        return [slot for slot in self.slots if not slot.is_removed]

    @property
    def living(self) -> list[Slot]:
        """Places where a replica lives."""
        return [slot for slot in self.slots if slot.is_on]

    @property
    def is_hopeful(self) -> bool:
        """Whether some replica lives, or is about to."""
        return any(slot.is_on or slot.role.state == "starting" for slot in self.present)

    def statuses(self) -> list[ReplicaStatus]:
        """Tell how every place stands."""
        return [slot.status() for slot in self.slots]

    def changed_everywhere(self) -> None:
        """Take note that replicas which are being started will be out of date."""
        with self._lock:
            self._epoch += 1

    # Views -------------------------------------------------------------------------------------

    def view(self, slots: Sequence[Slot], cached: Sequence[int] = ()) -> FleetView:
        """Return places as policies see them.

        Args:
            slots: Which.
            cached: Tokens of the prompt in question that each is thought to hold.
        """
        now = self._clock.now()
        return FleetView(
            now=now,
            replicas=tuple(self._replica_view(slot, now) for slot in slots),
            roles=tuple(slot.role for slot in slots),
            cached=tuple(cached),
        )

    def _replica_view(self, slot: Slot, now: float) -> ReplicaView:
        replica = slot.replica
        if replica is None:
            return self._nobody(now)
        report = replica.report()
        running: list[SequenceView] = []
        waiting: list[SequenceView] = []
        for leg in list(slot.legs):
            name = leg.request.request_id
            for number, _ in leg.open_parts:
                seen = report.members.get((name, number))
                one = _merged(leg, number, seen)
                (running if one.is_running else waiting).append(one)
        view = report.view
        return ReplicaView(
            now=max(now, view.now),
            running=tuple(running),
            waiting=tuple(waiting),
            num_free_pages=view.num_free_pages,
            num_pages=view.num_pages,
            page_size=view.page_size,
            max_num_seqs=view.max_num_seqs,
            max_num_batched_tokens=view.max_num_batched_tokens,
            max_loras=view.max_loras,
        )

    def _nobody(self, now: float) -> ReplicaView:
        """Return a place without a replica, as large as the others."""
        there = next((s.replica for s in self.slots if s.replica is not None), None)
        sizes = None if there is None else there.report().view
        return ReplicaView(
            now=now, running=(), waiting=(), num_free_pages=0,
            num_pages=1 if sizes is None else sizes.num_pages,
            page_size=1 if sizes is None else sizes.page_size,
            max_num_seqs=1 if sizes is None else sizes.max_num_seqs,
            max_num_batched_tokens=1 if sizes is None else sizes.max_num_batched_tokens,
        )  # fmt: skip

    # Changes -----------------------------------------------------------------------------------

    def carry_out(self, slots: Sequence[Slot], actions: Sequence[ScaleAction]) -> None:
        """Give replicas their new roles.

        Args:
            slots: The places of the view that was answered.
            actions: The answer.
        """
        for action in actions:
            slot = slots[action.replica]
            if action.state == "starting":
                self._want(slot)
                continue
            if action.state == "off":
                self._turn_off(slot)
                continue
            if slot.is_on:
                logger.info(
                    "replica %d: %s -> %s%s (%s)", slot.index, slot.role.state, action.state,
                    "" if action.tier is None else f", {1000 * action.tier:g} ms per token",
                    action.reason,
                )  # fmt: skip
                slot.role = ReplicaRole(state=action.state, tier=action.tier)

    def _turn_off(self, slot: Slot) -> None:
        on = sum(other.is_on for other in self.slots)
        if not slot.is_on or slot.legs or on <= self._min_on:
            return
        replica, slot.replica = slot.replica, None
        slot.role = ReplicaRole(state="off")
        logger.info("replica %d is turned off", slot.index)
        if replica is not None:
            self._spawn(replica.close, f"jaxserve-off-{slot.index}")

    def find_dead(self) -> list[Slot]:
        """Look for replicas that have stopped, and take them out; returns their places."""
        dead: list[Slot] = []
        with self._lock:
            for slot in self.slots:
                replica = slot.replica
                if replica is None or replica.failure is None or self._is_closing:
                    continue
                slot.failure, slot.replica = replica.failure, None
                slot.num_deaths += 1
                slot.role = ReplicaRole(state="off")
                dead.append(slot)
                if self.metrics is not None:
                    self.metrics.deaths[slot.index] += 1
                logger.error("replica %d has died: %s", slot.index, slot.failure)
                self._replace(slot)  # first: whoever is told asks what has become of the replica
                self.on_death(replica)
                self._spawn(replica.close, f"jaxserve-bury-{slot.index}")
        return dead

    def _replace(self, slot: Slot) -> None:
        """Have somebody started where a replica has died, or give the place up."""
        if slot.num_deaths > self._max_restarts:
            slot.is_removed = True
            logger.error(
                "replica %d has died %d times and is given up", slot.index, slot.num_deaths
            )
        elif sum(other.is_on or other.index in self._wanted for other in self.slots) < self._min_on:
            self._want(slot, RESTART_DELAY_S * (slot.num_deaths - 1))

    def _want(self, slot: Slot, delay_s: float = 0.0) -> None:
        if slot.replica is None and not slot.is_removed and slot.index not in self._wanted:
            slot.role = ReplicaRole(state="starting")
            self._wanted[slot.index] = self._clock.now() + delay_s

    def start_wanted(self) -> None:
        """Start those whose time has come, each on a thread of its own."""
        with self._lock:
            if self._is_closing or self.holds():
                return
            now = self._clock.now()
            ready = [index for index, at in self._wanted.items() if at <= now]
            for index in ready:
                self._wanted[index] = float("inf")  # until it is there
                slot, epoch = self.slots[index], self._epoch
                self._spawn(lambda s=slot, e=epoch: self._start(s, e), f"jaxserve-start-{index}")

    def _start(self, slot: Slot, epoch: int) -> None:
        replica: Replica | None = None
        problem: str | None = None
        try:
            replica = self._make(slot.index)
            self.on_start(replica)
        except Exception as error:
            logger.exception("replica %d could not be started", slot.index)
            problem = f"it could not be started: {error}"
        with self._lock:
            self._wanted.pop(slot.index, None)
            is_stale = epoch != self._epoch
            if self._is_closing or is_stale or problem is not None:
                slot.role = ReplicaRole(state="off")
                if problem is not None and not self._is_closing:
                    slot.failure = problem
                    slot.num_deaths += 1
                    self._replace(slot)
                elif is_stale:
                    self._want(slot)  # weights or pauses have changed meanwhile
            else:
                slot.replica, replica = replica, None
                slot.role = ReplicaRole(state=self._idle)
                if self.metrics is not None:
                    self.metrics.restarts[slot.index] += slot.num_deaths > 0
                logger.info("replica %d is up", slot.index)
        if replica is not None:
            replica.close()
        self._on_change()

    def _spawn(self, work: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                work()
            except Exception:
                logger.exception("%s failed", name)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def close(self) -> None:
        """Close every replica; waits for those that are being started."""
        with self._lock:
            self._is_closing = True
            threads = list(self._threads)
            replicas = [slot.replica for slot in self.slots if slot.replica is not None]
        for thread in threads:
            thread.join()
        for replica in replicas:
            replica.close()


def _merged(leg: Leg, number: int, seen: SequenceView | None) -> SequenceView:
    """Return a completion as its replica sees it, or as it waits if that has not seen it yet."""
    part, request = leg.parts[number], leg.request
    before = len(request.prompt_token_ids) + len(request.output_token_ids)
    fresh = len(part.tokens) - leg.begun
    if seen is None:
        return SequenceView(
            seq_id=part.number, arrival=request.arrival, priority=request.priority,
            prompt_len=len(request.prompt_token_ids), num_tokens=before + fresh,
            num_computed=0, max_total_len=before + (request.sampling.max_tokens or 1),
            num_pages=0, is_running=False, slo=request.slo,
            first_token_time=part.first_token_time,
            adapter="" if request.adapter is None else request.adapter.key,
        )  # fmt: skip
    return SequenceView(
        seq_id=part.number, arrival=request.arrival, priority=seen.priority,
        prompt_len=seen.prompt_len, num_tokens=seen.num_tokens, num_computed=seen.num_computed,
        max_total_len=seen.max_total_len, num_pages=seen.num_pages, is_running=seen.is_running,
        num_cached=seen.num_cached, is_decoding=seen.is_decoding, slo=request.slo,
        first_token_time=part.first_token_time, adapter=seen.adapter,
    )  # fmt: skip
