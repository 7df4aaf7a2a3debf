"""The engine: requests in, token events out, one loop of five verbs.

take -> view and plan -> run -> commit -> emit. With overlap, the step before is committed while the
device already runs the next one: sampled tokens stay on the device and feed it, the view is one
turn old, and a sequence that has just ended may compute one token too many, which is dropped. Where
a plan holds drafts, the step before is committed first (`engine.speculation` says why).

The scheduler decides, the engine obeys; the scheduler never sees a device array, the runner never
sees a request. Nothing that a request can cause raises out of `step`.
"""

import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from jaxserve.cache.pages import PagePools
from jaxserve.core.errors import CapacityError, RequestError
from jaxserve.core.event import (
    FinishReason,
    RequestMetrics,
    SloOutcome,
    TokenEvent,
    TokenLogprobs,
)
from jaxserve.core.plan import Rejection, StepPlan
from jaxserve.core.protocols import Clock, Doorkeeper, Scheduler
from jaxserve.core.request import Request, RequestId
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.engine.adapters import AdapterSlots
from jaxserve.engine.balance import ExpertBalancer
from jaxserve.engine.batcher import Item, build
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.inbox import Inbox, Sink
from jaxserve.engine.intake import Intake
from jaxserve.engine.logprobs import HostLogprobs
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.placement import Placement
from jaxserve.engine.pooled import Pooled, chunk_bounds, collect
from jaxserve.engine.results import Pending, judge
from jaxserve.engine.runner import Runner, StepResult
from jaxserve.engine.sampler import Sampled
from jaxserve.engine.sequence import Phase, SequenceState
from jaxserve.engine.slo import missed
from jaxserve.engine.sparse import record_reading
from jaxserve.engine.speculation import Speculator
from jaxserve.engine.step_times import StepTimes
from jaxserve.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FIRST_VERSION = "0"
"""Version of the weights with which an engine starts."""

_MAX_FAILURES = 3
_HOST_TIME_WINDOW = 4096


@dataclass(slots=True, kw_only=True, eq=False)
class _RequestState:
    """A request with its completions."""

    request: Request
    sink: Sink
    sequences: list[SequenceState]
    num_unfinished: int
    slo: SloOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """An engine, as those outside see it.

    Attributes:
        view: What its policy saw last; nobody is in it once everything has ended.
        members: Its sequences by request and completion.
    """

    view: ReplicaView
    members: Mapping[tuple[str, int], SequenceView]


def _param(problem: Exception) -> str | None:
    """Return the field to blame; None if the engine is to blame, and not the request."""
    return problem.param or "request" if isinstance(problem, RequestError) else None


class Engine(Inbox):
    """Serves requests on one device or mesh. `step` is called by one thread only.

    Args:
        runner: Executes steps.
        scheduler: Decides them.
        tokenizer: For text and stop strings; None serves token ids only.
        clock: Where time comes from.
        metrics: Counters.
        eos_token_ids: Tokens that end a completion.
        max_num_batched_tokens: Most tokens per step.
        max_num_queued_reqs: Most unfinished completions; None is no limit.
        enable_prefix_caching: Whether prefixes are kept and shared.
        overlap: Whether to prepare a step while the device runs the one before.
        seed: Seeds the streams of requests without a seed.
        max_logprobs: Most candidates a request may ask for.
        constraints: Grammars of outputs; refuses them by default.
        speculator: Drafts what may come next; None drafts nothing.
        times: Measures steps; by default without a cost model.
        balancer: Moves experts between devices; None leaves them where they are.

    Attributes:
        scheduler: Decides steps; may be exchanged between steps.
        max_num_batched_tokens: Most tokens per step.
        times: Measures steps; may be exchanged between steps.
        constraints: Grammars of outputs.
        placement: Rows, pages, and slots for adapters.
        host_times: Seconds of host work in recent steps, waiting for the device not counted.
        is_frozen: Whether no step is planned: what runs and what waits stays as it is. Set between
            steps only.
        weight_version: Version of the weights, with which every token is marked. Set between
            steps only.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        tokenizer: Tokenizer | None,
        clock: Clock,
        metrics: EngineMetrics,
        eos_token_ids: Sequence[int],
        max_num_batched_tokens: int,
        max_num_queued_reqs: int | None = None,
        enable_prefix_caching: bool = True,
        overlap: bool = True,
        seed: int = 0,
        max_logprobs: int = 20,
        constraints: Constraints | None = None,
        speculator: Speculator | None = None,
        times: StepTimes | None = None,
        balancer: ExpertBalancer | None = None,
    ) -> None:
        """Start idle."""
        spec = runner.spec
        self.constraints = constraints or Constraints(refusal="structured outputs are switched off")
        intake = Intake(
            spec,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            max_logprobs=max_logprobs,
            seed=seed,
            constraints=self.constraints,
        )
        super().__init__(intake, metrics, max_num_queued_reqs=max_num_queued_reqs)
        self.runner = runner
        self.placement = Placement(runner, enable_prefix_caching=enable_prefix_caching)
        self.host_times: deque[float] = deque(maxlen=_HOST_TIME_WINDOW)
        self.is_frozen = False
        self.weight_version = FIRST_VERSION
        self.scheduler = scheduler
        self.times = times or StepTimes(clock, metrics)
        self._speculator = speculator
        self._balancer = balancer
        self._tokenizer = tokenizer
        self._clock = clock
        self._eos = frozenset(eos_token_ids)
        self.max_num_batched_tokens = max_num_batched_tokens
        self._overlap = overlap
        self._requests: dict[RequestId, _RequestState] = {}
        self._sequences: dict[int, SequenceState] = {}
        self._waiting: dict[int, SequenceState] = {}
        self._in_flight: Pending | None = None
        self._events: list[tuple[Sink, TokenEvent]] = []
        self._idle_calls: list[Callable[[], None]] = []
        self._num_failures = 0
        self._waited = 0.0
        self._seen: ReplicaView | None = None

    @property
    def pool(self) -> PagePools:
        """Page book-keeping."""
        return self.placement.pools

    @property
    def adapters(self) -> AdapterSlots:
        """Low-rank adapters on the device."""
        return self.placement.adapters

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return tuple(self._eos)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(
            self._inbox
            or self._in_flight
            or self._idle_calls
            or (self._sequences and not self.is_frozen)
        )

    @property
    def is_busy(self) -> bool:
        """Whether a step is on the device."""
        return self._in_flight is not None

    def report(self) -> EngineReport:
        """Tell what is going on; from any thread, without waiting for the loop."""
        view, members = self._seen, dict[tuple[str, int], SequenceView]()
        if view is not None and self._sequences:
            for seen in (*view.running, *view.waiting):
                sequence = self._sequences.get(seen.seq_id)  # may have ended since
                if sequence is not None:
                    members[sequence.request.request_id, sequence.index] = seen
        if view is None or not members:
            # Without adapters: only the loop may ask who holds them.
            view = self._view_of(self._clock.now(), (), (), frozenset())
        return EngineReport(view=view, members=members)

    # The loop: one thread ----------------------------------------------------------------------

    def step(self) -> None:
        """Do one turn."""
        start = time.perf_counter()
        self._waited = 0.0
        try:
            if self._overlap:
                self._overlapped_turn()
            else:
                self._plain_turn()
            if self._idle_calls and not self._num_open:
                self._settle()
                self.run_idle_calls()
            self._num_failures = 0
        except Exception as error:  # noqa: BLE001  whatever happens, other requests go on
            self._recover(error)
        if not self.has_work:
            self._record_step(())  # no later turn will tell that everything has ended
        self._emit()
        self.host_times.append(time.perf_counter() - start - self._waited)

    def stop(self, reason: str) -> None:
        """Accept nothing more, and end with an error what is left, also what has just come in.

        Args:
            reason: Why.
        """
        with self._admission:
            self.dead = reason
        self._take()
        self._fail_all(f"the engine has stopped: {reason}")
        self._emit()
        self.run_idle_calls()

    def _plain_turn(self) -> None:
        self._take()
        self._commit(self._launch(self._plan()))

    def _overlapped_turn(self) -> None:
        self._take()
        if self._in_flight is not None and self._in_flight.has_drafts:
            self._commit_in_flight()
        plan = self._plan()
        if self._in_flight is not None and any(work.num_draft for work in plan.work):
            self._commit_in_flight()
            plan = self._plan()
        before, self._in_flight = self._in_flight, None
        try:
            launched = self._launch(plan, before)
        finally:
            self._commit(before)
        self._in_flight = launched

    def _commit_in_flight(self) -> None:
        pending, self._in_flight = self._in_flight, None
        self._commit(pending)

    def _plan(self) -> StepPlan:
        if self.is_frozen:
            return StepPlan()
        view = self._seen = self._view()
        start = time.thread_time()
        plan = self.scheduler.plan(view)
        self.metrics.planned(time.thread_time() - start)
        return plan

    def _take(self) -> None:
        while self._inbox:
            verb, load = self._inbox.popleft()
            if verb == "submit":
                request, sink = load  # type: ignore[misc]
                self._accept(request, sink)
            elif verb == "cancel":
                self._abort(RequestId(str(load)))
            elif verb == "cancel_all":
                self.abort_all()
            elif verb == "forget":
                self.pool.forget()
            else:
                self._answer_call(verb, cast(Callable[[], None], load))
        for sequence, problem in self.constraints.settle():
            self._send_failure(sequence, problem)

    def _accept(self, request: Request, sink: Sink) -> None:
        if request.request_id in self._requests:
            message = f"request id {request.request_id!r} is already in use."
            self._refuse(request, sink, RequestError(message, param="request_id"))
            return
        try:
            sequences = self._intake.make_sequences(request)
        except Exception as error:  # noqa: BLE001  one bad request must not end the others
            self._refuse(request, sink, error)
            return
        impossible = self._objection(request, sequences[0])
        if impossible is not None:
            self._refuse(request, sink, impossible)
            return
        self._requests[request.request_id] = _RequestState(
            request=request, sink=sink, sequences=sequences, num_unfinished=len(sequences)
        )
        for sequence in sequences:
            self.placement.set_root(sequence)
            self._sequences[sequence.seq_id] = sequence
            self._waiting[sequence.seq_id] = sequence
            self.constraints.add(sequence)
            if self._speculator is not None:
                self._speculator.add(sequence)
            if request.output_token_ids:
                self._replay(sequence)

    def _objection(self, request: Request, sequence: SequenceState) -> RequestError | None:
        """Find the objective that not even an idle engine could keep, by what the policy knows."""
        slo, policy = request.slo, self.scheduler
        if slo is None or not isinstance(policy, Doorkeeper):
            return None
        self.placement.set_root(sequence)
        num_cached = len(self.placement.match(sequence)) * self.runner.spec.page_size
        refusal = policy.refusal(sequence.view(num_cached=num_cached))
        if refusal is None:
            return None
        self.metrics.declined(slo.tier, refusal.reason, is_served=False)
        self.metrics.judged(slo.tier, missed(slo))
        return RequestError(refusal.detail, param=f"slo.{refusal.objective}")

    def _replay(self, sequence: SequenceState) -> None:
        """Take output of an interrupted run in; it may have been complete already."""
        for token in sequence.request.output_token_ids:
            sequence.token_ids.append(token)
            reason, stop_reason, _text = judge(sequence, token, self._eos)
            if reason is not None:
                self._send(sequence, reason=reason, stop_reason=stop_reason)
                return

    def _refuse(self, request: Request, sink: Sink, problem: Exception) -> None:
        """End a request that turned out to be impossible after it had been taken in."""
        self._close(request.sampling.n)
        for index in range(request.sampling.n):
            event = TokenEvent(
                request_id=request.request_id,
                index=index,
                finish_reason=FinishReason.ERROR,
                num_prompt_tokens=len(request.prompt_token_ids),
                error=str(problem),
                error_param=_param(problem),
            )
            self._events.append((sink, event))

    def _view(self) -> ReplicaView:
        running = self.placement.running
        spec = self.runner.spec
        num_rows_free = spec.max_num_seqs - len(running)
        waiting = []
        for sequence in self._waiting.values():
            if not self._is_visible(sequence):
                continue
            cached = self.placement.match(sequence) if len(waiting) < num_rows_free else []
            waiting.append(sequence.view(num_cached=len(cached) * spec.page_size))
        return self._view_of(
            self.times.plan_time(),
            tuple(s.view(num_draft=self._num_draft(s)) for s in running),
            tuple(waiting),
            self.adapters.held,
        )

    def _view_of(
        self,
        now: float,
        running: tuple[SequenceView, ...],
        waiting: tuple[SequenceView, ...],
        adapters: frozenset[str],
    ) -> ReplicaView:
        spec = self.runner.spec
        return ReplicaView(
            now=now,
            running=running,
            waiting=waiting,
            num_free_pages=self.pool.num_free,
            num_pages=self.pool.num_pages,
            page_size=spec.page_size,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            adapters=adapters,
            max_loras=self.adapters.max_loras,
            draft_sizes=tuple(
                spec.groups * size
                for size in spec.shapes.draft_sizes(-(-len(running) // spec.groups))
            ),
        )

    def _num_draft(self, sequence: SequenceState) -> int:
        return 0 if self._speculator is None else self._speculator.offer(sequence)

    def _is_visible(self, sequence: SequenceState) -> bool:
        """Hide siblings until the first completion has computed the prompt that they share."""
        if sequence.seq_id in self.constraints.compiling:
            return False
        if sequence.num_in_flight:
            return False  # preempted with a token on its way: known after the next commit
        first = self._requests[sequence.request.request_id].sequences[0]
        return not self.placement.is_worth_waiting(sequence, first)

    # Carrying a plan out -----------------------------------------------------------------------

    def _take_up(self, plan: StepPlan) -> list[Item]:
        """Decline, preempt and admit as planned, and take pages for the work of the step."""
        declined = self._decline(plan)
        for seq_id in plan.preempt:
            self._preempt(self._sequences[seq_id])
        for seq_id in plan.admit:
            if seq_id not in declined:
                with contextlib.suppress(CapacityError):
                    self._admit(self._sequences[seq_id])
        items: list[Item] = []
        short: set[int] = set()
        for work in plan.work:
            if work.seq_id in declined:
                continue
            sequence = self._sequences[work.seq_id]
            num_tokens = min(work.num_tokens, sequence.num_tokens - sequence.num_computed)
            if num_tokens > 0 and sequence.phase is Phase.RUNNING:
                # Preempting a sequence frees only the pages that nobody shares. Work for which a
                # plan thus found too few pages is left out; the next plan sees what is free.
                try:
                    items.append(self._reserve(sequence, num_tokens, work.num_draft))
                except CapacityError:
                    short.add(self.placement.group_of(sequence))
        if self.runner.spec.groups > 1:
            self._relieve(short - {self.placement.group_of(item.sequence) for item in items})
        return items

    def _relieve(self, groups: Iterable[int]) -> None:
        """Preempt the latest sequence of groups in which all that was planned lacks pages.

        A policy counts the pages of all groups together, and may see room where a group has none.
        """
        for group in groups:
            members = self.placement.in_group(group)
            if not any(member.num_in_flight for member in members):
                self._preempt(max(members, key=lambda one: (one.request.arrival, one.seq_id)))

    def _launch(self, plan: StepPlan, before: Pending | None = None) -> Pending | None:
        items = self._take_up(plan)
        if items:
            self.placement.compact(items)
            if self._speculator is not None:
                self._speculator.fill(items)
        self._record_step(items)
        if not items:
            return None
        packed = build(
            items, self.placement.table, self.runner.spec.shapes, self.runner.choose_shape,
            groups=self.runner.spec.groups,
        )  # fmt: skip
        # The mask of a constrained row hangs on the token that the step before has yet to draw.
        # Only reading that token and writing masks happens while the device has nothing to do;
        # planning is done by now, and committing follows when this step runs.
        stuck = self.constraints.fill(packed, items, lambda: self._drawn(before))
        planned, load = self.times.planned, self.times.launched(items)
        pending = Pending(
            items=items,
            result=self.runner.run(packed),
            wants_logprobs=bool(packed.fields["any_logprobs"]),
            wants_candidates=bool(packed.fields["any_top_logprobs"]),
            load=load,
            shape=packed.shape,
            planned=planned,
        )
        bounds = chunk_bounds(items, self.runner.spec.num_rows)
        if bounds is not None:
            pending.pooled = self.runner.pool(pending.result.hidden, *bounds)
        for item in items:
            self._advance(item, pending)
        if self.placement.segments is not None:
            self.placement.segments.extend(item.sequence for item in items)
        for sequence, problem in stuck:
            self._send_failure(sequence, problem)
        return pending

    def _decline(self, plan: StepPlan) -> set[int]:
        """End the requests that the policy refuses, and count those that it promises nothing.

        A request is refused as a whole: none of its completions has begun.

        Returns:
            The sequences that have ended.
        """
        ended: set[int] = set()
        for rejection in plan.reject:
            if rejection.seq_id in ended:
                continue
            state = self._requests[self._sequences[rejection.seq_id].request.request_id]
            if state.request.slo is not None:
                tier = state.request.slo.tier
                self.metrics.declined(tier, rejection.reason, is_served=False)
            for sequence in state.sequences:
                if sequence.phase is not Phase.FINISHED:
                    ended.add(sequence.seq_id)
                    self._send(sequence, reason=FinishReason.DECLINED, rejection=rejection)
        for note in plan.unpromised:
            sequence = self._sequences.get(note.seq_id)
            if sequence is not None and sequence.index == 0 and sequence.request.slo is not None:
                self.metrics.declined(sequence.request.slo.tier, note.reason, is_served=True)
        return ended

    def _drawn(self, pending: Pending | None) -> dict[int, int]:
        """Wait for a step and tell the token of each sequence that drew one."""
        if pending is None:
            return {}
        start = time.perf_counter()
        tokens = np.asarray(pending.result.sampled.token)
        self._waited += time.perf_counter() - start
        return {i.sequence.seq_id: int(tokens[i.place]) for i in pending.items if i.is_sampled}

    # Between steps: called on the engine's thread through `call` ---------------------------------

    def _answer_call(self, verb: str, run: Callable[[], None]) -> None:
        if verb == "call when idle" and self._num_open:
            self._idle_calls.append(run)
            return
        try:
            self._settle()
        except Exception:
            self._inbox.appendleft((verb, run))  # still owed, once the failure has been dealt with
            raise
        run()

    def _settle(self) -> None:
        """Wait for the step on the device and send what it brings."""
        self._commit_in_flight()
        self._emit()

    def run_idle_calls(self) -> None:
        """Do now what was to be done when idle."""
        calls, self._idle_calls = self._idle_calls, []
        for run in calls:
            run()

    def abort_all(self) -> None:
        """End every request with reason `abort`."""
        for request_id in list(self._requests):
            self._abort(request_id)
        self._emit()

    def preempt_all(self) -> None:
        """Take row and pages from every running sequence; each is recomputed later."""
        for sequence in reversed(self.placement.running):
            self._preempt(sequence)

    def forget_now(self) -> None:
        """Empty the prefix cache."""
        self.pool.forget()

    def start_generation(self) -> None:
        """Cut the prefix cache off from everything computed so far, because the weights changed."""
        self.placement.start_generation(self._sequences.values())

    def drop_cache(self) -> None:
        """Free the device's cache; running sequences are preempted."""
        for sequence in self._sequences.values():
            sequence.is_stale = True  # nothing is worth keeping
        self.preempt_all()
        self.placement.clear()
        self.runner.drop_cache()

    # Coming, going, advancing -----------------------------------------------------------------

    def _preempt(self, sequence: SequenceState) -> None:
        logger.debug("preempting sequence %d", sequence.seq_id)
        self.placement.keep_prefix(sequence)
        self.placement.leave(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        # In front of everybody else who waits: it has been served before.
        self._waiting = {sequence.seq_id: sequence, **self._waiting}
        self.metrics.preempted()

    def _admit(self, sequence: SequenceState) -> None:
        self.placement.admit(sequence)
        del self._waiting[sequence.seq_id]
        if sequence.first_scheduled_time is None:
            self._keep_whole(sequence)
            sequence.first_scheduled_time = self._clock.now()
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
            self.metrics.admitted(
                prompt_len=sequence.prompt_len,
                num_cached=sequence.num_cached,
                queue_time=sequence.first_scheduled_time - sequence.request.arrival,
            )

    def _keep_whole(self, sequence: SequenceState) -> None:
        """Have no completion of a request refused any more once one of them has begun."""
        slo = sequence.declared_slo
        if slo is not None and slo.on_decline == "reject" and sequence.sampling.n > 1:
            for sibling in self._requests[sequence.request.request_id].sequences:
                sibling.declared_slo = dataclasses.replace(slo, on_decline="best_effort")

    def _reserve(self, sequence: SequenceState, num_tokens: int, num_draft: int) -> Item:
        if num_draft:
            known = 0 if sequence.num_in_flight else self._num_draft(sequence)
            num_draft = min(num_draft, known)
        return self.placement.reserve(sequence, num_tokens, num_draft)

    def _advance(self, item: Item, pending: Pending) -> None:
        sequence = item.sequence
        if sequence.wants_prompt_logprobs and item.prefill_start >= 0:
            pending.prompt_scores.append((item, self._score_prompt(item, pending.result)))
        sequence.num_computed += item.num_tokens
        if item.is_sampled:
            sequence.num_in_flight += 1
            sequence.has_device_token = True
        if item.prefill_start >= 0:
            self.placement.keep_prefix(sequence)
            if self._speculator is not None:
                self._speculator.read_prompt(sequence)

    def _score_prompt(self, item: Item, result: StepResult) -> Sampled:
        sequence = item.sequence
        targets = np.full(result.hidden.shape[0], -1, np.int32)
        following = sequence.token_ids[item.start + 1 : item.start + item.num_tokens + 1]
        targets[item.hidden_start : item.hidden_start + len(following)] = following
        return self.runner.prompt_logprobs(result.hidden, targets)

    def _record_step(self, items: Sequence[Item]) -> None:
        running = self.placement.running
        self.metrics.step(
            num_running=len(running),
            num_waiting=len(self._waiting),
            num_compiling=len(self.constraints.compiling),
            kv_usage=self.pool.num_held / self.pool.num_pages,
            num_tokens=sum(item.num_tokens + len(item.drafts) for item in items),
        )
        if self.adapters.max_loras:
            self.metrics.adapters(
                max_loras=self.adapters.max_loras,
                running=_adapter_names(running),
                waiting=_adapter_names(self._waiting.values()),
                now=self._clock.unix(),
            )

    # Results -----------------------------------------------------------------------------------

    def _commit(self, pending: Pending | None) -> None:
        if pending is None:
            return
        start = time.perf_counter()
        sampled = pending.result.sampled
        tokens = np.asarray(sampled.token)
        self._waited += time.perf_counter() - start
        logprobs = None
        if pending.wants_logprobs:
            logprobs = HostLogprobs(sampled, with_candidates=pending.wants_candidates)
        for item, scores in pending.prompt_scores:
            self._commit_prompt_scores(item, scores)
        record_reading(pending.result.reading, self.metrics)
        if pending.pooled is not None:
            self._commit_pooled(pending.items, pending.pooled)
        self.times.committed(pending.load, pending.shape, pending.planned)
        if self._balancer is not None:
            self._balancer.committed()
        now = self._clock.now()
        for item in pending.items:
            sequence = item.sequence
            if not item.is_sampled or sequence.phase is Phase.FINISHED:
                continue
            sequence.num_in_flight -= 1
            if sequence.request.pooling is not None:
                self._send(sequence, reason=FinishReason.STOP, pooled=sequence.pooled)
                continue
            places = pending.places(item, tokens)
            entries: list[TokenLogprobs] | None = None
            if logprobs is not None and sequence.sampling.logprobs is not None:
                count = sequence.sampling.logprobs
                entries = [logprobs.entry(i, int(tokens[i]), count, self._decoded) for i in places]
            self._commit_tokens(item, [int(tokens[place]) for place in places], entries, now)

    def _commit_tokens(
        self, item: Item, tokens: list[int], entries: list[TokenLogprobs] | None, now: float
    ) -> None:
        """Take in what a step brought: one token, or behind accepted drafts several."""
        sequence, num_accepted = item.sequence, len(tokens) - 1
        if self._speculator is not None:
            self._speculator.learn(sequence, item.drafts, tokens)
        sequence.num_computed += num_accepted
        if item.num_draft:
            self.placement.drop_surplus_pages(sequence)
        old_len, text = len(sequence.token_ids), ""
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for token in tokens:
            sequence.token_ids.append(token)
            reason, stop_reason, piece = judge(sequence, token, self._eos)
            text += piece
            if reason is not None:
                break
        count = len(sequence.token_ids) - old_len
        if self._speculator is not None and item.drafts:
            self._speculator.count(sequence, len(item.drafts), min(count, num_accepted))
        self._time_tokens(sequence, count, now)
        self._send(
            sequence,
            token_ids=tuple(tokens[:count]),
            text=text,
            logprobs=None if entries is None else tuple(entries[:count]),
            reason=reason,
            stop_reason=stop_reason,
        )
        # In pages a decode fills shareable pages as it goes; slots are copied out at the end.
        size = self.pool.page_size
        has_new_page = (len(sequence.token_ids) - 1) // size > (old_len - 1) // size
        if self.runner.spec.use_pages and has_new_page and sequence.row >= 0:
            self.placement.keep_prefix(sequence)

    def _time_tokens(self, sequence: SequenceState, count: int, now: float) -> None:
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            self.metrics.first_token(now - sequence.request.arrival)
            self.metrics.tokens(count, None)
        else:
            self.metrics.tokens(count, now - (sequence.last_token_time or now))
        sequence.last_token_time = now
        if sequence.slo is not None:
            for _ in range(count):
                sequence.slo.token(now)

    def _commit_prompt_scores(self, item: Item, scores: Sampled) -> None:
        sequence = item.sequence
        if sequence.phase is Phase.FINISHED:
            return
        start = time.perf_counter()
        host = HostLogprobs(scores, with_candidates=True)
        self._waited += time.perf_counter() - start
        wanted = sequence.sampling.prompt_logprobs or 0
        if item.start == 0:
            sequence.prompt_logprobs.append(None)
        for offset in range(item.num_tokens):
            position = item.start + offset + 1
            if position < sequence.prompt_len:
                token = sequence.token_ids[position]
                index = item.hidden_start + offset
                sequence.prompt_logprobs.append(host.entry(index, token, wanted, self._decoded))

    def _commit_pooled(self, items: Sequence[Item], pooled: Pooled) -> None:
        for item in items:
            sequence = item.sequence
            is_chunk = sequence.request.pooling is not None and item.prefill_start >= 0
            if is_chunk and sequence.phase is not Phase.FINISHED:
                collect(sequence, item, pooled)

    def _decoded(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token)

    def _send(
        self,
        sequence: SequenceState,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        error: str | None = None,
        error_param: str | None = None,
        pooled: np.ndarray | None = None,
        rejection: Rejection | None = None,
    ) -> None:
        state = self._requests[sequence.request.request_id]
        prompt_logprobs = None
        if sequence.wants_prompt_logprobs and token_ids:
            prompt_logprobs = tuple(sequence.prompt_logprobs)
            sequence.are_prompt_logprobs_sent = True
        times = None if reason is None else self._finish(sequence, reason)
        event = TokenEvent(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=sequence.prompt_len,
            num_cached_tokens=sequence.num_cached,
            weight_version=self.weight_version if token_ids else "",
            metrics=times,
            error=error,
            error_param=error_param,
            pooled=pooled,
            rejection=rejection,
            retry_after_s=None if rejection is None else self._retry_after(),
        )
        self._events.append((state.sink, event))

    def _send_failure(self, sequence: SequenceState, problem: Exception) -> None:
        param = _param(problem)
        reason = FinishReason.ERROR
        self._send(sequence, reason=reason, error=str(problem), error_param=param)

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> RequestMetrics:
        if sequence.phase is Phase.RUNNING and reason is not FinishReason.ERROR:
            self.placement.keep_prefix(sequence)
        self.placement.leave(sequence)
        self._waiting.pop(sequence.seq_id, None)
        del self._sequences[sequence.seq_id]
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        state = self._requests[sequence.request.request_id]
        state.num_unfinished -= 1
        self._close(1)
        if state.num_unfinished == 0:
            del self._requests[sequence.request.request_id]
        now = self._clock.now()
        times = RequestMetrics(
            arrival_time=sequence.request.arrival,
            first_scheduled_time=sequence.first_scheduled_time,
            first_token_time=sequence.first_token_time,
            last_token_time=sequence.last_token_time,
            finished_time=now,
            num_preemptions=sequence.num_preemptions,
            slo=self._judge_slo(sequence, state, now),
            spec_decode=None if sequence.drafting is None else sequence.drafting.totals,
        )
        self.metrics.finished(
            reason=reason,
            prompt_len=sequence.prompt_len,
            output_len=sequence.num_output - len(sequence.request.output_token_ids),
            metrics=times,
            sampling=sequence.sampling,
            index=sequence.index,
        )
        return times

    def _judge_slo(
        self, sequence: SequenceState, state: _RequestState, now: float
    ) -> SloOutcome | None:
        """Judge one completion, and count its request when all of them have ended."""
        slo = state.request.slo
        if slo is None or sequence.slo is None:
            return None
        is_whole = sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        outcome = sequence.slo.outcome(finished=now, is_whole=is_whole)
        state.slo = outcome if state.slo is None else state.slo.both(outcome)
        if state.num_unfinished == 0:
            self.metrics.judged(slo.tier, state.slo)
        return outcome

    def _abort(self, request_id: RequestId) -> None:
        state = self._requests.get(request_id)
        if state is None:
            return
        for sequence in list(state.sequences):
            if sequence.phase is not Phase.FINISHED:
                text = ""
                if sequence.detokenizer is not None:
                    text = sequence.detokenizer.finish()
                self._send(sequence, text=text, reason=FinishReason.ABORT)
        self._record_step(())

    def _emit(self) -> None:
        events, self._events = self._events, []
        for sink, event in events:
            try:
                sink(event)
            except Exception:
                logger.exception("the receiver of request %s failed", event.request_id)

    # When something breaks ---------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Fail what was under way, start from empty buffers, and go on; give up on repetition."""
        error = self.runner.explain(error)
        logger.error("a step failed; all requests under way end with an error", exc_info=error)
        self._num_failures += 1
        self._in_flight = None
        self.times.forget()
        self._fail_all(f"{type(error).__name__}: {error}")
        self.placement.clear()
        if self._num_failures >= _MAX_FAILURES:
            self.stop(f"{_MAX_FAILURES} steps in a row failed; the last error was: {error}")
            return
        try:
            self.runner.reset()
            self.adapters.reset()
            if self._balancer is not None:
                self._balancer.forget()
        except Exception as reset_error:  # noqa: BLE001
            self.stop(f"the device buffers cannot be rebuilt: {reset_error}")

    def _fail_all(self, message: str) -> None:
        for sequence in list(self._sequences.values()):
            self._send(sequence, reason=FinishReason.ERROR, error=message)


def _adapter_names(sequences: Iterable[SequenceState]) -> tuple[str, ...]:
    found = [s.request.adapter.lora_request.lora_name for s in sequences if s.request.adapter]
    return tuple(dict.fromkeys(found))
