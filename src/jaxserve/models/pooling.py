"""How a model makes one vector of a text, as sentence-transformers' files beside it say."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.core.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedError,
    did_you_mean,
)
from jaxserve.core.pooling import PoolingType
from jaxserve.models.fields import Fields
from jaxserve.models.files import AGAIN, cannot_open, read_json

_MODES: Mapping[str, PoolingType] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_OTHER_MODES = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
_WORDS: Mapping[str, PoolingType] = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "last": "last",
    "lasttoken": "last",
}
_OVERRIDES = ("pooling_type", "seq_pooling_type", "normalize", "use_activation")
"""Keys of the setting `pooler_config`; the second and fourth are vLLM's newer names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """How the states of a text's tokens become its vector.

    Attributes:
        pooling_type: Which states are taken together, and how.
        normalize: Whether the vector is brought to length 1.
        max_length: Most tokens of a text, where the model's files say; None is the model's limit.
        lowercase: Whether texts are lowered before anything else.
        dimensions: Lengths to which a vector may be cut; empty where it may not be.
        is_matryoshka: Whether a vector may be cut at all; with no `dimensions`, to any length.
    """

    pooling_type: PoolingType
    normalize: bool = True
    max_length: int | None = None
    lowercase: bool = False
    dimensions: tuple[int, ...] = ()
    is_matryoshka: bool = False

    def with_overrides(self, overrides: Mapping[str, object] | None) -> "PoolingConfig":
        """Return a copy with what a user set by hand.

        Args:
            overrides: `pooling_type` (any case) and `normalize`, or vLLM's `seq_pooling_type` and
                `use_activation`.

        Raises:
            ConfigError: For an unknown key or a wrong value.
        """
        changed = self
        for key, value in (overrides or {}).items():
            if key not in _OVERRIDES:
                hint = did_you_mean(key, _OVERRIDES)
                raise ConfigError(
                    f"pooler_config: unknown key {key!r}; known: {', '.join(_OVERRIDES)}.{hint}"
                )
            if key in {"normalize", "use_activation"}:
                if not isinstance(value, bool):
                    raise ConfigError(f"pooler_config: {key} must be true or false, got {value!r}.")
                changed = dataclasses.replace(changed, normalize=value)
                continue
            kind = _WORDS.get(str(value).lower())
            if kind is None:
                known = ", ".join(typing.get_args(PoolingType))
                raise ConfigError(f"pooler_config: {key} must be one of {known}, got {value!r}.")
            changed = dataclasses.replace(changed, pooling_type=kind)
        return changed


def read_pooling(path: Path | None, *, default: PoolingType) -> PoolingConfig:
    """Read how a model pools.

    Args:
        path: Directory of the model; anything else has no such files.
        default: What is done where no file says; the vector is then normalised.

    Returns:
        The configuration.

    Raises:
        UnsupportedError: For a step that would not be computed right.
        CheckpointError: If a file is damaged.

    Source: sentence-transformers' modules (`modules.json` and the folders that it names).
    """
    if path is None or not path.is_dir():
        return PoolingConfig(pooling_type=default)
    config = Fields(_read(path / "config.json"))
    lengths = config.get("matryoshka_dimensions", ())
    lengths = tuple(n for n in lengths if isinstance(n, int)) if isinstance(lengths, list) else ()
    found = PoolingConfig(
        pooling_type=default,
        dimensions=lengths,
        is_matryoshka=bool(lengths) or config.flag("is_matryoshka"),
    )
    modules = _read_modules(path)
    if not modules:
        return found
    bert = Fields(_read(path / "sentence_bert_config.json"), where="sentence_bert_config.json")
    longest = bert.count("max_seq_length") if "max_seq_length" in bert else None
    found = dataclasses.replace(
        found, normalize=False, max_length=longest, lowercase=bert.flag("do_lower_case")
    )
    for kind, folder in modules:
        if kind == "Pooling":
            found = dataclasses.replace(found, pooling_type=_pooling_type(path / folder))
        elif kind == "Normalize":
            found = dataclasses.replace(found, normalize=True)
        elif kind != "Transformer":
            raise UnsupportedError(
                f"{path / 'modules.json'}: found a module {kind}, expected Transformer, Pooling "
                "and Normalize; this embedding model is not supported."
            )
    return found


def _read(file: Path) -> Mapping[str, object]:
    try:
        return read_json(file)
    except ModelNotFoundError:
        return {}


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """Return (kind, folder) of each step; none if there is no modules.json."""
    file = path / "modules.json"
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_open(file, error) from error
    try:
        steps = _parse_list(content)
    except ValueError as error:
        raise CheckpointError(f"{file}: not a list of modules ({error}); {AGAIN}") from error
    return [(kind.rpartition(".")[2], folder) for kind, folder in steps]


def _parse_list(content: str) -> list[tuple[str, str]]:
    steps: list[tuple[str, str]] = []
    value = json.loads(content)
    if not isinstance(value, list):
        raise ValueError(f"found {type(value).__name__}")  # noqa: TRY004
    for step in value:
        fields = step if isinstance(step, dict) else {}
        kind, folder = fields.get("type"), fields.get("path")
        # A name with a folder in it would lead out of the checkpoint.
        if not isinstance(kind, str) or not isinstance(folder, str) or "/" in folder:
            raise ValueError(f"found {step!r}")
        steps.append((kind, folder))
    return steps


def _pooling_type(folder: Path) -> PoolingType:
    values = Fields(_read(folder / "config.json"), where=str(folder / "config.json"))
    word = values.get("pooling_mode")
    if word is not None:
        kinds = [word] if isinstance(word, str) else list(typing.cast("list[object]", word))
    else:
        kinds = [kind for name, kind in _MODES.items() if values.flag(name)]
        kinds += [name for name in _OTHER_MODES if values.flag(name)]
    if len(kinds) != 1 or str(kinds[0]) not in _WORDS:
        raise UnsupportedError(
            f"{folder / 'config.json'}: found the pooling {', '.join(map(str, kinds)) or 'nothing'}"
            f", expected one of {', '.join(_WORDS)}; this embedding model is not supported."
        )
    return _WORDS[str(kinds[0])]
