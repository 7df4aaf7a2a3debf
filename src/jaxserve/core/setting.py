"""How settings are described and checked; the command line and the docs are made from that."""

import typing
from dataclasses import field
from typing import Any

from jaxserve.core.errors import ConfigError, did_you_mean


def option(
    default: object, text: str, *aliases: str, count: bool = False, hidden: bool = False
) -> Any:  # noqa: ANN401  dataclass fields are typed by their annotation
    """Describe one setting.

    Args:
        default: Its default.
        text: Help text.
        *aliases: Further flag names, without dashes in front.
        count: Whether suffixes such as `4k` are understood.
        hidden: Whether the command line leaves it out.
    """
    metadata = {"help": text, "aliases": aliases, "count": count, "hidden": hidden}
    return field(default=default, metadata=metadata)


def check_at_least(config: object, low: float, *names: str) -> None:
    """Check that settings which are not None are no less than a bound.

    Raises:
        ConfigError: Names the first that is.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}.")


def check_one_of(config: object, **choices: object) -> None:
    """Check that settings are among the words of a `Literal`.

    Raises:
        ConfigError: Names the first that is not, and the nearest word.
    """
    for name, literal in choices.items():
        value = getattr(config, name)
        known = typing.get_args(literal)
        if value not in known:
            hint = did_you_mean(str(value), map(str, known))
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.{hint}")
