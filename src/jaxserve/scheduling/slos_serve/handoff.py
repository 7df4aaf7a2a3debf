"""Hands requests that one replica cannot promise anything to another that can.

Every replica plans with the same cost model, so that whoever places a request can ask each planner
whether it would promise it its objectives. The first that would gets it.

Source: SLOs-Serve (arXiv 2504.08784), request routing between replicas.
"""

import math
from collections.abc import Sequence

from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import DeclineReason, Route
from jaxserve.core.view import FleetView, ReplicaView, SequenceView
from jaxserve.scheduling.slos_serve.scheduler import SlosServeScheduler

DEFAULT_HOPS = 8


class HandOffRouter:
    """Places each request on the first replica that would promise it its objectives.

    Replicas are asked in turn, beginning behind the one that was asked first the last time; with
    `least_first` those with the fewest tokens to compute are asked first.

    Args:
        schedulers: The planners of the replicas, in the order of the fleet's view.
        max_hops: Most replicas that are asked; the home replica, where a request stays that nobody
            can promise anything, is the first of them.
        least_first: Whether replicas are asked in the order of their load.

    Raises:
        ConfigError: Without planners, or with fewer than one hop.
    """

    def __init__(
        self,
        schedulers: Sequence[SlosServeScheduler],
        *,
        max_hops: int = DEFAULT_HOPS,
        least_first: bool = False,
    ) -> None:
        """Begin with the first replica."""
        if not schedulers or max_hops < 1:
            raise ConfigError(
                f"a router needs planners and at least one hop, got {len(schedulers)} planners and "
                f"{max_hops=}."
            )
        self._schedulers = schedulers
        self._max_hops = max_hops
        self._least_first = least_first
        self._turn = -1

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived."""
        count = len(fleet.replicas)
        if count != len(self._schedulers):
            raise ConfigError(f"there are {count} replicas and {len(self._schedulers)} planners.")
        self._turn = (self._turn + 1) % count
        order = [(self._turn + hop) % count for hop in range(count)]
        if self._least_first:
            order.sort(key=lambda index: _backlog(fleet.replicas[index]))
        order = order[: self._max_hops]
        reason: DeclineReason | None = None
        for index in order:
            reason = self._schedulers[index].would_admit(fleet.replicas[index], sequence)
            if reason is None:
                return Route(replica=index)
        # Best effort goes where the least is waiting, since nothing else tells replicas apart.
        home = min(order, key=lambda index: (_backlog(fleet.replicas[index]), index))
        return Route(replica=home, is_promised=False, reason=reason)


class RoundRobinRouter:
    """Places requests on one replica after the other."""

    def __init__(self) -> None:
        """Begin with the first replica."""
        self._turn = -1

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived."""
        del sequence
        self._turn = (self._turn + 1) % len(fleet.replicas)
        return Route(replica=self._turn)


def _backlog(view: ReplicaView) -> float:
    """Return the tokens that wait to be computed, and those that decode."""
    waiting = math.fsum(s.num_uncomputed for s in view.waiting)
    return waiting + math.fsum(s.num_uncomputed for s in view.running)
