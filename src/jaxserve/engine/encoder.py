"""The encoder's thread: packs the texts of all requests, sorted by length, into batches.

The text that has waited longest chooses the length of the next batch; others of that length join
it, oldest first, and shorter ones take rows that would be padding. A batch is read while the next
one is computed.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxserve.core.errors import CapacityError, EngineDeadError
from jaxserve.core.lora import Adapter
from jaxserve.core.protocols import Clock
from jaxserve.engine.encoder_metrics import EncoderMetrics
from jaxserve.engine.encoder_runner import BatchShape, EncoderRunner
from jaxserve.engine.pooling import PooledText

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """The texts of one request."""

    future: "Future[list[np.ndarray]]"
    results: list[np.ndarray | None]
    num_left: int
    num_tokens: int
    arrival: float
    started: float | None = None

    @property
    def is_over(self) -> bool:
        return self.future.done()


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    """One text that waits."""

    number: int
    text: PooledText
    group: _Group
    index: int


@dataclass(slots=True, kw_only=True)
class _Batch:
    """Texts on the device."""

    items: list[_Waiting]
    shape: BatchShape
    result: jax.Array


@dataclass(slots=True, kw_only=True)
class _Queue:
    """Texts that wait, by the length with which they run."""

    by_length: dict[int, deque[_Waiting]] = field(default_factory=dict)

    def add(self, length: int, item: _Waiting) -> None:
        self.by_length.setdefault(length, deque()).append(item)

    def first(self) -> int | None:
        """Return the length of the text that has waited longest; forget what nobody wants."""
        oldest: tuple[int, int] | None = None
        for length, items in self.by_length.items():
            while items and items[0].group.is_over:
                items.popleft()
            if items and (oldest is None or items[0].number < oldest[0]):
                oldest = (items[0].number, length)
        return None if oldest is None else oldest[1]

    def take(self, length: int, count: int) -> list[_Waiting]:
        items = self.by_length.get(length, deque())
        taken: list[_Waiting] = []
        while items and len(taken) < count:
            item = items.popleft()
            if not item.group.is_over:
                taken.append(item)
        return taken

    def shorter(self, length: int) -> Iterator[int]:
        yield from sorted((n for n in self.by_length if n < length), reverse=True)

    def count(self, length: int) -> int:
        return len(self.by_length.get(length, ()))

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.by_length.values()))


class Encoder:
    """Serves texts with one encoder, on a thread of its own.

    Args:
        runner: Executes batches.
        clock: Where time comes from.
        metrics: Counters.
        max_num_queued_reqs: Most unfinished requests; None is no limit.

    Attributes:
        runner: Executes batches.
        metrics: Counters.
        dead: Why it has stopped; None while it runs.
    """

    def __init__(
        self,
        runner: EncoderRunner,
        *,
        clock: Clock,
        metrics: EncoderMetrics,
        max_num_queued_reqs: int | None = None,
    ) -> None:
        """Start the thread."""
        config = runner.spec.config
        self.runner = runner
        self.metrics = metrics
        self.dead: str | None = None
        self.pooling = runner.spec.pooling
        self.max_length = runner.spec.shapes.lengths[-1]
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_labels = config.num_labels
        self.applies_sigmoid = config.applies_sigmoid
        self._clock = clock
        self._max_queued = max_num_queued_reqs
        self._changed = threading.Condition()
        self._queue = _Queue()
        self._open: set[_Group] = set()
        self._number = 0
        self._num_failures = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="jaxserve-encoder", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Requests that have been accepted and have not ended."""
        return len(self._open)

    def submit(
        self,
        texts: Sequence[PooledText],
        *,
        priority: int = 0,  # noqa: ARG002  texts are served in order of arrival
        adapter: Adapter | None = None,  # noqa: ARG002  `EncoderHost.get_adapter` gives none
    ) -> "Future[list[np.ndarray]]":
        """Hand texts over; see `Pooler.submit`."""
        future: Future[list[np.ndarray]] = Future()
        if not texts:
            future.set_result([])
            return future
        group = _Group(
            future=future,
            results=[None] * len(texts),
            num_left=len(texts),
            num_tokens=sum(len(text.token_ids) for text in texts),
            arrival=self._clock.now(),
        )
        shapes = self.runner.spec.shapes
        with self._changed:
            if self.dead is not None:
                raise EngineDeadError(f"the engine has stopped: {self.dead}")
            if self._max_queued is not None and len(self._open) >= self._max_queued:
                self.metrics.rejected("max_num_queued_reqs")
                raise CapacityError(
                    f"{len(self._open)} requests are under way and at most {self._max_queued} are "
                    "accepted. Try again later.",
                    retry_after_s=1.0,
                )
            self._open.add(group)
            for index, text in enumerate(texts):
                self._number += 1
                item = _Waiting(number=self._number, text=text, group=group, index=index)
                self._queue.add(shapes.length_of(len(text.token_ids)), item)
            self._changed.notify()
        future.add_done_callback(lambda _: self._ended(group))
        return future

    def _ended(self, group: _Group) -> None:
        """Forget a request that has ended, or was given up."""
        with self._changed:
            self._open.discard(group)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether everything has ended.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def close(self) -> None:
        """End what is under way with an error and stop the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    # The loop: one thread ----------------------------------------------------------------------

    def _run(self) -> None:
        before: _Batch | None = None
        while True:
            with self._changed:
                while not self._is_closing and before is None and self._queue.first() is None:
                    self._changed.wait()
                items, shape = (
                    ([], None) if self._is_closing else self._next(is_busy=before is not None)
                )
                self.metrics.batch_queue(len(items), self._queue.num_waiting)
            if self._is_closing:
                self._stop("it has been closed")
                return
            launched = None if shape is None else self._launch(items, shape)
            if before is not None:
                self._commit(before)
            before = launched
            if self._num_failures >= _MAX_FAILURES:
                self._stop(f"{_MAX_FAILURES} batches in a row failed")
                return

    def _next(self, *, is_busy: bool) -> tuple[list[_Waiting], BatchShape | None]:
        """Choose the next batch; called with the lock held."""
        length = self._queue.first()
        if length is None:
            return [], None
        most = self.runner.spec.shapes.row_buckets(length)[-1]
        if is_busy and self._queue.count(length) < most:
            return [], None  # not full yet, and the device has something to do
        shape = self.runner.choose_shape(self._queue.count(length), length)
        items = self._queue.take(length, shape.rows)
        if not self.runner.spec.shapes.one_per_length:
            for other in self._queue.shorter(shape.length):
                items += self._queue.take(other, shape.rows - len(items))
        return items, shape

    def _launch(self, items: list[_Waiting], shape: BatchShape) -> _Batch | None:
        now = self._clock.now()
        for item in items:
            if item.group.started is None:
                item.group.started = now
                self.metrics.admitted(
                    prompt_len=item.group.num_tokens,
                    num_cached=0,
                    queue_time=now - item.group.arrival,
                )
        try:
            result = self.runner.run([item.text for item in items], shape)
        except Exception as error:  # noqa: BLE001  whatever happens, other requests go on
            self._fail(items, error)
            return None
        return _Batch(items=items, shape=shape, result=result)

    def _commit(self, batch: _Batch) -> None:
        try:
            vectors = np.asarray(batch.result)
        except Exception as error:  # noqa: BLE001  as above
            self._fail(batch.items, error)
            return
        self._num_failures = 0
        num_tokens = sum(len(item.text.token_ids) for item in batch.items)
        self.metrics.batch(
            num_texts=len(batch.items),
            num_tokens=num_tokens,
            num_padding=batch.shape.rows * batch.shape.length - num_tokens,
        )
        for row, item in enumerate(batch.items):
            group = item.group
            group.results[item.index] = vectors[row].copy()  # not a view that keeps the batch
            group.num_left -= 1
            if not group.num_left:
                self._finish(group)

    def _finish(self, group: _Group) -> None:
        if not group.future.cancelled():
            self.metrics.request_ended(
                latency=self._clock.now() - group.arrival, num_tokens=group.num_tokens, ok=True
            )
        # It may be cancelled at this very moment.
        with suppress(InvalidStateError):
            group.future.set_result([vector for vector in group.results if vector is not None])

    def _fail(self, items: Sequence[_Waiting], error: Exception) -> None:
        logger.error("a batch failed; its requests end with an error", exc_info=error)
        self._num_failures += 1
        for group in {item.group for item in items}:
            self._end(group, f"{type(error).__name__}: {error}")

    def _end(self, group: _Group, reason: str) -> None:
        if group.is_over:
            return
        self.metrics.request_ended(
            latency=self._clock.now() - group.arrival, num_tokens=group.num_tokens, ok=False
        )
        with suppress(InvalidStateError):
            group.future.set_exception(EngineDeadError(f"the engine failed: {reason}"))

    def _stop(self, reason: str) -> None:
        with self._changed:
            self.dead = reason
            groups = list(self._open)
        for group in groups:
            self._end(group, reason)
