"""Units of the house and helpers to print and read them."""

from typing import NewType

from jaxserve.core.errors import ConfigError

Seconds = NewType("Seconds", float)
Bytes = NewType("Bytes", int)
Tokens = NewType("Tokens", int)

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_SUFFIXES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}


def format_bytes(count: int) -> str:
    """Print a number of bytes with a binary unit.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    value = float(count)
    for unit in _BINARY[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_BINARY[-1]}"


def parse_count(text: str | int) -> int:
    """Read a whole number with an optional suffix; lower case is decimal, upper case binary.

    Raises:
        ConfigError: If the text is not such a number.

    Source: the spelling that vLLM accepts for its token-count flags.

    >>> parse_count("1k"), parse_count("1K"), parse_count("25.6k")
    (1000, 1024, 25600)
    """
    if isinstance(text, int):
        return text
    stripped = text.strip()
    suffix = stripped[-1:] if stripped[-1:].isalpha() else ""
    number = stripped[: len(stripped) - len(suffix)]
    try:
        scaled = float(number) * _SUFFIXES[suffix]
    except (ValueError, KeyError):
        scaled = float("nan")
    if not scaled.is_integer():
        raise ConfigError(f"expected a whole number such as 4096, 4k or 4K, got {text!r}")
    return int(scaled)


_BYTE_UNITS = {
    unit.lower(): size
    for number, letter in enumerate(("", "K", "M", "G", "T"))
    for unit, size in (
        (letter, 1000**number),
        (f"{letter}B", 1000**number),
        (f"{letter}iB", 1024**number),
    )
}


def parse_bytes(text: str | int) -> int:
    """Read a size in bytes; kB, MB, GB are decimal, KiB, MiB, GiB binary.

    Raises:
        ConfigError: If the text is not a size.

    Source: the spelling that transformers accepts for `max_shard_size`.

    >>> parse_bytes("5GB"), parse_bytes("1.5 MiB"), parse_bytes(7)
    (5000000000, 1572864, 7)
    """
    if isinstance(text, int):
        return text
    stripped = text.strip()
    number = stripped.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = stripped[len(number) :].lower()
    try:
        size = float(number) * _BYTE_UNITS[unit]
    except (ValueError, KeyError):
        size = float("nan")
    if not 1 <= size < float("inf"):
        raise ConfigError(f"expected a size such as 5GB, 500MB or 2GiB, got {text!r}.")
    return int(size)
