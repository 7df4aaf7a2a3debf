"""Settings of sparse attention: keys and values in one text, checked and completed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from jaxserve.core.errors import ConfigError, did_you_mean

SparseEstimator = Literal["sampled", "hyperbola", "centroid"]
"""How the number of tokens is estimated; see `attention.tactic`."""

_FLOATS = ("p", "max_share", "failure_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig:
    """Decode attention that reads as much of a context as a share of its mass takes.

    Attributes:
        p: Share of the attention mass that is read, unless a request says otherwise.
        estimator: How the number of tokens is estimated.
        failure_rate: With `sampled`: share of cases in which the mass may stay below p.
        tail: Whether tokens that are not read stand in by means (`mean`) or not at all (`drop`).
        min_context: Shorter contexts are read whole.
        dense_layers: First layers, which are read whole.
        window: Last tokens, which are always read.
        sinks: First tokens, which are always read.
        segment: Tokens that are clustered together, once all are there; whole pages.
        cluster_size: Tokens per cluster on average.
        max_share: Heads that need more than this share of their tokens read all.
        measure_every: Steps from one measurement of the mass to the next; 0 measures never.

    Raises:
        ConfigError: If a value is out of range.
    """

    p: float = 0.9
    estimator: SparseEstimator = "sampled"
    failure_rate: float = 0.25
    tail: Literal["mean", "drop"] = "mean"
    min_context: int = 8192
    dense_layers: int = 2
    window: int = 128
    sinks: int = 4
    segment: int = 1024
    cluster_size: int = 16
    max_share: float = 0.5
    measure_every: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("p", "max_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise _wrong(name, "above 0 and at most 1", value)
        if not 0 < self.failure_rate <= 0.5:
            raise _wrong("failure_rate", "above 0 and at most 0.5", self.failure_rate)
        for name, known in (("estimator", get_args(SparseEstimator)), ("tail", ("mean", "drop"))):
            value = getattr(self, name)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise ConfigError(
                    f"sparse_attention: {name} must be one of {', '.join(known)}, got {value!r}."
                    f"{hint}"
                )
        for name, least in (
            ("min_context", 0), ("dense_layers", 0), ("measure_every", 0), ("sinks", 0),
            ("window", 1), ("cluster_size", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < least:
                raise _wrong(name, f"at least {least}", value)
        if self.segment < self.cluster_size or self.segment % self.cluster_size:
            raise _wrong(
                "segment", f"a multiple of cluster_size ({self.cluster_size})", self.segment
            )
        if self.sinks >= self.segment:
            raise _wrong("sinks", f"fewer than segment ({self.segment})", self.sinks)

    @classmethod
    def from_text(cls, text: str) -> "SparseConfig":
        """Read settings such as `p=0.9,estimator=sampled,min_context=4096`.

        Raises:
            ConfigError: For an unknown key (the nearest known one is suggested) or a bad value.

        >>> SparseConfig.from_text("p=0.8, min_context=4096").min_context
        4096
        """
        given: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals or not key or not value:
                raise ConfigError(
                    "sparse_attention must hold key=value pairs such as p=0.9,min_context=4096, "
                    f"got {text[:80]!r}."
                )
            if key in given:
                raise ConfigError(f"sparse_attention names {key!r} twice; give it once.")
            given[key] = value
        return cls.from_mapping(given)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "SparseConfig":
        """Check named values and fill in what they leave out.

        Raises:
            ConfigError: For an unknown key (the nearest known one is suggested) or a bad value.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise ConfigError(
                    f"sparse_attention has no key {key!r}.{hint} Known: {', '.join(known)}."
                )
            values[key] = _read(key, value)
        return cls(**values)


def _read(key: str, value: object) -> object:
    if key in ("estimator", "tail"):
        return str(value)
    kind, name = (float, "a number") if key in _FLOATS else (int, "a whole number")
    is_text = isinstance(value, str)
    is_fit = isinstance(value, int | kind) and not isinstance(value, bool)
    if is_text or is_fit:
        try:
            return kind(cast("str | float", value))
        except ValueError:
            pass
    raise _wrong(key, name, value)


def _wrong(key: str, rule: str, value: object) -> ConfigError:
    return ConfigError(f"sparse_attention: {key} must be {rule}, got {value!r}.")
