"""How long each algorithm takes by the cost model, from alpha-beta times of its steps."""

from typing import Final, Literal, NamedTuple, get_args

import numpy as np

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.sharding.flash.bounds import bound_of
from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.loads import Loads, Ports, measure_loads, measure_rounds
from jaxserve.sharding.flash.schedule import Schedule, plan

type Algorithm = Literal[
    "direct", "spread_out", "source_rail", "destination_rail", "balanced", "paper", "flash"
]
ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm.__value__)


class Simulation(NamedTuple):
    """What an algorithm takes.

    Attributes:
        algorithm: Its name.
        seconds: Modelled time.
        bound: Least time of any scheme without fixed times; see `lower_bound`.
        num_stages: Steps between servers, one after another.
    """

    algorithm: str
    seconds: float
    bound: float
    num_stages: int

    @property
    def ratio(self) -> float:
        """Time over the bound; 1 where there is nothing to do."""
        return self.seconds / self.bound if self.bound else 1.0


def simulate(
    traffic: np.ndarray | Loads,
    cost: CostModel,
    algorithm: Algorithm = "flash",
    *,
    schedule: Schedule | None = None,
) -> Simulation:
    """Return the modelled time of one algorithm.

    `direct`: each GPU sends to each final GPU, all at once. `spread_out`: in rounds, GPU g to GPU
    g + round, with a barrier behind each. `source_rail`: a row crosses on its own GPU's rail and is
    passed on there, as in DeepEP. `destination_rail`: it is handed to its final GPU's rail first,
    as in PXN. `balanced`: rails are balanced, then all is sent at once. `paper`: the published
    schedule: balance, ascending stages, redistribution behind the next stage. `flash`: stages of
    `plan`, with the balance of each behind the stage before it.

    Where all is sent at once, moving rows inside servers costs a fixed time only, as long as the
    ports there keep up, and the time of a port between servers grows with its senders by
    `cost.incast`. Of schedules every step counts, but for what others hide. Rows that stay in their
    server go whenever ports inside it are idle.

    Args:
        traffic: Rows, `[n, n]` of servers (spread evenly over their GPUs) or `[n, m, n, m]` of
            GPUs; or what `measure_loads` returned for them.
        cost: What links cost.
        algorithm: Which one.
        schedule: Stages for `flash`; None: those that `plan` makes.

    Raises:
        ConfigError: If the matrix is not one of traffic, or the algorithm is unknown.

    Source: FLASH, arXiv 2505.09764, for what is compared; the alpha-beta model is the usual one.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}."
            + did_you_mean(algorithm, ALGORITHMS)
        )
    loads = traffic if isinstance(traffic, Loads) else measure_loads(traffic, cost)
    if algorithm in ("flash", "paper"):
        if schedule is None:
            schedule = plan(loads.servers, cost, "paper" if algorithm == "paper" else "auto")
        seconds = _pipeline(loads, cost, schedule, is_balanced_first=algorithm == "paper")
        stages = schedule.num_stages
    elif algorithm == "spread_out":
        seconds, stages = _rounds(loads, cost)
    else:
        seconds = _at_once(loads, cost, algorithm)
        stages = int(loads.bottleneck > 0)
    return Simulation(algorithm, seconds, bound_of(loads, cost), stages)


def _inside(rows: np.ndarray, cost: CostModel) -> float:
    """Return the time of a step inside servers, of the rows of its ports; 0 if there are none."""
    most = float(rows.max())
    return most / cost.up_rate + cost.up_latency if most else 0.0


def _at_once(loads: Loads, cost: CostModel, algorithm: str) -> float:
    ports: Ports = getattr(loads, algorithm.removesuffix("_rail"))
    slowdown = 1 + cost.incast * np.log2(np.maximum(ports.senders, 1))
    across = max(float(ports.sent.max()), float((ports.received * slowdown).max())) / cost.out_rate
    across += cost.out_latency if loads.bottleneck else 0.0
    up = loads.rails.up
    hops = {
        "source_rail": (loads.forward,),
        "destination_rail": (loads.handover,),
        "balanced": (up[:2], up[2:]),
    }.get(algorithm, ())
    inside = loads.inside.copy()
    for hop in hops:
        inside += hop
        across += cost.up_latency if hop.any() else 0.0
    return max(across, _inside(inside, cost))


def _rounds(loads: Loads, cost: CostModel) -> tuple[float, int]:
    n, m = loads.traffic.shape[:2]
    most = np.zeros((2, n * m), np.int64)
    measure_rounds(loads.traffic, most)
    inside, across = most[:, 1:]
    times = np.maximum(
        np.where(inside > 0, inside / cost.up_rate + cost.up_latency, 0.0),
        np.where(across > 0, across / cost.out_rate + cost.out_latency, 0.0),
    )
    return float(times.sum()), int((across > 0).sum())


def _left_over(loads: Loads, cost: CostModel, idle: float) -> float:
    """Return what rows that stay in their servers take beyond the time in which ports idle."""
    return max(0.0, _inside(loads.inside, cost) - idle)


def stage_times(
    loads: Loads, cost: CostModel, schedule: Schedule
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the seconds of each stage: its balance, its sends, its redistribution; `[stages]`.

    A stage that carries a part of a pair's rows has that part of what the pair must move. Rails
    send whole rows.
    """
    n = schedule.num_servers
    place = (np.arange(n), schedule.perms)
    part = schedule.rows / np.maximum(loads.servers[place], 1)
    found: list[np.ndarray] = []
    for moved in (loads.rails.balance, loads.rails.redistribution):
        most = (part * moved[place]).max(axis=1, initial=0.0)
        found.append(np.where(most > 0, most / cost.up_rate + cost.up_latency, 0.0))
    sends = -(-schedule.durations // cost.gpus) / cost.out_rate + cost.out_latency
    return found[0], sends, found[1]


def _pipeline(
    loads: Loads, cost: CostModel, schedule: Schedule, *, is_balanced_first: bool
) -> float:
    if not schedule.num_stages:
        return _inside(loads.inside, cost)
    balance, sends, redistribution = stage_times(loads, cost, schedule)
    first, behind = balance[0], np.append(balance[1:], 0.0)
    if is_balanced_first:
        first, behind = _inside(loads.rails.up[:2], cost), np.zeros_like(balance)
    behind[1:] += redistribution[:-1]
    idle = float(np.maximum(sends - behind, 0.0).sum())
    shown = float(first + np.maximum(sends, behind).sum() + redistribution[-1])
    return shown + _left_over(loads, cost, idle)
