"""A runner whose every launch other processes make too, in the same order."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from jaxserve.core.errors import EngineDeadError, RequestError
from jaxserve.engine.draft_runner import DraftedRunner
from jaxserve.engine.hosts import READY_TIMEOUT_S, Channel
from jaxserve.engine.message import Message
from jaxserve.engine.pooled import Pooled
from jaxserve.engine.runner import Runner, StepResult
from jaxserve.engine.sampler import Sampled
from jaxserve.engine.shapes import PackedStep

KEPT_STEPS = 8
"""Steps whose hidden states can still be referred to."""
_MARGIN_S = 5
_CLOSE_TIMEOUT_S = 10
_PARTING_S = 1.0
"""The service that others part from ends with this process; they need a moment for that."""
CLOSED = "closed"
"""Where processes meet once nothing more will be launched."""
WARM = "warm"
"""Where processes meet once all programs are compiled."""


class _Announcing(Runner):
    """Announces each launch before it makes it.

    Attributes:
        channel: Where the other processes listen; set before the first launch.
    """

    channel: Channel

    def begin(self, channel: Channel) -> None:
        """Announce to these from now on."""
        self.channel = channel
        self._is_closed = False
        self._met: set[int] = set()
        self._number = {shape: i for i, shape in enumerate(self.spec.shapes.all_shapes())}
        self._recent: deque[jax.Array] = deque(maxlen=KEPT_STEPS)

    def _tell(self, name: str, **values: Any) -> None:  # noqa: ANN401  numbers, lists or arrays
        arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
        plain = {key: value for key, value in values.items() if key not in arrays}
        self.channel.send(Message(name=name, values=plain, arrays=arrays))

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program, in all processes."""
        self._tell("warm_up")
        super().warm_up(on_progress)
        self.channel.meet(WARM, READY_TIMEOUT_S)

    def run(self, packed: PackedStep) -> StepResult:
        """Launch one step."""
        mask = {} if packed.mask is None else {"mask": packed.mask}
        number = self._number[packed.shape]
        is_new = number not in self._met
        self._tell("run", shape=number, is_new=is_new, buffer=packed.buffer, **mask)
        if is_new:
            self.prepare(packed.shape)
            meet_for_shape(self.channel, number)
            self._met.add(number)
        result = super().run(packed)
        self._recent.append(result.hidden)
        return result

    def _age(self, hidden: jax.Array) -> int:
        """Say how many steps ago some hidden states were computed."""
        return next(age for age, one in enumerate(reversed(self._recent)) if one is hidden)

    def set_row(
        self, row: int, counts: np.ndarray, prompt_seen: np.ndarray, bias: np.ndarray
    ) -> None:
        """Set what the sampler knows of a row."""
        self._tell("set_row", row=row, counts=counts, prompt_seen=prompt_seen, bias=bias)
        super().set_row(row, counts, prompt_seen, bias)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Move a sequence to another row."""
        self._tell("move_row", source=source, target=target, length=length)
        super().move_row(source, target, length)

    def place_experts(self, experts: np.ndarray) -> None:
        """Move experts between devices."""
        self._tell("place_experts", experts=experts.astype(np.int32))
        super().place_experts(experts)

    def save_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy parts of slots into the page store."""
        self._tell("save_pages", moves=np.asarray(moves, np.int32).reshape(-1, 3))
        super().save_pages(moves)

    def load_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages of the store into parts of slots."""
        self._tell("load_pages", moves=np.asarray(moves, np.int32).reshape(-1, 3))
        super().load_pages(moves)

    def prompt_logprobs(self, hidden: jax.Array, targets: np.ndarray) -> Sampled:
        """Score the token that follows each prefill token."""
        self._tell("prompt_logprobs", age=self._age(hidden), targets=targets)
        return super().prompt_logprobs(hidden, targets)

    def pool(self, hidden: jax.Array, start: np.ndarray, count: np.ndarray) -> Pooled:
        """Sum the hidden states of chunks of a step's prefill tokens."""
        self._tell("pool", age=self._age(hidden), start=start, count=count)
        return super().pool(hidden, start, count)

    def explain(self, error: Exception) -> Exception:
        """Return why a step has failed; waits until it is known whether a process is lost."""
        if not isinstance(error, jax.errors.JaxRuntimeError):
            return error
        hosts = self.channel.hosts
        lost = hosts.wait_for_loss(hosts.timeout_s + _MARGIN_S)
        return error if lost is None else EngineDeadError(f"a host is lost: {lost}.")

    def reset(self) -> None:
        """Refuse: what the others have after a failed step is not known.

        Raises:
            EngineDeadError: Always; names the process that has been lost, if one has.
        """
        lost = self.channel.hosts.lost or "a step failed in one of several processes"
        raise EngineDeadError(f"{lost}; start all of them again.")

    def set_params(self, leaves: Sequence[jax.Array | None]) -> NoReturn:  # noqa: ARG002
        """Refuse; weights are changed where they are read, in every process."""
        raise refused("weights are replaced")

    def release_params(self) -> NoReturn:
        """Refuse; the others would keep theirs."""
        raise refused("weights are put aside")

    def drop_cache(self) -> NoReturn:
        """Refuse; the others would keep theirs."""
        raise refused("a cache is dropped")

    def close(self) -> None:
        """Free what is here, and let the others end."""
        is_first, self._is_closed = not self._is_closed, True
        if is_first and self.channel.hosts.lost is None:
            self._tell("close")
            with contextlib.suppress(EngineDeadError):  # one that is lost now is missed by nobody
                self.channel.meet(CLOSED, _CLOSE_TIMEOUT_S)
                time.sleep(_PARTING_S)
        super().close()


def meet_for_shape(channel: Channel, number: int) -> None:
    """Wait until all processes have the programs of a step; collectives do not wait for long."""
    channel.meet(f"shape {number}", READY_TIMEOUT_S)


def refused(what: str) -> RequestError:
    """Return the error for what engines of several processes cannot do, in words."""
    return RequestError(
        f"{what} only in engines of one process, and this one has several; start all processes "
        "again instead.",
        status=501,
    )


class LeadingRunner(_Announcing, Runner):
    """The runner of process 0."""


class LeadingDraftedRunner(_Announcing, DraftedRunner):
    """The runner of process 0, with a model that drafts."""

    def draft(
        self,
        rows: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[Sequence[int]],
        count: int,
    ) -> np.ndarray:
        """Draft what may follow the latest token of some rows."""
        self._tell(
            "draft",
            rows=[int(row) for row in rows],
            positions=[int(position) for position in positions],
            pages=[[int(page) for page in held] for held in pages],
            count=count,
        )
        return super().draft(rows, positions, pages, count)
