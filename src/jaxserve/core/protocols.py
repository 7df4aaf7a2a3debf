"""The sockets into which policies and mechanisms plug."""

from typing import Protocol, runtime_checkable

from jaxserve.core.plan import Rejection, Route, RoutePlan, ScalePlan, StepPlan
from jaxserve.core.view import FleetView, ReplicaView, SequenceView


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Return seconds since an arbitrary fixed instant."""
        ...

    def unix(self) -> float:
        """Return seconds since 1970."""
        ...


class Scheduler(Protocol):
    """Decides which tokens one engine computes next; pure, no clock, no device."""

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan.

        The plan must fit: at most `max_num_batched_tokens` tokens, at most `max_num_seqs` running
        sequences, and pages for every token once the preempted sequences have given up theirs.
        Running sequences use at most `max_loras` different adapters; whoever is admitted beyond
        that goes on waiting.
        """
        ...


@runtime_checkable
class Doorkeeper(Protocol):
    """A scheduler that knows what nobody could promise."""

    def refusal(self, sequence: SequenceView) -> Rejection | None:
        """Tell which objective of a new request not even an idle engine could keep; None if none.

        Args:
            sequence: The request, as it would wait.
        """
        ...


class Router(Protocol):
    """Decides which engine of a fleet a new request goes to; no clock, no device."""

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived."""
        ...


class QueueingRouter(Protocol):
    """A router that may let requests wait, and that gives replicas their roles."""

    def plan(self, sequence: SequenceView, fleet: FleetView) -> RoutePlan:
        """Decide about a request: where it goes, or that it waits."""
        ...

    def send_home(self, fleet: FleetView, plan: RoutePlan) -> RoutePlan:
        """Place a request for which there is no room, without a promise.

        The answer has a route, unless no replica serves.

        Args:
            fleet: The view.
            plan: The plan that lets it wait.
        """
        ...

    def tier_of(self, sequence: SequenceView) -> float | None:
        """Return the seconds per token of a request's tier; None without tiers."""
        ...

    def observe(self, sequence: SequenceView) -> None:
        """Take note of a request that has ended."""
        ...

    def drifted(self, ratio: float) -> None:
        """Take note of how long steps take of late, over what the cost model says."""
        ...


class Scaler(Protocol):
    """Decides which replicas of a fleet serve, drain, start or are turned off."""

    def refused(self, tier: float) -> None:
        """Take note of a request that found no room in its tier."""
        ...

    def plan(self, fleet: FleetView) -> ScalePlan:
        """Answer one view with the roles that change."""
        ...
