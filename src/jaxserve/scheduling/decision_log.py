"""What a policy saw and decided, line by line, so that it can be run again elsewhere.

The first line says which policy it was. Each further line is either a view with the plan that
answered it, or a step that was timed: a policy whose cost model learns depends on both, and on
nothing else. What never changes about a sequence is written once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxserve.core.cost import CostModel, StepLoad
from jaxserve.core.cost_file import cost_from_json, cost_to_json
from jaxserve.core.plan import Rejection, StepPlan, Work
from jaxserve.core.protocols import Doorkeeper, Scheduler
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.log_file import MOST_BYTES, LogFile, read_head, read_lines
from jaxserve.scheduling.policies import PolicySettings

FORMAT = "jaxserve decision log"
VERSION = 1
_FIXED = ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_loras")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogHead:
    """Which policy decided.

    Attributes:
        policy: Its name.
        settings: Its settings.
        cost: The cost model that it began with, without what it learned; None if it had none.
        learns: Whether that model was corrected by the steps that were timed.
    """

    policy: str
    settings: PolicySettings
    cost: CostModel | None
    learns: bool


class LogWriter(LogFile):
    """Writes a decision log. Lines cost some microseconds per sequence, and are buffered.

    Args:
        path: The file; replaced if it is there.
        head: Which policy decides.
        most_bytes: Longest log.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, head: LogHead, *, most_bytes: int = MOST_BYTES) -> None:
        """Open the file and write its first line."""
        super().__init__(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "policy": head.policy,
                "settings": head.settings.to_json(),
                "cost": None if head.cost is None else cost_to_json(head.cost),
                "learns": head.learns,
            },
            kind="decision log",
            most_bytes=most_bytes,
        )
        self._known: set[int] = set()
        self._fixed: tuple[object, ...] | None = None

    def planned(self, view: ReplicaView, plan: StepPlan | None, error: str | None) -> None:
        """Write a view and what answered it.

        Args:
            view: What the policy saw.
            plan: Its plan.
            error: The kind of what it raised instead.
        """
        line: dict[str, Any] = {"now": view.now, "free": view.num_free_pages}
        fixed = tuple(getattr(view, name) for name in _FIXED)
        if fixed != self._fixed:
            self._fixed = fixed
            line["fixed"] = fixed
        if view.adapters:
            line["adapters"] = sorted(view.adapters)
        if view.draft_sizes:
            line["drafts"] = view.draft_sizes
        new: list[list[Any]] = []
        for name, sequences in (("run", view.running), ("wait", view.waiting)):
            if sequences:
                line[name] = [self._sequence(one, new) for one in sequences]
        if new:
            line["new"] = new
        line["plan"] = error if plan is None else _plan_to_json(plan)
        if len(self._known) > 2 * (len(view.running) + len(view.waiting)) + 1024:
            self._known = {s.seq_id for s in (*view.running, *view.waiting)}
        self.write(line)

    def observed(self, load: StepLoad, seconds: float, now: float) -> None:
        """Write how long a step took."""
        self.write({"load": load, "seconds": seconds, "now": now})

    def _sequence(self, one: SequenceView, new: list[list[Any]]) -> list[Any]:
        if one.seq_id not in self._known:
            self._known.add(one.seq_id)
            slo = one.slo
            new.append(
                [
                    one.seq_id,
                    one.arrival,
                    one.priority,
                    one.prompt_len,
                    one.max_total_len,
                    one.adapter,
                    None
                    if slo is None
                    else [slo.ttft_ms, slo.tpot_ms, slo.e2e_ms, slo.tier, slo.on_decline],
                ]
            )
        return [
            one.seq_id,
            one.num_tokens,
            one.num_computed,
            one.num_pages,
            one.num_cached,
            one.num_draft,
            one.draft_acceptance,
            int(one.is_decoding),
            one.first_token_time,
        ]


class LoggedScheduler:
    """A policy whose decisions are written down.

    Args:
        policy: Decides.
        log: Where it is written.
    """

    def __init__(self, policy: Scheduler, log: LogWriter) -> None:
        """Keep both."""
        self.policy = policy
        self._log = log

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        try:
            plan = self.policy.plan(view)
        except Exception as error:
            self._log.planned(view, None, type(error).__name__)
            raise
        self._log.planned(view, plan, None)
        return plan

    def refusal(self, sequence: SequenceView) -> Rejection | None:
        """Tell which objective of a new request not even an idle engine could keep."""
        return self.policy.refusal(sequence) if isinstance(self.policy, Doorkeeper) else None


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """A view and what answered it.

    Attributes:
        line: Number of the line, from 1.
        view: What the policy saw.
        plan: Its plan; None if it raised.
        error: The kind of what it raised.
    """

    line: int
    view: ReplicaView
    plan: StepPlan | None
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """How long a step took."""

    load: StepLoad
    seconds: float
    now: float


class LogReader:
    """Reads a decision log.

    Args:
        path: The file.

    Attributes:
        head: Which policy decided.

    Raises:
        ConfigError: If it cannot be read, or is no decision log.
    """

    def __init__(self, path: Path) -> None:
        """Read the first line."""
        self._path = path
        head = read_head(
            path,
            name=FORMAT,
            version=VERSION,
            otherwise=f"is no decision log; `jaxserve serve --decision-log {path.name}` writes "
            "one.",
        )
        cost = head["cost"]
        self.head = LogHead(
            policy=head["policy"],
            settings=PolicySettings.from_json(head["settings"]),
            cost=None if cost is None else cost_from_json(cost, path.name),
            learns=head["learns"],
        )

    def __iter__(self) -> Iterator[Decision | Observation]:
        """Yield what happened, in order.

        Raises:
            ConfigError: If a line is damaged; the last one may have been cut short.
        """
        facts: dict[int, dict[str, Any]] = {}
        fixed: dict[str, Any] = {}

        def read(number: int, line: Mapping[str, Any]) -> Decision | Observation:
            if "load" in line:
                return Observation(StepLoad(*line["load"]), line["seconds"], line["now"])
            fixed.update(zip(_FIXED, line.get("fixed", ()), strict=False))
            facts.update({row[0]: _facts(row) for row in line.get("new", ())})
            view = _view(line, fixed, facts)
            found = line["plan"]
            if isinstance(found, str):
                return Decision(number, view, None, found)
            return Decision(number, view, _plan_from_json(found), None)

        return read_lines(self._path, read)


def _facts(row: list[Any]) -> dict[str, Any]:
    _, arrival, priority, prompt_len, max_total_len, adapter, slo = row
    made = None
    if slo is not None:
        ttft, tpot, e2e, tier, on_decline = slo
        made = Slo(ttft_ms=ttft, tpot_ms=tpot, e2e_ms=e2e, tier=tier, on_decline=on_decline)
    return {
        "arrival": arrival,
        "priority": priority,
        "prompt_len": prompt_len,
        "max_total_len": max_total_len,
        "adapter": adapter,
        "slo": made,
    }


def _view(
    line: Mapping[str, Any], fixed: Mapping[str, Any], facts: Mapping[int, dict[str, Any]]
) -> ReplicaView:
    def sequences(name: str) -> tuple[SequenceView, ...]:
        return tuple(
            SequenceView(
                seq_id=row[0],
                num_tokens=row[1],
                num_computed=row[2],
                num_pages=row[3],
                num_cached=row[4],
                num_draft=row[5],
                draft_acceptance=row[6],
                is_decoding=bool(row[7]),
                first_token_time=row[8],
                is_running=name == "run",
                **facts[row[0]],
            )
            for row in line.get(name, ())
        )

    return ReplicaView(
        now=line["now"],
        running=sequences("run"),
        waiting=sequences("wait"),
        num_free_pages=line["free"],
        adapters=frozenset(line.get("adapters", ())),
        draft_sizes=tuple(line.get("drafts", ())),
        **fixed,
    )


def _plan_to_json(plan: StepPlan) -> dict[str, Any]:
    made: dict[str, Any] = {
        "work": [
            [item.seq_id, item.num_tokens, item.num_draft]
            if item.num_draft
            else [item.seq_id, item.num_tokens]
            for item in plan.work
        ]
    }
    if plan.admit:
        made["admit"] = plan.admit
    if plan.preempt:
        made["preempt"] = plan.preempt
    for name, notes in (("reject", plan.reject), ("unpromised", plan.unpromised)):
        if notes:
            made[name] = [[one.seq_id, one.reason, one.objective, one.detail] for one in notes]
    if plan.holds_until > -math.inf:
        made["holds"] = "inf" if plan.holds_until == math.inf else plan.holds_until
    return made


def _plan_from_json(made: Mapping[str, Any]) -> StepPlan:
    def notes(name: str) -> tuple[Rejection, ...]:
        return tuple(
            Rejection(seq_id=row[0], reason=row[1], objective=row[2], detail=row[3])
            for row in made.get(name, ())
        )

    holds = made.get("holds", -math.inf)
    return StepPlan(
        work=tuple(
            Work(seq_id=row[0], num_tokens=row[1], num_draft=row[2] if len(row) > 2 else 0)
            for row in made["work"]
        ),
        admit=tuple(made.get("admit", ())),
        preempt=tuple(made.get("preempt", ())),
        reject=notes("reject"),
        unpromised=notes("unpromised"),
        holds_until=math.inf if holds == "inf" else holds,
    )
