"""The event loop: requests arrive, are placed on replicas, and steps end.

Events are ordered by time, then by kind (steps end, requests arrive, steps begin), then by the
order in which they were made, so that a run is the same to the last bit whenever it is repeated.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.core.event import SloOutcome
from jaxserve.core.plan import Rejection
from jaxserve.core.protocols import Router
from jaxserve.core.view import FleetView
from jaxserve.sim.replica import LiveSequence, Replica
from jaxserve.sim.request import Completion, SimRequest, judge

_END, _BEGIN = 0, 2
"""Ranks of events at one time; arrivals are between them."""


class StalledError(JaxserveError, RuntimeError):
    """Requests are left, and no policy does anything about them."""


def simulate(
    requests: Iterable[SimRequest],
    replicas: Sequence[Replica],
    *,
    router: Router | None = None,
    keep_times: bool = False,
    stop: Callable[[Completion], bool] | None = None,
) -> list[Completion]:
    """Serve requests to the end.

    Args:
        requests: In order of arrival.
        replicas: Idle ones.
        router: Which replica a request goes to; None sends it to the only one.
        keep_times: Whether completions keep the times of all tokens.
        stop: Called with every completion; True ends the run early.

    Returns:
        What became of each request, in the order of their ends.

    Raises:
        ConfigError: If there are several replicas and no router.
        StalledError: If requests are left that no policy serves.
    """
    if router is None and len(replicas) != 1:
        raise ConfigError(f"{len(replicas)} replicas need a router, got none.")
    return _Run(replicas, router, keep_times=keep_times, stop=stop).serve(requests)


class _Run:
    def __init__(
        self,
        replicas: Sequence[Replica],
        router: Router | None,
        *,
        keep_times: bool,
        stop: Callable[[Completion], bool] | None,
    ) -> None:
        self._replicas = replicas
        self._router = router
        self._keep_times = keep_times
        self._stop = stop
        self._done: list[Completion] = []
        self._is_over = False
        self._events: list[tuple[float, int, int, int, int]] = []
        self._made = 0
        self._versions = [0] * len(replicas)
        """Events of an older version of their replica are out of date."""
        self._is_idle = [True] * len(replicas)
        for replica in replicas:
            replica.on_finish = self._finisher(replica)

    def serve(self, requests: Iterable[SimRequest]) -> list[Completion]:
        arrivals = iter(requests)
        request = next(arrivals, None)
        events, versions = self._events, self._versions
        while not self._is_over:
            next_arrival = math.inf if request is None else request.arrival
            if events and (events[0][0], events[0][1]) < (next_arrival, 1):
                now, kind, _, index, version = heapq.heappop(events)
                if version != versions[index]:
                    continue
                replica = self._replicas[index]
                if kind == _END:
                    replica.settle(math.inf)
                    self._push(now, _BEGIN, index)
                    continue
                # The next arrival stops nobody else when there is a choice of replicas.
                horizon = next_arrival if self._router is None else math.inf
                end = replica.begin(now, horizon)
                self._is_idle[index] = end is None
                if end is not None:
                    self._push(end, _END, index)
            elif request is not None:
                self._arrive(request)
                following = next(arrivals, None)
                if following is not None and following.arrival < request.arrival:
                    raise ConfigError(
                        f"requests must be in order of arrival; {following.request_id} comes "
                        f"after {request.request_id} and arrives before it. Sort them."
                    )
                request = following
            else:
                break
        left = sum(len(r.running) + len(r.waiting) for r in self._replicas)
        if left and not self._is_over:
            raise StalledError(f"{left} requests are left, and no policy gives them work.")
        return self._done

    def _push(self, time: float, kind: int, index: int) -> None:
        self._made += 1
        heapq.heappush(self._events, (time, kind, self._made, index, self._versions[index]))

    def _arrive(self, request: SimRequest) -> None:
        now = request.arrival
        index = 0 if self._router is None else self._place(self._router, request)
        replica = self._replicas[index]
        replica.settle(now)
        replica.submit(request)
        if self._is_idle[index]:
            self._versions[index] += 1
            self._push(now, _BEGIN, index)
            self._is_idle[index] = False
        elif replica.is_ahead:
            replica.interrupt()
            self._versions[index] += 1
            self._push(replica.now, _END, index)

    def _place(self, router: Router, request: SimRequest) -> int:
        now = request.arrival
        for replica in self._replicas:
            replica.settle(now)
        views = tuple(replica.view_from(now) for replica in self._replicas)
        route = router.place(LiveSequence.waiting(request), FleetView(now=now, replicas=views))
        if not 0 <= route.replica < len(self._replicas):
            raise ConfigError(
                f"the router places request {request.request_id} on replica {route.replica}; "
                f"there are {len(self._replicas)}."
            )
        return route.replica

    def _finisher(
        self, replica: Replica
    ) -> Callable[[LiveSequence, float, Rejection | None], None]:
        index = replica.index

        def finish(sequence: LiveSequence, now: float, rejection: Rejection | None) -> None:
            slo, times = sequence.slo, sequence.token_times
            outcome = SloOutcome()
            if slo is not None:
                outcome = judge(slo, sequence.arrival, times, now)
            completion = Completion(
                request=sequence.request,
                replica=index,
                first_token=times[0] if times else None,
                finished=now,
                outcome=outcome,
                preemptions=sequence.preemptions,
                rejection=rejection,
                token_times=tuple(times) if self._keep_times else (),
            )
            self._done.append(completion)
            if self._stop is not None and self._stop(completion):
                self._is_over = True

        return finish
