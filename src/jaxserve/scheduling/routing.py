"""Routers by name, for fleets and for replays of what they decided.

The plain ones place every request at once: the rule that counts loads is the one that a simulated
fleet compares PolyServe with (`polyserve/packing.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.core.cost import CostModel, LinearCost, Plane
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import Route, RoutePlan
from jaxserve.core.protocols import QueueingRouter, Scaler
from jaxserve.core.registry import Registry
from jaxserve.core.view import FleetView, ReplicaRole, SequenceView
from jaxserve.scheduling.polyserve.config import PolyServeConfig
from jaxserve.scheduling.polyserve.packing import LEAST_REQUESTS, ROUND_ROBIN, rival
from jaxserve.scheduling.polyserve.router import TierRouter, TierScaler, rules_for
from jaxserve.scheduling.polyserve.state import (
    NOBODY,
    POOLED,
    SERVING,
    WHOLE,
    empty_requests,
    empty_servers,
)
from jaxserve.scheduling.step_times import step_times

NEED_TIMES = frozenset({"polyserve"})
"""Routers that predict how long steps take."""
_NO_TIMES = step_times(LinearCost(Plane(base=1e-3)))


class ReplicaRouter:
    """Places each request at once, by a rule that needs no times.

    Args:
        kind: `ROUND_ROBIN` takes turns, `LEAST_REQUESTS` looks for the fewest unfinished requests.
    """

    def __init__(self, kind: int) -> None:
        """Begin with the first replica."""
        self._kind = kind
        self._turn = np.array([1, NOBODY])
        self._rules = rules_for(PolyServeConfig(tiers=(1.0,)), capacity=1, seats=1, max_tokens=1)
        self._nobody = empty_requests(1)

    def plan(self, sequence: SequenceView, fleet: FleetView) -> RoutePlan:
        """Decide about a request; it waits only if no replica serves."""
        del sequence
        roles = _roles(fleet)
        sv = empty_servers(len(fleet.replicas), 1, 1)
        for s, (replica, role) in enumerate(zip(fleet.replicas, roles, strict=True)):
            sv.one.state[s] = SERVING if role.state == "serving" else POOLED
            sv.one.decodes[s] = len(replica.running)
            sv.one.pending[s] = len(replica.waiting)
        found = rival(
            self._kind, _NO_TIMES, self._rules, self._nobody, sv, 0, fleet.now, WHOLE, self._turn
        )
        if found == NOBODY:
            return RoutePlan(route=None, reason="compute")
        return RoutePlan(route=Route(replica=int(found)))

    def send_home(self, fleet: FleetView, plan: RoutePlan) -> RoutePlan:
        """Return the plan: whoever waits does so because no replica serves."""
        del fleet
        return plan

    def tier_of(self, sequence: SequenceView) -> float | None:
        """Return None, as there are no tiers."""
        del sequence

    def observe(self, sequence: SequenceView) -> None:
        """Take no note of what has ended."""

    def drifted(self, ratio: float) -> None:
        """Take no note of times, which decide nothing here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAwareConfig:
    """When a cached prefix is worth a longer queue.

    Attributes:
        min_share: Share of a prompt that must be cached somewhere before that decides.
        max_lead: Most unfinished requests that the replica with the prefix may have more than the
            one with the fewest.

    Raises:
        ConfigError: If a value is out of its range.
    """

    min_share: float = 0.1
    max_lead: int = 8

    def __post_init__(self) -> None:
        """Check both."""
        if not 0 <= self.min_share <= 1:
            raise ConfigError(f"min_share must be between 0 and 1, got {self.min_share}.")
        if self.max_lead < 0:
            raise ConfigError(f"max_lead must be zero or more requests, got {self.max_lead}.")


class PrefixAwareRouter(ReplicaRouter):
    """Sends a request where most of its prompt is cached, unless that replica is far busier.

    Args:
        config: When a prefix decides; otherwise the replica with the fewest requests is taken.

    Source: the rule of cache-aware routers in SGLang and vLLM's production stack: affinity while
        loads are balanced, else load.
    """

    def __init__(self, config: PrefixAwareConfig | None = None) -> None:
        """Keep the settings."""
        super().__init__(LEAST_REQUESTS)
        self._config = config or PrefixAwareConfig()

    def plan(self, sequence: SequenceView, fleet: FleetView) -> RoutePlan:
        """Decide about a request; it waits only if no replica serves."""
        roles = _roles(fleet)
        busy = {
            i: len(one.running) + len(one.waiting)
            for i, one in enumerate(fleet.replicas)
            if roles[i].state == "serving"
        }
        if fleet.cached and busy:
            least = min(busy.values())
            near = [i for i, many in busy.items() if many - least <= self._config.max_lead]
            best = max(near, key=lambda i: (fleet.cached[i], -busy[i], -i))
            share = fleet.cached[best] / max(1, sequence.prompt_len)
            if fleet.cached[best] and share >= self._config.min_share:
                return RoutePlan(route=Route(replica=best))
        return super().plan(sequence, fleet)


def _roles(fleet: FleetView) -> tuple[ReplicaRole, ...]:
    return fleet.roles or (ReplicaRole(),) * len(fleet.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """What routers may want to know; each takes what concerns it.

    Attributes:
        polyserve: Settings of the tier router and its scaler.
        prefix_aware: When a prefix decides.
        elastic: Whether the scaler starts replicas and turns them off.
    """

    polyserve: PolyServeConfig = field(default_factory=PolyServeConfig)
    prefix_aware: PrefixAwareConfig = field(default_factory=PrefixAwareConfig)
    elastic: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RouterSettings":
        """Return the settings of what `to_json` has returned.

        Raises:
            ConfigError: For an unknown name, or a bad value.
        """
        try:
            return cls(
                polyserve=polyserve_config(fields["polyserve"]),
                prefix_aware=PrefixAwareConfig(**fields["prefix_aware"]),
                elastic=bool(fields["elastic"]),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the settings of a router are wrong: {error}.") from None


def polyserve_config(fields: Mapping[str, Any]) -> PolyServeConfig:
    """Build settings of the tier router from named values.

    Raises:
        ConfigError: For an unknown name, or a bad value.
    """
    known = {spec.name for spec in dataclasses.fields(PolyServeConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(
            f"there is no setting {unknown[0]!r} of polyserve; known: {', '.join(sorted(known))}."
        )
    values = dict(fields)
    if "tiers" in values:
        values["tiers"] = tuple(float(tau) for tau in values["tiers"])
    try:
        return PolyServeConfig(**values)
    except TypeError as error:
        raise ConfigError(f"the settings of polyserve are wrong: {error}.") from None


type RouterMaker = Callable[
    [CostModel | None, RouterSettings], tuple[QueueingRouter, Scaler | None]
]

ROUTERS: Registry[RouterMaker] = Registry("router")


def make_router(
    name: str, cost: CostModel | None, settings: RouterSettings
) -> tuple[QueueingRouter, Scaler | None]:
    """Make a router, and the scaler that goes with it if there is one.

    Args:
        name: One of `ROUTERS`.
        cost: Times of steps; those in `NEED_TIMES` need it.
        settings: What it may want to know.

    Raises:
        ConfigError: For an unknown name, or if times of steps are missing.
    """
    return ROUTERS[name](cost, settings)


@ROUTERS.register("round_robin")
def _round_robin(
    cost: CostModel | None, settings: RouterSettings
) -> tuple[QueueingRouter, Scaler | None]:
    del cost, settings
    return ReplicaRouter(ROUND_ROBIN), None


@ROUTERS.register("least_loaded")
def _least_loaded(
    cost: CostModel | None, settings: RouterSettings
) -> tuple[QueueingRouter, Scaler | None]:
    del cost, settings
    return ReplicaRouter(LEAST_REQUESTS), None


@ROUTERS.register("prefix_aware")
def _prefix_aware(
    cost: CostModel | None, settings: RouterSettings
) -> tuple[QueueingRouter, Scaler | None]:
    del cost
    return PrefixAwareRouter(settings.prefix_aware), None


@ROUTERS.register("polyserve")
def _polyserve(
    cost: CostModel | None, settings: RouterSettings
) -> tuple[QueueingRouter, Scaler | None]:
    if cost is None:
        raise ConfigError("the router polyserve needs times of steps; give a cost model.")
    router = TierRouter(cost, settings.polyserve)
    scaler = TierScaler(cost, router=router, elastic=settings.elastic)
    return router, scaler
