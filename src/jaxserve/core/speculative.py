"""Settings of speculative decoding: one JSON object, or three flags, checked and completed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.core.errors import ConfigError, did_you_mean

SpecMethod = Literal["ngram", "draft_model"]

MAX_SPECULATIVE_TOKENS = 64

_KEYS = (
    "method",
    "model",
    "num_speculative_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "revision",
    "draft_sample_method",
    "rejection_sample_method",
)
_ONLY_FOR: Mapping[str, SpecMethod] = {
    "prompt_lookup_min": "ngram",
    "prompt_lookup_max": "ngram",
    "model": "draft_model",
    "revision": "draft_model",
    "draft_sample_method": "draft_model",
}
_METHODS: tuple[SpecMethod, ...] = ("ngram", "draft_model")
_FOREIGN_METHODS = (
    "eagle", "eagle3", "mtp", "medusa", "mlp_speculator", "suffix", "ngram_gpu", "dflash", "dspark",
    "extract_hidden_states", "custom_class",
)  # fmt: skip
_DEFAULT_LOOKUP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How drafts are made.

    Attributes:
        method: `ngram` looks up what the sequence has said before, `draft_model` asks a smaller
            model.
        num_speculative_tokens: Most draft tokens per sequence and step.
        prompt_lookup_min: With `ngram`: fewest tokens that must agree.
        prompt_lookup_max: With `ngram`: tokens beyond which agreement does not count.
        model: With `draft_model`: its name or path.
        revision: With `draft_model`: branch, tag or commit on the model hub.
    """

    method: SpecMethod
    num_speculative_tokens: int
    prompt_lookup_min: int = _DEFAULT_LOOKUP
    prompt_lookup_max: int = _DEFAULT_LOOKUP
    model: str | None = None
    revision: str | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "SpeculativeConfig":
        """Check a JSON object and fill in what it leaves out.

        Args:
            given: Keys as vLLM names them.

        Raises:
            ConfigError: For an unknown key (the nearest known one is suggested) or a bad value.

        >>> made = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
        >>> SpeculativeConfig.from_mapping(made).prompt_lookup_min
        3
        """
        for key in given:
            if key not in _KEYS:
                hint = did_you_mean(str(key), _KEYS)
                raise ConfigError(
                    f"speculative_config has no key {key!r}.{hint} Known: {', '.join(_KEYS)}."
                )
        values = {key: value for key, value in given.items() if value is not None}
        method = _method(values)
        for key, owner in _ONLY_FOR.items():
            is_name = key == "model" and values.get(key) in ("ngram", "[ngram]")
            if key in values and owner != method and not is_name:
                raise ConfigError(
                    f"speculative_config.{key} belongs to method {owner!r}, got method {method!r}; "
                    "leave one of them out."
                )
        _only(values, "rejection_sample_method", "standard")
        _only(values, "draft_sample_method", "greedy")
        if "num_speculative_tokens" not in values:
            raise ConfigError(
                "speculative_config needs num_speculative_tokens, the most draft tokens per step, "
                "such as 5."
            )
        count = _whole(values, "num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS)
        if method == "ngram":
            low, high = _lookup(values)
            return cls(
                method=method,
                num_speculative_tokens=count,
                prompt_lookup_min=low,
                prompt_lookup_max=high,
            )
        for key in ("model", "revision"):
            if key in values and not isinstance(values[key], str):
                raise ConfigError(f"speculative_config.{key} must be a name, got {values[key]!r}.")
        if not values.get("model"):
            raise ConfigError(
                "speculative_config: method 'draft_model' needs model, the name or path of a "
                "smaller checkpoint with the same vocabulary."
            )
        return cls(
            method=method,
            num_speculative_tokens=count,
            model=values["model"],
            revision=values.get("revision"),
        )


def _method(values: Mapping[str, Any]) -> SpecMethod:
    name, model = values.get("method"), values.get("model")
    if name is None and model in ("ngram", "[ngram]"):
        return "ngram"
    if name is None and model is not None:
        return "draft_model"
    if name is None:
        raise ConfigError(
            "speculative_config needs a method: ngram, or a draft model named by the key model."
        )
    for known in _METHODS:
        if name == known:
            return known
    if name in _FOREIGN_METHODS:
        raise ConfigError(
            f"speculative_config: method {name!r} is not built in; use one of "
            f"{', '.join(_METHODS)}."
        )
    hint = did_you_mean(str(name), _METHODS)
    raise ConfigError(
        f"speculative_config.method must be one of {', '.join(_METHODS)}, got {name!r}.{hint}"
    )


def _only(values: Mapping[str, Any], key: str, known: str) -> None:
    if values.get(key, known) != known:
        raise ConfigError(
            f"speculative_config.{key} can only be {known!r} here, got {values[key]!r}; "
            "leave it out."
        )


def _whole(values: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"speculative_config.{key} must be a whole number from {low} to {high}, got {value!r}."
        )
    return value


def _lookup(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return both bounds; one alone stands for the other, as in vLLM."""
    found = {
        key: _whole(values, key, 1, MAX_SPECULATIVE_TOKENS)
        for key in ("prompt_lookup_min", "prompt_lookup_max")
        if key in values
    }
    other = next(iter(found.values()), _DEFAULT_LOOKUP)
    low = found.get("prompt_lookup_min", other)
    high = found.get("prompt_lookup_max", other)
    if low > high:
        raise ConfigError(
            f"speculative_config.prompt_lookup_min={low} exceeds prompt_lookup_max={high}."
        )
    return low, high
