"""The token planner: who is promised what, and which tokens run next."""

import math
from collections import deque
from dataclasses import replace

import numpy as np

from jaxserve.core.cost import CostModel, StepLoad, safe_cost, zero_load_time
from jaxserve.core.plan import DeclineReason, Rejection, StepPlan
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.slos_serve.composition import Composer, Sorted, left_of
from jaxserve.scheduling.slos_serve.config import SlosServeConfig
from jaxserve.scheduling.slos_serve.fast import admit_greedily
from jaxserve.scheduling.slos_serve.forward import (
    NO_DECODES,
    Decodes,
    Prefill,
    certify,
)  # fmt: skip
from jaxserve.scheduling.slos_serve.programme import Item, choose
from jaxserve.scheduling.slos_serve.promise import OutputLengths, Record, Standing, record_of
from jaxserve.scheduling.slos_serve.segment import SegmentPlanner

_RETRIED = 4
"""Most requests without a promise that are considered anew in a step."""
_TRIALS = 4
"""Most requests that are tried one by one beyond those that the programme wants."""
_EXCHANGES = 4
"""Most requests without room that are tried in the place of others in a step."""
_EXCHANGED = 4
"""Most places that each of them is tried in."""
_SHORTER = 1.25
"""How many times the work of a request another must ask for, to give way to it."""
_DEAREST = 8.0
"""Multiple of the mean work at which prices begin to matter."""
_SPARED = 0.03
"""Share of the requests worth their work that find no room, where prices are at rest."""
_WORTHWHILE = 1.0
"""How many steps with next to nothing in them come on top of the longest step."""
_DEFAULT_STEP_S = 0.1
_TARGETS = 64
"""Latest targets of the first token that are remembered."""
_SLOW_S = 1e9
"""Seconds per token that are no objective."""


def _first_of(slo: Slo | None) -> str:
    """Name the objective that sets the deadline of the first token."""
    if slo is None or slo.ttft_ms is not None:
        return "ttft_ms"
    return "e2e_ms" if slo.e2e_ms is not None else "tpot_ms"


class SlosServeScheduler:
    """Promises what can be kept, keeps it, and serves everybody else with what is left over.

    New requests are decided about when they arrive: the programme (or fast admission) proposes whom
    to promise, and a simulation of the batches to come certifies it. Others are served as best
    effort, refused if they asked for that, and considered anew while their deadlines are in reach.

    Args:
        cost: Times of steps, without a margin.
        config: The settings.

    Attributes:
        num_fallbacks: Steps in which promises could not all be kept, because steps took longer than
            predicted or outputs were longer than reckoned with.
        declined: Why each unfinished request has no promise.

    Source: SLOs-Serve (arXiv 2504.08784).
    """

    def __init__(self, cost: CostModel, config: SlosServeConfig | None = None) -> None:
        """Start without promises."""
        self.config = config or SlosServeConfig()
        self.num_fallbacks = 0
        self.declined: dict[int, DeclineReason] = {}
        config = self.config
        self._plain_cost = cost
        self._unpromised: list[Rejection] = []
        self._cost = safe_cost(cost, margin=config.margin, overhead=config.overhead_s)
        self._records: dict[int, Record] = {}
        self._lengths = OutputLengths(self.config.output_quantile, self.config.initial_output)
        self._composer = Composer(self._cost, config)
        self._num_broken = 0
        self._targets: deque[float] = deque(maxlen=_TARGETS)
        self._default_step_s = _DEFAULT_STEP_S
        self._longest_step_s = self.config.max_step_s or _DEFAULT_STEP_S
        self._rows = 0
        self._dearest = math.inf
        self._mean_work = 0.0
        self._short_until = -math.inf

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        if view.max_num_seqs != self._rows:
            self._fit_rows(view.max_num_seqs)
        found = self._sort(view)
        self._unpromised = []
        if found.new:
            self._follow_targets(found)
        rejections = self._decide(view, found) if found.new or found.expired else []
        plan = self._composer.compose(
            view,
            found,
            self._decodes(found, with_left=False),
            [self._prefill(one) for one in found.prefills],
            max_step_s=self._longest_step_s,
            is_short=view.now < self._short_until,
            reject=rejections,
            unpromised=self._unpromised,
        )
        self.num_fallbacks = self._num_broken + self._composer.num_late
        return plan

    def adopt(self, view: ReplicaView) -> None:
        """Promise everybody who is running their objectives, as when a planner is exchanged."""
        found = self._sort(view)
        for sequence, record in (*found.new, *found.others, *found.expired):
            if sequence.is_running and record.deadline < math.inf:
                record.standing, record.has_missed = Standing.PROMISED, False

    def would_admit(self, view: ReplicaView, sequence: SequenceView) -> DeclineReason | None:
        """Tell why a request that is not here could not be promised anything; None if it could.

        Args:
            view: This engine.
            sequence: The request.
        """
        found = self._sort(view, is_real=False)
        record = record_of(sequence, self.config, self._idle(sequence))
        if record.standing is Standing.BEST_EFFORT:
            return None
        undecided = [one for one in found.new if one[1].standing is Standing.NEW]
        return self._objection(view, found, [*undecided, (sequence, record)])

    def refusal(self, sequence: SequenceView) -> Rejection | None:
        """Tell which objective of a new request not even an idle engine could keep; None if none.

        Args:
            sequence: The request, as it would wait.
        """
        slo = sequence.slo
        if slo is None:
            return None
        cost, per_round = self._plain_cost, self.config.max_draft + 1
        cached = min(sequence.num_cached, sequence.prompt_len - 1)
        first = 1000 * zero_load_time(cost, sequence.prompt_len, cached)
        step = cost.step_time(StepLoad(decodes=1, context=sequence.prompt_len + 1))
        for objective, target, idle, what in (
            ("ttft_ms", slo.ttft_ms, first, f"to the first token of {sequence.prompt_len}"),
            ("tpot_ms", slo.tpot_ms, 1000 * step / per_round, "per token"),
            ("e2e_ms", slo.e2e_ms, first, f"to the first token of {sequence.prompt_len}"),
        ):
            if target is not None and idle > target:
                return Rejection(
                    seq_id=sequence.seq_id,
                    reason="idle_server",
                    objective=objective,
                    detail=f"slo.{objective} asks for {target:g} ms, but an idle server needs "
                    f"{idle:.1f} ms {what}; ask for more time.",
                )
        return None

    # Who is there ------------------------------------------------------------------------------

    def _sort(self, view: ReplicaView, *, is_real: bool = True) -> Sorted:
        """Bring the records up to date and sort sequences by standing."""
        now, pace, records = view.now, self.config.pace, self._records
        found = Sorted()
        seen = len(view.running) + len(view.waiting)
        for sequence in (*view.running, *view.waiting):
            record = records.get(sequence.seq_id) or self._meet(sequence, is_real=is_real)
            if sequence.num_tokens == sequence.num_computed:
                continue  # its last token is on its way
            generated = sequence.num_tokens - sequence.prompt_len
            if generated != record.generated:
                record.generated = generated
                record.last_token = now
            first = sequence.first_token_time
            standing = record.standing
            if standing is Standing.PROMISED:
                if sequence.is_decoding:
                    due = record.due(pace, first)
                    if due < now - 1e-6:
                        record.has_missed = True
                    else:
                        found.decodes.append((sequence, record))
                        found.dues.append(due)
                        continue
                elif generated == 0 and now <= record.deadline:
                    found.prefills.append((sequence, record))
                    continue
                record.has_missed = True
                record.standing = Standing.BEST_EFFORT
                self._num_broken += 1
            elif standing is Standing.NEW or (
                generated == 0 and not record.has_missed and record.deadline < math.inf
            ):
                if now < record.deadline:
                    found.new.append((sequence, record))
                    continue
                record.has_missed = True
                if standing is Standing.NEW:
                    found.expired.append((sequence, record))
                    continue
            found.others.append((sequence, record))
        if is_real and len(records) > seen:
            self._forget(view)
        found.prefills.sort(key=lambda one: (one[1].deadline, one[0].seq_id))
        found.new.sort(key=lambda one: (one[1].deadline, one[0].seq_id))
        return found

    def _meet(self, sequence: SequenceView, *, is_real: bool) -> Record:
        """Read the objectives of a request, and remember it if it is here to stay."""
        record = record_of(sequence, self.config, self._idle(sequence))
        if is_real:
            self._records[sequence.seq_id] = record
            if record.deadline < math.inf:
                self._targets.append(record.deadline - sequence.arrival)
        return record

    def _forget(self, view: ReplicaView) -> None:
        """Drop the records of those that are gone, and learn from their lengths."""
        here = {sequence.seq_id for sequence in view.running}
        here.update(sequence.seq_id for sequence in view.waiting)
        for seq_id in [seq_id for seq_id in self._records if seq_id not in here]:
            record = self._records.pop(seq_id)
            self.declined.pop(seq_id, None)
            if record.generated and record.tier:
                self._lengths.observe(record.tier, record.generated + 1)

    # Whom to promise ---------------------------------------------------------------------------

    def _decide(self, view: ReplicaView, found: Sorted) -> list[Rejection]:
        """Promise what can be kept to new requests; the others go on without, or are refused."""
        fresh = [one for one in found.new if one[1].standing is Standing.NEW]
        retried = [one for one in found.new if one[1].standing is not Standing.NEW]
        limit = max(self.config.max_candidates, 4 * _RETRIED)
        candidates = [*fresh[:limit], *retried[:_RETRIED]]
        rejections: list[Rejection] = []
        promised = self._propose(view, found, candidates)
        for sequence, _ in found.expired:
            self.declined[sequence.seq_id] = "expired"
        for sequence, record in (*found.new, *found.expired):
            if sequence.seq_id in promised:
                record.standing = Standing.PROMISED
                self.declined.pop(sequence.seq_id, None)
                continue
            is_new = record.standing is Standing.NEW
            record.standing = Standing.BEST_EFFORT
            slo = sequence.slo
            may_refuse = is_new and not sequence.is_running  # another policy may have begun it
            if may_refuse and slo is not None and slo.on_decline == "reject":
                rejections.append(self._rejection(view, found, sequence, record))
            else:
                if is_new:
                    record.is_noted = True
                    self._unpromised.append(self._note(sequence, record, _first_of(slo)))
                found.others.append((sequence, record))
        found.others.sort(key=lambda one: (not one[1].as_soon_as_possible, one[0].arrival))
        found.prefills.sort(key=lambda one: (one[1].deadline, one[0].seq_id))
        refused = {one.seq_id for one in rejections}
        found.new = []
        for seq_id in refused:
            del self._records[seq_id]
            self.declined.pop(seq_id, None)
        return rejections

    def _propose(
        self,
        view: ReplicaView,
        found: Sorted,
        candidates: list[tuple[SequenceView, Record]],
    ) -> set[int]:
        """Choose whom to promise; everybody chosen joins `found.prefills`."""
        if self.config.price_gain:
            for one in candidates:
                if one[1].standing is Standing.NEW:
                    change = self._work(one[0]) - self._mean_work
                    self._mean_work += change * (0.01 if self._mean_work else 1.0)
            if view.now < self._short_until:
                candidates = [one for one in candidates if self._is_worth(one)]
        fresh = [one for one in candidates if one[1].standing is Standing.NEW]
        chosen = self._chosen(view, found, candidates) if len(candidates) > 1 else set()
        # Whom the programme wants comes first, then the others, those with little work before.
        ordered = sorted(
            candidates, key=lambda one: (one[0].seq_id not in chosen, self._work(one[0]))
        )
        wanted = ordered[: len(chosen)]
        low, high = 0, len(wanted) + 1 if len(wanted) > 1 else 1
        trial = len(wanted)
        while high - low > 1:  # mostly all of them at once
            is_kept = self._objection(view, found, wanted[:trial]) is None
            low, high = (trial, high) if is_kept else (low, trial)
            trial = (low + high) // 2
        found.prefills += wanted[:low]
        promised = {one[0].seq_id for one in wanted[:low]}
        for one in ordered[low + _TRIALS :]:
            self.declined.setdefault(one[0].seq_id, "compute")
        for one in ordered[low : low + _TRIALS]:
            reason = self._objection(view, found, [one])
            if reason is None:
                found.prefills.append(one)
                promised.add(one[0].seq_id)
            else:
                self.declined[one[0].seq_id] = reason
        if self.config.revises:
            out = [one for one in ordered if one[0].seq_id not in promised]
            self._revise(view, found, out[:_EXCHANGES], promised)
        refused = sum(one[0].seq_id not in promised for one in fresh)
        if refused:
            self._short_until = view.now + self.config.shortage_s
        self._price(len(fresh), refused)
        return promised

    def _revise(
        self,
        view: ReplicaView,
        found: Sorted,
        out: list[tuple[SequenceView, Record]],
        promised: set[int],
    ) -> None:
        """Let promises pass from requests that wait to others with less work, if there are any."""
        for one in out:
            other = self._exchange(view, found, one)
            if other is None:
                continue
            promised.add(one[0].seq_id)
            if other[0].seq_id in promised:
                promised.remove(other[0].seq_id)
                self.declined[other[0].seq_id] = "compute"
            else:
                self._withdraw(found, other)

    def _exchange(
        self, view: ReplicaView, found: Sorted, one: tuple[SequenceView, Record]
    ) -> tuple[SequenceView, Record] | None:
        """Put a request in the place of a promised one that asks for more, if that makes room.

        As many are promised as before, and less work is; whoever gives way is served with what is
        left over, and considered anew. As with jobs on one machine, where to drop the longest
        leaves the fewest late (Moore, 1968). Whoever runs keeps the promise, and whoever would have
        been refused.

        Returns:
            Who gave way; None if nobody did.
        """
        most = _SHORTER * self._work(one[0])
        others = [
            (work, other)
            for other in found.prefills
            if not other[0].is_running
            and other[0].slo is not None
            and other[0].slo.on_decline != "reject"
            and (work := self._work(other[0])) > most
        ]
        others.sort(key=lambda pair: (-pair[0], pair[1][0].seq_id))
        for _, other in others[:_EXCHANGED]:
            place = found.prefills.index(other)
            del found.prefills[place]
            if self._objection(view, found, [one]) is None:
                found.prefills.append(one)
                return other
            found.prefills.insert(place, other)
        return None

    def _withdraw(self, found: Sorted, one: tuple[SequenceView, Record]) -> None:
        """Serve a request without its promise, and say so the first time."""
        sequence, record = one
        record.standing = Standing.BEST_EFFORT
        self.declined[sequence.seq_id] = "compute"
        if not record.is_noted:
            record.is_noted = True
            self._unpromised.append(self._note(sequence, record, _first_of(sequence.slo)))
        found.others.append(one)

    def _objection(
        self, view: ReplicaView, found: Sorted, new: list[tuple[SequenceView, Record]]
    ) -> DeclineReason | None:
        """Tell what stands against promising something to `new` as well; None if nothing does."""
        if self._pages_promised(view, found, new) > self._pages_for_promises(view):
            return "memory"
        if len(found.decodes) + len(found.prefills) + len(new) > view.max_num_seqs:
            return "memory"
        prefills = [self._prefill(one) for one in (*found.prefills, *new)]
        return certify(
            view.now,
            self._decodes(found),
            prefills,
            self._cost,
            pace=self.config.pace,
            max_step_s=self._longest_step_s,
            max_tokens=view.max_num_batched_tokens,
        )

    def _follow_targets(self, found: Sorted) -> None:
        """Fit the longest step to the targets of the first token of the latest requests.

        Whoever comes during a step must still be served in time. Promises have been certified with
        the steps of their time, so that nothing changes while prompts are promised.
        """
        targets = self._targets
        if self.config.max_step_s is not None or not targets or found.prefills:
            return
        short = sorted(targets)[len(targets) // 5]
        # Where every gap counts, decodes end steps early enough, and short ones waste time.
        share = self.config.step_share * (2 if self.config.pace == "tpot_gap" else 1)
        # A step that is mostly the cost of any step, however little it holds, serves nobody.
        idle = self._cost.step_time(StepLoad(decodes=1, context=1))
        longest = share * short + _WORTHWHILE * idle
        # The first few targets say little about those to come.
        is_known = len(targets) >= _TARGETS // 4
        self._longest_step_s = longest if is_known else min(longest, self._default_step_s)

    def _fit_rows(self, rows: int) -> None:
        """Let a step be long enough for all rows to decode, where that takes a server long."""
        self._rows = rows
        whole = self._cost.step_time(StepLoad(decodes=rows, context=rows))
        self._default_step_s = max(_DEFAULT_STEP_S, 1.25 * whole)
        if self.config.max_step_s is None and not self._targets:
            self._longest_step_s = self._default_step_s

    def _chosen(
        self,
        view: ReplicaView,
        found: Sorted,
        candidates: list[tuple[SequenceView, Record]],
    ) -> set[int]:
        """Ask the programme, or fast admission where there are too many for it."""
        everybody = [*found.decodes, *found.prefills, *candidates]
        tiers = tuple(sorted({record.tau for _, record in everybody}))
        context = sum(s.num_tokens for s, _ in everybody) / len(everybody)
        planner = SegmentPlanner(
            self._cost,
            tiers,
            mean_context=context,
            max_step_s=self._longest_step_s,
            max_tokens=view.max_num_batched_tokens,
        )
        size = view.page_size
        items = [
            Item(
                key=sequence.seq_id,
                deadline=0.0 if sequence.is_decoding else max(0.0, record.deadline - view.now),
                prefill=0 if sequence.is_decoding else left_of(sequence),
                pages=-(-(sequence.prompt_len + self._output(sequence, record)) // size),
                tier=tiers.index(record.tau),
                is_forced=place < len(everybody) - len(candidates),
            )
            for place, (sequence, record) in enumerate(everybody)
        ]
        free = self._pages_for_promises(view) - self._pages_promised(view, found, [])
        horizon = self.config.horizon_s
        if len(candidates) > self.config.max_candidates or len(tiers) > self.config.max_tiers:
            fast = admit_greedily(items, planner, free_pages=free, horizon_s=horizon)
            return set(fast.accepted)
        choice = choose(items, planner, free_pages=free, horizon_s=horizon)
        return set(choice.accepted) if choice is not None else set()

    def _idle(self, sequence: SequenceView) -> float:
        """Return the seconds to the first token on an idle server."""
        cached = sequence.num_cached if not sequence.is_running else 0
        return zero_load_time(self._cost, sequence.prompt_len, min(cached, sequence.prompt_len - 1))

    def _work(self, sequence: SequenceView) -> float:
        """Return the seconds of server time that a request asks for, roughly."""
        load = StepLoad(decodes=1, context=sequence.num_tokens)
        idle = self._cost.step_time(StepLoad())
        prefill = zero_load_time(self._cost, max(1, left_of(sequence))) - idle
        record = self._records.get(sequence.seq_id)
        output = self._output(sequence, record) if record is not None else 1
        return prefill + output * (self._cost.step_time(load) - idle)

    def _is_worth(self, one: tuple[SequenceView, Record]) -> bool:
        """Tell whether a request asks for little enough to be promised anything.

        Where demand exceeds the server, one that asks for much costs several others their promise.
        """
        return self._work(one[0]) <= self._dearest

    def _price(self, fresh: int, refused: int) -> None:
        """Let the most that a request may ask for follow demand.

        It falls with every new request that is worth its work and finds no room, and rises with
        every new request, so that in the long run few of them find none.
        """
        gain = self.config.price_gain
        if not gain:
            return
        if refused:
            self._dearest = min(self._dearest, _DEAREST * self._mean_work)
        self._dearest *= math.exp(gain * (_SPARED * fresh - refused))
        self._dearest = max(self._dearest, self.config.price_floor * self._mean_work)

    def _output(self, sequence: SequenceView, record: Record) -> int:
        limit = sequence.max_total_len - sequence.prompt_len
        return self._lengths.guess(record.tier, record.generated, limit)

    def _pages_for_promises(self, view: ReplicaView) -> int:
        return math.floor(view.num_pages * (1 - self.config.watermark))

    def _pages_promised(
        self, view: ReplicaView, found: Sorted, new: list[tuple[SequenceView, Record]]
    ) -> int:
        """Count the pages that promised requests will hold at their ends."""
        size = view.page_size
        outputs = self._outputs(found)
        pages = sum(
            -(-(one[0].prompt_len + output) // size)
            for one, output in zip(found.decodes, outputs, strict=True)
        )
        return pages + sum(
            -(-(sequence.prompt_len + self._output(sequence, record)) // size)
            for sequence, record in (*found.prefills, *new)
        )

    def _outputs(self, found: Sorted) -> list[int]:
        if found.outputs is None:
            found.outputs = [self._output(sequence, record) for sequence, record in found.decodes]
        return found.outputs

    def _prefill(self, one: tuple[SequenceView, Record]) -> Prefill:
        sequence, record = one
        left = left_of(sequence)
        return Prefill(
            record.deadline,
            left,
            sequence.num_tokens - left,
            record.tau,
            self._output(sequence, record),
        )

    def _decodes(self, found: Sorted, *, with_left: bool = True) -> Decodes:
        if not found.decodes:
            return NO_DECODES
        left = [0.0] * len(found.decodes)
        if with_left:
            outputs = self._outputs(found)
            left = [
                float(output - one[1].generated)
                for one, output in zip(found.decodes, outputs, strict=True)
            ]
        return Decodes(
            np.array(found.dues),
            np.array([record.tau for _, record in found.decodes]),
            np.array([float(sequence.num_computed) for sequence, _ in found.decodes]),
            np.array(left),
        )

    def _rejection(
        self, view: ReplicaView, found: Sorted, sequence: SequenceView, record: Record
    ) -> Rejection:
        """Say why a request is refused, and which of its objectives asks for too much."""
        slo = sequence.slo
        objective = _first_of(slo)
        is_slow = self.declined.get(sequence.seq_id, "compute") == "compute"
        if is_slow and slo is not None and slo.tpot_ms is not None and objective != "tpot_ms":
            # Would it be served in time if it could be read out slowly?
            easy = replace(record, tau=_SLOW_S)
            if self._objection(view, found, [(sequence, easy)]) is None:
                objective = "tpot_ms"
        return self._note(sequence, record, objective)

    def _note(self, sequence: SequenceView, record: Record, objective: str) -> Rejection:
        reason = self.declined.get(sequence.seq_id, "compute")
        idle = record.idle_s * 1000
        target = (record.deadline - sequence.arrival) * 1000
        if idle > target:
            reason = "idle_server"
        if objective == "tpot_ms":
            asked = f"{record.tau * 1000:.0f} ms per token were asked for"
        else:
            asked = f"{target:.0f} ms to the first token were asked for"
            asked += "" if objective == "ttft_ms" else f" by {objective}"
        others = {
            "compute": "what has been promised to others leaves no time",
            "memory": "what has been promised to others leaves no room in the cache",
            "idle_server": "no load makes up for that",
            "expired": "that time has passed",
        }[reason]
        return Rejection(
            seq_id=sequence.seq_id,
            reason=reason,
            objective=objective,
            detail=f"{asked}; an idle server needs {idle:.0f} ms to the first token, and {others}.",
        )
