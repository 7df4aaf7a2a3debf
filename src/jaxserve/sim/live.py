"""Shows on a terminal how a simulation goes on."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from jaxserve.sim.replica import Replica
from jaxserve.sim.report import Reading, is_attained
from jaxserve.sim.request import Completion

_EVERY_S = 0.1


class LiveDisplay:
    """One line that follows a run: requests done, virtual time, its speed, what was kept, queues.

    Its `note` is handed to `simulate` as `stop`. Where the output is no terminal nothing is shown.

    Args:
        name: Of the run.
        count: Requests in all.
        replicas: Who serves them.
        reading: How the target per token is read.
        is_shown: Whether to show it; None asks whether stderr is a terminal.
    """

    def __init__(
        self,
        name: str,
        count: int,
        replicas: Sequence[Replica],
        reading: Reading,
        *,
        is_shown: bool | None = None,
    ) -> None:
        """Begin with nothing done."""
        self._replicas = replicas
        self._reading: Reading = reading
        self._kept = 0
        self._done = 0
        self._began = self._shown = time.monotonic()
        self._bar = tqdm(
            total=count, desc=name, unit="request", file=sys.stderr, leave=False,
            disable=None if is_shown is None else not is_shown, dynamic_ncols=True,
            mininterval=_EVERY_S,
        )  # fmt: skip

    def note(self, one: Completion) -> bool:
        """Take note of a request that has ended; never ends the run."""
        self._done += 1
        self._kept += is_attained(one, self._reading)
        now = time.monotonic()
        if now - self._shown >= _EVERY_S:
            self._show(one.finished, now)
        return False

    def _show(self, finished: float, now: float) -> None:
        self._shown = now
        self._bar.update(self._done - self._bar.n)
        running = sum(len(replica.running) for replica in self._replicas)
        waiting = sum(len(replica.waiting) for replica in self._replicas)
        speed = finished / max(now - self._began, 1e-9)
        self._bar.set_postfix_str(
            f"at {finished:.0f} s, {speed:.0f}x real time, {self._kept / self._done:.0%} kept, "
            f"{running} running, {waiting} waiting",
            refresh=True,
        )

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the line away."""
        self._bar.close()
