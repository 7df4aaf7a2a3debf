"""Clocks. Time enters every policy and every record through one of these."""

import time


class WallClock:
    """Seconds of the machine's monotonic clock, and the calendar time of an instant."""

    def now(self) -> float:
        """Return seconds since an arbitrary fixed instant; never goes back."""
        return time.monotonic()

    def unix(self) -> float:
        """Return seconds since 1970-01-01 UTC, for `created` fields."""
        return time.time()  # noqa: TID251  the one place that may ask for calendar time


class VirtualClock:
    """A clock that moves only when told to, for tests and the simulator."""

    def __init__(self, start: float = 0.0) -> None:
        """Stand at `start` seconds."""
        self._now = start

    def now(self) -> float:
        """Return the current virtual time in seconds."""
        return self._now

    def unix(self) -> float:
        """Return the same as `now`."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward.

        Raises:
            ValueError: If `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a clock cannot go back, got {seconds=}")
        self._now += seconds
