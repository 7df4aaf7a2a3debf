"""What a layer makes of positions: rotary frequencies, and how far back it sees."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from jaxserve.core.errors import ConfigError

MOST_LAYERS = 1 << 14
"""No model is deeper; a damaged file may say so."""

RopeKind = Literal["linear", "llama3", "yarn", "factors", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What differs between the layers of a model; those of one kind share their compiled code.

    Attributes:
        window: Tokens that a token sees back from itself, itself included; None sees all.
        rope: Which rotation queries and keys get: "global" (`rope_theta` and `rope_scaling`),
            "local" (`local_rope_theta`, unstretched), or "none".
        has_experts: Whether the feed-forward is made of experts.

    Raises:
        ConfigError: If the window is empty.
    """

    window: int | None = None
    rope: Literal["global", "local", "none"] = "global"
    has_experts: bool = False

    def __post_init__(self) -> None:
        """Check the window."""
        if self.window is not None and self.window < 1:
            raise ConfigError(f"a sliding window holds at least 1 token, got {self.window}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    Attributes:
        kind: linear (every frequency divided by `factor`), llama3 and yarn (low frequencies divided
            by `factor`, high ones kept, a ramp between), factors (one divisor per frequency),
            longrope (likewise, with other divisors for contexts as short as in pretraining).
        factor: Stretch of the context.
        low_freq_factor: llama3: frequencies with fewer turns than this over the original context
            are divided by `factor`.
        high_freq_factor: llama3: frequencies with more turns than this are kept.
        original_max_position: Context length of pretraining in tokens; llama3, yarn and longrope.
        beta_fast: yarn: turns over the original context above which a frequency is kept.
        beta_slow: yarn: turns below which a frequency is divided by `factor`.
        attention_factor: yarn, longrope: multiplies cosines and sines; None derives it from
            `factor`.
        truncate: yarn: round the ends of the ramp to whole frequencies.
        factors: factors, longrope: the divisors, one per frequency.
        short_factors: longrope: the divisors for contexts up to `original_max_position`.

    Raises:
        ConfigError: If a number is impossible.

    Source: transformers `modeling_rope_utils` (names, formulas); llama.cpp's `rope_freqs` tensor.
    """

    kind: RopeKind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.factor > 0 or not math.isfinite(self.factor):
            raise ConfigError(f"rope scaling factor must be positive, got {self.factor}.")
        if self.kind in {"llama3", "yarn", "longrope"} and self.original_max_position < 1:
            raise ConfigError(
                f"rope scaling {self.kind} needs original_max_position of at least 1, got "
                f"{self.original_max_position}."
            )
        if self.kind == "longrope" and self.original_max_position < 2:
            raise ConfigError("rope scaling longrope needs original_max_position of at least 2.")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                "rope scaling llama3 needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"rope scaling yarn needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and "
                f"{self.beta_fast}."
            )
        for factors in (self.factors, self.short_factors):
            if not all(f > 0 and math.isfinite(f) for f in factors):
                raise ConfigError(f"rope factors must be positive numbers, got {factors}.")
        if self.kind == "longrope" and len(self.factors) != len(self.short_factors):
            raise ConfigError(
                f"rope scaling longrope needs as many long as short factors, got "
                f"{len(self.factors)} and {len(self.short_factors)}."
            )

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with; 1 except under yarn and longrope."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))
        return yarn_magnitude(self.factor, 1.0) if self.kind == "yarn" else 1.0

    def longrope_factors(self, max_position: int) -> tuple[float, ...]:
        """Return the divisors of longrope.

        Args:
            max_position: Most tokens of context that will be used. One choice holds for all
                sequences: keys in the cache cannot be rotated anew when a sequence grows.
        """
        is_long = max_position > self.original_max_position
        return self.factors if is_long else self.short_factors


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, max_position: int
) -> tuple[Float32[np.ndarray, " pairs"], float]:
    """Compute rotary frequencies.

    Args:
        dim: How many numbers of each head are rotated; even.
        theta: Base.
        scaling: How the frequencies are stretched; None leaves them as they are.
        max_position: Most tokens of context that will be used; chooses the factors of longrope.

    Returns:
        Angle per position of each of the `dim / 2` pairs, in radians, and the number that cosines
        and sines are multiplied with (1 except under yarn and longrope).

    Source: transformers `modeling_rope_utils`; rounding follows it, since an error of one unit in
        the last place of float32 grows with the position.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / wavelengths
    if scaling is None:
        return plain, 1.0
    factor = np.float32(scaling.factor)
    match scaling.kind:
        case "linear":
            return plain / factor, 1.0
        case "factors":
            return plain / np.asarray(scaling.factors, np.float32), 1.0
        case "longrope":
            factors = np.asarray(scaling.longrope_factors(max_position), np.float32)
            return np.float32(1) / (factors * wavelengths), scaling.magnitude
        case "llama3":
            return _llama3_frequencies(plain, scaling), 1.0
        case "yarn":
            keep = np.float32(1) - _yarn_ramp(dim, theta, scaling)
            stretched = np.float32(1) / (factor * wavelengths)
            return stretched * (1 - keep) + plain * keep, scaling.magnitude


def stretched_length(max_position: int, scaling: RopeScaling | None) -> int:
    """Return the most tokens of context, given what a checkpoint states and how it is stretched.

    Checkpoints that add yarn later often leave the stated length as it was.
    """
    if scaling is None or scaling.kind != "yarn":
        return max_position
    return max(max_position, round(scaling.factor * scaling.original_max_position))


def yarn_magnitude(factor: float, scale: float) -> float:
    """Return what yarn multiplies cosines and sines with."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _llama3_frequencies(
    plain: Float32[np.ndarray, " pairs"], scaling: RopeScaling
) -> Float32[np.ndarray, " pairs"]:
    turns = np.float32(scaling.original_max_position) / (np.float32(2 * math.pi) / plain)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    slow = plain / np.float32(scaling.factor)
    return np.where(smooth == 1, plain, (1 - smooth) * slow + smooth * plain)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Float32[np.ndarray, " pairs"]:
    """Return 0 for frequencies to keep and 1 for those to stretch, with a ramp between."""

    def pair_with(turns: float) -> float:
        ratio = scaling.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    return np.clip(ramp, 0, 1)
