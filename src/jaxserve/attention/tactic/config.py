"""Settings of sparse attention, each checked where it is made."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxserve.core.errors import ConfigError

EstimatorName = Literal["sampled", "hyperbola", "centroid"]
"""How many tokens are needed: from samples, from a fitted curve, or from cluster means alone."""

Correction = Literal["none", "spread"]
"""Whether a cluster's mean weight is that of its mean key, or also counts the keys' variance."""

IndexDtype = Literal["float32", "bfloat16"]
"""Element types of an index."""

Tail = Literal["drop", "mean"]
"""Whether tokens that are not read are left out, or stand in by the mean value of their cluster."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a setting is one of its choices.

    Raises:
        ConfigError: If it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How keys are clustered.

    Attributes:
        cluster_size: Tokens per cluster on average; n / C in the paper, where it is 32.
        segment_len: Tokens that are clustered together; the cost per token grows with it, and a
            segment that is full never changes again.
        dtype: Of mean keys and values.
        max_iterations: Most Lloyd iterations, 10 in the paper; fewer are done once assignments
            settle.
        seed: Of the keys that clusters start from.

    Raises:
        ConfigError: If a number is out of range, or clusters do not fill segments.
    """

    cluster_size: int = 16
    segment_len: int = 1024
    dtype: IndexDtype = "bfloat16"
    max_iterations: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_at_least("cluster_size", self.cluster_size, 2)
        _check_at_least("max_iterations", self.max_iterations, 0)
        check_choice("dtype", self.dtype, get_args(IndexDtype))
        if self.segment_len < self.cluster_size or self.segment_len % self.cluster_size:
            raise ConfigError(
                f"segment_len must be a multiple of cluster_size ({self.cluster_size}), got "
                f"{self.segment_len}; use {self.cluster_size * 256}."
            )

    @property
    def clusters_per_segment(self) -> int:
        """Clusters of a full segment."""
        return self.segment_len // self.cluster_size

    def num_segments(self, capacity: int) -> int:
        """Return how many segments a row of so many tokens can have; the rest is read whole."""
        return capacity // self.segment_len


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorConfig:
    """How the number of tokens is estimated.

    Attributes:
        name: The estimator.
        correction: What clusters are ranked by, and their masses predicted with.
        failure_rate: `sampled`: share of cases in which the mass may stay below its target, as far
            as samples can tell; 0.5 takes the estimate itself.
        control_variate: `sampled`: whether samples measure how wrong predicted masses are, rather
            than the masses.
        head_len: `sampled`: tokens at the front of the order whose weights are computed exactly.
        num_strata: `sampled`: ranges of ranks, in geometric progression behind the head.
        samples_per_stratum: `sampled`: tokens drawn from each.
        fit_window: `hyperbola`: tokens of each of the two windows that the curve goes through.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: EstimatorName = "sampled"
    correction: Correction = "spread"
    failure_rate: float = 0.25
    control_variate: bool = True
    head_len: int = 128
    num_strata: int = 12
    samples_per_stratum: int = 16
    fit_window: int = 32

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choice("estimator", self.name, get_args(EstimatorName))
        check_choice("correction", self.correction, get_args(Correction))
        if not 0 < self.failure_rate <= 0.5:
            raise ConfigError(f"failure_rate must be in (0, 0.5], got {self.failure_rate}.")
        for name in ("head_len", "num_strata", "fit_window"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("samples_per_stratum", self.samples_per_stratum, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TacticConfig:
    """Sparse decode attention that reads as many tokens as a share of the attention mass takes.

    Attributes:
        p: Share of the softmax mass that must be read, unless a request says otherwise; 1 reads
            everything.
        sinks: First tokens, which are always read.
        window: Last tokens, which are always read.
        tail: What becomes of tokens that are not read.
        token_level: Share of 1 - p that is left to single tokens of the clusters that are read, the
            rest of it to whole clusters; see `tokens.py`. 0 reads clusters whole.
        min_spread: Variance that the logarithms of weights must have within a cluster before its
            tokens are looked at one by one.
        max_share: Where more than this share of a head's tokens is needed, all are read.
        min_context: Shorter contexts are read whole.
        dense_layers: First layers, which are read whole.
        clusters: How keys are clustered.
        estimator: How the number of tokens is estimated.

    Raises:
        ConfigError: If a value is out of range.
    """

    p: float = 0.9
    sinks: int = 4
    window: int = 128
    tail: Tail = "mean"
    token_level: float = 0.0
    min_spread: float = 1.0
    max_share: float = 0.5
    min_context: int = 8192
    dense_layers: int = 2
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        check_mass(self.p)
        check_choice("tail", self.tail, get_args(Tail))
        for name in ("sinks", "min_context", "dense_layers"):
            _check_at_least(name, getattr(self, name), 0)
        _check_at_least("window", self.window, 1)
        if self.sinks >= self.clusters.segment_len:
            raise ConfigError(
                f"sinks must be fewer than segment_len ({self.clusters.segment_len}), got "
                f"{self.sinks}."
            )
        if not 0 <= self.token_level < 1:
            raise ConfigError(
                f"token_level must be at least 0 and below 1, got {self.token_level}; 0 reads "
                "clusters whole."
            )
        if not self.min_spread >= 0:
            raise ConfigError(f"min_spread must be at least 0, got {self.min_spread}.")
        if not 0 < self.max_share <= 1:
            raise ConfigError(f"max_share must be in (0, 1], got {self.max_share}.")


def check_mass(p: float) -> None:
    """Check a target share of the attention mass.

    Raises:
        ConfigError: If it is not in (0, 1].
    """
    if not 0 < p <= 1:
        raise ConfigError(
            f"the attention mass p must be above 0 and at most 1, got {p}; "
            "0.9 reads the tokens that hold nine tenths of the mass, 1 reads all."
        )
