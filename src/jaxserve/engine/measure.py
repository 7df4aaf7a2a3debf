"""Measures how long the steps of an engine take, shape by shape, and fits a cost model to them.

Real requests go through the engine, planned first come first served, so that what is measured is
what serving takes: the device, and as much of the host's work as it does not hide.
"""

import logging
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxserve.core.cost import StepLoad
from jaxserve.core.cost_file import MOST_MARGIN, CostFile
from jaxserve.core.errors import CapacityError, EngineDeadError
from jaxserve.core.event import FinishReason, TokenEvent
from jaxserve.core.protocols import Clock
from jaxserve.core.request import Request, SamplingParams, new_request_id
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.shapes import StepShape
from jaxserve.engine.step_times import StepTimes
from jaxserve.scheduling.cost_fit import Bucket, FitReport, fit_buckets, judge_fit
from jaxserve.scheduling.fcfs import FcfsScheduler

logger = logging.getLogger(__name__)

SHORT = 32
"""Tokens of prompts whose contexts are to cost nothing."""
_MOST_TURNS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        repeats: Steps per shape and context.
        contexts: Tokens of context of decodes, beside `SHORT`; those too long are left out.
        with_past: Whether prompts are also measured behind tokens that were computed before.
    """

    repeats: int = 10
    contexts: tuple[int, ...] = (256, 1024, 4096)
    with_past: bool = True


QUICK = Effort(repeats=3, contexts=(512,), with_past=False)
"""What suffices for a start; what it misses is learned while serving."""


@dataclass(slots=True)
class Samples:
    """Measured steps.

    Attributes:
        groups: Groups of devices that have rows of their own.
        shapes: What each of them was padded to.
        loads: What they held.
        seconds: Their times.
    """

    groups: int = 1
    shapes: list[StepShape] = field(default_factory=list)
    loads: list[StepLoad] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, load: StepLoad, shape: StepShape, seconds: float, now: float) -> None:
        """Take note of one step."""
        del now
        self.shapes.append(shape)
        self.loads.append(load)
        self.seconds.append(seconds)

    @property
    def buckets(self) -> list[Bucket]:
        """The shapes as cost models know them."""
        return [Bucket(self.groups * s.rows, s.prefill, s.drafts) for s in self.shapes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A cost model with the steps that it was fitted to.

    Attributes:
        file: The model, ready to be written.
        report: How well it fits.
        samples: The steps.
    """

    file: CostFile
    report: FitReport
    samples: Samples


def measure_engine(engine: Engine, clock: Clock, effort: Effort = QUICK) -> Measured:
    """Measure every step shape and fit a cost model.

    Args:
        engine: Idle and turned by nobody else; its counters and prefix cache stay as they are, but
            for the programs that it compiles.
        clock: Where time comes from.
        effort: How thoroughly.

    Raises:
        EngineDeadError: If a step fails.
    """
    with _borrowed(engine, clock) as samples:
        _Prober(engine, clock, samples, effort).probe()
    cost = fit_buckets(samples.buckets, samples.loads, samples.seconds)
    report = judge_fit(cost, samples.loads, samples.seconds)
    facts = {"engine": describe(engine), "fit": _rounded(report), "steps": len(samples.seconds)}
    made = CostFile(cost=cost, margin=min(MOST_MARGIN, round(report.margin, 4)), facts=facts)
    if cost.enveloped:
        logger.info("raised to the times of smaller steps: %s", ", ".join(cost.enveloped))
    return Measured(file=made, report=report, samples=samples)


def describe(engine: Engine) -> dict[str, object]:
    """Return the sizes of an engine on which times of steps depend."""
    spec = engine.runner.spec
    return {
        "model_type": spec.config.model_type,
        "layers": spec.config.num_layers,
        "hidden_size": spec.config.hidden_size,
        "dtype": spec.dtype,
        "backend": str(spec.backend),
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.shapes.prefill_buckets[-1],
        "page_size": spec.page_size,
    }


def _rounded(report: FitReport) -> dict[str, float]:
    return {
        "r2": round(report.r2, 5),
        "mean_error": round(report.mean_error, 5),
        "p99_error_s": round(report.p99_error, 6),
        "under_predicted": round(report.under_predicted, 4),
    }


@contextmanager
def _borrowed(engine: Engine, clock: Clock) -> Generator[Samples]:
    """Let an engine be planned first come first served, its counters put aside meanwhile."""
    kept = engine.scheduler, engine.times, engine.metrics
    samples = Samples(groups=engine.runner.spec.groups)
    scratch = EngineMetrics(max_model_len=engine.runner.spec.max_model_len)
    times = StepTimes(clock, scratch)
    times.sink = samples
    engine.scheduler = FcfsScheduler(mix=not engine.runner.spec.batch_invariant)
    engine.times, engine.metrics = times, scratch
    try:
        yield samples
    finally:
        engine.scheduler, engine.times, engine.metrics = kept
        engine.forget_now()


class _Prober:
    """Puts an engine through the steps that are to be measured."""

    def __init__(self, engine: Engine, clock: Clock, samples: Samples, effort: Effort) -> None:
        self._engine = engine
        self._clock = clock
        self._samples = samples
        self._effort = effort
        self._random = random.Random(0)  # noqa: S311  prompts that nobody has sent before
        self._spec = engine.runner.spec
        self._prefix: list[int] = []
        self._failure: str | None = None
        self._num_open = 0

    def probe(self) -> None:
        shapes, engine = self._spec.shapes, self._engine
        most = engine.max_num_batched_tokens
        engine.runner.warm_up()
        lengths = [SHORT, *(n for n in self._effort.contexts if n < self._spec.max_model_len // 2)]
        for length in lengths:
            self._prefix = self._tokens(length)
            rows = shapes.row_buckets if length == SHORT else shapes.row_buckets[-1:]
            for count in self._orderly(self._counts(rows)):
                self._decode(self._affordable(count, length), length)
        self._prefix = self._tokens(SHORT)
        for rows in self._orderly(self._counts(shapes.mixed_row_buckets)):
            sizes = [min(size, most - (rows - 1)) for size in shapes.prefill_buckets]
            self._mix(rows - 1, [size for size in sizes if size > 0])
        if self._effort.with_past:
            size = shapes.prefill_buckets[-1]
            self._long(min(4 * size, self._spec.max_model_len - 2))

    def _counts(self, rows: Sequence[int]) -> list[int]:
        """Return how many sequences fill so many rows of each group."""
        most = self._spec.max_num_seqs
        return [min(most, self._spec.groups * count) for count in rows]

    def _orderly(self, sizes: Sequence[int]) -> list[int]:
        """Return sizes in random order, so that a machine that warms up spoils none of them."""
        return self._random.sample(list(sizes), len(sizes))

    def _affordable(self, count: int, length: int) -> int:
        pages = self._engine.pool.num_pages
        per_row = -(-(length + self._effort.repeats + 8) // self._spec.page_size) + 1
        return max(1, min(count, pages // per_row))

    def _decode(self, count: int, length: int) -> None:
        """Let so many sequences decode behind so many tokens."""
        room = self._spec.max_model_len - length - 2
        for _ in range(count):
            self._submit([*self._prefix[: length - 4], *self._tokens(4)], room)
        self._turn_until(lambda: self._is_decoding(count))
        steps = self._effort.repeats + 2
        before = len(self._samples.seconds)
        self._turn_until(lambda: len(self._samples.seconds) >= before + steps)
        self._stop()

    def _is_decoding(self, count: int) -> bool:
        loads = self._samples.loads
        return bool(loads) and loads[-1].decodes == count and not loads[-1].prefill

    def _mix(self, decodes: int, sizes: Sequence[int]) -> None:
        """Compute prompts of given sizes beside so many decodes."""
        room = self._spec.max_model_len - SHORT - 2
        for _ in range(decodes):
            self._submit([*self._prefix[: SHORT - 4], *self._tokens(4)], room)
        if decodes:
            self._turn_until(lambda: self._is_decoding(decodes))
        for _ in range(self._effort.repeats):
            for size in self._orderly(sizes):
                prompt = self._tokens(min(size, self._spec.max_model_len - 2))
                before = len(self._samples.seconds)
                open_before = self._num_open
                self._submit(prompt, 1)
                self._turn_until(
                    lambda n=open_before, b=before: (
                        self._num_open <= n and len(self._samples.seconds) > b
                    )
                )
        self._stop()

    def _long(self, length: int) -> None:
        """Compute a prompt in several chunks, each behind those before."""
        for _ in range(max(1, self._effort.repeats // 3)):
            before = self._num_open
            self._submit(self._tokens(length), 1)
            self._turn_until(lambda n=before: self._num_open <= n)
        self._stop()

    def _tokens(self, count: int) -> list[int]:
        vocab = self._spec.config.vocab_size
        return [self._random.randrange(vocab) for _ in range(count)]

    def _submit(self, prompt: Sequence[int], num_tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        self._num_open += 1
        request = Request(
            request_id=new_request_id(),
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            arrival=self._clock.now(),
        )
        self._engine.submit(request, self._sink)

    def _sink(self, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            self._num_open -= 1
        if event.finish_reason is FinishReason.ERROR:
            self._failure = event.error

    def _turn_until(self, is_done: Callable[[], bool]) -> None:
        for _ in range(_MOST_TURNS):
            if is_done():
                return
            self._engine.step()
            if self._failure is not None:
                raise EngineDeadError(f"a step failed while it was measured: {self._failure}")
            if not self._engine.has_work and not is_done():
                break
        if not is_done():
            raise CapacityError("the engine cannot run the steps that are to be measured.")

    def _stop(self) -> None:
        self._engine.cancel_all()
        self._turn_until(lambda: not self._num_open)
        while self._engine.has_work:
            self._engine.step()
