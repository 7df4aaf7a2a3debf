"""Workloads: arrivals, lengths and objectives, chosen apart from each other."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.core.cost import CostModel, zero_load_time
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Slo
from jaxserve.sim.request import SimRequest

_PER_SECOND = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths of one request, and how soon its tokens are wanted.

    Attributes:
        prompt_len: Tokens of the prompt.
        output_len: Tokens that it generates.
        ttft_slowdown: Time to the first token, as a multiple of that on an idle server.
        tpot_s: Seconds per further token.
        name: Class of requests.
        cached_len: Prompt tokens that the prefix cache holds.
    """

    prompt_len: int
    output_len: int
    ttft_slowdown: float
    tpot_s: float
    name: str
    cached_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A stream of requests that can be offered at any rate.

    Attributes:
        name: For reports.
        arrivals: Clock times of arrivals in seconds, increasing; stretched to the wanted rate, so
            that bursts keep their form.
        shapes: What arrives. With `is_paired` shape i belongs to arrival i; otherwise shapes are
            drawn at random, each as likely.
        is_paired: Whether shapes and arrivals belong together.

    Raises:
        ConfigError: If there is nothing to offer, or arrivals decrease.
    """

    name: str
    arrivals: tuple[float, ...]
    shapes: tuple[Shape, ...]
    is_paired: bool = False

    def __post_init__(self) -> None:
        """Check that there is something to offer."""
        if len(self.arrivals) < 2 or not self.shapes or self.arrivals[-1] <= self.arrivals[0]:
            raise ConfigError(
                f"workload {self.name!r} needs two arrivals at different times and a shape, got "
                f"{len(self.arrivals)} arrivals and {len(self.shapes)} shapes."
            )
        if any(b < a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)):
            raise ConfigError(f"the arrivals of workload {self.name!r} must not decrease.")
        if self.is_paired and len(self.shapes) != len(self.arrivals):
            raise ConfigError(
                f"workload {self.name!r} pairs {len(self.arrivals)} arrivals with "
                f"{len(self.shapes)} shapes; there must be one for each."
            )

    def offer(
        self,
        rate: float,
        count: int,
        cost: CostModel,
        *,
        seed: int = 0,
        max_output: int | None = None,
    ) -> list[SimRequest]:
        """Return requests at a mean rate.

        Args:
            rate: Requests per second over the whole stream.
            count: How many.
            cost: The server's own, for objectives in multiples of an idle server's time.
            seed: Where in the stream to begin, and which shapes are drawn.
            max_output: Most output tokens that schedulers must reckon with; None tells them the
                true length.

        Raises:
            ConfigError: For a rate or count that is not above zero.
        """
        if not (rate > 0 and count > 0):
            raise ConfigError(f"rate and count must be above zero, got {rate} and {count}.")
        rng = random.Random(f"{self.name} {seed}")
        total = len(self.arrivals)
        span = (self.arrivals[-1] - self.arrivals[0]) * total / (total - 1)
        stretch = total / span / rate
        first = rng.randrange(total) if seed else 0
        start = self.arrivals[first]
        idle: dict[tuple[int, int], float] = {}
        requests: list[SimRequest] = []
        for number in range(count):
            turn, place = divmod(first + number, total)
            shape = self.shapes[place] if self.is_paired else rng.choice(self.shapes)
            lens = (shape.prompt_len, shape.cached_len)
            if lens not in idle:
                idle[lens] = zero_load_time(cost, *lens)
            requests.append(
                SimRequest(
                    request_id=number,
                    arrival=(self.arrivals[place] - start + turn * span) * stretch,
                    prompt_len=shape.prompt_len,
                    output_len=shape.output_len,
                    max_output=None if max_output is None else max(max_output, shape.output_len),
                    slo=Slo(
                        ttft_ms=shape.ttft_slowdown * idle[lens] * _PER_SECOND,
                        tpot_ms=shape.tpot_s * _PER_SECOND,
                        tier=f"{shape.tpot_s * _PER_SECOND:g}ms",
                    ),
                    name=shape.name,
                    cached_len=shape.cached_len,
                )
            )
        return requests


def gamma_arrivals(count: int, *, cv: float = 1.0, seed: int = 0) -> tuple[float, ...]:
    """Draw arrivals at one per second with gamma-distributed gaps.

    Args:
        count: How many.
        cv: Standard deviation of a gap over its mean; 1 is a Poisson process, 0 a clock.
        seed: Of the random numbers.
    """
    rng = random.Random(f"gamma {cv} {seed}")
    now, times = 0.0, list[float]()
    for _ in range(count):
        now += rng.gammavariate(cv**-2, cv**2) if cv else 1.0
        times.append(now)
    return tuple(times)


def lognormal_shapes(
    count: int,
    *,
    prompt: tuple[int, float],
    output: tuple[int, float],
    ttft_slowdown: float,
    tpot_s: float,
    name: str,
    seed: int = 0,
    longest: int = 8192,
) -> tuple[Shape, ...]:
    """Draw shapes with log-normal lengths.

    Args:
        count: How many.
        prompt: Median of the prompt's tokens, and standard deviation of their logarithm.
        output: The same of the output's tokens.
        ttft_slowdown: Time to the first token, as a multiple of that on an idle server.
        tpot_s: Seconds per further token.
        name: Class of requests.
        seed: Of the random numbers.
        longest: Most tokens of either.
    """
    rng = random.Random(f"lognormal {name} {seed}")

    def draw(median: int, sigma: float) -> int:
        return min(longest, max(1, round(rng.lognormvariate(math.log(median), sigma))))

    return tuple(
        Shape(
            prompt_len=draw(*prompt),
            output_len=draw(*output),
            ttft_slowdown=ttft_slowdown,
            tpot_s=tpot_s,
            name=name,
        )
        for _ in range(count)
    )


def interleave(name: str, arrivals: Sequence[float], *kinds: Sequence[Shape]) -> Workload:
    """Mix several kinds of requests in equal parts."""
    most = max(len(kind) for kind in kinds)
    shapes = tuple(kind[i % len(kind)] for i in range(most) for kind in kinds)
    return Workload(name=name, arrivals=tuple(arrivals), shapes=shapes)
