"""Fits the planes of a cost model to measured steps, and says how good the fit is."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from jaxserve.core.cost import CostModel, LinearCost, Plane, StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.errors import ConfigError

MOST_UNDER_PREDICTED = 0.05
"""Share of steps that may take longer than a safe model says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """How well a cost model predicts measured steps.

    Attributes:
        r2: Share of the variance that it explains.
        mean_error: Mean absolute error as a share of the time.
        p99_error: 99th percentile of the absolute error in seconds.
        under_predicted: Share of steps that took longer than predicted.
        margin: Smallest share by which to raise predictions so that 95 % of the steps take no
            longer.
    """

    r2: float
    mean_error: float
    p99_error: float
    under_predicted: float
    margin: float


def fit_linear(
    loads: Sequence[StepLoad], seconds: Sequence[float], *, num_planes: int = 1, rounds: int = 20
) -> LinearCost:
    """Fit the largest of a few planes, with coefficients of zero or more.

    Each round gives every step to the plane that predicts most for it and fits each plane to its
    own steps; the best round wins. Errors count relative to the time of the step.

    Args:
        loads: What the steps held.
        seconds: Their times, above zero.
        num_planes: Most planes; one that is left with no step is dropped.
        rounds: Most rounds.

    Raises:
        ConfigError: For fewer steps than coefficients, or times that are none.

    Source: Lawson and Hanson's non-negative least squares, in SciPy.
    """
    times = np.asarray(seconds, float)
    if len(loads) != len(times) or len(times) < 5 * num_planes:
        raise ConfigError(
            f"fitting {num_planes} planes needs a time for each step and at least "
            f"{5 * num_planes} steps, got {len(loads)} steps and {len(times)} times."
        )
    if not (np.isfinite(times) & (times > 0)).all():
        raise ConfigError("times of steps must be finite and above zero; measure again.")
    counts = np.array([_counts(load) for load in loads], float)
    order = np.argsort(counts[:, 0], kind="stable")
    owner = np.empty(len(times), int)
    owner[order] = np.arange(len(times)) * num_planes // len(times)
    best, least = LinearCost(_plane(counts, times)), np.inf
    for _ in range(rounds):
        planes = [
            _plane(counts[owner == plane], times[owner == plane])
            for plane in range(num_planes)
            if (owner == plane).any()
        ]
        model = LinearCost(*planes)
        predicted = np.array([model.step_time(load) for load in loads])
        error = float(np.mean(((predicted - times) / times) ** 2))
        if error < least:
            best, least = model, error
        heights = np.stack([_heights(plane, counts) for plane in planes])
        owned = heights.argmax(axis=0)
        if (owned == owner).all():
            break
        owner = owned
    return best


class Bucket(NamedTuple):
    """The step shape that a measured step was padded to.

    Attributes:
        rows: Its rows.
        prefill: Prompt tokens; 0 without prompts.
        drafts: Draft tokens; 0 without drafts.
    """

    rows: int
    prefill: int = 0
    drafts: int = 0


def fit_buckets(
    buckets: Sequence[Bucket], loads: Sequence[StepLoad], seconds: Sequence[float]
) -> BucketCost:
    """Fit a time for each step shape, and straight lines for what attention reads.

    Steps of equal load are repeats, of which the median counts. Errors count relative to the time
    of the step, and no coefficient is below zero.

    Args:
        buckets: What each step was padded to.
        loads: What it held.
        seconds: Its time, above zero.

    Raises:
        ConfigError: Without steps, for times that are none, or for a grid with holes.
    """
    times = np.asarray(seconds, float)
    if not len(times) or not (np.isfinite(times) & (times > 0)).all():
        raise ConfigError("times of steps must be finite and above zero; measure again.")
    repeats: dict[tuple[Bucket, StepLoad], list[float]] = defaultdict(list)
    for bucket, load, time in zip(buckets, loads, times, strict=True):
        repeats[bucket, load].append(float(time))
    known = sorted({bucket for bucket, _ in repeats})
    place = {bucket: index for index, bucket in enumerate(known)}
    medians = np.array([np.median(several) for several in repeats.values()])
    columns = np.zeros((len(repeats), len(known) + 3))
    for row, (bucket, load) in enumerate(repeats):
        columns[row, place[bucket]] = 1
        columns[row, -3:] = load.context, load.pairs, load.draft_steps
    rows = columns / medians[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-12)
    found, _ = nnls(rows / scale, np.ones(len(medians)))
    values = [float(value) for value in found / scale]
    least = float(medians.min()) * 1e-3
    cells = [(bucket, max(values[place[bucket]], least)) for bucket in known]
    return BucketCost(
        decode=[(b.rows, 0, time) for b, time in cells if not b.prefill and not b.drafts],
        mixed=[(b.rows, b.prefill, time) for b, time in cells if b.prefill],
        drafted=[(b.rows, b.drafts, time) for b, time in cells if b.drafts],
        context=values[-3],
        pair=values[-2],
        draft_step=values[-1],
        name="the measured table",
    )


def judge_fit(cost: CostModel, loads: Sequence[StepLoad], seconds: Sequence[float]) -> FitReport:
    """Compare a cost model with measured steps."""
    times = np.asarray(seconds, float)
    predicted = np.array([cost.step_time(load) for load in loads])
    error = predicted - times
    spread = float(((times - times.mean()) ** 2).sum())
    needed = np.quantile(times / predicted, 1 - MOST_UNDER_PREDICTED, method="higher")
    return FitReport(
        r2=1 - float((error**2).sum()) / spread if spread else float((error == 0).all()),
        mean_error=float(np.mean(np.abs(error) / times)),
        p99_error=float(np.quantile(np.abs(error), 0.99)),
        under_predicted=float(np.mean(times > predicted * (1 + 1e-12))),
        margin=max(0.0, float(needed) - 1),
    )


def _counts(load: StepLoad) -> tuple[int, int, int, int, int]:
    read = load.context + load.past
    return (load.tokens, load.prefills + load.decodes, read, load.draft_steps, 1)


def _plane(counts: np.ndarray, times: np.ndarray) -> Plane:
    rows = counts / times[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-12)
    found, _ = nnls(rows / scale, np.ones(len(times)))
    token, request, context, draft_step, base = (float(value) for value in found / scale)
    return Plane(token=token, request=request, context=context, draft_step=draft_step, base=base)


def _heights(plane: Plane, counts: np.ndarray) -> np.ndarray:
    row = [plane.token, plane.request, plane.context, plane.draft_step, plane.base]
    return counts @ np.array(row)
