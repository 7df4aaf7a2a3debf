"""The shape of a model: `ModelConfig`, read from a Hugging Face `config.json`.

One record describes every supported family; the families differ in which biases and norms exist.
Whatever would change the mathematics and is not supported is refused here, by name, so that no
model is ever run as if it were a slightly different one.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from jaxserve.core.errors import CheckpointError, ConfigError, UnsupportedError, did_you_mean

RopeKind = Literal["linear", "llama3", "yarn", "factors"]

_HUGE = 1e30
"""No setting is beyond this; it keeps float32 arithmetic on settings finite."""

_FAMILY_OF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Hugging Face `model_type` -> our family."""

_HF_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What a key means when a `config.json` leaves it out; transformers' class defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    Attributes:
        kind: linear (every frequency divided by `factor`), llama3 and yarn (low frequencies divided
            by `factor`, high ones kept, a ramp between), factors (one divisor per frequency).
        factor: Stretch of the context.
        low_freq_factor: llama3: frequencies with fewer turns than this over the original context
            are divided by `factor`.
        high_freq_factor: llama3: frequencies with more turns than this are kept.
        original_max_position: Context length of pretraining in tokens; llama3 and yarn.
        beta_fast: yarn: turns over the original context above which a frequency is kept.
        beta_slow: yarn: turns below which a frequency is divided by `factor`.
        attention_factor: yarn: multiplies cosines and sines; None derives it from `factor`.
        truncate: yarn: round the ends of the ramp to whole frequencies.
        factors: factors: the divisors, one per frequency.

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

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.factor > 0 or not math.isfinite(self.factor):
            raise ConfigError(f"rope scaling factor must be positive, got {self.factor}.")
        if self.kind in {"llama3", "yarn"} and self.original_max_position < 1:
            raise ConfigError(
                f"rope scaling {self.kind} needs original_max_position of at least 1, got "
                f"{self.original_max_position}."
            )
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
        if self.kind == "factors" and not all(f > 0 and math.isfinite(f) for f in self.factors):
            raise ConfigError(f"rope factors must be positive numbers, got {self.factors}.")

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with; 1 except under yarn."""
        if self.attention_factor is not None:
            return self.attention_factor
        return _yarn_magnitude(self.factor, 1.0) if self.kind == "yarn" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the mathematics of a model; hashable, so it can be a static argument.

    Attributes:
        model_type: Family: "llama", "qwen2" or "qwen3".
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of one head; even.
        rms_norm_eps: Added to the mean square in every norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How these are stretched; None leaves them as they are.
        max_position: Most tokens of context that the checkpoint claims to handle.
        tie_word_embeddings: Whether the embedding is also the output projection.
        qkv_bias: Whether query, key and value projections have biases.
        o_bias: Whether the attention output projection has one.
        mlp_bias: Whether the three MLP projections have them.
        qk_norm: Whether queries and keys are normed per head before rotation.
        hidden_act: Activation of the MLP gate; only "silu".
        eos_token_ids: Tokens that end a completion.
        bos_token_id: Token that begins a text, if there is one.
        torch_dtype: Name of the checkpoint's own precision, if it says.

    Raises:
        ConfigError: If the numbers cannot belong together.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: Literal["silu"] = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    torch_dtype: str | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit together."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not value > 0 or not math.isfinite(value):
                raise ConfigError(f"{name} must be positive, got {value}.")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta must be greater than 1, got {self.rope_theta}.")
        scaling = self.rope_scaling
        if scaling and scaling.kind == "factors" and 2 * len(scaling.factors) != self.head_dim:
            raise ConfigError(
                f"rope factors: found {len(scaling.factors)}, expected head_dim / 2 = "
                f"{self.head_dim // 2}."
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, object]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json`, of old or new spelling.

        Args:
            raw: The parsed file.

        Returns:
            The same model in our words.

        Raises:
            UnsupportedError: For a model, or a variation of one, that would not be computed right.
            CheckpointError: For a missing or impossible value; names the key.

        Source: transformers' configuration classes (keys and defaults).
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILY_OF:
            hint = did_you_mean(str(model_type), _FAMILY_OF)
            raise UnsupportedError(
                f"config.json: found model_type {model_type!r}, expected one of "
                f"{', '.join(_FAMILY_OF)}; this model family is not supported.{hint}"
            )
        values = Fields(raw, _HF_DEFAULTS[model_type])
        _refuse_variations(values, model_type)
        family = _FAMILY_OF[model_type]
        num_heads = values.count("num_attention_heads")
        hidden_size = values.count("hidden_size")
        max_position = values.count("max_position_embeddings")
        rope_theta, rope_scaling = _read_rope(values, max_position)
        # mistral has no such switch and qwen2 always has biases on q, k and v, never on o.
        attention_bias = model_type in {"llama", "qwen3"} and values.flag("attention_bias")
        try:
            return cls(
                model_type=family,
                vocab_size=values.count("vocab_size"),
                hidden_size=hidden_size,
                intermediate_size=values.count("intermediate_size"),
                num_layers=values.count("num_hidden_layers"),
                num_heads=num_heads,
                num_kv_heads=values.count("num_key_value_heads", num_heads),
                head_dim=values.count("head_dim", hidden_size // num_heads),
                rms_norm_eps=values.number("rms_norm_eps", 1e-6),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                max_position=stretched_length(max_position, rope_scaling),
                tie_word_embeddings=values.flag("tie_word_embeddings"),
                qkv_bias=attention_bias or family == "qwen2",
                o_bias=attention_bias,
                mlp_bias=model_type == "llama" and values.flag("mlp_bias"),
                qk_norm=family == "qwen3",
                eos_token_ids=values.token_ids("eos_token_id"),
                bos_token_id=next(iter(values.token_ids("bos_token_id")), None),
                torch_dtype=values.word("dtype") or values.word("torch_dtype"),
            )
        except CheckpointError:
            raise
        except ConfigError as error:
            raise CheckpointError(f"config.json: {error}") from error

    def rope_frequencies(self) -> tuple[Float32[np.ndarray, " pairs"], float]:
        """Compute the rotary frequencies, stretched as `rope_scaling` says.

        Returns:
            Angle per position of each of the `head_dim / 2` pairs, in radians, and the number that
            cosines and sines are multiplied with (1 except under yarn).

        Source: transformers `modeling_rope_utils`; rounding follows it, since an error of one unit
            in the last place of float32 grows with the position.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        wavelengths = (self.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
        plain = np.float32(1) / wavelengths
        scaling = self.rope_scaling
        if scaling is None:
            return plain, 1.0
        factor = np.float32(scaling.factor)
        if scaling.kind == "linear":
            return plain / factor, 1.0
        if scaling.kind == "factors":
            return plain / np.asarray(scaling.factors, np.float32), 1.0
        if scaling.kind == "llama3":
            return _llama3_frequencies(plain, scaling), 1.0
        keep = np.float32(1) - _yarn_ramp(self.head_dim, self.rope_theta, scaling)
        stretched = np.float32(1) / (factor * wavelengths)
        return stretched * (1 - keep) + plain * keep, scaling.magnitude


def stretched_length(max_position: int, scaling: RopeScaling | None) -> int:
    """Return the most tokens of context, given what a checkpoint states and how it is stretched.

    Checkpoints that add yarn later often leave the stated length as it was.
    """
    if scaling is None or scaling.kind != "yarn":
        return max_position
    return max(max_position, round(scaling.factor * scaling.original_max_position))


class Fields:
    """Checked access to the named values of a file; a null is the same as a missing one.

    Args:
        raw: The values.
        defaults: What a missing one means.
        where: The file, for error messages.
    """

    def __init__(
        self,
        raw: Mapping[str, object],
        defaults: Mapping[str, object] | None = None,
        where: str = "config.json",
    ) -> None:
        self._raw = raw
        self._defaults = defaults or {}
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def get(self, key: str, default: object = None) -> object:
        """Return a value as it is; an explicit null gives `default`."""
        if key in self._raw:
            return default if self._raw[key] is None else self._raw[key]
        return self._defaults.get(key, default)

    def _wrong(self, key: str, found: object, expected: str) -> CheckpointError:
        shown = "nothing" if found is None else reprlib.repr(found)
        return CheckpointError(
            f"{self.where}: found {shown} for {key!r}, expected {expected}; repair the file or "
            "download the model again."
        )

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1.

        Raises:
            CheckpointError: If it is missing without a default, or something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self._wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number.

        Raises:
            CheckpointError: If it is missing without a default, or something else.
        """
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE:
            return float(value)
        raise self._wrong(key, value, "a number")

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def word(self, key: str) -> str | None:
        """Return a string, or None if there is none.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a word")
        return value

    def table(self, key: str) -> Mapping[str, object] | None:
        """Return an object, or None if there is none.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return {str(name): item for name, item in value.items()}

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one or several token ids, without repetitions; none if there are none.

        Raises:
            CheckpointError: If it is something else.
        """
        value = self.get(key)
        items = () if value is None else value if isinstance(value, list | tuple) else (value,)
        found: list[int] = []
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
                raise self._wrong(key, value, "a token id or a list of them")
            found.append(item)
        return tuple(dict.fromkeys(found))


def _refuse_variations(values: Fields, model_type: str) -> None:
    """Refuse what would be computed wrongly."""

    def refuse(found: str, expected: str) -> None:
        raise UnsupportedError(
            f"config.json: found {found}, expected {expected}; this variation of {model_type} is "
            "not supported."
        )

    act = values.get("hidden_act", "silu")
    if act != "silu":
        refuse(f"hidden_act {act!r}", "'silu'")
    if values.get("quantization_config") is not None:
        refuse("quantization_config", "unquantised safetensors, or a GGUF file")
    rotary = values.number("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        refuse(f"partial_rotary_factor {rotary}", "1.0")
    if model_type == "mistral":
        window = values.get("sliding_window")
        max_position = values.count("max_position_embeddings")
        if window is not None and values.count("sliding_window") < max_position:
            refuse(f"sliding_window {window}", "null (attention over the whole context)")
    elif values.flag("use_sliding_window"):
        refuse("use_sliding_window true", "false (attention over the whole context)")
    layer_types = values.get("layer_types", ())
    if isinstance(layer_types, list | tuple) and any(t != "full_attention" for t in layer_types):
        kinds = sorted({str(kind) for kind in layer_types} - {"full_attention"})
        refuse(f"layer_types {', '.join(kinds)}", "full_attention in every layer")


def _read_rope(values: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """Return base and stretching of the rotary frequencies, from either spelling."""
    old = values.table("rope_scaling")
    table = values.table("rope_parameters") or old or {}
    where = "config.json, rope_parameters" if old is None else "config.json, rope_scaling"
    rope = Fields(table, where=where)
    theta = rope.number("rope_theta", values.number("rope_theta", 10000.0))
    kind = rope.word("rope_type") or rope.word("type") or "default"
    if kind == "default":
        if any(isinstance(item, Mapping) for item in table.values()):
            raise UnsupportedError(
                f"{where}: found one entry per layer type ({', '.join(table)}), expected one for "
                "all layers; such models are not supported."
            )
        return theta, None
    if kind not in {"linear", "llama3", "yarn"}:
        raise UnsupportedError(
            f"{where}: found rope_type {kind!r}, expected default, linear, llama3 or yarn; "
            "remove the entry to use the model within its original context."
        )
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"{where}: found partial_rotary_factor {rope.get('partial_rotary_factor')}, expected "
            "1.0; rotating a part of each head is not supported."
        )
    original = rope.count(
        "original_max_position_embeddings",
        values.count("original_max_position_embeddings", max_position),
    )
    factor = rope.number("factor", max_position / original if kind == "yarn" else None)
    try:
        if kind == "linear":
            return theta, RopeScaling(kind="linear", factor=factor)
        if kind == "llama3":
            return theta, RopeScaling(
                kind="llama3",
                factor=factor,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position=original,
            )
        return theta, RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=rope.flag("truncate", default=True),
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _yarn_attention_factor(rope: Fields, factor: float) -> float | None:
    given = rope.get("attention_factor")
    if given is not None:
        return rope.number("attention_factor")
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
    return None


def _yarn_magnitude(factor: float, scale: float) -> float:
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
