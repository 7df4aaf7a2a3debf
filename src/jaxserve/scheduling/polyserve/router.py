"""The tier router and the scaler over views: frozen records in, plans out.

Both bring the view into arrays and call the functions that a simulated fleet calls.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.core.cost import CostModel
from jaxserve.core.cost_drift import HIGHEST, LOWEST
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import DeclineReason, Route, RoutePlan, ScaleAction, ScalePlan
from jaxserve.core.view import FleetView, ReplicaRole, ReplicaStage, ReplicaState, SequenceView
from jaxserve.scheduling.polyserve.admission import EPS, MEMORY, SEATS, TAKES, admits
from jaxserve.scheduling.polyserve.config import PolyServeConfig
from jaxserve.scheduling.polyserve.packing import (
    Gradient,
    empty_gradient,
    enter,
    load_of,
    route,
)
from jaxserve.scheduling.polyserve.scaling import empty_watch, resize_pool, scale_down
from jaxserve.scheduling.polyserve.state import (
    BETWEEN,
    DRAINING,
    MEANS,
    NEVER,
    NOBODY,
    POOLED,
    SERVING,
    Records,
    Rules,
    Servers,
    empty_requests,
    empty_servers,
    records,
)
from jaxserve.scheduling.step_times import StepTimes, step_seconds, step_times

_STATES: tuple[ReplicaState, ...] = ("off", "starting", "pooled", "serving", "draining")
_STAGES: tuple[ReplicaStage, ...] = ("whole", "prefill", "decode")
_PRIOR = 50
"""Requests that the initial means count as."""
_FAR = 1e9
"""Seconds until something is due that nobody wants at any time."""


def tier_of(tpot: np.ndarray, tiers: tuple[float, ...]) -> np.ndarray:
    """Return the bin of each request: the loosest tier that is no looser than what it asks for.

    Args:
        tpot: `[requests]`: seconds per token.
        tiers: Seconds per token of the bins, ascending.

    Raises:
        ConfigError: If one asks for less than the tightest tier.
    """
    found = np.searchsorted(np.array(tiers), tpot * (1 + 1e-9), side="right") - 1
    if len(found) and found.min() < 0:
        at = int(found.argmin())
        raise ConfigError(
            f"request {at} wants a token every {tpot[at] * 1000:g} ms, and the tightest tier is "
            f"{tiers[0] * 1000:g} ms; add a tier, or refuse it."
        )
    return found.astype(np.int64)


def rules_for(
    config: PolyServeConfig,
    *,
    capacity: int,
    seats: int,
    max_tokens: int,
    transfer: tuple[float, float] = (0.0, 0.0),
) -> Rules:
    """Return what the compiled policy goes by.

    Args:
        config: The settings.
        capacity: Tokens that the cache of a server holds.
        seats: Most sequences on one.
        max_tokens: Most tokens in a step.
        transfer: Seconds to move keys and values: at least, and per token.
    """
    many = len(config.tiers)
    checks = config.check_first + 2 * config.check_second + 4 * config.check_later
    means = records(MEANS, many)
    means.tau[:] = config.tiers
    means.output[:], means.prompt[:] = config.initial_output, config.initial_prompt
    means.finished[:] = means.arrived[:] = _PRIOR
    return Rules(
        means=means, interference=float(config.interference),
        guard=float(config.guard), max_step=float(config.max_step_s),
        is_gap=int(config.pace == "tpot_gap"), packs=int(config.packs), capacity=capacity,
        seats=seats, max_tokens=max_tokens, max_probes=config.max_probes, walk=400,
        transfer_base=float(transfer[0]), transfer_token=float(transfer[1]), checks=checks,
    )  # fmt: skip


class _Arrays:
    """A fleet's view as arrays, with the new request last."""

    def __init__(
        self, fleet: FleetView, config: PolyServeConfig, rules: Rules, new: SequenceView | None
    ) -> None:
        """Copy everything that the policy reads."""
        replicas = fleet.replicas
        roles = fleet.roles or tuple(ReplicaRole() for _ in replicas)
        if not replicas or len(roles) != len(replicas):
            raise ConfigError(
                f"a fleet needs replicas and a role for each, got {len(replicas)} replicas and "
                f"{len(roles)} roles."
            )
        self._tiers = config.tiers
        total = sum(len(r.running) + len(r.waiting) for r in replicas)
        self.rq: Records = empty_requests(total + (new is not None))
        self.sv: Servers = empty_servers(len(replicas), rules.seats, len(config.tiers))
        self._used = 0
        for s, (replica, role) in enumerate(zip(replicas, roles, strict=True)):
            self.sv.one.state[s] = _STATES.index(role.state)
            self.sv.one.stage[s] = _STAGES.index(role.stage)
            self.sv.one.label[s] = self._label(role)
            self.sv.one.phase[s] = BETWEEN
            self.sv.one.end[s] = replica.now
            first = self._used
            pending: list[int] = []
            for sequence in (*replica.running, *replica.waiting):
                r = self._request(sequence)
                if sequence.is_decoding and sequence.is_running:
                    self._decode(rules, s, r, sequence)
                else:
                    pending.append(r)
            pending.sort(key=lambda r: (float(self.rq.due[r]), r))
            for r, following in zip(pending, [*pending[1:], NOBODY], strict=False):
                self.rq.following[r] = following
                self.sv.one.pending_tokens[s] += self.rq.total[r] - self.rq.computed[r]
            self.sv.one.pending[s] = len(pending)
            if self.sv.one.state[s] == SERVING and role.tier is None and role.stage == "whole":
                self._relabel(s, range(first, self._used))
            self.sv.one.known[s], self.sv.one.known_kv[s] = (
                self.sv.one.context[s],
                self.sv.one.kv[s],
            )
            self.sv.one.head[s] = pending[0] if pending else NOBODY
        self.new = NOBODY if new is None else self._request(new)

    def gradient(self, rules: Rules, times: Any) -> Gradient:  # noqa: ANN401  arrays or a fit
        """Return the servers that serve, in their rows."""
        gr = empty_gradient(len(self.sv.one.state), len(self._tiers))
        for s in range(len(self.sv.one.state)):
            if self.sv.one.state[s] == SERVING:
                row = self.sv.one.label[s]
                self.sv.one.load[s] = load_of(times, rules, self.sv, s)
                enter(gr, self.sv, s, len(self._tiers) if row == NOBODY else int(row))
        return gr

    def _label(self, role: ReplicaRole) -> int:
        if role.tier is None:
            return NOBODY
        if role.tier not in self._tiers:
            known = ", ".join(f"{tau:g}" for tau in self._tiers)
            raise ConfigError(
                f"a replica serves the tier {role.tier:g}, and the router knows {known} seconds "
                "per token; give both the same tiers."
            )
        return self._tiers.index(role.tier)

    def _relabel(self, s: int, members: range) -> None:
        """Give a replica without a role that of those it serves; to the pool if it serves none."""
        if members:
            self.sv.one.label[s] = min(int(self.rq.tier[r]) for r in members)
        else:
            self.sv.one.state[s] = POOLED

    def _request(self, sequence: SequenceView) -> int:
        r, rq, slo = self._used, self.rq, sequence.slo
        self._used += 1
        tpot = self._tiers[-1] if slo is None or slo.tpot_ms is None else slo.tpot_ms / 1000
        ttft = _FAR if slo is None or slo.ttft_ms is None else slo.ttft_ms / 1000
        emitted = sequence.num_tokens - sequence.prompt_len
        rq.arrival[r] = sequence.arrival
        rq.prompt[r] = sequence.prompt_len
        rq.tier[r] = max(0, np.searchsorted(self._tiers, tpot * (1 + 1e-9), side="right") - 1)
        rq.due[r] = sequence.arrival + ttft
        rq.tpot[r] = tpot
        rq.total[r] = sequence.num_tokens
        rq.computed[r] = sequence.num_computed
        rq.emitted[r] = emitted
        return r

    def _decode(self, rules: Rules, s: int, r: int, sequence: SequenceView) -> None:
        sv, rq, i = self.sv, self.rq, int(self.sv.one.decodes[s])
        k = int(rq.tier[r])
        tau = float(rules.means.tau[k])
        sv.slots.request[s, i] = r
        sv.slots.tier[s, i] = k
        sv.slots.tpot[s, i] = rq.tpot[r]
        sv.slots.context[s, i] = sequence.num_computed
        sv.slots.emitted[s, i] = rq.emitted[r]
        sv.slots.finish[s, i] = NEVER
        due = max(
            rq.due[r] + tau * rq.emitted[r], sv.one.end[s] + tau * (rq.due[r] < sv.one.end[s])
        )
        sv.slots.due[s, i] = due - tau
        sv.min_due[s, k] = min(sv.min_due[s, k], due - tau)
        sv.one.decodes[s] += 1
        sv.one.context[s] += sequence.num_computed
        sv.one.kv[s] += sequence.num_computed


class TierRouter:
    """Places requests by tier, fullest server first.

    Args:
        cost: How long the replicas' steps take.
        config: The settings.

    Attributes:
        means: What it goes by, with the mean lengths that it has seen.

    Raises:
        ConfigError: For a cost model that compiled loops cannot read.
    """

    def __init__(self, cost: CostModel, config: PolyServeConfig | None = None) -> None:
        """Start without having seen any request."""
        self.config = config or PolyServeConfig()
        self._measured = self._times = step_times(cost, margin=self.config.margin)
        self.means = rules_for(self.config, capacity=1, seats=1, max_tokens=1)

    def plan(self, sequence: SequenceView, fleet: FleetView) -> RoutePlan:
        """Decide about a request: where it goes, or that it waits.

        Raises:
            ConfigError: If the view has no replicas, or tiers that the router does not know.
        """
        rules = _sized(self.means, fleet)
        arrays = _Arrays(fleet, self.config, rules, sequence)
        rq, r = arrays.rq, arrays.new
        reason = self._at_the_door(sequence, rq, r, fleet.now)
        if reason is not None:
            return RoutePlan(route=None, reason=reason)
        before = arrays.sv.one.state.copy(), arrays.sv.one.label.copy()
        gr = arrays.gradient(rules, self._times)
        s = route(
            self._times, rules, rq, arrays.sv, gr, r, fleet.now, 0, self.config.promotes
        )  # fmt: skip
        actions = _actions(self.config, before, arrays.sv, "the tier has no room")
        if s != NOBODY:
            return RoutePlan(route=Route(replica=int(s)), actions=actions)
        return RoutePlan(route=None, actions=actions, reason=self._why(rules, arrays, fleet.now))

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived, in a fleet where nobody waits.

        A request that should wait goes where the least is left to be computed.

        Raises:
            ConfigError: If no replica serves or could.
        """
        plan = self.plan(sequence, fleet)
        route = plan.route or self.send_home(fleet, plan).route
        if route is None:
            raise ConfigError("no replica of the fleet serves, or waits in the pool.")
        return route

    def send_home(self, fleet: FleetView, plan: RoutePlan) -> RoutePlan:
        """Place a request for which there is no room.

        Args:
            fleet: The view.
            plan: The plan that lets it wait, and says why.
        """
        roles = fleet.roles or (ReplicaRole(),) * len(fleet.replicas)
        there = [i for i, role in enumerate(roles) if role.state in ("serving", "pooled")]
        if not there:
            return plan
        home = min(
            there,
            key=lambda i: (
                sum(s.num_uncomputed for s in fleet.replicas[i].waiting),
                len(fleet.replicas[i].running), i,
            ),
        )  # fmt: skip
        actions = plan.actions
        if roles[home].state == "pooled" and not any(a.replica == home for a in actions):
            tier, reason = self.config.tiers[-1], "a request must not wait"
            actions += (ScaleAction(replica=home, state="serving", tier=tier, reason=reason),)
        route = Route(replica=home, is_promised=False, reason=plan.reason)
        return RoutePlan(route=route, actions=actions, reason=plan.reason)

    def observe(self, sequence: SequenceView) -> None:
        """Take note of a request that has ended, for the mean lengths of its tier."""
        k = self._tier_index(sequence)
        means, output = self.means.means, sequence.num_tokens - sequence.prompt_len
        means.finished[k] += 1
        means.output[k] += (output - means.output[k]) / means.finished[k]
        means.arrived[k] += 1
        means.prompt[k] += (sequence.prompt_len - means.prompt[k]) / means.arrived[k]

    @property
    def times(self) -> StepTimes:
        """Times of steps that it goes by."""
        return self._times

    def drifted(self, ratio: float) -> None:
        """Take note of how long steps take of late, over what the cost model says.

        As where an engine learns, it is not followed beyond 0.7 and 1.5.
        """
        scale = min(max(ratio, LOWEST), HIGHEST)
        planes, grid = self._measured.planes * scale, self._measured.grid * scale
        self._times = self._measured._replace(planes=planes, grid=grid)

    def tier_of(self, sequence: SequenceView) -> float:
        """Return the tier of a request; one that wants more than the tightest belongs to that."""
        return self.config.tiers[self._tier_index(sequence)]

    def _tier_index(self, sequence: SequenceView) -> int:
        slo, tiers = sequence.slo, self.config.tiers
        tpot = tiers[-1] if slo is None or slo.tpot_ms is None else slo.tpot_ms / 1000
        return max(0, int(np.searchsorted(tiers, tpot * (1 + 1e-9), side="right")) - 1)

    def dump(self) -> dict[str, list[float]]:
        """Return what has been learned, as JSON has it."""
        names = ("output", "finished", "prompt", "arrived")
        return {name: self.means.means[name].tolist() for name in names}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what `dump` has returned."""
        for name, values in state.items():
            self.means.means[name] = values

    def _at_the_door(
        self, sequence: SequenceView, rq: Records, r: int, now: float
    ) -> DeclineReason | None:
        """Say what stands against a request that not even an idle server could serve in time."""
        if rq.tpot[r] < self.config.tiers[0] * (1 - 1e-9):
            return "idle_server"
        left = sequence.num_tokens - sequence.num_computed
        alone = step_seconds(self._times, left, left * left / 2, 1, 0, 0, 0)
        decode = step_seconds(self._times, 0, 0.0, 0, 0, 1, sequence.num_tokens + 1)
        if sequence.arrival + alone > rq.due[r] + EPS or decode > rq.tpot[r]:
            return "idle_server"
        return "expired" if now + alone > rq.due[r] + EPS else None

    def _why(self, rules: Rules, arrays: _Arrays, now: float) -> DeclineReason:
        """Say what the servers of the request's tier are short of."""
        sv = arrays.sv
        verdicts = [
            admits(self._times, rules, arrays.rq, sv, s, arrays.new, now, 1.0)
            for s in range(len(sv.one))
            if sv.one.state[s] == SERVING and sv.one.label[s] == arrays.rq.tier[arrays.new]
        ]
        is_memory = verdicts and all(v in (MEMORY, SEATS) for v in verdicts if v != TAKES)
        return "memory" if is_memory else "compute"


class TierScaler:
    """Decides which replicas drain, start or are turned off; asked every `check_s` seconds.

    Args:
        cost: How long the replicas' steps take.
        config: The settings.
        router: The router of the same fleet, whose mean lengths are then gone by.
        elastic: Whether replicas are started and turned off; otherwise those that are on stay on,
            in the pool if nobody needs them.
    """

    def __init__(
        self,
        cost: CostModel,
        config: PolyServeConfig | None = None,
        *,
        router: TierRouter | None = None,
        elastic: bool = True,
    ) -> None:
        """Start without having seen the fleet."""
        self._router = router or TierRouter(cost, config)
        self.config = self._router.config
        self._elastic = elastic
        self._watch = empty_watch(len(self.config.tiers))

    def refused(self, tier: float) -> None:
        """Take note of a request that found no room in its tier."""
        if tier not in self.config.tiers:
            raise ConfigError(f"there is no tier of {tier:g} seconds per token.")
        self._watch.refused[self.config.tiers.index(tier)] += 1

    def plan(self, fleet: FleetView) -> ScalePlan:
        """Answer one view with the roles that change."""
        config, rules = self.config, _sized(self._router.means, fleet)
        arrays = _Arrays(fleet, config, rules, None)
        sv = arrays.sv
        before = sv.one.state.copy(), sv.one.label.copy()
        gr = arrays.gradient(rules, self._router.times)
        for s in range(len(sv.one)):
            if sv.one.state[s] == DRAINING and sv.one.decodes[s] + sv.one.pending[s] == 0:
                sv.one.state[s] = _STATES.index("pooled")
                sv.one.label[s] = NOBODY
        if config.scales:
            scale_down(
                self._router.times, rules, sv, gr, self._watch, fleet.now, config.hold_checks,
                config.cooldown_s, config.down_load, config.drain_share,
            )  # fmt: skip
        actions = _actions(config, before, sv, "the others have room")
        if not self._elastic:
            return ScalePlan(actions=actions)
        reserve = max(1, math.ceil(config.reserve_share * len(sv.one)))
        change = np.zeros(len(sv.one), np.int64)
        keep = max(0.0, 1 - config.check_s / max(config.start_s, config.check_s))
        count = int(resize_pool(sv, self._watch, reserve, config.hold_checks, keep, change))
        state: ReplicaState = "starting" if count > 0 else "off"
        resized = tuple(
            ScaleAction(replica=int(s), state=state, reason=f"the pool should hold {reserve}")
            for s in change[: abs(count)]
        )
        return ScalePlan(actions=actions + resized)


def _sized(rules: Rules, fleet: FleetView) -> Rules:
    """Return rules with the sizes of a fleet's replicas."""
    if not fleet.replicas:
        raise ConfigError("a fleet needs replicas, got none.")
    first = fleet.replicas[0]
    return rules._replace(
        capacity=first.num_pages * first.page_size, seats=first.max_num_seqs,
        max_tokens=first.max_num_batched_tokens,
    )  # fmt: skip


def _actions(
    config: PolyServeConfig, before: tuple[np.ndarray, np.ndarray], sv: Servers, reason: str
) -> tuple[ScaleAction, ...]:
    """Return the roles that have changed."""
    states, labels = before
    changed = np.flatnonzero((states != sv.one.state) | (labels != sv.one.label))
    return tuple(
        ScaleAction(
            replica=int(s), state=_STATES[int(sv.one.state[s])], reason=reason,
            tier=None if sv.one.label[s] == NOBODY else config.tiers[int(sv.one.label[s])],
        )
        for s in changed
    )  # fmt: skip
