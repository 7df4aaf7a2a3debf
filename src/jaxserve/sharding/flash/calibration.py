"""From measured times to a cost model. What measures is elsewhere; these are fits only."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash.cost import CostModel


class Link(NamedTuple):
    """A link.

    Attributes:
        latency: Seconds that a message takes whatever its size (alpha).
        rate: Bytes per second (1 / beta).
    """

    latency: float
    rate: float


class Burst(NamedTuple):
    """One measurement of many senders to one port.

    Attributes:
        senders: How many, at least 2.
        at_once: Seconds if all send at once.
        in_turn: Seconds if the same bytes come one sender after the other.
    """

    senders: int
    at_once: float
    in_turn: float


def fit_link(samples: Sequence[tuple[float, float]]) -> Link:
    """Fit a fixed time and a rate to times of messages.

    Relative errors count, so that small messages decide the one and large ones the other. Repeated
    sizes are reduced to their median first, as disturbances only ever add time.

    Args:
        samples: Bytes and seconds; at least two sizes.

    Returns:
        The fit; the fixed time is 0 or more.

    Raises:
        ConfigError: If there are too few sizes, a number is not above 0, or times do not grow.
    """
    for size, seconds in samples:
        if not (math.isfinite(size) and math.isfinite(seconds) and size > 0 and seconds > 0):
            raise ConfigError(
                f"bytes and seconds must be finite and above 0, got {size} bytes in {seconds} s; "
                "leave out what failed."
            )
    sizes = sorted({size for size, _ in samples})
    if len(sizes) < 2:
        raise ConfigError(
            f"a link needs messages of at least two sizes, got {len(sizes)}; measure a small and "
            "a large one."
        )
    times = np.array([np.median([t for size, t in samples if size == one]) for one in sizes])
    columns = np.stack([np.ones(len(sizes)), np.array(sizes)], axis=1)
    # Columns of like size keep the system well conditioned: bytes are many, seconds few.
    scale = np.array([1.0, sizes[-1]])
    (latency, slope), *_ = np.linalg.lstsq(
        columns / scale / times[:, None], np.ones(len(sizes)), rcond=None
    )
    if latency < 0:
        part = columns[:, 1] / scale[1] / times
        latency, slope = 0.0, float(part.sum() / (part @ part))
    if slope <= 0:
        raise ConfigError(
            f"times must grow with sizes, got {times[0]:.3g} s for {sizes[0]:.0f} bytes and "
            f"{times[-1]:.3g} s for {sizes[-1]:.0f}; measure larger messages."
        )
    return Link(float(latency), float(sizes[-1] / slope))


def fit_incast(bursts: Sequence[Burst]) -> float:
    """Fit what each doubling of senders adds to the time of a port, as a share; 0 or more.

    Args:
        bursts: At least one.

    Raises:
        ConfigError: If there is none, or one has fewer than two senders or no time.
    """
    if not bursts:
        raise ConfigError("incast needs at least one burst, got none; measure one of all servers.")
    for burst in bursts:
        times = (burst.at_once, burst.in_turn)
        if burst.senders < 2 or not all(math.isfinite(t) and t > 0 for t in times):
            raise ConfigError(
                f"a burst needs at least two senders and times above 0, got {burst}; leave it out."
            )
    doublings = np.log2([burst.senders for burst in bursts])
    excess = np.array([burst.at_once / burst.in_turn - 1 for burst in bursts])
    return max(0.0, float(doublings @ excess / (doublings @ doublings)))


def fit_cost(
    gpus: int,
    inside: Sequence[tuple[float, float]],
    across: Sequence[tuple[float, float]],
    bursts: Sequence[Burst] = (),
) -> CostModel:
    """Fit a cost model.

    Args:
        gpus: GPUs of a server.
        inside: Bytes and seconds of messages between two GPUs of a server.
        across: The same between servers.
        bursts: Many senders to one port; none: incast costs nothing.

    Raises:
        ConfigError: If measurements do not suffice.
    """
    up, out = fit_link(inside), fit_link(across)
    return CostModel(
        gpus=gpus,
        up_rate=up.rate,
        out_rate=out.rate,
        up_latency=up.latency,
        out_latency=out.latency,
        incast=fit_incast(bursts) if bursts else 0.0,
    )
