"""Means with intervals: of Student's t at 95 %, over documents and over clustering seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from scipy import stats


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean; nan for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def spread[T](results: Mapping[tuple[str, int], T], what: Callable[[T], float]) -> dict[str, float]:
    """Describe a quantity over documents and seeds.

    Args:
        results: Per document and seed.
        what: Takes the quantity from a result.

    Returns:
        Its mean, and half the widths of the intervals over documents and over seeds.
    """
    values = {key: what(result) for key, result in results.items()}

    def means(axis: int) -> list[float]:
        groups: dict[object, list[float]] = {}
        for key, value in values.items():
            groups.setdefault(key[axis], []).append(value)
        return [statistics.fmean(group) for group in groups.values()]

    return {
        "mean": statistics.fmean(values.values()),
        "documents": interval(means(0)),
        "seeds": interval(means(1)),
    }
