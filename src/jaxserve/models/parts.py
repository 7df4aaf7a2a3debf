"""Parts that only some families have: experts, and keys and values kept compressed."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxserve.core.errors import ConfigError

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """How a feed-forward made of experts chooses among them, and what each of them is.

    Attributes:
        num_experts: Experts that tokens choose among.
        top_k: Experts per token.
        inner_size: Width inside each of them.
        scoring: What turns the router's logits into scores; the softmax is over all experts.
        normalize: Whether the weights of a token's experts are divided by their sum.
        scale: Multiplies the weights afterwards.
        num_groups: Equal runs of experts of which a token uses a few; 1 does not limit it.
        top_groups: Groups that a token may use.
        group_score: What a group is chosen by: its largest score, or its two largest together.
        has_correction: Whether scores have a bias per expert while experts are chosen; weights are
            without it.
        shared_size: Inner width of what every token passes through besides; 0 if there is none.
        has_bias: Whether router and experts have biases.
        swiglu_limit: Bound of what goes into the gate and of what it multiplies; None has none,
            and plain SwiGLU.
        swiglu_alpha: Steepness of the gate, where there is a bound.

    Raises:
        ConfigError: If the numbers cannot belong together.

    Source: Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060), DeepSeek-V2 and V3
        (arXiv 2405.04434, 2412.19437: groups, shared experts, correction), gpt-oss (bounds).
    """

    num_experts: int
    top_k: int
    inner_size: int
    scoring: Scoring = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    has_correction: bool = False
    shared_size: int = 0
    has_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        """Check that the numbers fit together."""
        for name in ("num_experts", "top_k", "inner_size", "num_groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"the experts must form equal groups, got {self.num_experts} experts and "
                f"{self.num_groups} groups."
            )
        if self.top_groups > self.num_groups:
            raise ConfigError(
                f"a token cannot use {self.top_groups} of {self.num_groups} groups of experts."
            )
        reach = self.top_groups * self.group_size
        if self.top_k > reach:
            raise ConfigError(
                f"a token cannot use {self.top_k} experts, it can choose among {reach}."
            )
        if self.group_score == "top2" and self.num_groups > 1 and self.group_size < 2:
            raise ConfigError("groups of one expert have no two largest scores.")
        for name in ("scale", "swiglu_limit", "swiglu_alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} of the experts must be positive, got {value}.")

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.num_experts // self.num_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Attention whose keys and values are projected from one small vector per token.

    That vector and one rotated key for all heads are what the cache holds.

    Attributes:
        rank: Width of the vector.
        query_rank: Width of what queries are projected from; None projects them directly.
        plain_dim: Part of each query and key that is not rotated.
        rotary_dim: Part that is.
        value_dim: Width of each head's values.
        is_interleaved: Whether rotated pairs are neighbours, (0, 1), (2, 3), and not half a head
            apart.
        norm_eps: Added to the mean square in the norms of the compressed vectors.

    Raises:
        ConfigError: If a width is impossible.

    Source: multi-head latent attention of DeepSeek-V2 (arXiv 2405.04434).
    """

    rank: int
    query_rank: int | None
    plain_dim: int
    rotary_dim: int
    value_dim: int
    is_interleaved: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the widths."""
        for name in ("rank", "query_rank", "plain_dim", "rotary_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of latent attention must be at least 1, got {value}.")
        if self.rotary_dim % 2 or self.rank % 2:
            raise ConfigError(
                "rank and rotary_dim of latent attention must be even, got "
                f"{self.rank} and {self.rotary_dim}."
            )

    @property
    def query_dim(self) -> int:
        """Width of each head's queries and keys."""
        return self.plain_dim + self.rotary_dim

    @property
    def cached_dim(self) -> int:
        """Width of what is cached per token."""
        return self.rank + self.rotary_dim
