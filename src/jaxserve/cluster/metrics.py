"""Counters of a fleet: those of its engines side by side, and what only the fleet knows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxserve.core.event import SloOutcome
from jaxserve.core.view import ReplicaStatus
from jaxserve.engine.metrics import (
    SLO_ATTAINED,
    SLO_MISSED,
    EngineMetrics,
    Family,
    render_page,
    slo_families,
)

ROUTER = "router"
"""Label of what the router counts by itself."""
STATES = ("starting", "pooled", "serving", "draining", "off", "removed")
_SUMMED = (
    "num_running", "num_waiting", "num_compiling", "num_steps", "num_preemptions", "prompt_tokens",
    "cached_tokens", "generation_tokens", "num_compilations", "compile_seconds",
)  # fmt: skip


class FleetMetrics(EngineMetrics):
    """What a fleet counts.

    Objectives are judged by the fleet: a request that moved is judged once, over all of its
    replicas, and counted for the one at which it ended.

    Args:
        engines: Returns the counters of the replicas that are there, by number.
        statuses: Returns the state of each replica.
        max_model_len: Bounds the buckets of the length histograms.

    Attributes:
        num_queued: Requests that wait at the router.
        routed: Requests placed, per replica.
        moved: Completions taken from a replica that failed, per replica.
        deaths: Replicas that have died, per replica.
        restarts: Replicas that have been started again, per replica.
    """

    def __init__(
        self,
        *,
        engines: Callable[[], Mapping[int, EngineMetrics]],
        statuses: Callable[[], Sequence[ReplicaStatus]],
        max_model_len: int,
    ) -> None:
        """Start with everything at zero."""
        super().__init__(max_model_len=max_model_len)
        self._engines = engines
        self._statuses = statuses
        self.num_queued = 0
        self.routed: Counter[int] = Counter()
        self.moved: Counter[int] = Counter()
        self.deaths: Counter[int] = Counter()
        self.restarts: Counter[int] = Counter()
        self._judged: dict[int, tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]] = {}

    def request_judged(self, replica: int, tier: str, outcome: SloOutcome) -> None:
        """Record which objectives a request kept.

        Args:
            replica: Where it ended; -1 if it never left the router.
            tier: Its class.
            outcome: What was kept.
        """
        self.judged(tier, outcome)
        with self._lock:
            tier = self._counted_tier(tier)
            kept, missed = self._judged.setdefault(replica, (Counter(), Counter()))
            for objective, good in {**outcome.readings(), "request": outcome.attained}.items():
                kept[tier, objective] += good
                missed[tier, objective] += not good

    def attainment(self, tier: str) -> tuple[int, int]:
        """Return how many requests of a tier kept all objectives, and how many were judged."""
        with self._lock:
            kept = self.slo_attained[tier, "request"]
            return kept, kept + self.slo_missed[tier, "request"]

    def gather(self) -> "FleetMetrics":
        """Add up what the engines have counted so far; returns itself."""
        engines = list(self._engines().values())
        with self._lock:
            for name in _SUMMED:
                setattr(self, name, sum(getattr(one, name) for one in engines))
            self.num_waiting += self.num_queued
            usage = [one.kv_usage for one in engines]
            self.kv_usage = sum(usage) / len(usage) if usage else 0.0
            self.finished_by_reason = sum(
                (one.finished_by_reason for one in engines), Counter[str]()
            )
        return self

    def render(self, model_name: str, *, aliases: Iterable[str] = ()) -> str:
        """Return the page that Prometheus scrapes, with a label `engine` for each replica."""
        pages: dict[str, Sequence[Family]] = {}
        with self._lock:
            judged = {i: (kept.copy(), lost.copy()) for i, (kept, lost) in self._judged.items()}
            declined = self.slo_declined.copy()
            rejections = self.rejections.copy()
        for index, engine in sorted(self._engines().items()):
            kept, lost = judged.pop(index, (Counter(), Counter()))
            own = [f for f in engine.families() if f.name not in (SLO_ATTAINED, SLO_MISSED)]
            pages[str(index)] = [*own, *slo_families(kept, lost)]
        for index, (kept, lost) in judged.items():  # not there any more, or never placed
            pages[ROUTER if index < 0 else str(index)] = list(slo_families(kept, lost))
        for status in self._statuses():
            name = str(status.index)
            pages[name] = [*pages.get(name, ()), *self._of_replica(status)]
        pages[ROUTER] = [
            *pages.get(ROUTER, ()),
            Family("router_queue_requests", "gauge", "Requests that wait at the router.",
                   [({}, self.num_queued)]),
            Family("slo_declined_total", "counter",
                   "Requests whose objectives were not promised, by reason, and what became of "
                   "them.",
                   [({"tier": tier, "reason": reason, "outcome": outcome}, n)
                    for (tier, reason, outcome), n in declined.items()]),
            Family("admission_rejections_total", "counter", "Refused requests, by reason.",
                   [({"reason": reason}, n) for reason, n in rejections.items()],
                   has_engine_label=False),
        ]  # fmt: skip
        return render_page(pages, model_name, aliases=aliases)

    def _of_replica(self, status: ReplicaStatus) -> list[Family]:
        index = status.index
        return [
            Family("replica_state", "gauge", "1 for the state in which a replica is.",
                   [({"state": state}, float(state == status.state)) for state in STATES]),
            Family("replica_tier_seconds", "gauge",
                   "Seconds per token of the tier that a replica serves; 0 for none.",
                   [({}, status.tier or 0.0)]),
            Family("replica_open_completions", "gauge", "Completions that are with a replica.",
                   [({}, status.num_open)]),
            Family("replica_deaths_total", "counter", "Times that a replica has died.",
                   [({}, self.deaths[index])]),
            Family("replica_restarts_total", "counter",
                   "Times that a replica has been started again.", [({}, self.restarts[index])]),
            Family("requests_routed_total", "counter", "Requests placed with a replica.",
                   [({}, self.routed[index])]),
            Family("completions_moved_total", "counter",
                   "Completions taken from a replica that failed, to go on with another.",
                   [({}, self.moved[index])]),
        ]  # fmt: skip
