"""What is compared: estimators and baselines, and combinations of their parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.rooms.sparse import mass
from jaxserve.attention.tactic.config import TacticConfig

TARGETS = (0.8, 0.9, 0.95)
KNOBS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.985, 0.995)
"""Values of p."""
BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5)
"""Shares of the optional tokens."""
ABLATION_P = 0.9
CLUSTERED = (mass.clustered, mass.cluster_order)
"""Methods that a clustering decides about."""
DEFAULT = "sampled (default)"

BASE = TacticConfig(max_share=1.0, min_context=0)
"""Settings of the comparison: nothing is read whole, so that estimators are seen as they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """A method with its settings.

    Attributes:
        method: What is read.
        config: Settings.
        knobs: Values of p, or of the share of tokens.
    """

    method: mass.Method
    config: TacticConfig = BASE
    knobs: tuple[float, ...] = KNOBS

    @property
    def is_budget(self) -> bool:
        """Whether its knob is the share of tokens rather than p."""
        return self.knobs == BUDGETS


def _estimator(**changes: Any) -> TacticConfig:  # noqa: ANN401
    return mass.with_estimator(BASE, **changes)


CONTESTANTS: Mapping[str, Contestant] = {
    "oracle top-p": Contestant(mass.oracle_top_p),
    "cluster order, oracle count": Contestant(mass.cluster_order),
    DEFAULT: Contestant(mass.clustered),
    "hyperbola (Tactic)": Contestant(
        mass.clustered, _estimator(name="hyperbola", correction="none")
    ),
    "centroid mass (Double-P)": Contestant(
        mass.clustered, _estimator(name="centroid", correction="none")
    ),
    "int4 keys, top-p (Twilight)": Contestant(mass.int4_top_p),
    "page bounds, oracle count": Contestant(mass.pages_top_p),
    "page bounds, budget (Quest)": Contestant(mass.pages_top_k, knobs=BUDGETS),
    "exact top-k, budget": Contestant(mass.exact_top_k, knobs=BUDGETS),
    "sinks and window": Contestant(mass.sinks_and_window, knobs=BUDGETS),
}

_COUNTS: Mapping[str, tuple[mass.Method, Mapping[str, object]]] = {
    "oracle": (mass.cluster_order, {}),
    "centroid": (mass.clustered, {"name": "centroid"}),
    "hyperbola": (mass.clustered, {"name": "hyperbola"}),
    "sampled, means": (mass.clustered, {"control_variate": False, "failure_rate": 0.5}),
    "sampled, ratios": (mass.clustered, {"failure_rate": 0.5}),
    "sampled, ratios, bound": (mass.clustered, {}),
}
ABLATION: Mapping[str, Contestant] = {
    f"{order} | {count}": Contestant(
        method, _estimator(correction=correction, **changes), (ABLATION_P,)
    )
    for order, correction in (("means", "none"), ("spread", "spread"))
    for count, (method, changes) in _COUNTS.items()
}
"""Order of clusters, and how tokens are counted."""

ESTIMATORS: Mapping[str, TacticConfig] = {
    "sampled": TacticConfig(min_context=0),
    "sampled, rest dropped": TacticConfig(min_context=0, tail="drop"),
    "hyperbola": mass.with_estimator(
        TacticConfig(min_context=0, tail="drop"), name="hyperbola", correction="none"
    ),
    "centroid": mass.with_estimator(
        TacticConfig(min_context=0, tail="drop"), name="centroid", correction="none"
    ),
}
"""What text is decoded with, as a user would: diffuse heads and the first layers read everything.

The published estimators leave out what is not read, as their papers do.
"""


def segmented(config: TacticConfig, segment_len: int, seed: int = 0) -> TacticConfig:
    """Return settings with another clustering."""
    clusters = dataclasses.replace(config.clusters, segment_len=segment_len, seed=seed)
    return dataclasses.replace(config, clusters=clusters)
