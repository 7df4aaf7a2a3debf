"""A name -> maker table whose misses list the valid names."""

from collections.abc import Callable, Iterator

from jaxserve.core.errors import ConfigError, did_you_mean


class Registry[T]:
    """Maps names to values of one kind.

    Args:
        kind: What the values are, for error messages ("model family", "scheduler").
    """

    def __init__(self, kind: str) -> None:
        """Start empty."""
        self._kind = kind
        self._values: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under every one of `names`.

        Raises:
            ConfigError: If a name is taken.
        """

        def keep(value: T) -> T:
            for name in names:
                if name in self._values:
                    raise ConfigError(f"{self._kind} {name!r} is registered twice")
                self._values[name] = value
            return value

        return keep

    def __getitem__(self, name: str) -> T:
        """Return the value stored under `name`.

        Raises:
            ConfigError: If there is none; the message lists the known names.
        """
        if name not in self._values:
            known = sorted(self._values)
            hint = did_you_mean(name, known)
            raise ConfigError(
                f"unknown {self._kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
            )
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether `name` is known."""
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        """Iterate over the known names in order of registration."""
        return iter(self._values)
