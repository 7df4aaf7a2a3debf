"""Which tokens run next: the batch of what is promised, filled up with those without a promise."""

import math
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

from jaxserve.core.cost import CostModel
from jaxserve.core.plan import Rejection, StepPlan, Work
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.slos_serve.config import SlosServeConfig
from jaxserve.scheduling.slos_serve.forward import Batch, Decodes, Prefill, form, pace_of
from jaxserve.scheduling.slos_serve.promise import Record
from jaxserve.scheduling.slos_serve.speculation import clamp, expected_tokens

_WINDOW_S = 10.0
_HOLDS_S = 1.0
_AHEAD_S = 2.0
"""How far ahead of their deadlines all decodes are when others fill up steps in any case."""
_MODEST = 0.5
"""Share of the tightest target per token that steps may take for others in any case."""


@lru_cache(maxsize=1 << 16)
def _decode(seq_id: int) -> Work:
    return Work(seq_id=seq_id, num_tokens=1)


def left_of(sequence: SequenceView) -> int:
    """Count the tokens to compute before the next one can be drawn."""
    cached = 0 if sequence.is_running else sequence.num_cached
    return sequence.num_tokens - sequence.num_computed - cached


@dataclass(slots=True)
class Sorted:
    """The sequences of a view, by how they stand.

    Attributes:
        decodes: Promised ones that decode, with when their next token is due.
        prefills: Promised ones with a prompt to compute, by deadline.
        new: Ones to decide about.
        others: Those without a promise, in the order in which they are served.
        expired: New ones whose deadline passed during the step in which they came.
        outputs: Output tokens to reckon with for each of `decodes`, once they are known.
    """

    decodes: list[tuple[SequenceView, Record]] = field(default_factory=list)
    dues: list[float] = field(default_factory=list)
    prefills: list[tuple[SequenceView, Record]] = field(default_factory=list)
    new: list[tuple[SequenceView, Record]] = field(default_factory=list)
    others: list[tuple[SequenceView, Record]] = field(default_factory=list)
    expired: list[tuple[SequenceView, Record]] = field(default_factory=list)
    outputs: list[int] | None = None


@dataclass(slots=True)
class _Open:
    """A plan in the making, with the pages and rows that are left."""

    view: ReplicaView
    pages: int
    rows: int
    work: list[Work] = field(default_factory=list)
    admit: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    served: set[int] = field(default_factory=set)

    def needs(self, sequence: SequenceView, num_tokens: int) -> int:
        """Count the pages that a sequence must get for so many more tokens."""
        size = self.view.page_size
        if not sequence.is_running:
            return -(-sequence.num_tokens // size)
        return max(0, -(-(sequence.num_computed + num_tokens) // size) - sequence.num_pages)

    def give(self, sequence: SequenceView, num_tokens: int) -> bool:
        """Add work if pages and a row are there; tell whether they were."""
        pages = self.needs(sequence, num_tokens)
        if pages > self.pages or (not sequence.is_running and self.rows < 1):
            return False
        self.pages -= pages
        if not sequence.is_running:
            self.rows -= 1
            self.admit.append(sequence.seq_id)
        self.served.add(sequence.seq_id)
        plain = num_tokens == 1
        self.work.append(
            _decode(sequence.seq_id)
            if plain
            else Work(seq_id=sequence.seq_id, num_tokens=num_tokens)
        )
        return True


class Composer:
    """Composes steps, and keeps account of what those without a promise got.

    Args:
        cost: Times of steps, with their margin.
        config: The settings of the planner.

    Attributes:
        num_late: Steps in which not all tokens that were due could be computed in time.
    """

    def __init__(self, cost: CostModel, config: SlosServeConfig) -> None:
        """Start without steps."""
        self.num_late = 0
        self._cost = cost
        self._config = config
        self._shares: deque[tuple[float, int, int]] = deque()
        self._given = [0, 0]

    def compose(
        self,
        view: ReplicaView,
        found: Sorted,
        decodes: Decodes,
        prefills: list[Prefill],
        *,
        max_step_s: float,
        is_short: bool,
        reject: list[Rejection],
        unpromised: list[Rejection],
    ) -> StepPlan:
        """Form the next batch, fill it up with those without a promise, and find pages for it.

        Whoever fills up a step makes it longer: promised requests stay on time, but end later, and
        keep their places from others who might be promised something. So where promises are short,
        steps with promised requests are filled up to a modest length only.

        Args:
            view: The engine.
            found: Who is there.
            decodes: Of `found`, those that are promised and decode.
            prefills: Of `found`, promised prompts.
            max_step_s: Longest step.
            is_short: Whether requests have lately been declined.
            reject: Who is refused.
            unpromised: Who is served without a promise from now on.
        """
        pace_s = pace_of(decodes.tau, prefills)
        batch = form(
            view.now,
            decodes,
            prefills,
            self._cost,
            pace_s=pace_s,
            max_step_s=max_step_s,
            max_tokens=view.max_num_batched_tokens,
        )
        self.num_late += batch.is_late
        opened = _Open(view, view.num_free_pages, view.max_num_seqs - len(view.running))
        wanted = [
            (sequence, 1) for (sequence, _), is_in in zip(found.decodes, batch.is_in, strict=True)
            if is_in
        ]  # fmt: skip
        wanted += [
            (sequence, tokens)
            for (sequence, _), tokens in zip(found.prefills, batch.chunks, strict=False)
        ]
        for sequence, tokens in wanted:
            while not opened.give(sequence, tokens):
                if not self._make_room(opened, found, sequence):
                    break
        horizon = batch.horizon
        if batch.is_late:
            horizon = 0.0
        elif is_short and self._is_first(view.now, found, batch):
            horizon = min(horizon, _MODEST * pace_s)
        self._fill(view, found, batch, opened, horizon)
        if not opened.work and not opened.preempt and (found.others or found.prefills):
            self._force(found, opened)
        work = self._speculate(view, batch, opened)
        return StepPlan(
            work=tuple(work),
            admit=tuple(opened.admit),
            preempt=tuple(opened.preempt),
            reject=tuple(reject),
            unpromised=tuple(unpromised),
            holds_until=-math.inf
            if any(item.num_draft for item in work)
            else self._holds_until(view, found, batch, opened, pace_s),
        )

    def _holds_until(
        self, view: ReplicaView, found: Sorted, batch: Batch, opened: _Open, pace_s: float
    ) -> float:
        """Return until when the plan stays: for a while, if everybody there decodes at ease."""
        if view.waiting or opened.admit or opened.preempt:
            return -math.inf
        if len(opened.work) != len(view.running) or len(found.decodes) != len(view.running):
            return -math.inf
        if batch.load.prefill:
            return -math.inf
        grown = batch.load._replace(context=2 * batch.load.context + 4096)
        at_ease = self._cost.step_time(grown) < min(pace_s, batch.horizon)
        return view.now + _HOLDS_S if at_ease else -math.inf

    def _make_room(self, opened: _Open, found: Sorted, for_whom: SequenceView) -> bool:
        """Take the place of somebody without a promise, or else of the latest promised one."""
        gone = {*opened.preempt, *opened.served, for_whom.seq_id}
        for sequence, _ in (*reversed(found.others), *reversed(found.prefills)):
            if sequence.is_running and sequence.seq_id not in gone:
                break
        else:
            return False
        opened.preempt.append(sequence.seq_id)
        opened.pages += sequence.num_pages
        # The row is free only in the next step: an engine counts those who are preempted first.
        opened.rows += 1
        return True

    def _is_first(self, now: float, found: Sorted, batch: Batch) -> bool:
        """Tell whether a batch serves somebody promised who is not far ahead already."""
        if not batch.load.tokens:
            return False
        return bool(found.prefills) or min(found.dues) - now < _AHEAD_S

    def _fill(
        self,
        view: ReplicaView,
        found: Sorted,
        batch: Batch,
        opened: _Open,
        horizon: float,
    ) -> None:
        """Give what is left of some time to those without a promise, oldest first.

        If they have not had their least share, what is left of the batch's.
        """
        if not found.others:
            return
        if self._is_owed(view.now):
            horizon = batch.horizon
        load = batch.load
        room = view.max_num_batched_tokens - load.tokens
        before = load.tokens
        for sequence in [s for s, _ in found.others if s.seq_id not in opened.preempt]:
            if room <= 0:
                break
            if sequence.is_decoding:
                new = load._replace(
                    decodes=load.decodes + 1, context=load.context + sequence.num_tokens
                )
                if self._cost.step_time(new) > horizon:
                    break
                if opened.give(sequence, 1):
                    load, room = new, room - 1
                continue
            if opened.preempt:
                continue  # memory is short
            if not sequence.is_running and not self._may_admit(view, sequence, opened):
                continue
            left = left_of(sequence)
            past = sequence.num_tokens - left
            tokens = min(left, room, self._cost.prefill_within(horizon, load, past))
            if tokens <= 0:
                break
            if opened.give(sequence, tokens):
                load, room = load.with_chunk(tokens, past), room - tokens
        self._share(view.now, opened, load.tokens - before)

    def _may_admit(self, view: ReplicaView, sequence: SequenceView, opened: _Open) -> bool:
        """Keep some rows and pages for those who may be promised something soon."""
        del view
        reserve = len(opened.view.running) + len(opened.admit)
        return opened.rows > 1 and opened.needs(sequence, 0) + reserve <= opened.pages

    def _force(self, found: Sorted, opened: _Open) -> None:
        """Let at least one go on where no batch would be short enough for anybody."""
        most = opened.view.max_num_batched_tokens
        for sequence, _ in (*found.decodes, *found.prefills, *found.others):
            if opened.give(sequence, min(left_of(sequence), most)):
                return
        running = [s for s, _ in (*found.prefills, *found.others) if s.is_running]
        if len(running) > 1 or (running and not found.decodes):
            victim = running[-1]
            opened.preempt.append(victim.seq_id)

    def _share(self, now: float, opened: _Open, best_effort: int) -> None:
        """Keep account of how many tokens went to those without a promise."""
        total = sum(item.num_tokens for item in opened.work)
        self._shares.append((now, best_effort, total))
        self._given[0] += best_effort
        self._given[1] += total
        while self._shares and self._shares[0][0] < now - _WINDOW_S:
            _, some, all_of_it = self._shares.popleft()
            self._given[0] -= some
            self._given[1] -= all_of_it

    def _is_owed(self, now: float) -> bool:
        del now
        return self._given[0] < self._config.best_effort_share * self._given[1]

    def _speculate(self, view: ReplicaView, batch: Batch, opened: _Open) -> list[Work]:
        """Add draft tokens to a batch of decodes, as many as make tokens per second the most."""
        offered = {s.seq_id: s for s in view.running if s.num_draft and s.is_decoding}
        if not offered or any(item.seq_id not in offered for item in opened.work):
            return opened.work
        decodes = len(opened.work)
        alpha = clamp(sum(s.draft_acceptance for s in offered.values()) / len(offered))
        best, length = decodes / self._cost.step_time(batch.load), 1
        for tokens in range(2, self._config.max_draft + 2):
            load = batch.load._replace(drafts=decodes * (tokens - 1), draft_steps=tokens - 1)
            time = self._cost.step_time(load)
            if load.tokens > view.max_num_batched_tokens or time > batch.horizon:
                break
            speed = decodes * expected_tokens(alpha, tokens) / time
            if speed > best:
                best, length = speed, tokens
        if length == 1:
            return opened.work
        work: list[Work] = []
        for item in opened.work:
            drafts = min(length - 1, offered[item.seq_id].num_draft)
            pages = opened.needs(offered[item.seq_id], 1 + drafts) - opened.needs(
                offered[item.seq_id], 1
            )
            if pages > opened.pages:
                work.append(item)
                continue
            opened.pages -= pages
            work.append(Work(seq_id=item.seq_id, num_tokens=1, num_draft=drafts))
        return work
