"""First come, first served, with chunked prefill: the baseline of every comparison.

Decodes go first, then the prefills under way, then new requests, until the token budget is used.
Where nothing but decodes runs, what is left of the budget goes to draft tokens that are worth it.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from jaxserve.core.plan import StepPlan, Work
from jaxserve.core.view import ReplicaView, SequenceView


@dataclass(slots=True)
class _Budget:
    """What is left to give out while a plan is made."""

    tokens: int
    pages: int
    work: list[Work] = field(default_factory=list)
    admit: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)


def pages_for(view: ReplicaView, sequence: SequenceView, num_tokens: int) -> int:
    """Count the further pages that a sequence needs to compute `num_tokens` more tokens."""
    total = -(-(sequence.num_computed + num_tokens) // view.page_size)
    return max(0, total - sequence.num_pages)


class FcfsScheduler:
    """Continuous batching in order of arrival.

    Args:
        by_priority: Order by `priority` (lower first), then arrival. Otherwise by arrival.
        mix: Whether a step may hold prefills and decodes. Without, prefills run alone, one
            sequence at a time, so that the shape of a step does not depend on its neighbours.
        max_mixed_prefill: Most prefill tokens in a step that decodes as well, so that a long prompt
            does not stall those who are reading along; None is the whole budget. It holds while
            fewer sequences wait or prefill than decode: in a burst of arrivals, filling the batch
            comes first.
        ageing_s: Seconds of waiting that count as much as one step of priority; None is never.
        draft_cost: How much longer each draft token makes a step, as a share of its time without.
        lora_drain_wait_s: Seconds that a sequence may wait for a slot for its adapter while others
            use theirs anew; after that no adapter is admitted before it, so that a slot drains.

    When pages run out, the running sequence that comes last in that order loses its pages and is
    recomputed later; a waiting one is admitted only if its whole prompt fits, so that an admitted
    prefill never stalls for memory.

    Source: the default policy of vLLM (decode first, chunked prefill, preemption by recompute).
    """

    def __init__(
        self,
        *,
        by_priority: bool = False,
        mix: bool = True,
        max_mixed_prefill: int | None = None,
        ageing_s: float | None = None,
        draft_cost: float = 0.1,
        lora_drain_wait_s: float = 1.0,
    ) -> None:
        """Keep the choices."""
        self._by_priority = by_priority
        self._mix = mix
        self._max_mixed_prefill = max_mixed_prefill
        self._ageing_s = ageing_s
        self._draft_cost = draft_cost
        self._lora_drain_wait_s = lora_drain_wait_s

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        running = sorted(view.running, key=lambda s: self._rank(s, view.now))
        waiting = sorted(view.waiting, key=lambda s: self._rank(s, view.now))
        if any(s.adapter for s in waiting):
            waiting = self._with_slot(view, waiting)
        budget = _Budget(tokens=view.max_num_batched_tokens, pages=view.num_free_pages)
        ready = [s for s in running if s.num_uncomputed > 0]
        decodes = [s for s in ready if s.is_decoding]
        prefills = [s for s in ready if not s.is_decoding]
        if self._mix:
            self._serve(view, decodes, running, budget)
            if budget.work and len(prefills) + len(waiting) < len(decodes):
                budget.tokens = min(budget.tokens, self._max_mixed_prefill or budget.tokens)
            self._serve(view, prefills, running, budget)
            self._admit(view, waiting, len(running), budget)
        elif prefills:
            self._serve(view, prefills[:1], running, budget)
        else:
            self._admit(view, waiting[:1], len(running), budget)
            if not budget.work:
                self._serve(view, decodes, running, budget)
        if any(s.num_draft for s in decodes):
            self._draft(view, {s.seq_id: s for s in decodes}, budget)
        return StepPlan(
            work=tuple(budget.work),
            admit=tuple(budget.admit),
            preempt=tuple(budget.preempt),
            holds_until=math.inf if self._repeats(view, decodes, budget) else -math.inf,
        )

    def _repeats(self, view: ReplicaView, decodes: list[SequenceView], budget: _Budget) -> bool:
        """Tell whether everybody decodes and nobody can come in, so that the plan stays."""
        is_closed = not view.waiting or len(view.running) >= view.max_num_seqs
        is_plain = not budget.admit and not budget.preempt and self._ageing_s is None
        everybody = 0 < len(budget.work) == len(decodes) == len(view.running)
        return is_closed and is_plain and everybody and not any(s.num_draft for s in decodes)

    def _draft(self, view: ReplicaView, decodes: dict[int, SequenceView], budget: _Budget) -> None:
        """Add draft tokens to a step of decodes, so that it brings the most tokens per time.

        A sequence's draft token number i, counted from 1, becomes output with the chance
        `acceptance ** i`; the likeliest come first. A step takes as long as if it were full, so
        what is padded anyhow is filled. Pages are taken only from what is free: drafts displace
        nobody.

        Source: the goodput of SmartSpec (arXiv 2406.14066), with a step whose time grows evenly.
        """
        rows = [item.seq_id for item in budget.work]
        if not all(seq_id in decodes for seq_id in rows):
            return
        left = view.max_num_batched_tokens - len(rows)
        output, best, taken = float(len(rows)), float(len(rows)), 0
        order: list[int] = []
        for seq_id, chance in self._likeliest(view, [decodes[i] for i in rows], budget.pages):
            if len(order) == left:
                break
            order.append(seq_id)
            output += chance
            size = next((n for n in view.draft_sizes if n >= len(order)), len(order))
            rate = output / (1 + self._draft_cost * size)
            if rate > best:
                best, taken = rate, len(order)
        drafts = Counter(order[:taken])
        budget.work = [replace(item, num_draft=drafts[item.seq_id]) for item in budget.work]

    @staticmethod
    def _likeliest(
        view: ReplicaView, decodes: Sequence[SequenceView], pages: int
    ) -> Iterator[tuple[int, float]]:
        """Yield whose draft token comes next and its chance, the likeliest first, within pages."""
        by_id = {s.seq_id: s for s in decodes}
        counts = dict.fromkeys(by_id, 0)
        chances = [(-s.draft_acceptance, s.seq_id) for s in decodes if s.num_draft]
        heapq.heapify(chances)
        while chances:
            chance, seq_id = heapq.heappop(chances)
            sequence, count = by_id[seq_id], counts[seq_id] + 1
            needed = pages_for(view, sequence, 1 + count) - pages_for(view, sequence, count)
            if needed > pages:
                continue
            pages -= needed
            counts[seq_id] = count
            yield seq_id, -chance
            if count < sequence.num_draft:
                heapq.heappush(chances, (chance * sequence.draft_acceptance, seq_id))

    def _rank(self, sequence: SequenceView, now: float) -> tuple[float, float, int]:
        priority = float(sequence.priority) if self._by_priority else 0.0
        if self._by_priority and self._ageing_s is not None:
            priority -= (now - sequence.arrival) / self._ageing_s
        return (priority, sequence.arrival, sequence.seq_id)

    def _with_slot(self, view: ReplicaView, waiting: list[SequenceView]) -> list[SequenceView]:
        """Leave out those whose adapter would find no slot if everybody before were admitted."""
        held = set(view.adapters)
        found: list[SequenceView] = []
        is_draining = False
        for sequence in waiting:
            has_slot = not sequence.adapter or (
                not is_draining and (sequence.adapter in held or len(held) < view.max_loras)
            )
            if has_slot:
                found.append(sequence)
                held |= {sequence.adapter} - {""}
            else:
                is_draining |= view.now - sequence.arrival > self._lora_drain_wait_s
        return found

    def _serve(
        self,
        view: ReplicaView,
        sequences: list[SequenceView],
        running: list[SequenceView],
        budget: _Budget,
    ) -> None:
        for sequence in sequences:
            if sequence.seq_id in budget.preempt or budget.tokens == 0:
                continue
            num_tokens = min(sequence.num_uncomputed, budget.tokens)
            needed = pages_for(view, sequence, num_tokens)
            while needed > budget.pages and self._preempt_last(view, running, sequence, budget):
                pass
            if sequence.seq_id in budget.preempt or needed > budget.pages:
                continue
            budget.pages -= needed
            budget.tokens -= num_tokens
            budget.work.append(Work(seq_id=sequence.seq_id, num_tokens=num_tokens))

    def _preempt_last(
        self,
        view: ReplicaView,
        running: list[SequenceView],
        beneficiary: SequenceView,
        budget: _Budget,
    ) -> bool:
        """Take the pages of the last in rank; False if the beneficiary itself had to give up."""
        served = {item.seq_id for item in budget.work}
        for victim in reversed(running):
            if victim.seq_id in budget.preempt:
                continue
            if victim.seq_id in served:
                continue
            if self._rank(victim, view.now) < self._rank(beneficiary, view.now):
                return False
            budget.preempt.append(victim.seq_id)
            budget.pages += victim.num_pages
            return victim.seq_id != beneficiary.seq_id
        return False

    def _admit(
        self, view: ReplicaView, waiting: list[SequenceView], num_running: int, budget: _Budget
    ) -> None:
        if budget.preempt:
            return  # memory is short: nobody new until the preempted ones are back
        for sequence in waiting:
            if num_running + len(budget.admit) >= view.max_num_seqs or budget.tokens == 0:
                return
            missing = sequence.num_tokens - sequence.num_cached
            needed = -(-sequence.num_tokens // view.page_size)
            # Every running sequence may want a page soon; without this reserve a preempted one
            # would come back only to be preempted again.
            reserve = num_running + len(budget.admit)
            if needed + reserve > budget.pages:
                return
            num_tokens = min(missing, budget.tokens)
            # Pages for the whole prompt are set aside, not only for the first chunk.
            budget.pages -= needed
            budget.tokens -= num_tokens
            budget.admit.append(sequence.seq_id)
            budget.work.append(Work(seq_id=sequence.seq_id, num_tokens=num_tokens))
