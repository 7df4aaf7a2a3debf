"""What an encoder counts, on the page on which an engine counts generation."""

from collections.abc import Iterator

from jaxserve.core.event import FinishReason
from jaxserve.engine.metrics import ITERATION_BUCKETS, EngineMetrics, Family, Histogram

_TEXT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class EncoderMetrics(EngineMetrics):
    """Counters of an encoder: those of an engine, with batches in the place of steps.

    Args:
        max_length: Bounds the buckets of the length histograms.

    Attributes:
        num_texts: Texts that have been computed.
        num_padding_tokens: Tokens of padding that were computed beside them.
        texts_per_batch: Texts per batch.
    """

    def __init__(self, *, max_length: int) -> None:
        """Start with everything at zero."""
        super().__init__(max_model_len=max_length)
        self.num_texts = 0
        self.num_padding_tokens = 0
        self.texts_per_batch = Histogram(_TEXT_BUCKETS)
        self.iteration_tokens = Histogram(ITERATION_BUCKETS)

    def batch_queue(self, num_running: int, num_waiting: int) -> None:
        """Record what runs and what waits.

        Args:
            num_running: Texts in the batch that is about to start.
            num_waiting: Texts that wait for another one.
        """
        with self._lock:
            self.num_running, self.num_waiting = num_running, num_waiting

    def batch(self, *, num_texts: int, num_tokens: int, num_padding: int) -> None:
        """Record one batch.

        Args:
            num_texts: Texts in it.
            num_tokens: Their tokens.
            num_padding: Further tokens that were computed.
        """
        with self._lock:
            self.num_steps += 1
            self.num_texts += num_texts
            self.num_padding_tokens += num_padding
            self.texts_per_batch.observe(num_texts)
            self.iteration_tokens.observe(num_tokens)

    def request_ended(self, *, latency: float, num_tokens: int, ok: bool) -> None:
        """Record the end of one request.

        Args:
            latency: Seconds since its arrival.
            num_tokens: Tokens of its texts.
            ok: Whether it was answered.
        """
        reason = FinishReason.STOP if ok else FinishReason.ERROR
        with self._lock:
            self.finished_by_reason[reason.value] += 1
            self.request_prompt_tokens.observe(num_tokens)
            self.e2e_latency.observe(latency)

    def _scalars(self) -> Iterator[Family]:
        yield from super()._scalars()
        for name, text, value in (
            ("pooled_texts_total", "Texts embedded or scored.", self.num_texts),
            (
                "pooling_padding_tokens_total",
                "Padding computed beside them.",
                self.num_padding_tokens,
            ),
        ):
            yield Family(name, "counter", text, [({}, value)])

    def _histograms(self) -> Iterator[Family]:
        yield from super()._histograms()
        yield Family(
            "pooling_batch_texts",
            "histogram",
            "Texts per batch.",
            histogram=self.texts_per_batch.copy(),
        )
