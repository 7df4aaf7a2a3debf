"""The tier router and the scaler over views: frozen records in, plans out.

Both bring the view into arrays and call the functions that a simulated fleet calls.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.core.cost import CostModel
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
    NEVER,
    NOBODY,
    SERVING,
    RequestArrays,
    Rules,
    ServerArrays,
    empty_requests,
    empty_servers,
)
from jaxserve.scheduling.step_times import step_seconds, step_times

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
    return Rules(
        tau=np.array(config.tiers), outputs=np.full(many, config.initial_output),
        finished=np.full(many, _PRIOR), prompts=np.full(many, config.initial_prompt),
        arrived=np.full(many, _PRIOR), interference=float(config.interference),
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
        self.rq: RequestArrays = empty_requests(total + (new is not None))
        self.sv: ServerArrays = empty_servers(len(replicas), rules.seats, len(config.tiers))
        self._used = 0
        for s, (replica, role) in enumerate(zip(replicas, roles, strict=True)):
            self.sv.state[s] = _STATES.index(role.state)
            self.sv.stage[s] = _STAGES.index(role.stage)
            self.sv.label[s] = self._label(role)
            self.sv.phase[s] = BETWEEN
            self.sv.end[s] = replica.now
            pending: list[int] = []
            for sequence in (*replica.running, *replica.waiting):
                r = self._request(sequence)
                if sequence.is_decoding and sequence.is_running:
                    self._decode(rules, s, r, sequence)
                else:
                    pending.append(r)
            pending.sort(key=lambda r: (float(self.rq.due[r]), r))
            for r, following in zip(pending, [*pending[1:], NOBODY], strict=True):
                self.rq.following[r] = following
                self.sv.pending_tokens[s] += self.rq.total[r] - self.rq.computed[r]
            self.sv.pending[s] = len(pending)
            self.sv.head[s] = pending[0] if pending else NOBODY
        self.new = NOBODY if new is None else self._request(new)

    def gradient(self, rules: Rules, times: Any) -> Gradient:  # noqa: ANN401  arrays or a fit
        """Return the servers that serve, in their rows."""
        gr = empty_gradient(len(self.sv.state), len(self._tiers))
        for s in range(len(self.sv.state)):
            if self.sv.state[s] == SERVING:
                row = self.sv.label[s]
                self.sv.load[s] = load_of(times, rules, self.sv, s)
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
        sv, rq, i = self.sv, self.rq, int(self.sv.decodes[s])
        k = int(rq.tier[r])
        tau = float(rules.tau[k])
        sv.slot_request[s, i] = r
        sv.slot_context[s, i] = sequence.num_computed
        sv.slot_emitted[s, i] = rq.emitted[r]
        sv.slot_finish[s, i] = NEVER
        due = max(rq.due[r] + tau * rq.emitted[r], sv.end[s] + tau * (rq.due[r] < sv.end[s]))
        sv.slot_due[s, i] = due - tau
        sv.min_due[s, k] = min(sv.min_due[s, k], due - tau)
        sv.decodes[s] += 1
        sv.context[s] += sequence.num_computed
        sv.kv[s] += sequence.num_computed


class TierRouter:
    """Places requests by tier, fullest server first.

    Args:
        cost: How long the replicas' steps take.
        config: The settings.

    Raises:
        ConfigError: For a cost model that compiled loops cannot read.
    """

    def __init__(self, cost: CostModel, config: PolyServeConfig | None = None) -> None:
        """Start without having seen any request."""
        self.config = config or PolyServeConfig()
        self._times = step_times(cost, margin=self.config.margin)
        self._means = rules_for(self.config, capacity=1, seats=1, max_tokens=1)

    def plan(self, sequence: SequenceView, fleet: FleetView) -> RoutePlan:
        """Decide about a request: where it goes, or that it waits.

        Raises:
            ConfigError: If the view has no replicas, or tiers that the router does not know.
        """
        rules = self._rules(fleet)
        arrays = _Arrays(fleet, self.config, rules, sequence)
        rq, r = arrays.rq, arrays.new
        reason = self._at_the_door(sequence, rq, r, fleet.now)
        if reason is not None:
            return RoutePlan(route=None, reason=reason)
        before = arrays.sv.state.copy(), arrays.sv.label.copy()
        gr = arrays.gradient(rules, self._times)
        s = route(
            self._times, rules, rq, arrays.sv, gr, r, fleet.now, 0, self.config.promotes
        )  # fmt: skip
        actions = self._actions(before, arrays.sv, "the tier has no room")
        if s != NOBODY:
            return RoutePlan(route=Route(replica=int(s)), actions=actions)
        return RoutePlan(route=None, actions=actions, reason=self._why(rules, arrays, fleet.now))

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived, in a fleet where nobody waits.

        A request that should wait goes where the least is left to be computed.
        """
        plan = self.plan(sequence, fleet)
        if plan.route is not None:
            return plan.route
        home = min(
            range(len(fleet.replicas)),
            key=lambda i: (
                sum(s.num_uncomputed for s in fleet.replicas[i].waiting),
                len(fleet.replicas[i].running), i,
            ),
        )  # fmt: skip
        return Route(replica=home, is_promised=False, reason=plan.reason)

    def observe(self, sequence: SequenceView) -> None:
        """Take note of a request that has ended, for the mean lengths of its tier."""
        slo = sequence.slo
        tpot = self.config.tiers[-1] if slo is None or slo.tpot_ms is None else slo.tpot_ms / 1000
        k = int(tier_of(np.array([tpot]), self.config.tiers)[0])
        means, output = self._means, sequence.num_tokens - sequence.prompt_len
        means.finished[k] += 1
        means.outputs[k] += (output - means.outputs[k]) / means.finished[k]
        means.arrived[k] += 1
        means.prompts[k] += (sequence.prompt_len - means.prompts[k]) / means.arrived[k]

    def dump(self) -> dict[str, list[float]]:
        """Return what has been learned, as JSON has it."""
        names = ("outputs", "finished", "prompts", "arrived")
        return {name: getattr(self._means, name).tolist() for name in names}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what `dump` has returned."""
        for name, values in state.items():
            getattr(self._means, name)[:] = values

    def _rules(self, fleet: FleetView) -> Rules:
        if not fleet.replicas:
            raise ConfigError("a fleet needs replicas, got none.")
        first = fleet.replicas[0]
        return self._means._replace(
            capacity=first.num_pages * first.page_size, seats=first.max_num_seqs,
            max_tokens=first.max_num_batched_tokens,
        )  # fmt: skip

    def _at_the_door(
        self, sequence: SequenceView, rq: RequestArrays, r: int, now: float
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
            for s in range(len(sv.state))
            if sv.state[s] == SERVING and sv.label[s] == arrays.rq.tier[arrays.new]
        ]
        is_memory = verdicts and all(v in (MEMORY, SEATS) for v in verdicts if v != TAKES)
        return "memory" if is_memory else "compute"

    def _actions(
        self, before: tuple[np.ndarray, np.ndarray], sv: ServerArrays, reason: str
    ) -> tuple[ScaleAction, ...]:
        states, labels = before
        changed = np.flatnonzero((states != sv.state) | (labels != sv.label))
        return tuple(
            ScaleAction(
                replica=int(s), state=_STATES[int(sv.state[s])], reason=reason,
                tier=None if sv.label[s] == NOBODY else self.config.tiers[int(sv.label[s])],
            )
            for s in changed
        )  # fmt: skip


class TierScaler:
    """Decides which replicas drain, start or are turned off; asked every `check_s` seconds.

    Args:
        cost: How long the replicas' steps take.
        config: The settings.
    """

    def __init__(self, cost: CostModel, config: PolyServeConfig | None = None) -> None:
        """Start without having seen the fleet."""
        self._router = TierRouter(cost, config)
        self.config = self._router.config
        self._times = step_times(cost, margin=self.config.margin)
        self._watch = empty_watch(len(self.config.tiers))

    def refused(self, tier: float) -> None:
        """Take note of a request that found no room in its tier."""
        if tier not in self.config.tiers:
            raise ConfigError(f"there is no tier of {tier:g} seconds per token.")
        self._watch.refused[self.config.tiers.index(tier)] += 1

    def plan(self, fleet: FleetView) -> ScalePlan:
        """Answer one view with the roles that change."""
        config, rules = self.config, self._router._rules(fleet)
        arrays = _Arrays(fleet, config, rules, None)
        sv = arrays.sv
        before = sv.state.copy(), sv.label.copy()
        gr = arrays.gradient(rules, self._times)
        for s in range(len(sv.state)):
            if sv.state[s] == DRAINING and sv.decodes[s] + sv.pending[s] == 0:
                sv.state[s] = _STATES.index("pooled")
                sv.label[s] = NOBODY
        scale_down(
            self._times, rules, sv, gr, self._watch, fleet.now, config.hold_checks,
            config.cooldown_s, config.down_load, config.drain_share,
        )  # fmt: skip
        actions = self._router._actions(before, sv, "the others have room")
        reserve = max(1, math.ceil(config.reserve_share * len(sv.state)))
        change = np.zeros(len(sv.state), np.int64)
        count = int(resize_pool(sv, self._watch, reserve, config.hold_checks, change))
        state: ReplicaState = "starting" if count > 0 else "off"
        resized = tuple(
            ScaleAction(replica=int(s), state=state, reason=f"the pool should hold {reserve}")
            for s in change[: abs(count)]
        )
        return ScalePlan(actions=actions + resized)
