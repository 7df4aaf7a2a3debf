"""Checked access to the named values of a file that somebody else wrote."""

import reprlib
from collections.abc import Mapping

from jaxserve.core.errors import CheckpointError

_HUGE = 1e30
"""No setting is beyond this; it keeps float32 arithmetic on settings finite."""


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
        """Tell whether there is a value, given or by default."""
        return self.get(key) is not None

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

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of at least `least`.

        Raises:
            CheckpointError: If it is missing without a default, or something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self._wrong(key, value, f"a whole number of at least {least}")
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

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers.

        Raises:
            CheckpointError: If it is missing, or something else.
        """
        value = self.get(key)
        if not isinstance(value, list | tuple):
            raise self._wrong(key, value, "a list of numbers")
        items = Fields({str(place): item for place, item in enumerate(value)}, where=self.where)
        return tuple(items.number(str(place)) for place in range(len(value)))

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
