"""Which algorithm to take for given counts."""

from typing import Final, NamedTuple

import numpy as np

from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.loads import Loads, measure_loads
from jaxserve.sharding.flash.schedule import Schedule, plan
from jaxserve.sharding.flash.simulate import Algorithm, simulate

TOLERANCE: Final = 0.03
"""What a plan must promise to save, as a share, before it is made."""
_WITHOUT_PLAN: Final[tuple[Algorithm, ...]] = (
    "direct",
    "source_rail",
    "destination_rail",
    "balanced",
)


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        algorithm: The one with the least modelled time.
        seconds: That time.
        schedule: Its stages, if it is `flash`.
    """

    algorithm: Algorithm
    seconds: float
    schedule: Schedule | None


def choose(traffic: np.ndarray | Loads, cost: CostModel) -> Choice:
    """Choose between sending at once, in three ways, and stages.

    Stages are planned only where they might save more than `TOLERANCE`: no schedule takes less than
    the fullest server's rows and a stage for each of its partners. So the choice is at most so much
    slower than the best of all.

    Args:
        traffic: Rows, `[n, n]` or `[n, m, n, m]`, or what `measure_loads` returned for them.
        cost: What links cost.

    Raises:
        ConfigError: If the matrix is not one of traffic.

    Source: ours; the paper always schedules.
    """
    loads = traffic if isinstance(traffic, Loads) else measure_loads(traffic, cost)
    times = {name: simulate(loads, cost, name).seconds for name in _WITHOUT_PLAN}
    best = min(_WITHOUT_PLAN, key=times.__getitem__)
    if times[best] <= (1 + TOLERANCE) * _least_staged(loads, cost):
        return Choice(best, times[best], None)
    schedule = plan(loads.servers, cost)
    staged = simulate(loads, cost, "flash", schedule=schedule).seconds
    if staged < times[best]:
        return Choice("flash", staged, schedule)
    return Choice(best, times[best], None)


def _least_staged(loads: Loads, cost: CostModel) -> float:
    """Return what any schedule takes at the least: a stage carries one entry of a row."""
    partners = loads.servers > 0
    stages = int(max(partners.sum(axis=0).max(), partners.sum(axis=1).max()))
    return loads.bottleneck / (cost.gpus * cost.out_rate) + stages * cost.out_latency
