"""Lets a policy's cost model learn from simulated steps, as an engine's does from real ones."""

from collections.abc import Sequence

from jaxserve.core.cost import StepLoad
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.plan import StepPlan


class CostLearner:
    """An observer of replicas that tells a cost model how long each step took.

    Args:
        cost: The model that learns; the policy should be the one that goes by it.
    """

    def __init__(self, cost: LearnedCost) -> None:
        """Keep the model."""
        self._cost = cost

    def step(
        self, replica: int, begin: float, ends: Sequence[float], plan: StepPlan, load: StepLoad
    ) -> None:
        """Take note of one step, or of several with one plan.

        Args:
            replica: Where.
            begin: When the first began, in seconds.
            ends: When each ended.
            plan: What was planned.
            load: What the first held; later ones hold a token more for each decode.
        """
        del replica, plan
        for number, end in enumerate(ends):
            context = load.context + number * load.decodes
            self._cost.observe(load._replace(context=context), end - begin, end)
            begin = end
