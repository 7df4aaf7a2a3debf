"""How long an all-to-all takes at the very least, whatever the schedule."""

import numpy as np

from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.loads import Loads, measure_loads


def lower_bound(traffic: np.ndarray, cost: CostModel) -> float:
    """Return the seconds that any scheme takes, fixed times left out.

    The fullest server has so many ports between servers and no more; and what a GPU has for others,
    or gets from them, passes through its own two ports.

    Args:
        traffic: Rows, `[n, n]` of servers or `[n, m, n, m]` of GPUs, as for `plan`.
        cost: What links cost.

    Raises:
        ConfigError: If the matrix is not one of traffic.

    Source: FLASH, arXiv 2505.09764, for the first of the two; the second is ours.

    >>> lower_bound(np.array([[0, 80], [40, 0]]), CostModel(gpus=8, out_rate=10.0, up_rate=1e9))
    1.0
    """
    return bound_of(measure_loads(traffic, cost), cost)


def bound_of(loads: Loads, cost: CostModel) -> float:
    """Return the bound of traffic whose loads are known; see `lower_bound`."""
    both = cost.up_rate + (cost.out_rate if len(loads.servers) > 1 else 0.0)
    ports = max(int((loads.direct.sent + loads.inside[0]).max()),
                int((loads.direct.received + loads.inside[1]).max()))  # fmt: skip
    return max(loads.bottleneck / (cost.gpus * cost.out_rate), ports / both)
