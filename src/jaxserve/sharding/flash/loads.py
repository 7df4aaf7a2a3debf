"""What each port carries, by the way that rows take."""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import compiled
from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.rails import Rails, assign_rails
from jaxserve.sharding.flash.traffic import as_gpu_counts


class Ports(NamedTuple):
    """Rows through the ports between servers, of each GPU: all `[n, m]`.

    Attributes:
        sent: Rows.
        received: Rows.
        senders: How many GPUs send to each.
    """

    sent: np.ndarray
    received: np.ndarray
    senders: np.ndarray


class Loads(NamedTuple):
    """What traffic amounts to.

    Attributes:
        traffic: `[n, m, n, m]`, int64.
        servers: `[n, n]`, without its diagonal.
        bottleneck: The largest sum of a row or column of it.
        inside: `[2, n, m]`: rows that each GPU gives to and takes from others of its server, as
            their final place.
        direct: Ports if each row goes from its GPU straight to its final one.
        source: Ports if it crosses on the rail of its own GPU.
        forward: `[2, n, m]`: rows that are then passed on inside the receiver: given, taken.
        destination: Ports if it crosses on the rail of its final GPU.
        handover: `[2, n, m]`: rows that are handed to that rail first: given, taken.
        balanced: Ports if rails are balanced.
        rails: What the balance moves.
    """

    traffic: np.ndarray
    servers: np.ndarray
    bottleneck: int
    inside: np.ndarray
    direct: Ports
    source: Ports
    forward: np.ndarray
    destination: Ports
    handover: np.ndarray
    balanced: Ports
    rails: Rails


def measure_loads(traffic: np.ndarray, cost: CostModel) -> Loads:
    """Count what each port carries.

    Args:
        traffic: Rows, `[n, n]` of servers or `[n, m, n, m]` of GPUs, as for `plan`.
        cost: The links, which say how many GPUs a server has.

    Raises:
        ConfigError: If the matrix is not one of traffic.
    """
    traffic = as_gpu_counts(traffic, cost)
    n, m = traffic.shape[:2]
    each = np.arange(n)
    own = traffic[each, :, each, :]
    across = traffic.copy()
    across[each, :, each, :] = 0
    by_source, by_final = across.sum(axis=3), across.sum(axis=1)
    servers = by_source.sum(axis=1)
    rails = assign_rails(traffic)
    rest = np.arange(m) < (servers % m)[:, :, None]  # the first rails have one row more
    parts = servers[:, :, None] // m + rest
    balanced = Ports(parts.sum(axis=1), parts.sum(axis=0), (parts > 0).sum(axis=0))
    return Loads(
        traffic=traffic,
        servers=servers,
        bottleneck=int(max(servers.sum(axis=0).max(), servers.sum(axis=1).max())),
        inside=_exchange(own),
        direct=Ports(
            across.sum(axis=(2, 3)), across.sum(axis=(0, 1)), (across > 0).sum(axis=(0, 1))
        ),
        source=Ports(by_source.sum(axis=2), by_source.sum(axis=0).T, (by_source > 0).sum(axis=0).T),
        forward=_exchange(across.sum(axis=0).transpose(1, 0, 2)),
        destination=Ports(by_final.sum(axis=1), by_final.sum(axis=0), (by_final > 0).sum(axis=0)),
        handover=_exchange(across.sum(axis=2)),
        balanced=balanced,
        rails=rails,
    )


def _exchange(rows: np.ndarray) -> np.ndarray:
    """Return what GPUs give and take, `[2, n, m]`, of rows between them, `[n, m, m]`."""
    kept = np.diagonal(rows, axis1=1, axis2=2)
    return np.stack([rows.sum(axis=2) - kept, rows.sum(axis=1) - kept])


@compiled
def measure_rounds(traffic: np.ndarray, most: np.ndarray) -> None:
    """Find the largest message of each round in which GPU g sends to GPU g + round.

    Args:
        traffic: `[n, m, n, m]`, int64.
        most: `[2, n * m]`, zeros; written: the largest inside servers, and between them.
    """
    n, m = traffic.shape[0], traffic.shape[1]
    for i in range(n):
        for k in range(m):
            for j in range(n):
                tier = 0 if i == j else 1
                for final in range(m):
                    turn = (j * m + final - i * m - k) % (n * m)
                    most[tier, turn] = max(most[tier, turn], traffic[i, k, j, final])
