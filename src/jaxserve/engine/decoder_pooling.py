"""Vectors from a decoder that serves generation at the same time.

Texts become prompts of the engine that end with their last token. Of each call only a few are under
way at a time, so that a long list of texts leaves rows and queue places to others.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import numpy as np

from jaxserve.core.errors import ConfigError, EngineDeadError
from jaxserve.core.event import FinishReason, TokenEvent
from jaxserve.core.lora import Adapter
from jaxserve.core.protocols import Clock
from jaxserve.core.request import Request, SamplingParams, new_request_id
from jaxserve.engine.inbox import Door
from jaxserve.engine.pooling import PooledText
from jaxserve.models.config import ModelConfig
from jaxserve.models.pooling import PoolingConfig

_SAMPLING = SamplingParams(temperature=0.0, detokenize=False)
"""Nothing is drawn; the first completion is the only one."""


class DecoderPooler:
    """Pools the hidden states of prompts.

    Args:
        thread: Takes the texts as requests.
        clock: Where times of arrival come from.
        pooling: How; "last" or "mean".
        model_config: The model's shape.
        max_model_len: Most tokens of a sequence.
        max_num_seqs: Sequences running at once.

    Raises:
        ConfigError: If the pooling is another one.
    """

    num_labels = 0
    applies_sigmoid = False

    def __init__(
        self,
        thread: Door,
        clock: Clock,
        pooling: PoolingConfig,
        *,
        model_config: ModelConfig,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        """Check the way of pooling."""
        if pooling.pooling_type not in {"last", "mean"}:
            raise ConfigError(
                f"found the pooling {pooling.pooling_type!r}, expected last or mean for a decoder; "
                "choose one with --pooler-config."
            )
        self.pooling = pooling
        self.max_length = min(pooling.max_length or max_model_len, max_model_len)
        self.vocab_size = model_config.vocab_size
        self.hidden_size = model_config.hidden_size
        self._thread = thread
        self._clock = clock
        # Half of the rows stay free for generation.
        self._window = max(1, max_num_seqs // 2)

    def submit(
        self,
        texts: Sequence[PooledText],
        *,
        priority: int = 0,
        adapter: Adapter | None = None,
    ) -> "Future[list[np.ndarray]]":
        """Hand texts over; see `Pooler.submit`."""
        requests = [
            Request(
                request_id=new_request_id(),
                prompt_token_ids=tuple(text.token_ids),
                sampling=_SAMPLING,
                arrival=self._clock.now(),
                priority=priority,
                pooling="mean" if self.pooling.pooling_type == "mean" else "last",
                adapter=adapter,
            )
            for text in texts
        ]
        run = _Run(self._thread, requests)
        run.start(self._window)
        return run.future


class _Run:
    """The texts of one call on their way through the engine."""

    def __init__(self, thread: Door, requests: Sequence[Request]) -> None:
        self.future: Future[list[np.ndarray]] = Future()
        self._thread = thread
        self._requests = requests
        self._place = {request.request_id: i for i, request in enumerate(requests)}
        self._vectors: list[np.ndarray | None] = [None] * len(requests)
        self._num_left = len(requests)
        self._next = 0
        self._lock = threading.Lock()  # the caller starts, the engine's thread goes on

    def start(self, window: int) -> None:
        """Submit the first texts; a refusal of the very first is raised, later ones are told."""
        if not self._requests:
            self.future.set_result([])
            return
        self.future.add_done_callback(self._cancel_rest)
        try:
            self._submit_next()
        except BaseException:
            self.future.cancel()
            raise
        for _ in range(window - 1):
            self._go_on()

    def _submit_next(self) -> None:
        with self._lock:
            index = self._next
            self._next += 1
        if index < len(self._requests) and not self.future.done():
            self._thread.submit(self._requests[index], self._take)

    def _go_on(self) -> None:
        try:
            self._submit_next()
        except Exception as error:  # noqa: BLE001  whoever waits is told
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # it may have ended or been given up
            self.future.set_exception(error)

    def _take(self, event: TokenEvent) -> None:
        """Receive the one event of a text; on the engine's thread."""
        if event.finish_reason is not FinishReason.STOP or event.pooled is None:
            reason = event.error or "the text was aborted"
            self._fail(EngineDeadError(f"the engine failed at this text: {reason}"))
            return
        self._vectors[self._place[event.request_id]] = event.pooled  # type: ignore[index]
        self._num_left -= 1
        if self._num_left:
            self._go_on()
            return
        with suppress(InvalidStateError):
            self.future.set_result([vector for vector in self._vectors if vector is not None])

    def _cancel_rest(self, future: "Future[list[np.ndarray]]") -> None:
        """Free what is still under way when the call failed or was given up."""
        if future.cancelled() or future.exception() is not None:
            with self._lock:
                started = self._requests[: self._next]
            for request in started:
                if self._vectors[self._place[request.request_id]] is None:
                    self._thread.cancel(request.request_id)
