"""The engine: requests in, token events out, one loop of five verbs.

take -> view and plan -> run -> commit -> emit. With overlap, the step before is committed while the
device already runs the next one: sampled tokens stay on the device and feed it, the view is one
turn old, and a sequence that has just ended may compute one token too many, which is dropped.

The scheduler decides, the engine obeys; the scheduler never sees a device array, the runner never
sees a request. Nothing that a request can cause raises out of `step`.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.cache.pages import PagePool, chain_hashes, salt_hash
from jaxserve.core.errors import CapacityError, EngineDeadError, RequestError, UnsupportedError
from jaxserve.core.event import FinishReason, Logprob, RequestMetrics, TokenEvent, TokenLogprobs
from jaxserve.core.plan import StepPlan
from jaxserve.core.protocols import Clock, Scheduler
from jaxserve.core.request import Request, RequestId, SamplingParams
from jaxserve.core.view import ReplicaView
from jaxserve.engine.batcher import Item, RowTable, build
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.runner import Runner, StepResult
from jaxserve.engine.sampler import MAX_BANNED, Sampled
from jaxserve.engine.sequence import Phase, SequenceState
from jaxserve.engine.tokenizer import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]
"""Where the events of one request go; called on the engine's thread, must not block."""

_MAX_FAILURES = 3
_MAX_SALT = 128
_HOST_TIME_WINDOW = 4096


@dataclass(slots=True, kw_only=True, eq=False)
class _RequestState:
    """A request with its completions."""

    request: Request
    sink: Sink
    sequences: list[SequenceState]
    num_unfinished: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A step on the device."""

    items: list[Item]
    result: StepResult
    wants_logprobs: bool
    wants_candidates: bool
    prompt_scores: list[tuple[Item, Sampled]] = field(default_factory=list)


class Engine:
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

    Attributes:
        pool: Page book-keeping.
        metrics: Counters.
        host_times: Seconds of host work in recent steps, waiting for the device not counted.
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
    ) -> None:
        """Start idle."""
        spec = runner.spec
        self.runner = runner
        self.metrics = metrics
        self.pool = PagePool(spec.num_pages, spec.page_size)
        self.host_times: deque[float] = deque(maxlen=_HOST_TIME_WINDOW)
        self.dead: str | None = None
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._clock = clock
        self._eos = tuple(eos_token_ids)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_queued = max_num_queued_reqs
        self._caching = enable_prefix_caching
        self._overlap = overlap
        self._max_logprobs = max_logprobs
        self._rng = np.random.default_rng(seed)
        self._inbox: deque[tuple[str, object]] = deque()
        self._admission = threading.Lock()
        self._num_open = 0
        self._requests: dict[RequestId, _RequestState] = {}
        self._sequences: dict[int, SequenceState] = {}
        self._waiting: dict[int, SequenceState] = {}
        self._rows: list[SequenceState | None] = [None] * spec.max_num_seqs
        self._table = RowTable(spec.max_num_seqs)
        self._dirty_bias: set[int] = set()
        self._in_flight: _Pending | None = None
        self._events: list[tuple[Sink, TokenEvent]] = []
        self._next_id = 0
        self._num_failures = 0
        self._waited = 0.0

    # The way in: any thread --------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Completions that have been accepted and have not ended."""
        return self._num_open

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inbox or self._sequences or self._in_flight)

    @property
    def is_busy(self) -> bool:
        """Whether a step is on the device."""
        return self._in_flight is not None

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request, or refuse it at once.

        Args:
            request: What to do.
            sink: Receives its events; the last one of every completion has a finish reason.

        Raises:
            RequestError: If it can never be served.
            CapacityError: If too many completions are under way.
            EngineDeadError: If the engine has stopped.
        """
        self._check(request)
        count = request.sampling.n
        with self._admission:
            if self.dead is not None:
                raise EngineDeadError(f"the engine has stopped: {self.dead}")
            if self._max_queued is not None and self._num_open + count > self._max_queued:
                self.metrics.rejected("max_num_queued_reqs")
                raise CapacityError(
                    f"{self._num_open} completions are under way and at most {self._max_queued} "
                    f"are accepted; {count} more were asked for. Try again later.",
                    retry_after_s=self._retry_after(),
                )
            self._num_open += count
            self._inbox.append(("submit", (request, sink)))

    def cancel(self, request_id: str) -> None:
        """Ask for a request to end; its completions finish with reason `abort`."""
        self._inbox.append(("cancel", request_id))

    def cancel_all(self) -> None:
        """Ask for every request to end."""
        self._inbox.append(("cancel_all", None))

    def forget_prefixes(self) -> None:
        """Ask for the prefix cache to be emptied."""
        self._inbox.append(("forget", None))

    def _retry_after(self) -> float:
        done = self.metrics.e2e_latency
        return max(1.0, round(done.mean, 0)) if done.count else 1.0

    def _check(self, request: Request) -> None:
        spec, sampling = self.runner.spec, request.sampling
        prompt_len = len(request.prompt_token_ids)
        vocab = spec.config.vocab_size
        if prompt_len == 0:
            raise RequestError("the prompt is empty; give at least one token.", param="prompt")
        limit = min(spec.max_model_len, spec.num_pages * spec.page_size)
        if prompt_len >= limit:
            raise RequestError(
                f"this engine's maximum context length is {limit} tokens, but the prompt has "
                f"{prompt_len}, which leaves no room for an output token. Shorten the prompt.",
                param="prompt",
            )
        low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if low < 0 or high >= vocab:
            raise RequestError(
                f"token ids must be in [0, {vocab}), got {low if low < 0 else high}.",
                param="prompt",
            )
        self._check_tokens(sampling, vocab)
        for name in ("logprobs", "prompt_logprobs"):
            wanted, limit = getattr(sampling, name), self._max_logprobs
            if wanted is not None and limit >= 0 and not 0 <= wanted <= limit:
                raise RequestError(
                    f"{name} must be at most {limit}, got {wanted}; start with a larger "
                    "--max-logprobs.",
                    param=name,
                )
        if len(request.cache_salt) > _MAX_SALT:
            raise RequestError(
                f"cache_salt must have at most {_MAX_SALT} characters, got "
                f"{len(request.cache_salt)}.",
                param="cache_salt",
            )
        if self._tokenizer is None and sampling.stop:
            raise RequestError("stop strings need a tokenizer.", param="stop")

    def _check_tokens(self, sampling: SamplingParams, vocab: int) -> None:
        named = {
            "logit_bias": sampling.logit_bias or (),
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, ids in named.items():
            bad = [i for i in ids if not 0 <= i < vocab]
            if bad:
                raise RequestError(
                    f"{name} must hold ids in [0, {vocab}), got {bad[0]}.", param=name
                )
        num_stops = len(sampling.stop_token_ids) + len(self._eos)
        if sampling.min_tokens and num_stops > MAX_BANNED:
            raise RequestError(
                f"min_tokens works with at most {MAX_BANNED} stop tokens, got {num_stops}.",
                param="stop_token_ids",
            )
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
        if sampling.min_tokens and stops.issuperset(sampling.allowed_token_ids or (-1,)):
            raise RequestError(
                "allowed_token_ids holds stop tokens only, which "
                f"min_tokens={sampling.min_tokens} forbids at first; allow another token.",
                param="allowed_token_ids",
            )

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

    def _plain_turn(self) -> None:
        self._take()
        plan = self._scheduler.plan(self._view())
        self._commit(self._launch(plan))

    def _overlapped_turn(self) -> None:
        self._take()
        plan = self._scheduler.plan(self._view())
        before, self._in_flight = self._in_flight, None
        try:
            launched = self._launch(plan)
        finally:
            self._commit(before)
        self._in_flight = launched

    def _take(self) -> None:
        while self._inbox:
            verb, load = self._inbox.popleft()
            if verb == "submit":
                request, sink = load  # type: ignore[misc]
                self._accept(request, sink)
            elif verb == "cancel":
                self._abort(RequestId(str(load)))
            elif verb == "cancel_all":
                for request_id in list(self._requests):
                    self._abort(request_id)
            else:
                self.pool.forget()

    def _accept(self, request: Request, sink: Sink) -> None:
        if request.request_id in self._requests:
            self._refuse(request, sink, f"request id {request.request_id!r} is already in use.")
            return
        try:
            sequences = [self._make_sequence(request, i) for i in range(request.sampling.n)]
        except Exception as error:  # noqa: BLE001  one bad request must not end the others
            self._refuse(request, sink, str(error))
            return
        self._requests[request.request_id] = _RequestState(
            request=request, sink=sink, sequences=sequences, num_unfinished=len(sequences)
        )
        for sequence in sequences:
            self._sequences[sequence.seq_id] = sequence
            self._waiting[sequence.seq_id] = sequence

    def _refuse(self, request: Request, sink: Sink, message: str) -> None:
        """End a request that turned out to be impossible after it had been taken in."""
        with self._admission:
            self._num_open -= request.sampling.n
        for index in range(request.sampling.n):
            event = TokenEvent(
                request_id=request.request_id,
                index=index,
                finish_reason=FinishReason.ERROR,
                num_prompt_tokens=len(request.prompt_token_ids),
                error=message,
            )
            self._events.append((sink, event))

    def _make_sequence(self, request: Request, index: int) -> SequenceState:
        spec, sampling = self.runner.spec, request.sampling
        prompt_len = len(request.prompt_token_ids)
        limit = min(spec.max_model_len, spec.num_pages * spec.page_size)
        if sampling.max_tokens is not None:
            limit = min(limit, prompt_len + sampling.max_tokens)
        if sampling.seed is None:
            seed = int(self._rng.integers(0, 2**63))
        else:
            seed = (sampling.seed + index) % 2**64
        stops = frozenset(sampling.stop_token_ids)
        detokenizer = None
        if self._tokenizer is not None and sampling.detokenize:
            detokenizer = Detokenizer(
                self._tokenizer,
                prompt_ids=request.prompt_token_ids,
                skip_special_tokens=sampling.skip_special_tokens,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                min_tokens=sampling.min_tokens,
            )
        self._next_id += 1
        return SequenceState(
            seq_id=self._next_id,
            request=request,
            index=index,
            sampling=sampling,
            max_total_len=limit,
            stop_ids=stops if sampling.ignore_eos else stops | frozenset(self._eos),
            detokenizer=detokenizer,
            prompt_len=prompt_len,
            seed_words=(seed >> 32, seed & 0xFFFFFFFF),
            root_hash=salt_hash(request.cache_salt),
            token_ids=list(request.prompt_token_ids),
        )

    def _view(self) -> ReplicaView:
        running = [s for s in self._rows if s is not None]
        spec = self.runner.spec
        num_rows_free = spec.max_num_seqs - len(running)
        waiting = []
        for sequence in self._waiting.values():
            if not self._is_visible(sequence):
                continue
            cached = self._match(sequence) if len(waiting) < num_rows_free else []
            waiting.append(sequence.view(num_cached=len(cached) * spec.page_size))
        return ReplicaView(
            now=self._clock.now(),
            running=tuple(s.view() for s in running),
            waiting=tuple(waiting),
            num_free_pages=self.pool.num_free,
            num_pages=self.pool.num_pages,
            page_size=spec.page_size,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def _is_visible(self, sequence: SequenceState) -> bool:
        """Hide siblings until the first completion has computed the prompt that they share."""
        if sequence.num_in_flight:
            return False  # preempted with a token on its way: known after the next commit
        if sequence.index == 0 or not self._caching:
            return True
        if sequence.prompt_len <= self.pool.page_size:
            return True
        first = self._requests[sequence.request.request_id].sequences[0]
        return first.phase is Phase.FINISHED or first.num_computed >= first.prompt_len

    def _match(self, sequence: SequenceState) -> list[int]:
        """Find cached pages for a waiting sequence; at least one token is left to compute."""
        if not self._caching or sequence.wants_prompt_logprobs:
            return []
        self._hash(sequence)
        usable = (len(sequence.token_ids) - 1) // self.pool.page_size
        return self.pool.match(sequence.hashes[:usable])

    def _hash(self, sequence: SequenceState) -> None:
        if len(sequence.hashes) < len(sequence.token_ids) // self.pool.page_size:
            sequence.hashes = chain_hashes(
                sequence.token_ids,
                self.pool.page_size,
                root=sequence.root_hash,
                parents=sequence.hashes,
            )

    # Carrying a plan out -----------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> _Pending | None:
        for seq_id in plan.preempt:
            self._preempt(self._sequences[seq_id])
        for seq_id in plan.admit:
            with contextlib.suppress(CapacityError):
                self._admit(self._sequences[seq_id])
        items: list[Item] = []
        for work in plan.work:
            if work.num_draft:
                raise UnsupportedError("this engine does not verify draft tokens.")
            sequence = self._sequences[work.seq_id]
            num_tokens = min(work.num_tokens, sequence.num_tokens - sequence.num_computed)
            if num_tokens > 0 and sequence.phase is Phase.RUNNING:
                # Preempting a sequence frees only the pages that nobody shares. Work for which a
                # plan thus found too few pages is left out; the next plan sees what is free.
                with contextlib.suppress(CapacityError):
                    items.append(self._reserve(sequence, num_tokens))
        self._record_step(items)
        if not items:
            return None
        self._compact(items)
        packed = build(items, self._table, self.runner.spec.shapes, self.runner.choose_shape)
        pending = _Pending(
            items=items,
            result=self.runner.run(packed),
            wants_logprobs=bool(packed.fields["any_logprobs"]),
            wants_candidates=bool(packed.fields["any_top_logprobs"]),
        )
        for item in items:
            self._advance(item, pending)
        return pending

    def _preempt(self, sequence: SequenceState) -> None:
        logger.debug("preempting sequence %d", sequence.seq_id)
        self._keep_prefix(sequence)
        self._leave_row(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        # In front of everybody else who waits: it has been served before.
        self._waiting = {sequence.seq_id: sequence, **self._waiting}
        self.metrics.preempted()

    def _admit(self, sequence: SequenceState) -> None:
        pages = self._match(sequence)
        total = -(-sequence.num_tokens // self.pool.page_size)
        self.pool.hold(pages)
        try:
            fresh = self.pool.take(total - len(pages))
        except CapacityError:
            self.pool.release(pages)
            raise
        row = self._rows.index(None)
        self._rows[row] = sequence
        sequence.row = row
        sequence.phase = Phase.RUNNING
        sequence.pages = [*pages, *fresh]
        sequence.num_named = len(pages)
        sequence.num_computed = len(pages) * self.pool.page_size
        sequence.prompt_logprobs = []
        del self._waiting[sequence.seq_id]
        if pages and not self.runner.spec.use_pages:
            self.runner.load_pages([(row, block, page) for block, page in enumerate(pages)])
        self._set_up_row(sequence)
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = self._clock.now()
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
            self.metrics.admitted(
                prompt_len=sequence.prompt_len,
                num_cached=sequence.num_cached,
                queue_time=sequence.first_scheduled_time - sequence.request.arrival,
            )

    def _set_up_row(self, sequence: SequenceState) -> None:
        sampling, row = sequence.sampling, sequence.row
        self._table.set(row, sampling, sequence.seed_words)
        if not (sampling.needs_penalties or sampling.needs_bias or row in self._dirty_bias):
            return
        vocab = self.runner.spec.config.vocab_size
        output = np.asarray(sequence.token_ids[sequence.prompt_len :], np.int64)
        seen = np.zeros(vocab, bool)
        seen[np.asarray(sequence.token_ids[: sequence.prompt_len])] = True
        bias = np.zeros(vocab, np.float32)
        if sampling.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(sampling.allowed_token_ids)] = 0
        for token, value in (sampling.logit_bias or {}).items():
            bias[token] += value
        self.runner.set_row(row, np.bincount(output, minlength=vocab), seen, bias)
        if sampling.needs_bias:
            self._dirty_bias.add(row)
        else:
            self._dirty_bias.discard(row)

    def _reserve(self, sequence: SequenceState, num_tokens: int) -> Item:
        end = sequence.num_computed + num_tokens
        missing = -(-end // self.pool.page_size) - len(sequence.pages)
        if missing > 0:
            sequence.pages.extend(self.pool.take(missing))
        return Item(
            sequence=sequence,
            row=sequence.row,
            start=sequence.num_computed,
            num_tokens=num_tokens,
            is_sampled=end == len(sequence.token_ids) + sequence.num_in_flight
            and sequence.has_length_left,
        )

    def _compact(self, items: list[Item]) -> None:
        """Move sequences from high rows into holes where that makes the step smaller."""
        shapes = self.runner.spec.shapes
        while True:
            occupied = [i for i, s in enumerate(self._rows) if s is not None]
            if shapes.row_bucket(occupied[-1] + 1) <= shapes.row_bucket(len(occupied)):
                break
            source, target = occupied[-1], self._rows.index(None)
            sequence = self._rows[source]
            if sequence is None:
                raise AssertionError("an occupied row holds a sequence")
            self.runner.move_row(source, target, sequence.num_computed)
            self._table.move(source, target)
            if source in self._dirty_bias:
                self._dirty_bias.add(target)
            else:
                self._dirty_bias.discard(target)
            self._rows[target], self._rows[source] = sequence, None
            sequence.row = target
        for item in items:
            item.row = item.sequence.row

    def _advance(self, item: Item, pending: _Pending) -> None:
        sequence = item.sequence
        if sequence.wants_prompt_logprobs and item.prefill_start >= 0:
            pending.prompt_scores.append((item, self._score_prompt(item, pending.result)))
        sequence.num_computed += item.num_tokens
        if item.is_sampled:
            sequence.num_in_flight += 1
            sequence.has_device_token = True
        if item.prefill_start >= 0:
            self._keep_prefix(sequence)

    def _score_prompt(self, item: Item, result: StepResult) -> Sampled:
        sequence = item.sequence
        targets = np.full(result.hidden.shape[0], -1, np.int32)
        following = sequence.token_ids[item.start + 1 : item.start + item.num_tokens + 1]
        targets[item.prefill_start : item.prefill_start + len(following)] = following
        return self.runner.prompt_logprobs(result.hidden, targets)

    def _keep_prefix(self, sequence: SequenceState) -> None:
        """Make the full pages whose tokens are known available to others."""
        if not self._caching:
            return
        self._hash(sequence)
        known = min(sequence.num_computed, len(sequence.token_ids)) // self.pool.page_size
        moves: list[tuple[int, int, int]] = []
        for block in range(sequence.num_named, known):
            page, digest = sequence.pages[block], sequence.hashes[block]
            if self.pool.name(page, digest):
                moves.append((sequence.row, block, page))
        sequence.num_named = max(sequence.num_named, known)
        if moves and not self.runner.spec.use_pages:
            self.runner.save_pages(moves)

    def _leave_row(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_named = 0
        sequence.has_device_token = False
        if sequence.row >= 0:
            self._rows[sequence.row] = None
            self._table.clear(sequence.row)
            sequence.row = -1

    def _record_step(self, items: Sequence[Item]) -> None:
        running = sum(s is not None for s in self._rows)
        self.metrics.step(
            num_running=running,
            num_waiting=len(self._waiting),
            kv_usage=self.pool.num_held / self.pool.num_pages,
            num_tokens=sum(item.num_tokens for item in items),
        )

    # Results -----------------------------------------------------------------------------------

    def _commit(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        start = time.perf_counter()
        sampled = pending.result.sampled
        tokens = np.asarray(sampled.token)
        self._waited += time.perf_counter() - start
        logprobs = _HostLogprobs(sampled, pending) if pending.wants_logprobs else None
        for item, scores in pending.prompt_scores:
            self._commit_prompt_scores(item, scores)
        now = self._clock.now()
        for item in pending.items:
            sequence = item.sequence
            if not item.is_sampled or sequence.phase is Phase.FINISHED:
                continue
            sequence.num_in_flight -= 1
            token = int(tokens[item.row])
            entry = None
            if logprobs is not None and sequence.sampling.logprobs is not None:
                entry = logprobs.entry(item.row, token, sequence.sampling.logprobs, self._decoded)
            self._commit_token(sequence, token, entry, now)

    def _commit_token(
        self, sequence: SequenceState, token: int, entry: TokenLogprobs | None, now: float
    ) -> None:
        sequence.token_ids.append(token)
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            self.metrics.first_token(now - sequence.request.arrival)
            self.metrics.tokens(1, None)
        else:
            self.metrics.tokens(1, now - (sequence.last_token_time or now))
        sequence.last_token_time = now
        reason, stop_reason, text = self._judge(sequence, token)
        self._send(
            sequence,
            token_ids=(token,),
            text=text,
            logprobs=None if entry is None else (entry,),
            reason=reason,
            stop_reason=stop_reason,
        )
        # In pages a decode fills shareable pages as it goes; slots are copied out at the end.
        has_new_page = len(sequence.token_ids) % self.pool.page_size == 1
        if self.runner.spec.use_pages and has_new_page and sequence.row >= 0:
            self._keep_prefix(sequence)

    def _judge(
        self, sequence: SequenceState, token: int
    ) -> tuple[FinishReason | None, int | str | None, str]:
        """Tell whether a new token ends its sequence, and what text it brings."""
        sampling, detokenizer = sequence.sampling, sequence.detokenizer
        is_stop = token in sequence.stop_ids and sequence.num_output > sampling.min_tokens
        text = ""
        if detokenizer is not None and (not is_stop or sampling.include_stop_str_in_output):
            text = detokenizer.push((token,))
            if detokenizer.matched_stop is not None:
                return FinishReason.STOP, detokenizer.matched_stop, text
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if is_stop:
            reason = FinishReason.STOP
            stop_reason = token if token in sampling.stop_token_ids else None
        elif len(sequence.token_ids) >= sequence.max_total_len:
            reason = FinishReason.LENGTH
        if reason is not None and detokenizer is not None:
            text += detokenizer.finish()
            if detokenizer.matched_stop is not None:
                return FinishReason.STOP, detokenizer.matched_stop, text
        return reason, stop_reason, text

    def _commit_prompt_scores(self, item: Item, scores: Sampled) -> None:
        sequence = item.sequence
        if sequence.phase is Phase.FINISHED:
            return
        start = time.perf_counter()
        host = _HostLogprobs(scores, None)
        self._waited += time.perf_counter() - start
        wanted = sequence.sampling.prompt_logprobs or 0
        if item.start == 0:
            sequence.prompt_logprobs.append(None)
        for offset in range(item.num_tokens):
            position = item.start + offset + 1
            if position < sequence.prompt_len:
                token = sequence.token_ids[position]
                index = item.prefill_start + offset
                sequence.prompt_logprobs.append(host.entry(index, token, wanted, self._decoded))

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
            metrics=times,
            error=error,
        )
        self._events.append((state.sink, event))

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> RequestMetrics:
        if sequence.phase is Phase.RUNNING and reason is not FinishReason.ERROR:
            self._keep_prefix(sequence)
        self._leave_row(sequence)
        self._waiting.pop(sequence.seq_id, None)
        del self._sequences[sequence.seq_id]
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        state = self._requests[sequence.request.request_id]
        state.num_unfinished -= 1
        with self._admission:
            self._num_open -= 1
        if state.num_unfinished == 0:
            del self._requests[sequence.request.request_id]
        times = RequestMetrics(
            arrival_time=sequence.request.arrival,
            first_scheduled_time=sequence.first_scheduled_time,
            first_token_time=sequence.first_token_time,
            last_token_time=sequence.last_token_time,
            finished_time=self._clock.now(),
            num_preemptions=sequence.num_preemptions,
        )
        self.metrics.finished(
            reason=reason,
            prompt_len=sequence.prompt_len,
            output_len=sequence.num_output,
            metrics=times,
            sampling=sequence.sampling,
            index=sequence.index,
        )
        return times

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
        logger.error("a step failed; all requests under way end with an error", exc_info=error)
        self._num_failures += 1
        self._in_flight = None
        self._fail_all(f"{type(error).__name__}: {error}")
        spec = self.runner.spec
        self._rows = [None] * spec.max_num_seqs
        self._table = RowTable(spec.max_num_seqs)
        self._dirty_bias.clear()
        self.pool = PagePool(spec.num_pages, spec.page_size)
        if self._num_failures >= _MAX_FAILURES:
            self.stop(f"{_MAX_FAILURES} steps in a row failed; the last error was: {error}")
            return
        try:
            self.runner.reset()
        except Exception as reset_error:  # noqa: BLE001
            self.stop(f"the device buffers cannot be rebuilt: {reset_error}")

    def _fail_all(self, message: str) -> None:
        for sequence in list(self._sequences.values()):
            self._send(sequence, reason=FinishReason.ERROR, error=message)


class _HostLogprobs:
    """Log-probabilities of one step, fetched from the device."""

    def __init__(self, sampled: Sampled, pending: _Pending | None) -> None:
        self._logprob = np.asarray(sampled.logprob)
        self._rank = np.asarray(sampled.rank)
        self._tokens: np.ndarray | None = None
        self._values: np.ndarray | None = None
        if pending is None or pending.wants_candidates:
            self._tokens = np.asarray(sampled.top_token)
            self._values = np.asarray(sampled.top_logprob)

    def entry(
        self, index: int, token: int, count: int, decoded: Callable[[int], str | None]
    ) -> TokenLogprobs:
        """Build the entry of one token: itself first, then the `count` most likely ones."""
        own = Logprob(
            logprob=float(self._logprob[index]),
            rank=int(self._rank[index]),
            decoded_token=decoded(token),
        )
        entry = {token: own}
        if self._tokens is None or self._values is None:
            return entry
        number = self._tokens.shape[1] if count < 0 else min(count, self._tokens.shape[1])
        for rank in range(number):
            candidate = int(self._tokens[index, rank])
            if candidate not in entry:
                entry[candidate] = Logprob(
                    logprob=float(self._values[index, rank]),
                    rank=rank + 1,
                    decoded_token=decoded(candidate),
                )
        return entry
