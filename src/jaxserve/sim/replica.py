"""One simulated engine: carries out the plans of a scheduler and takes a model's time for it.

The scheduler is the very object that a real engine drives. What it sees are the live records of
the replica, which have the fields of `SequenceView` and `ReplicaView`: copying them for every step
would take longer than everything else. `frozen_views` makes the copies all the same.
"""

import dataclasses
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

from jaxserve.core.cost import CostModel, StepLoad
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.core.plan import Rejection, StepPlan
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.sim.request import SimRequest

_FIELDS = tuple(field.name for field in dataclasses.fields(SequenceView))
_MOST_AT_ONCE = 4096
"""Most steps that are computed ahead."""


class PlanError(JaxserveError, RuntimeError):
    """A policy answered with a plan that cannot be carried out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """Sizes of a simulated engine.

    Attributes:
        num_pages: Pages of the cache.
        page_size: Tokens per page.
        max_num_seqs: Most sequences running at once.
        max_num_batched_tokens: Most tokens in one step.
        overhead: Seconds of the host per step.
        noise: Standard deviation of the logarithm of a step's time over its prediction.
        deviations: What steps took over their predictions, one after the other, as recorded
            somewhere; they are gone through again and again, from a random one on, in place of
            `noise`. So steps are held up as often, and as long, as they were there.
        max_draft: Draft tokens offered per sequence and step.
        overlap: Whether a step is planned when the one before begins, as engines do that prepare
            steps while the device computes. Whoever arrives during a step then waits for the next
            one as well.

    Raises:
        ConfigError: If a size is not above zero, or a time is negative.
    """

    num_pages: int
    page_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    overhead: float = 0.0
    noise: float = 0.0
    deviations: tuple[float, ...] = ()
    max_draft: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("overhead", "noise", "max_draft"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be zero or more, got {getattr(self, name)}.")
        bad = [value for value in self.deviations if not 0 < value < math.inf]
        if bad or (self.noise and self.deviations):
            found = f"{bad[0]} among them" if bad else f"noise={self.noise} as well"
            raise ConfigError(f"deviations must be above zero and without noise, got {found}.")

    @property
    def is_noisy(self) -> bool:
        """Whether steps take other times than predicted."""
        return bool(self.noise or self.deviations)


class LiveSequence:
    """One unfinished sequence, with the fields of `SequenceView` and what the simulator knows."""

    __slots__ = (*_FIELDS, "output_len", "preemptions", "request", "token_times")

    num_tokens: int
    num_computed: int
    num_pages: int
    is_running: bool
    is_decoding: bool
    num_draft: int
    first_token_time: float | None
    prompt_len: int
    seq_id: int
    arrival: float
    slo: Slo | None

    def __init__(self, request: SimRequest) -> None:
        """Wait, with nothing computed."""
        output = request.output_len if request.max_output is None else request.max_output
        self.seq_id = request.request_id
        self.arrival = request.arrival
        self.priority = 0
        self.prompt_len = request.prompt_len
        self.num_tokens = request.prompt_len
        self.num_computed = 0
        self.max_total_len = request.prompt_len + output
        self.num_pages = 0
        self.is_running = False
        self.num_cached = request.cached_len
        self.num_draft = 0
        self.draft_acceptance = request.acceptance
        self.is_decoding = False
        self.slo = request.slo
        self.first_token_time = None
        self.adapter = ""
        self.request = request
        self.output_len = request.output_len
        self.token_times: list[float] = []
        self.preemptions = 0

    @classmethod
    def waiting(cls, request: SimRequest) -> SequenceView:
        """Return a request as a router sees it."""
        return cast("SequenceView", cls(request))

    @property
    def num_uncomputed(self) -> int:
        """Tokens that must be computed before the next one can be drawn."""
        return self.num_tokens - self.num_computed

    def freeze(self) -> SequenceView:
        """Return a copy that stays as it is."""
        return SequenceView(**{name: getattr(self, name) for name in _FIELDS})


class _LiveView:
    """The fields of `ReplicaView`, filled in anew for each step."""

    __slots__ = tuple(field.name for field in dataclasses.fields(ReplicaView))

    now: float
    running: tuple[LiveSequence, ...]
    waiting: tuple[LiveSequence, ...]
    num_free_pages: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    adapters: frozenset[str]
    max_loras: int
    draft_sizes: tuple[int, ...]


class Observer(Protocol):
    """Is told of every step; for traces and tests."""

    def step(
        self, replica: int, begin: float, ends: Sequence[float], plan: StepPlan, load: StepLoad
    ) -> None:
        """Take note of one step, or of several with one plan.

        Args:
            replica: Its number.
            begin: Clock time at which the first began, in seconds.
            ends: When each of them ended.
            plan: What they did.
            load: What the first held.
        """
        ...


class Replica:
    """A simulated engine.

    Args:
        spec: Its sizes.
        scheduler: The policy.
        cost: How long steps take.
        index: Its number in the fleet.
        seed: Of noise and of what becomes of drafts.
        jump: Whether steps of decodes that the policy would repeat are done at once.
        frozen_views: Whether the policy gets copies instead of live records.
        observer: Is told of every step.

    Attributes:
        now: Clock time up to which everything is settled: the end of the step under way, or when
            it became idle.
        num_steps: Steps done.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        scheduler: Scheduler,
        cost: CostModel,
        *,
        index: int = 0,
        seed: int = 0,
        jump: bool = True,
        frozen_views: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """Start empty and idle."""
        self.spec = spec
        self.scheduler = scheduler
        self.index = index
        self.now = 0.0
        self.num_steps = 0
        self.running: dict[int, LiveSequence] = {}
        self.waiting: list[LiveSequence] = []
        self.free_pages = spec.num_pages
        self.on_finish: Callable[[LiveSequence, float, Rejection | None], None] = _ignore
        self._cost = cost
        self._jump = jump
        self._frozen_views = frozen_views
        self._observer = observer
        self._noise = random.Random(f"noise {seed} {index}")
        self._noises: list[float] = []
        self._first = self._noise.randrange(len(spec.deviations)) if spec.deviations else 0
        self._drafts = random.Random(f"drafts {seed} {index}")
        self._live = _LiveView()
        self._ahead: list[float] = []
        """Ends of the steps that repeat the last one and are not settled yet."""
        self._repeated: list[LiveSequence] = []
        self._begun, self._ended = -math.inf, -math.inf
        """When the latest step began and ended."""

    @property
    def is_busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.running or self.waiting)

    def submit(self, request: SimRequest) -> None:
        """Let a request wait here."""
        if -(-(request.prompt_len + request.output_len) // self.spec.page_size) > (
            self.spec.num_pages
        ):
            raise ConfigError(
                f"request {request.request_id} needs more than the {self.spec.num_pages} pages of "
                f"a replica: {request.prompt_len} and {request.output_len} tokens at "
                f"{self.spec.page_size} per page. Leave it out, or simulate a larger replica."
            )
        insort(self.waiting, LiveSequence(request), key=_order)

    @property
    def is_ahead(self) -> bool:
        """Whether steps have been looked ahead to that have not begun."""
        return bool(self._ahead)

    def view_from(self, now: float) -> ReplicaView:
        """Return a view of its own for a router: as of the end of the step under way, or `now`."""
        self._live = _LiveView()
        return self.view(max(self.now, now))

    def view(self, now: float | None = None) -> ReplicaView:
        """Return the replica as its scheduler sees it."""
        live, spec = self._live, self.spec
        live.now = self.now if now is None else now
        live.num_free_pages = self.free_pages
        live.num_pages = spec.num_pages
        live.page_size = spec.page_size
        live.max_num_seqs = spec.max_num_seqs
        live.max_num_batched_tokens = spec.max_num_batched_tokens
        live.adapters = frozenset()
        live.max_loras = 0
        live.draft_sizes = ()
        if self._frozen_views:
            running = tuple(sequence.freeze() for sequence in self.running.values())
            waiting = tuple(sequence.freeze() for sequence in self._visible())
            return ReplicaView(
                now=live.now, running=running, waiting=waiting, num_free_pages=self.free_pages,
                num_pages=spec.num_pages, page_size=spec.page_size, max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
            )  # fmt: skip
        live.running = tuple(self.running.values())
        live.waiting = tuple(self._visible())
        return cast("ReplicaView", live)

    def _visible(self) -> list[LiveSequence]:
        """Return those who waited when the step was planned that is about to begin."""
        if not self.spec.overlap or self._ended < self.now:
            return self.waiting
        return [one for one in self.waiting if one.arrival <= self._begun]

    def begin(self, now: float, horizon: float = math.inf) -> float | None:
        """Plan the next step and begin it.

        Args:
            now: Clock time in seconds, not before that of the last step's end.
            horizon: Nobody arrives before this time, as far as is known.

        Returns:
            When it ends, or the last of the steps that repeat it; None if there is nothing to do.

        Raises:
            PlanError: If the plan cannot be carried out.
        """
        self.now = max(self.now, now)
        plan = self.scheduler.plan(self.view())
        for rejection in plan.reject:
            self._reject(rejection)
        if not plan.work and not plan.preempt:
            if self.spec.overlap and self._ended >= self.now:
                # Nothing is on the device any more, so that everybody is seen.
                self._ended = -math.inf
                return self.begin(self.now, horizon)
            return None
        for seq_id in plan.preempt:
            self._preempt(seq_id)
        for seq_id in plan.admit:
            self._admit(seq_id)
        load, sequences = self._load(plan)
        if not plan.work:
            return self.begin(self.now, horizon) if self.is_busy else None
        begin = self.now
        is_plain = load.decodes == len(plan.work) and not load.drafts
        is_seen = not self.spec.overlap or len(self._visible()) == len(self.waiting)
        if self._jump and plan.holds_until > begin and is_plain and is_seen:
            self._look_ahead(load, sequences, min(horizon, plan.holds_until))
            if self._observer is not None:
                self._observer.step(self.index, begin, self._ahead, plan, load)
            last = self._ahead[-1]
            self._settle(1)
            return last
        self.now = begin + self._time(load)
        self._begun, self._ended = begin, self.now
        self.num_steps += 1
        if self._observer is not None:
            self._observer.step(self.index, begin, (self.now,), plan, load)
        self._compute(plan, sequences)
        return self.now

    def settle(self, now: float) -> None:
        """Do what has been looked ahead to, as far as it begins before `now`."""
        if self._ahead and self.now < now:
            self._settle(min(bisect_left(self._ahead, now) + 1, len(self._ahead)))

    def interrupt(self) -> None:
        """Forget the steps that have not begun, because something has changed."""
        self._ahead.clear()

    def _settle(self, count: int) -> None:
        ahead = self._ahead
        ends = ahead[:count]
        del ahead[:count]
        page_size, last = self.spec.page_size, ends[-1]
        self._begun = ends[-2] if count > 1 else self.now
        self._ended = self.now = last
        self.num_steps += count
        for sequence in self._repeated:
            computed = sequence.num_computed + count
            sequence.num_computed = computed
            sequence.num_tokens += count
            sequence.token_times.extend(ends)
            more = -(-computed // page_size) - sequence.num_pages
            if more > 0:
                self.free_pages -= more
                sequence.num_pages += more
        if not ahead:
            for sequence in self._repeated:
                if len(sequence.token_times) >= sequence.output_len:
                    self._finish(sequence, last)
            self._repeated = []

    def _time(self, load: StepLoad) -> float:
        seconds = self._cost.step_time(load) + self.spec.overhead
        return seconds * self._noise_of(self.num_steps) if self.spec.is_noisy else seconds

    def _noise_of(self, step: int) -> float:
        """Return the factor of a step, the same however many steps are done at once."""
        known = self.spec.deviations
        if known:
            return known[(self._first + step) % len(known)]
        while len(self._noises) <= step:
            self._noises.append(self._noise.lognormvariate(0.0, self.spec.noise))
        return self._noises[step]

    def _look_ahead(self, load: StepLoad, sequences: list[LiveSequence], horizon: float) -> None:
        """Compute when the steps end that repeat this one: until one ends, or until `horizon`."""
        count = min(s.output_len - len(s.token_times) for s in sequences)
        while count > 1 and self._pages_for(sequences, count) > self.free_pages:
            count = (count + 1) // 2
        overhead, is_noisy = self.spec.overhead, self.spec.is_noisy
        ends: list[float] = []
        begin, step, decodes = self.now, self.num_steps, load.decodes
        while count and begin < horizon:
            some = min(count, _MOST_AT_ONCE)
            if horizon < math.inf:
                guess = (horizon - begin) / (self._cost.step_time(load) + overhead)
                some = max(1, min(some, int(guess) + 1))
            times = [time + overhead for time in self._cost.decode_times(load, some)]
            if is_noisy:
                times = [t * self._noise_of(step + i) for i, t in enumerate(times)]
            new = list(accumulate(times, initial=begin))[1:]
            begun = bisect_left(new, horizon) + 1
            ends += new[:begun]
            if begun <= len(new):
                break
            begin, step, count = ends[-1], step + some, count - some
            load = load._replace(context=load.context + some * decodes)
        self._ahead = ends
        self._repeated = sequences

    def _pages_for(self, sequences: Sequence[LiveSequence], count: int) -> int:
        page_size = self.spec.page_size
        return sum(
            max(0, -(-(s.num_computed + count) // page_size) - s.num_pages) for s in sequences
        )

    def _load(self, plan: StepPlan) -> tuple[StepLoad, list[LiveSequence]]:
        """Sum up what a plan computes and take the pages for it."""
        page_size, running = self.spec.page_size, self.running
        prefill = prefills = past = decodes = context = drafts = draft_steps = 0
        pairs = 0.0
        free = self.free_pages
        sequences: list[LiveSequence] = []
        for item in plan.work:
            sequence = running.get(item.seq_id)
            if sequence is None:
                raise PlanError(
                    f"the plan gives work to sequence {item.seq_id}, which is not running; admit "
                    "it first."
                )
            count, start = item.num_tokens, sequence.num_computed
            end = start + count
            if not 0 < count <= sequence.num_tokens - start:
                raise PlanError(
                    f"the plan computes {count} tokens of sequence {item.seq_id}, which has "
                    f"{sequence.num_uncomputed} left."
                )
            if sequence.is_decoding:
                decodes += 1
                context += end
                if item.num_draft:
                    drafts += item.num_draft
                    draft_steps = max(draft_steps, item.num_draft)
                    end += item.num_draft
            else:
                prefill += count
                pairs += count * start + count * count / 2
                prefills += 1
                past += start
            more = -(-end // page_size) - sequence.num_pages
            if more > 0:
                free -= more
                sequence.num_pages += more
            sequences.append(sequence)
        if free < 0:
            raise PlanError(
                f"the plan needs {-free} pages more than the {self.free_pages} that are free; "
                "preempt somebody."
            )
        tokens = prefill + decodes + drafts
        if tokens > self.spec.max_num_batched_tokens:
            raise PlanError(
                f"the plan has {tokens} tokens, and a step holds at most "
                f"{self.spec.max_num_batched_tokens}."
            )
        self.free_pages = free
        load = StepLoad(prefill, pairs, prefills, past, decodes, context, drafts, draft_steps)
        return load, sequences

    def _compute(self, plan: StepPlan, sequences: list[LiveSequence]) -> None:
        """Do the work of one step, which ends now."""
        now = self.now
        for item, sequence in zip(plan.work, sequences, strict=True):
            computed = sequence.num_computed + item.num_tokens
            sequence.num_computed = computed
            if computed < sequence.num_tokens:
                continue
            new = 1 + (self._accepted(sequence, item.num_draft) if item.num_draft else 0)
            times = sequence.token_times
            new = min(new, sequence.output_len - len(times))
            if sequence.first_token_time is None:
                sequence.first_token_time = now
            sequence.num_tokens += new
            sequence.num_computed += new - 1
            sequence.is_decoding = True
            sequence.num_draft = self.spec.max_draft
            for _ in range(new):
                times.append(now)
            if len(times) >= sequence.output_len:
                self._finish(sequence, now)

    def _accepted(self, sequence: LiveSequence, num_draft: int) -> int:
        """Draw how many draft tokens are right: each with one chance, if all before it are."""
        chance = sequence.request.acceptance
        for accepted in range(num_draft):
            if self._drafts.random() >= chance:
                return accepted
        return num_draft

    def _finish(self, sequence: LiveSequence, now: float) -> None:
        del self.running[sequence.seq_id]
        self.free_pages += sequence.num_pages
        sequence.num_pages = 0
        self.on_finish(sequence, now, None)

    def _reject(self, rejection: Rejection) -> None:
        sequence = self._take(rejection.seq_id, "refuses")
        self.on_finish(sequence, self.now, rejection)

    def _take(self, seq_id: int, verb: str) -> LiveSequence:
        for place, sequence in enumerate(self.waiting):
            if sequence.seq_id == seq_id:
                del self.waiting[place]
                return sequence
        raise PlanError(f"the plan {verb} sequence {seq_id}, which does not wait.")

    def _admit(self, seq_id: int) -> None:
        sequence = self._take(seq_id, "admits")
        needed = -(-sequence.num_tokens // self.spec.page_size)
        if len(self.running) >= self.spec.max_num_seqs or needed > self.free_pages:
            raise PlanError(
                f"the plan admits sequence {seq_id}, which needs {needed} pages; "
                f"{self.free_pages} are free, and {len(self.running)} of "
                f"{self.spec.max_num_seqs} sequences run."
            )
        self.free_pages -= needed
        sequence.num_pages = needed
        sequence.num_computed = sequence.num_cached
        sequence.is_running = True
        self.running[seq_id] = sequence

    def _preempt(self, seq_id: int) -> None:
        sequence = self.running.pop(seq_id, None)
        if sequence is None:
            raise PlanError(f"the plan preempts sequence {seq_id}, which does not run.")
        self.free_pages += sequence.num_pages
        sequence.num_pages = 0
        sequence.num_computed = 0
        sequence.num_draft = 0
        sequence.is_running = sequence.is_decoding = False
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=_order)


def _order(sequence: LiveSequence) -> tuple[float, int]:
    return (sequence.arrival, sequence.seq_id)


def _ignore(sequence: LiveSequence, now: float, rejection: Rejection | None) -> None:
    """Take no note of an end."""
