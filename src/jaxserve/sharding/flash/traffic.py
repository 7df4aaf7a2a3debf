"""Matrices of traffic: which shapes and numbers are taken, and how they are read."""

import numpy as np

from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.errors import TrafficError


def as_counts(traffic: np.ndarray, cost: CostModel) -> np.ndarray:
    """Return traffic as contiguous int64; whether entries are negative is not looked at.

    Args:
        traffic: `[n, n]`, or `[n, m, n, m]`; whole numbers in any dtype.
        cost: The links, which say how many GPUs a server has.

    Returns:
        The same numbers in the same shape.

    Raises:
        TrafficError: If the shape is another, or if an entry is not a whole number of int64.
    """
    found = np.asarray(traffic)
    shape = found.shape
    is_servers = found.ndim == 2 and shape[0] == shape[1]
    is_gpus = found.ndim == 4 and shape[:2] == shape[2:]
    if not (is_servers or is_gpus) or not found.size:
        raise TrafficError(
            f"traffic must be square, [servers, servers] or [servers, gpus, servers, gpus], and "
            f"not empty, got shape {shape}; use split_gpus for a square matrix of GPUs."
        )
    if is_gpus and shape[1] != cost.gpus:
        raise TrafficError(
            f"traffic has {shape[1]} GPUs per server and the cost model has {cost.gpus}; make "
            "them equal."
        )
    if found.dtype.kind not in "iuf":
        raise TrafficError(
            f"traffic must be of whole numbers, got dtype {found.dtype}; count rows or bytes."
        )
    if found.dtype.kind == "f":
        odd = ~np.isfinite(found) | (found != np.floor(found))
        if odd.any():
            place = tuple(int(x) for x in np.argwhere(odd)[0])
            raise TrafficError(
                f"traffic must be of whole numbers, got {found[place]} at {place}; count rows or "
                "bytes, and round before."
            )
    if found.dtype.kind in "uf" and float(found.max()) >= 2.0**63:
        raise TrafficError(
            f"numbers of rows must be less than 2**63, got {found.max()}; count in larger units."
        )
    return np.ascontiguousarray(found, np.int64)


def split_gpus(traffic: np.ndarray, gpus: int) -> np.ndarray:
    """Return a square matrix of GPUs as `[servers, gpus, servers, gpus]`, without a copy.

    Args:
        traffic: `[servers * gpus, servers * gpus]`, the GPUs of a server side by side.
        gpus: GPUs per server.

    Raises:
        TrafficError: If the matrix is not square or not made of whole servers.
    """
    shape = np.shape(traffic)
    if len(shape) != 2 or shape[0] != shape[1] or gpus < 1 or shape[0] % gpus:
        raise TrafficError(
            f"traffic of GPUs must be square, with a multiple of gpus={gpus} rows, got shape "
            f"{shape}; add rows of zeros for GPUs that are missing."
        )
    servers = shape[0] // gpus
    return np.reshape(traffic, (servers, gpus, servers, gpus))


def spread_servers(counts: np.ndarray, gpus: int) -> np.ndarray:
    """Spread the rows of pairs of servers over pairs of GPUs as evenly as whole rows can be.

    Args:
        counts: `[n, n]`, int64.
        gpus: GPUs per server.

    Returns:
        `[n, gpus, n, gpus]`, int64; of rows that do not divide, the k-th goes on from GPU k.
    """
    pairs = gpus * gpus
    sender, receiver = np.divmod(np.arange(pairs), gpus)
    rank = ((receiver - sender) % gpus * gpus + sender).reshape(gpus, gpus)
    whole, rest = np.divmod(counts, pairs)
    found = whole[:, None, :, None] + (rank[None, :, None, :] < rest[:, None, :, None])
    return np.ascontiguousarray(found, np.int64)


def as_gpu_counts(traffic: np.ndarray, cost: CostModel) -> np.ndarray:
    """Return traffic as `[n, m, n, m]`; that of servers is spread evenly over their GPUs.

    Args:
        traffic: `[n, n]` or `[n, m, n, m]`.
        cost: The links.

    Raises:
        TrafficError: As by `as_counts`, and if an entry is negative or all are too many.
    """
    counts = as_counts(traffic, cost)
    if counts.min() < 0:
        place = tuple(int(x) for x in np.argwhere(counts < 0)[0])
        raise TrafficError(
            f"numbers of rows must be 0 or more, got {counts[place]} at {place}; count "
            "what is sent."
        )
    if float(counts.sum(dtype=np.float64)) >= 2.0**62:
        raise TrafficError(
            f"the rows of all pairs must be fewer than 2**62 in sum, got about "
            f"{counts.sum(dtype=np.float64):.3g}; count in larger units."
        )
    return spread_servers(counts, cost.gpus) if counts.ndim == 2 else counts
