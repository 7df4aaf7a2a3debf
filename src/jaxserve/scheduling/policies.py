"""Policies by name, for engines and for replays of what they decided."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.core.cost import CostModel
from jaxserve.core.errors import ConfigError
from jaxserve.core.protocols import Scheduler
from jaxserve.core.registry import Registry
from jaxserve.scheduling.baselines import (
    DeadlineHybridScheduler,
    DeadlineScheduler,
    PrefillFirstScheduler,
    SlackGreedyScheduler,
)  # fmt: skip
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.slos_serve import SlosServeConfig, SlosServeScheduler
from jaxserve.scheduling.slos_serve.config import Pace

NEED_COST = frozenset({"slo", "deadline_hybrid", "slack_greedy"})
"""Policies that predict how long steps take."""
PLAIN = frozenset({"fcfs", "priority"})
"""Policies that stand in for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What policies may want to know; each takes what concerns it.

    Attributes:
        pace: How a target per token is read.
        margin: Share by which predicted times are raised before anything is promised.
        max_draft: Most draft tokens per sequence and step; 0 without speculation.
        mix: Whether a step may hold prefills and decodes.
        max_mixed_prefill: Most prompt tokens in a step that decodes as well, under fcfs.
        ageing_s: Seconds of waiting that count as one step of priority.
        draft_cost: Time of a draft token as a share of that of a step, under fcfs.
        lora_drain_wait_s: How long a sequence may wait for a slot for its adapter, under fcfs.
    """

    pace: Pace = "tpot"
    margin: float = 0.05
    max_draft: int = 0
    mix: bool = True
    max_mixed_prefill: int | None = None
    ageing_s: float | None = None
    draft_cost: float = 0.1
    lora_drain_wait_s: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PolicySettings":
        """Return the settings of what `to_json` has returned.

        Raises:
            ConfigError: For an unknown name.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"the settings of a policy are wrong: {error}.") from None


type Maker = Callable[[CostModel | None, PolicySettings], Scheduler]

POLICIES: Registry[Maker] = Registry("scheduling policy")


def make_policy(name: str, cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    """Make a policy.

    Args:
        name: One of `POLICIES`.
        cost: Times of steps; those in `NEED_COST` need it.
        settings: What it may want to know.

    Raises:
        ConfigError: For an unknown name, or if times of steps are missing.
    """
    return POLICIES[name](cost, settings)


def _known(cost: CostModel | None, name: str) -> CostModel:
    if cost is None:
        raise ConfigError(f"the policy {name} needs times of steps; give a cost model.")
    return cost


@POLICIES.register("fcfs")
def _fcfs(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    del cost
    return _first_come(settings, by_priority=False)


@POLICIES.register("priority")
def _priority(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    del cost
    return _first_come(settings, by_priority=True)


def _first_come(settings: PolicySettings, *, by_priority: bool) -> FcfsScheduler:
    return FcfsScheduler(
        by_priority=by_priority,
        mix=settings.mix,
        max_mixed_prefill=settings.max_mixed_prefill,
        ageing_s=settings.ageing_s,
        draft_cost=settings.draft_cost,
        lora_drain_wait_s=settings.lora_drain_wait_s,
    )


@POLICIES.register("slo")
def _slo(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    config = SlosServeConfig(
        pace=settings.pace, margin=settings.margin, max_draft=settings.max_draft
    )
    return SlosServeScheduler(_known(cost, "slo"), config)


@POLICIES.register("edf")
def _edf(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    del cost, settings
    return DeadlineScheduler()


@POLICIES.register("prefill_first")
def _prefill_first(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    del cost, settings
    return PrefillFirstScheduler()


@POLICIES.register("deadline_hybrid")
def _deadline_hybrid(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    every_gap = settings.pace == "tpot_gap"
    return DeadlineHybridScheduler(_known(cost, "deadline_hybrid"), every_gap=every_gap)


@POLICIES.register("slack_greedy")
def _slack_greedy(cost: CostModel | None, settings: PolicySettings) -> Scheduler:
    every_gap = settings.pace == "tpot_gap"
    return SlackGreedyScheduler(_known(cost, "slack_greedy"), every_gap=every_gap)
