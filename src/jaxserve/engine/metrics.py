"""Counters, gauges and histograms of one engine, and their Prometheus text.

The engine thread calls the verbs; any other thread may read the attributes or render a page. Names,
labels and bucket bounds are those that dashboards of the field already use.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxserve.core.event import FinishReason, RequestMetrics, SloOutcome
from jaxserve.core.request import SamplingParams

SleepState = Literal["awake", "weights_offloaded", "discard_all"]

PREFIX = "jaxserve"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
GRAMMAR_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
UPDATE_BUCKETS = (0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
N_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
POLICY_BUCKETS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1,
    1.0,
)  # fmt: skip
MAX_TIERS = 64
"""Tiers counted by name; requests choose the names, and every name is kept for ever."""
OTHER_TIERS = "other"
SLO_ATTAINED, SLO_MISSED = "slo_attained_total", "slo_missed_total"


def one_two_five_buckets(max_value: int) -> tuple[int, ...]:
    """Return the series 1, 2, 5, 10, 20, 50, ... up to a bound.

    Args:
        max_value: Largest bucket bound allowed; at least 1.

    Source: vLLM's buckets for lengths in tokens.

    >>> one_two_five_buckets(100)
    (1, 2, 5, 10, 20, 50, 100)
    """
    bounds: list[int] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > max_value:
                return tuple(bounds)
            bounds.append(digit * scale)
        scale *= 10


class Histogram:
    """Observations sorted into buckets with fixed upper bounds; not locked by itself.

    Attributes:
        bounds: Upper bounds, rising; a last bucket without a bound is implied.
        counts: Observations per bucket, not cumulative; one longer than `bounds`.
        total: Sum of all observations.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Average observation; 0 when there is none."""
        count = self.count
        return self.total / count if count else 0.0

    def observe(self, value: float) -> None:
        """Add one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        """Return an independent copy."""
        twin = Histogram(self.bounds)
        twin.counts = list(self.counts)
        twin.total = self.total
        return twin


@dataclass(frozen=True, slots=True)
class Family:
    """One metric as it stands on the page: labelled numbers, or one histogram with labels.

    Attributes:
        name: Its name, without a prefix.
        kind: `counter`, `gauge` or `histogram`.
        text: What it says.
        values: Numbers, each with labels of its own.
        histogram: Observations; then `values` hold labels only.
        has_engine_label: Whether engines are told apart; otherwise their numbers are added up.
    """

    name: str
    kind: str
    text: str
    values: Sequence[tuple[Mapping[str, str], float]] = ()
    histogram: Histogram | None = None
    has_engine_label: bool = True


class EngineMetrics:
    """What an engine counts and times.

    Verbs are called by the engine thread, each costing about a microsecond. One lock makes every
    page of `render` a consistent picture; it is held only while numbers are copied.

    Args:
        max_model_len: Bounds the buckets of the length histograms.
        cache_config: Facts about the cache (page size, number of pages, ...), published as labels.
        engine: Index of the engine, the value of the label `engine`.
        num_speculative_tokens: Most tokens per draft; with 0, nothing is said about drafts.
        has_sparse: Whether attention may be sparse; otherwise nothing is said about it.
        has_balance: Whether experts move between devices; otherwise nothing is said about it.

    Attributes:
        num_running: Sequences that hold a row of the batch.
        num_waiting: Sequences that wait for one, or for their grammar.
        num_compiling: Those of them that wait for their grammar.
        num_grammar_failures: Grammars that did not compile.
        kv_usage: Share of the pages in use, 0 to 1.
        num_steps: Steps taken.
        num_compilations: Step shapes compiled, warm-up included.
        compile_seconds: Seconds spent on that.
        num_preemptions: Sequences that lost their pages.
        prompt_tokens: Prompt tokens of admitted sequences.
        cached_tokens: Those of them that the prefix cache supplied.
        generation_tokens: Tokens generated.
        finished_by_reason: Ended completions per finish reason.
        rejections: Refused requests per reason.
        weight_version: Version of the weights.
        num_weight_updates: How often they have been changed.
        weight_update_time: Seconds per change, from the call to the swap.
        sleep_state: `awake`, `weights_offloaded` or `discard_all`.
        num_drafts: Drafts verified, one per sequence and step.
        num_draft_tokens: Their tokens.
        num_accepted_tokens: Draft tokens that became output.
        accepted_per_position: Those of them per place in their draft, counted from 0.
        sparse_tokens_read: Tokens that key-value heads have read in decodes with sparse attention.
        sparse_tokens_there: Tokens that they would have read without it.
        sparse_heads: How many heads that were, over rows, layers and steps.
        sparse_mass: Estimated share of the mass that they have read, summed over them.
        measured_heads: Query heads whose share of the mass was measured.
        measured_mass: These shares, summed.
        missed_heads: Those of them that fell short of their target by more than 0.02.
        imbalance: Work of the busiest device over the mean, of the loads seen last, over layers:
            where experts lay, and where they lie since.
        num_rebalances: How often experts have moved.
        num_moved_experts: Slots that got another expert thereby.
        slo_attained: Requests that kept an objective, per (tier, objective). The objective
            `request` stands for all of a request's together.
        slo_missed: Requests that did not keep it, refused and aborted ones included.
        slo_declined: Requests that got no promise, per (tier, reason, outcome): `refused`, or
            served as `best_effort`.
        policy_time: Seconds of processor time per plan.
        policy_fallbacks: Steps that another policy planned, per reason.
        drift: Times of steps over those that the cost model predicts; 1 without a model.
        is_drift_alarming: Whether that has been far from 1 for a while.

    Source: metric names, labels and buckets of vLLM, under our own prefix.
    """

    def __init__(
        self,
        *,
        max_model_len: int = 8192,
        cache_config: Mapping[str, object] | None = None,
        engine: int = 0,
        num_speculative_tokens: int = 0,
        has_sparse: bool = False,
        has_balance: bool = False,
    ) -> None:
        """Start with everything at zero."""
        self._lock = threading.Lock()
        self._engine = str(engine)
        self._cache_config = {name: str(value) for name, value in (cache_config or {}).items()}
        self.num_running = 0
        self.num_waiting = 0
        self.num_compiling = 0
        self.num_grammar_failures = 0
        self.kv_usage = 0.0
        self.num_steps = 0
        self.num_compilations = 0
        self.compile_seconds = 0.0
        self.num_preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished_by_reason: Counter[str] = Counter(
            {reason.value: 0 for reason in FinishReason}
        )
        self.rejections: Counter[str] = Counter({"max_num_queued_reqs": 0, "paused": 0})
        self.weight_version = "0"
        self._adapters: tuple[int, tuple[str, ...], tuple[str, ...], float] | None = None
        self.num_weight_updates = 0
        self.weight_update_time = Histogram(UPDATE_BUCKETS)
        self.sleep_state: SleepState = "awake"
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_per_position: list[int] = [0] * num_speculative_tokens
        self._has_sparse = has_sparse
        self.sparse_tokens_read = 0
        self.sparse_tokens_there = 0
        self.sparse_heads = 0
        self.sparse_mass = 0.0
        self.measured_heads = 0
        self.measured_mass = 0.0
        self.missed_heads = 0
        self._has_balance = has_balance
        self.imbalance = (1.0, 1.0)
        self.num_rebalances = 0
        self.num_moved_experts = 0
        self.slo_attained: Counter[tuple[str, str]] = Counter()
        self.slo_missed: Counter[tuple[str, str]] = Counter()
        self.slo_declined: Counter[tuple[str, str, str]] = Counter()
        self.policy_fallbacks: Counter[str] = Counter({"error": 0, "late": 0, "invalid": 0})
        self.drift = 1.0
        self.is_drift_alarming = False
        self._tiers: set[str] = set()
        self._make_histograms(max_model_len)

    def _make_histograms(self, max_model_len: int) -> None:
        lengths = one_two_five_buckets(max(1, max_model_len))
        self.iteration_tokens = Histogram(ITERATION_BUCKETS)
        self.policy_time = Histogram(POLICY_BUCKETS)
        self.grammar_time = Histogram(GRAMMAR_BUCKETS)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.tpot = Histogram(ITL_BUCKETS)
        self.e2e_latency = Histogram(LATENCY_BUCKETS)
        self.queue_time = Histogram(LATENCY_BUCKETS)
        self.inference_time = Histogram(LATENCY_BUCKETS)
        self.prefill_time = Histogram(LATENCY_BUCKETS)
        self.decode_time = Histogram(LATENCY_BUCKETS)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_max_tokens = Histogram(lengths)
        self.request_computed_tokens = Histogram(lengths)
        self.request_n = Histogram(N_BUCKETS)
        self.request_preemptions = Histogram(PREEMPTION_BUCKETS)

    def set_cache_config(self, facts: Mapping[str, object]) -> None:
        """Publish facts about the cache, known only after its memory has been planned."""
        with self._lock:
            self._cache_config = {name: str(value) for name, value in facts.items()}

    def step(
        self,
        *,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
        num_tokens: int,
        num_compiling: int = 0,
    ) -> None:
        """Record one turn of the engine.

        Args:
            num_running: Sequences that hold a row after it.
            num_waiting: Sequences that wait for one.
            kv_usage: Share of the pages in use, 0 to 1.
            num_tokens: Tokens computed in it; 0 only refreshes the gauges.
            num_compiling: Those waiting sequences that wait for their grammar.
        """
        with self._lock:
            self.num_running = num_running
            self.num_waiting = num_waiting
            self.num_compiling = num_compiling
            self.kv_usage = kv_usage
            if num_tokens > 0:
                self.num_steps += 1
                self.iteration_tokens.observe(num_tokens)

    def admitted(self, *, prompt_len: int, num_cached: int, queue_time: float) -> None:
        """Record that a sequence got its first row; not called again after a preemption.

        Args:
            prompt_len: Tokens of its prompt.
            num_cached: Those of them found in the prefix cache.
            queue_time: Seconds since its arrival.
        """
        with self._lock:
            self.prompt_tokens += prompt_len
            self.cached_tokens += num_cached
            self.queue_time.observe(queue_time)
            self.request_computed_tokens.observe(prompt_len - num_cached)

    def first_token(self, ttft: float) -> None:
        """Record the seconds from a sequence's arrival to its first token."""
        with self._lock:
            self.ttft.observe(ttft)

    def tokens(self, count: int, gap: float | None) -> None:
        """Record generated tokens of one sequence.

        Args:
            count: How many came at once.
            gap: Seconds since the sequence's previous token; None for its first.
        """
        with self._lock:
            self.generation_tokens += count
            if gap is not None:
                self.itl.observe(gap)

    def preempted(self) -> None:
        """Record that a sequence lost its pages."""
        with self._lock:
            self.num_preemptions += 1

    def finished(
        self,
        *,
        reason: FinishReason,
        prompt_len: int,
        output_len: int,
        metrics: RequestMetrics,
        sampling: SamplingParams,
        index: int = 0,
    ) -> None:
        """Record the end of one completion.

        Args:
            reason: Why it ended.
            prompt_len: Tokens of its prompt.
            output_len: Tokens it generated.
            metrics: Its times.
            sampling: What was asked for.
            index: Which of the n completions; what concerns the whole request is counted with 0.
        """
        with self._lock:
            self.finished_by_reason[reason.value] += 1
            self.request_prompt_tokens.observe(prompt_len)
            self.request_generation_tokens.observe(output_len)
            self.request_preemptions.observe(metrics.num_preemptions)
            if index == 0:
                self.request_n.observe(sampling.n)
                if sampling.max_tokens is not None:
                    self.request_max_tokens.observe(sampling.max_tokens)
            self._observe_times(metrics, output_len)

    def _observe_times(self, times: RequestMetrics, output_len: int) -> None:
        if times.finished_time is not None:
            self.e2e_latency.observe(times.finished_time - times.arrival_time)
        start, first, last = (
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
        )
        if start is None or first is None or last is None:
            return  # aborted before its first token
        self.inference_time.observe(last - start)
        self.prefill_time.observe(first - start)
        self.decode_time.observe(last - first)
        if output_len > 1:
            self.tpot.observe((last - first) / (output_len - 1))

    def drafted(self, num_tokens: int, num_accepted: int) -> None:
        """Record that a draft was verified.

        Args:
            num_tokens: Its tokens.
            num_accepted: How many of them became output.
        """
        with self._lock:
            self.num_drafts += 1
            self.num_draft_tokens += num_tokens
            self.num_accepted_tokens += num_accepted
            for position in range(num_accepted):
                self.accepted_per_position[position] += 1

    def attended(
        self, *, num_read: int, num_there: int, num_heads: int, estimated_mass: float
    ) -> None:
        """Record what sparse attention read in one step, over rows, layers and key-value heads.

        Args:
            num_read: Tokens read.
            num_there: Tokens that there were.
            num_heads: Heads that read them.
            estimated_mass: Estimated shares of the mass, summed over these heads.
        """
        with self._lock:
            self.sparse_tokens_read += num_read
            self.sparse_tokens_there += num_there
            self.sparse_heads += num_heads
            self.sparse_mass += estimated_mass

    def mass_measured(self, *, num_heads: int, num_missed: int, mass: float) -> None:
        """Record measured shares of the attention mass.

        Args:
            num_heads: Query heads measured, over rows and layers.
            num_missed: Those of them that fell short of their target by more than 0.02.
            mass: Shares, summed over heads.
        """
        with self._lock:
            self.measured_heads += num_heads
            self.missed_heads += num_missed
            self.measured_mass += mass

    def balanced(self, *, before: float, after: float, num_moved: int) -> None:
        """Record a look at the loads of experts.

        Args:
            before: Work of the busiest device over the mean, as it was.
            after: As it would have been with experts where they lie from now on.
            num_moved: Slots that hold another expert from now on.
        """
        with self._lock:
            self.imbalance = before, after
            self.num_rebalances += num_moved > 0
            self.num_moved_experts += num_moved

    def compiled(self, seconds: float) -> None:
        """Record the compilation of one step shape."""
        with self._lock:
            self.num_compilations += 1
            self.compile_seconds += seconds

    def weights_updated(self, version: str, seconds: float) -> None:
        """Record a change of the weights, and the seconds from the call to the swap."""
        with self._lock:
            self.weight_version = version
            self.num_weight_updates += 1
            self.weight_update_time.observe(seconds)

    def weights_renamed(self, version: str) -> None:
        """Record another name for the same weights."""
        with self._lock:
            self.weight_version = version

    def grammar_compiled(self, seconds: float, is_good: bool) -> None:  # noqa: FBT001  a result
        """Record that a grammar was compiled; from any thread.

        Args:
            seconds: How long it took.
            is_good: Whether it can be used.
        """
        with self._lock:
            self.grammar_time.observe(seconds)
            self.num_grammar_failures += not is_good

    def adapters(
        self, *, max_loras: int, running: Sequence[str], waiting: Sequence[str], now: float
    ) -> None:
        """Record which low-rank adapters are in use.

        Args:
            max_loras: Most of them on the device at once.
            running: Those of sequences in the batch.
            waiting: Those of sequences that wait.
            now: Seconds since 1970.
        """
        with self._lock:
            self._adapters = max_loras, tuple(running), tuple(waiting), now

    def rejected(self, reason: str) -> None:
        """Record a request that was refused, such as `max_num_queued_reqs`; from any thread."""
        with self._lock:
            self.rejections[reason] += 1

    def judged(self, tier: str, outcome: SloOutcome) -> None:
        """Record which service-level objectives a request kept; from any thread.

        Args:
            tier: Its class; beyond the first 64 names, all others share the name `other`.
            outcome: What was kept.
        """
        with self._lock:
            tier = self._counted_tier(tier)
            for objective, kept in {**outcome.readings(), "request": outcome.attained}.items():
                # Both exist from the first request on, so that rates are never of nothing.
                self.slo_attained[tier, objective] += kept
                self.slo_missed[tier, objective] += not kept

    def declined(self, tier: str, reason: str, *, is_served: bool) -> None:
        """Record that a request got no promise of its objectives.

        Args:
            tier: Its class.
            reason: What stands against it.
            is_served: Whether it is served all the same, with what is left over.
        """
        with self._lock:
            outcome = "best_effort" if is_served else "refused"
            self.slo_declined[self._counted_tier(tier), reason, outcome] += 1

    def _counted_tier(self, tier: str) -> str:
        if tier not in self._tiers and len(self._tiers) >= MAX_TIERS:
            tier = OTHER_TIERS
        self._tiers.add(tier)
        return tier

    def planned(self, seconds: float) -> None:
        """Record the processor time of one plan in seconds."""
        with self._lock:
            self.policy_time.observe(seconds)

    def policy_failed(self, how: str) -> None:
        """Record a step that another policy had to plan: `error`, `late` or `invalid`."""
        with self._lock:
            self.policy_fallbacks[how] += 1

    def drifted(self, ratio: float, *, is_alarming: bool) -> None:
        """Record how times of steps compare with those that are predicted."""
        with self._lock:
            self.drift = ratio
            self.is_drift_alarming = is_alarming

    def render(self, model_name: str, *, aliases: Iterable[str] = ()) -> str:
        """Return the page that Prometheus scrapes.

        Args:
            model_name: Value of the label `model_name`.
            aliases: Further prefixes under which everything is repeated, such as `vllm`.

        Returns:
            Text in Prometheus' exposition format 0.0.4, ending with a newline.
        """
        return render_page({self._engine: self.families()}, model_name, aliases=aliases)

    def families(self) -> list[Family]:
        """Return everything that is counted, as it is now."""
        with self._lock:
            return [*self._scalars(), *self._histograms()]

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the lock, to be sent to another process."""
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take everything, and a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _scalars(self) -> Iterator[Family]:
        def one(name: str, kind: str, text: str, value: float) -> Family:
            return Family(name, kind, text, [({}, value)])

        def many(name: str, kind: str, text: str, label: str, values: Mapping[str, int]) -> Family:
            return Family(name, kind, text, [({label: key}, n) for key, n in values.items()])

        yield one("num_requests_running", "gauge", "Sequences in the batch.", self.num_running)
        yield one("num_requests_waiting", "gauge", "Sequences that wait.", self.num_waiting)
        yield many(
            "num_requests_waiting_by_reason", "gauge", "Sequences that wait, by reason.",
            "reason",
            {
                "capacity": self.num_waiting - self.num_compiling,
                "deferred": self.num_compiling,
            },
        )  # fmt: skip
        yield one("kv_cache_usage_perc", "gauge", "Share of pages in use, 0 to 1.", self.kv_usage)
        if self._cache_config:
            yield Family(
                "cache_config_info", "gauge", "Settings of the cache.", [(self._cache_config, 1)]
            )
        yield one(
            "prefix_cache_queries_total", "counter", "Tokens looked up in the prefix cache.",
            self.prompt_tokens,
        )  # fmt: skip
        yield one(
            "prefix_cache_hits_total", "counter", "Tokens found in the prefix cache.",
            self.cached_tokens,
        )  # fmt: skip
        yield one(
            "num_preemptions_total", "counter", "Sequences that lost their pages.",
            self.num_preemptions,
        )  # fmt: skip
        yield one("prompt_tokens_total", "counter", "Prompt tokens.", self.prompt_tokens)
        yield one(
            "prompt_tokens_cached_total", "counter", "Prompt tokens from the prefix cache.",
            self.cached_tokens,
        )  # fmt: skip
        yield many(
            "prompt_tokens_by_source_total", "counter", "Prompt tokens, by where they came from.",
            "source",
            {
                "local_compute": self.prompt_tokens - self.cached_tokens,
                "local_cache_hit": self.cached_tokens,
                "external_kv_transfer": 0,
            },
        )  # fmt: skip
        yield one("generation_tokens_total", "counter", "Tokens generated.", self.generation_tokens)
        yield many(
            "request_success_total", "counter", "Ended completions, by finish reason.",
            "finished_reason", dict(self.finished_by_reason),
        )  # fmt: skip
        yield Family(
            "admission_rejections_total", "counter", "Refused requests, by reason.",
            [({"reason": reason}, n) for reason, n in self.rejections.items()],
            has_engine_label=False,
        )  # fmt: skip
        if self.accepted_per_position:
            yield from self._drafts()
        if self._has_sparse:
            yield from self._sparse()
        if self._has_balance:
            yield from self._balance()
        if self._adapters is not None:
            most, running, waiting, now = self._adapters
            labels = {
                "max_lora": str(most),
                "running_lora_adapters": ",".join(running),
                "waiting_lora_adapters": ",".join(waiting),
            }
            yield Family(
                "lora_requests_info", "gauge",
                "Adapters in use, as labels; the value is the time, in seconds since 1970.",
                [(labels, now)],
            )  # fmt: skip
        yield one(
            "num_grammar_queue_reqs", "gauge", "Sequences that wait for their grammar.",
            self.num_compiling,
        )  # fmt: skip
        yield one(
            "grammar_failures_total", "counter", "Grammars that did not compile.",
            self.num_grammar_failures,
        )  # fmt: skip
        yield from slo_families(self.slo_attained, self.slo_missed)
        yield Family(
            "slo_declined_total", "counter",
            "Requests whose objectives were not promised, by reason, and what became of them.",
            [
                ({"tier": tier, "reason": reason, "outcome": outcome}, n)
                for (tier, reason, outcome), n in self.slo_declined.items()
            ],
        )  # fmt: skip
        yield many(
            "policy_fallbacks_total", "counter",
            "Steps that fcfs planned because the policy failed, by reason.", "reason",
            dict(self.policy_fallbacks),
        )  # fmt: skip
        yield one(
            "cost_model_drift_ratio", "gauge",
            "Times of steps over those that the cost model predicts; 1 without a model.",
            self.drift,
        )  # fmt: skip
        yield one(
            "cost_model_drift_alarm", "gauge",
            "1 if the drift has been outside 0.8 to 1.25 for 30 seconds.",
            self.is_drift_alarming,
        )  # fmt: skip
        yield one("compilations_total", "counter", "Step shapes compiled.", self.num_compilations)
        yield one(
            "compile_seconds_total", "counter", "Seconds spent compiling.", self.compile_seconds
        )
        yield Family(
            "weight_version", "gauge", "Changes of the weights so far; their version is a label.",
            [({"weight_version": self.weight_version}, self.num_weight_updates)],
        )  # fmt: skip
        yield many(
            "engine_sleep_state", "gauge", "1 for the state in which the weights are.",
            "sleep_state", {state: state == self.sleep_state for state in get_args(SleepState)},
        )  # fmt: skip

    def _sparse(self) -> Iterator[Family]:
        for name, text, value in (
            ("tokens_read", "Tokens that key-value heads read, of a share.",
             self.sparse_tokens_read),
            ("tokens_in_context", "Tokens that these heads could have read.",
             self.sparse_tokens_there),
            ("heads", "Heads that read a share, over rows, layers and steps.", self.sparse_heads),
            ("estimated_mass", "Estimated shares of the mass, summed over these heads.",
             self.sparse_mass),
            ("measured_heads", "Query heads whose share was measured.", self.measured_heads),
            ("measured_mass", "Measured shares, summed over these heads.", self.measured_mass),
            ("missed_heads", "Of these heads, those below their target by more than 0.02.",
             self.missed_heads),
        ):  # fmt: skip
            yield Family(f"sparse_attention_{name}_total", "counter", text, [({}, value)])

    def _balance(self) -> Iterator[Family]:
        yield Family(
            "expert_load_imbalance", "gauge",
            "Work of the busiest device over the mean, of the loads of experts seen last, where "
            "they lay then and where they lie since.",
            [({"placement": name}, value)
             for name, value in zip(("before", "after"), self.imbalance, strict=True)],
        )  # fmt: skip
        for name, text, value in (
            ("rebalances", "How often experts have moved.", self.num_rebalances),
            ("moves", "Slots that got another expert.", self.num_moved_experts),
        ):
            yield Family(f"expert_{name}_total", "counter", text, [({}, value)])

    def _drafts(self) -> Iterator[Family]:
        for name, text, value in (
            ("drafts", "Drafts verified.", self.num_drafts),
            ("draft_tokens", "Draft tokens verified.", self.num_draft_tokens),
            ("accepted_tokens", "Draft tokens accepted.", self.num_accepted_tokens),
        ):
            yield Family(f"spec_decode_num_{name}_total", "counter", text, [({}, value)])
        yield Family(
            "spec_decode_num_accepted_tokens_per_pos_total", "counter",
            "Draft tokens accepted, by their place in the draft.",
            [({"position": str(i)}, n) for i, n in enumerate(self.accepted_per_position)],
        )  # fmt: skip

    def _histograms(self) -> Iterator[Family]:
        table = (
            ("iteration_tokens_total", "Tokens per step.", self.iteration_tokens),
            (
                "policy_time_seconds",
                "Processor time of the policy per step.",
                self.policy_time,
            ),
            (
                "grammar_compilation_time_seconds",
                "Time to compile a grammar.",
                self.grammar_time,
            ),
            ("time_to_first_token_seconds", "Arrival to first token.", self.ttft),
            ("inter_token_latency_seconds", "Gap between two tokens.", self.itl),
            (
                "request_time_per_output_token_seconds",
                "Mean time per token after the first.",
                self.tpot,
            ),
            ("e2e_request_latency_seconds", "Arrival to the end.", self.e2e_latency),
            ("request_queue_time_seconds", "Arrival to admission.", self.queue_time),
            ("request_inference_time_seconds", "Admission to last token.", self.inference_time),
            ("request_prefill_time_seconds", "Admission to first token.", self.prefill_time),
            ("request_decode_time_seconds", "First to last token.", self.decode_time),
            ("request_prompt_tokens", "Prompt tokens per request.", self.request_prompt_tokens),
            (
                "request_generation_tokens",
                "Generated tokens per request.",
                self.request_generation_tokens,
            ),
            (
                "request_max_num_generation_tokens",
                "Generated tokens per completion.",
                self.request_generation_tokens,
            ),
            ("request_params_max_tokens", "max_tokens as requested.", self.request_max_tokens),
            (
                "request_prefill_kv_computed_tokens",
                "Prompt tokens computed, cached ones left out.",
                self.request_computed_tokens,
            ),
            ("request_params_n", "n as requested.", self.request_n),
            ("request_num_preemptions", "Preemptions per request.", self.request_preemptions),
        )
        for name, text, histogram in table:
            yield Family(name, "histogram", text, histogram=histogram.copy())
        yield Family(
            "rl_weight_update_operation_duration_seconds", "histogram",
            "Seconds per change of the weights.",
            [({"operation": "update_weights"}, 0)], self.weight_update_time.copy(),
        )  # fmt: skip


def slo_families(
    attained: Mapping[tuple[str, str], int], missed: Mapping[tuple[str, str], int]
) -> Iterator[Family]:
    """Yield what is told about objectives.

    Args:
        attained: Requests that kept an objective, per (tier, objective).
        missed: Requests that did not.
    """
    for name, text, counts in (
        (SLO_ATTAINED, "Requests that kept an objective.", attained),
        (SLO_MISSED, "Requests that did not keep an objective.", missed),
    ):
        yield Family(
            name, "counter", text,
            [({"tier": tier, "objective": kind}, n) for (tier, kind), n in counts.items()],
        )  # fmt: skip


def render_page(
    engines: Mapping[str, Sequence[Family]], model_name: str, *, aliases: Iterable[str] = ()
) -> str:
    """Return the page that Prometheus scrapes, for one engine or for several.

    Args:
        engines: What is told about each, by the value of the label `engine`.
        model_name: Value of the label `model_name`.
        aliases: Further prefixes under which everything is repeated.

    Returns:
        Text in Prometheus' exposition format 0.0.4, ending with a newline.
    """
    merged: dict[str, list[tuple[str, Family]]] = {}
    for engine, families in engines.items():
        for family in families:
            merged.setdefault(family.name, []).append((engine, family))
    lines: list[str] = []
    for name, found in merged.items():
        if not found[0][1].has_engine_label:
            merged[name] = [("", _summed([family for _, family in found]))]
    for prefix in dict.fromkeys((PREFIX, *aliases)):
        for name, found in merged.items():
            first = found[0][1]
            lines.append(f"# HELP {prefix}:{name} {first.text}")
            lines.append(f"# TYPE {prefix}:{name} {first.kind}")
            for engine, family in found:
                lines.extend(_samples(family, prefix, model_name, engine))
    return "\n".join(lines) + "\n"


def _summed(families: Sequence[Family]) -> Family:
    """Add up what is told without the label that tells engines apart."""
    totals: dict[tuple[tuple[str, str], ...], float] = {}
    for family in families:
        for labels, value in family.values:
            key = tuple(labels.items())
            totals[key] = totals.get(key, 0) + value
    first = families[0]
    values = [(dict(key), value) for key, value in totals.items()]
    return Family(first.name, first.kind, first.text, values, has_engine_label=False)


def _samples(family: Family, prefix: str, model_name: str, engine: str) -> Iterator[str]:
    name = f"{prefix}:{family.name}"
    base = {"model_name": model_name}
    if family.has_engine_label:
        base = {"engine": engine, **base}
    if family.histogram is None:
        for labels, value in family.values:
            yield f"{name}{{{_labels({**base, **labels})}}} {_number(value)}"
        return
    for labels, _value in family.values:
        base |= labels
    common = _labels(base)
    below = 0
    bounds = [*map(_number, family.histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, family.histogram.counts, strict=True):
        below += count
        yield f'{name}_bucket{{{common},le="{bound}"}} {_number(below)}'
    yield f"{name}_sum{{{common}}} {_number(family.histogram.total)}"
    yield f"{name}_count{{{common}}} {_number(below)}"


def _number(value: float) -> str:
    return repr(float(value))


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
