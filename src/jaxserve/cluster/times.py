"""Times of steps of several replicas."""

from collections.abc import Iterable

from jaxserve.core.cost import StepLoad
from jaxserve.core.cost_file import CostFile

_TYPICAL = StepLoad(decodes=4, context=1024)


def slowest(files: Iterable[CostFile]) -> CostFile:
    """Return the times of the slowest replica, which say what every one of them can promise."""
    return max(files, key=lambda file: file.cost.step_time(_TYPICAL))
