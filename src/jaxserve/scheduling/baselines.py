"""Policies of other systems, to compare with on the same engine and the same cost model."""

import math
from dataclasses import dataclass, field

from jaxserve.core.cost import CostModel, StepLoad, zero_load_time
from jaxserve.core.plan import StepPlan, Work
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.fcfs import pages_for

_PER_SECOND = 1000


@dataclass(slots=True)
class _Plan:
    """A plan in the making."""

    view: ReplicaView
    tokens: int
    pages: int
    rows: int
    work: list[Work] = field(default_factory=list)
    admit: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    is_closed: bool = False
    """Whether somebody who waits could not come in, so that nobody behind may."""

    @classmethod
    def of(cls, view: ReplicaView) -> "_Plan":
        rows = view.max_num_seqs - len(view.running)
        return cls(view, view.max_num_batched_tokens, view.num_free_pages, rows)

    def decode(self, decodes: list[SequenceView]) -> StepLoad:
        """Give every sequence a token, those at the end giving up their pages where need be."""
        context = 0
        left = list(decodes)
        place = 0
        while place < len(left) and self.tokens > 0:
            one = left[place]
            pages = pages_for(self.view, one, 1)
            while pages > self.pages and len(left) > place:
                victim = left.pop()
                self.preempt.append(victim.seq_id)
                self.pages += victim.num_pages
            if place >= len(left):
                break
            self.pages -= pages
            self.tokens -= 1
            self.work.append(Work(seq_id=one.seq_id, num_tokens=1))
            context += one.num_tokens
            place += 1
        return StepLoad(decodes=len(self.work), context=context)

    def prefill(self, one: SequenceView, tokens: int) -> bool:
        """Give a sequence a chunk of its prompt, and a row and pages for all of it."""
        if tokens <= 0 or tokens > self.tokens:
            return False
        if not one.is_running:
            reserve = len(self.view.running) + len(self.admit)
            pages = -(-one.num_tokens // self.view.page_size)
            no_room = bool(self.preempt) or self.rows < 1 or pages + reserve > self.pages
            if self.is_closed or no_room:
                self.is_closed = True
                return False
            self.rows -= 1
            self.admit.append(one.seq_id)
        else:
            pages = pages_for(self.view, one, tokens)
            if pages > self.pages:
                return False
        self.pages -= pages
        self.tokens -= tokens
        self.work.append(Work(seq_id=one.seq_id, num_tokens=tokens))
        return True

    def fill(
        self,
        prompts: list[SequenceView],
        cost: CostModel,
        load: StepLoad,
        slack: float,
        *,
        chunk: int | None = None,
    ) -> None:
        """Give prompts chunks in their order, as long as decodes have slack.

        Args:
            prompts: The most urgent one first.
            cost: Times of steps.
            load: What the step holds.
            slack: Seconds that the step may take.
            chunk: Most prompt tokens of the step; None is whatever fits.
        """
        left = self.tokens if chunk is None else chunk
        for one in prompts:
            past = one.num_tokens - _left(one)
            tokens = min(_left(one), self.tokens, left)
            if slack < math.inf:
                tokens = min(tokens, cost.prefill_within(slack, load, past))
            if tokens == 0 and not self.work:
                tokens = min(_left(one), self.tokens, 1)
            if not self.prefill(one, tokens):
                if self.is_closed and not one.is_running:
                    continue  # who has a row goes on
                break
            load = load.with_chunk(tokens, past)
            left -= tokens

    def finish(self, decodes: list[SequenceView], *, changes: bool = False) -> StepPlan:
        """Return the plan; it stays as long as everybody decodes and nobody can come in.

        Args:
            decodes: Those that decode.
            changes: Whether the policy's choice changes with time all the same.
        """
        view = self.view
        is_closed = not view.waiting or len(view.running) >= view.max_num_seqs
        everybody = 0 < len(self.work) == len(decodes) == len(view.running)
        stays = is_closed and everybody and not (changes or self.admit or self.preempt)
        return StepPlan(
            work=tuple(self.work),
            admit=tuple(self.admit),
            preempt=tuple(self.preempt),
            holds_until=math.inf if stays else -math.inf,
        )


def _split(view: ReplicaView) -> tuple[list[SequenceView], list[SequenceView]]:
    """Return those that decode, and those that have a prompt to compute, running ones first."""
    # Who has nothing to compute has its last token on its way.
    decodes = [s for s in view.running if s.is_decoding and s.num_uncomputed > 0]
    prefills = [s for s in view.running if not s.is_decoding and s.num_uncomputed > 0]
    return sorted(decodes, key=lambda s: (s.arrival, s.seq_id)), [*prefills, *view.waiting]


def _left(sequence: SequenceView) -> int:
    cached = 0 if sequence.is_running else sequence.num_cached
    return sequence.num_uncomputed - cached


def _deadline(sequence: SequenceView) -> float:
    slo = sequence.slo
    if slo is None or slo.ttft_ms is None:
        return math.inf
    return sequence.arrival + slo.ttft_ms / _PER_SECOND


def _tau(slo: Slo | None) -> float:
    return math.inf if slo is None or slo.tpot_ms is None else slo.tpot_ms / _PER_SECOND


def _due(view: ReplicaView, one: SequenceView, *, every_gap: bool) -> float:
    """Return the seconds until a decode's next token is due.

    Args:
        view: The replica.
        one: The decode.
        every_gap: Whether each gap between tokens is bounded; otherwise early tokens bank slack.
    """
    tau = _tau(one.slo)
    if every_gap or tau == math.inf:
        return tau
    due = _deadline(one) + (one.num_tokens - one.prompt_len) * tau - view.now
    # Who is late already is served at its pace, so that it does not stop everybody else.
    return due if due > 0 else tau


class PrefillFirstScheduler:
    """Whole prompts first, first come, first served; decodes run when no prompt can.

    Source: the scheduling of early vLLM (arXiv 2309.06180), before chunked prefill.
    """

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        decodes, prefills = _split(view)
        plan = _Plan.of(view)
        for one in sorted(prefills, key=lambda s: (s.arrival, s.seq_id)):
            # A prompt longer than a step can be is the only one that is cut.
            tokens = min(_left(one), view.max_num_batched_tokens)
            if not plan.prefill(one, tokens):
                if plan.is_closed and not one.is_running:
                    continue  # who has a row goes on
                break
        if not plan.work:
            plan.decode(decodes)
        return plan.finish(decodes)


class DeadlineScheduler:
    """Decodes first, then chunks of prompts in the order of their deadlines, up to a budget.

    Args:
        budget: Most tokens in a step; None is the engine's.

    Source: earliest deadline first on the chunked prefill of Sarathi-Serve (arXiv 2403.02310).
    """

    def __init__(self, *, budget: int | None = None) -> None:
        """Keep the budget."""
        self._budget = budget

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        decodes, prefills = _split(view)
        plan = _Plan.of(view)
        plan.tokens = min(plan.tokens, self._budget or plan.tokens)
        plan.decode(decodes)
        for one in sorted(prefills, key=lambda s: (_deadline(s), s.seq_id)):
            if not plan.prefill(one, min(_left(one), plan.tokens)):
                if plan.is_closed and not one.is_running:
                    continue  # who has a row goes on
                break
        return plan.finish(decodes)


class DeadlineHybridScheduler:
    """Deadlines with a preference for short prompts, chunks as large as decodes have slack.

    Args:
        cost: Times of steps.
        alpha: Seconds by which each prompt token that is left postpones a request.
        max_chunk: Most prompt tokens in a step.
        every_gap: Whether each gap between tokens is bounded; otherwise early tokens bank slack.

    Source: QoServe, formerly Niyama (arXiv 2503.22562): hybrid prioritization, dynamic chunking and
        eager relegation.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        alpha: float = 0.001,
        max_chunk: int = 2500,
        every_gap: bool = False,
    ) -> None:
        """Keep the choices."""
        self._cost = cost
        self._alpha = alpha
        self._max_chunk = max_chunk
        self._every_gap = every_gap

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        decodes, prefills = _split(view)
        plan = _Plan.of(view)
        load = plan.decode(decodes)
        slack = min((_due(view, s, every_gap=self._every_gap) for s in decodes), default=math.inf)
        ranked = sorted(prefills, key=lambda s: self._rank(view, s))
        plan.fill(ranked, self._cost, load, slack, chunk=self._max_chunk)
        return plan.finish(decodes)

    def _rank(self, view: ReplicaView, one: SequenceView) -> tuple[bool, float, int]:
        """Return the place of a prompt; those that will be late come after all others."""
        deadline, left = _deadline(one), _left(one)
        will_miss = view.now + zero_load_time(self._cost, max(1, left)) > deadline
        return (will_miss, deadline + self._alpha * left, one.seq_id)


class SlackGreedyScheduler:
    """Each request just fast enough; those that need the least of the server come first.

    Decodes whose next token is not due soon are left out while prompts wait. Prompts are ranked by
    the share of the server that they need to keep their deadlines: the time that their work takes
    over the time that is left for it.

    Args:
        cost: Times of steps.
        expected_output: Output tokens to reckon with.
        every_gap: Whether each gap between tokens is bounded; otherwise early tokens bank slack.

    Source: after JITServe (NSDI 2026) and Tempo (arXiv 2504.20068).
    Differs: one expected length for all, instead of a learned bound per request.
    """

    def __init__(
        self, cost: CostModel, *, expected_output: int = 256, every_gap: bool = False
    ) -> None:
        """Keep the choices."""
        self._cost = cost
        self._expected_output = expected_output
        self._every_gap = every_gap

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        decodes, prefills = _split(view)
        plan = _Plan.of(view)
        pace = min((_tau(s.slo) for s in decodes), default=math.inf)
        due = {s.seq_id: _due(view, s, every_gap=self._every_gap) for s in decodes}
        urgent = decodes
        if prefills and pace < math.inf and not self._every_gap:
            urgent = [s for s in decodes if due[s.seq_id] < 2 * pace]
        load = plan.decode(urgent)
        slack = min((due[s.seq_id] for s in urgent), default=pace)
        ranked = sorted(prefills, key=lambda s: self._rank(view, s))
        plan.fill(ranked, self._cost, load, slack)
        if not plan.work:
            plan.decode(decodes)
        return plan.finish(decodes, changes=bool(prefills))

    def _rank(self, view: ReplicaView, one: SequenceView) -> tuple[bool, float, int]:
        left = max(1, _left(one))
        deadline, tau = _deadline(one), _tau(one.slo)
        prefill = zero_load_time(self._cost, left)
        will_miss = view.now + prefill > deadline
        if deadline == math.inf or tau == math.inf:
            return (will_miss, math.inf, one.seq_id)
        alone = self._cost.step_time(StepLoad(decodes=1, context=one.num_tokens))
        more = self._cost.step_time(StepLoad(decodes=2, context=2 * one.num_tokens)) - alone
        work = prefill + self._expected_output * more
        time = max(1e-6, deadline - view.now) + self._expected_output * tau
        return (will_miss, work / time, one.seq_id)
