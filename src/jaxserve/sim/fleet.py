"""Fleets of hundreds of servers on a virtual clock: the way in to the compiled loop.

The router and the scaler are the functions that `scheduling/polyserve` gives to a real fleet as
well. A server of such a simulation is simpler than `sim/replica.py`: all of its decodes run in each
of its steps, nothing is drafted, and its cache counts tokens, not pages. With one server and a
fixed budget both give the same times to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxserve.core.cost import CostModel
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.polyserve.config import PolyServeConfig, check_tiers
from jaxserve.scheduling.polyserve.packing import POLYSERVE, empty_gradient
from jaxserve.scheduling.polyserve.router import rules_for, tier_of
from jaxserve.scheduling.polyserve.scaling import empty_watch
from jaxserve.scheduling.polyserve.state import (
    DECODE,
    NOBODY,
    OFF,
    PREFILL,
    empty_requests,
    empty_servers,
    records,
)
from jaxserve.scheduling.step_times import step_times
from jaxserve.sim import fleet_board, fleet_loop
from jaxserve.sim.fleet_board import (
    DECLINED,
    LATE_FIRST,
    LATE_GAP,
    LATE_TOKEN,
    Board,
    Setup,
)
from jaxserve.sim.report import READINGS, Reading
from jaxserve.sim.request import SimRequest

RivalName = Literal[
    "random", "round_robin", "least_requests", "least_kv", "power_of_two", "slo_headroom",
    "static_tiers", "freeness",
]  # fmt: skip
"""Routers to compare with. `static_tiers` gives every tier servers of its own (Silo); `freeness`
is the placement of Llumnix without its migration; `slo_headroom` weighs predicted times."""
RIVALS: tuple[RivalName, ...] = get_args(RivalName)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """Servers that are all alike.

    Attributes:
        servers: How many.
        cost: How long steps take.
        capacity: Tokens that the cache of each holds.
        seats: Most sequences on one.
        max_tokens: Most tokens in one step.
        prefill_servers: How many compute prompts only, the others making further tokens; 0 lets
            every server do both.
        transfer_base_s: Seconds to move a request's keys and values between them, besides
        transfer_token_s: seconds for each token.

    Raises:
        ConfigError: If a size is not above zero, or one kind of server is missing.
    """

    servers: int
    cost: CostModel
    capacity: int
    seats: int = 256
    max_tokens: int = 8192
    prefill_servers: int = 0
    transfer_base_s: float = 0.0
    transfer_token_s: float = 0.0

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("servers", "capacity", "seats", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.prefill_servers < self.servers:
            raise ConfigError(
                f"prefill_servers must be zero or more and leave some of the {self.servers} "
                f"servers for the tokens after the first, got {self.prefill_servers}."
            )
        for name in ("transfer_base_s", "transfer_token_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be zero or more, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRival:
    """Another router, and the engines behind it.

    Attributes:
        name: Which.
        budget: Most tokens of a step, a fixed size of chunks; 0 follows slack as PolyServe does.
        by_deadline: Whether prompts are computed in the order in which they are due.
        sheds: Whether prompts that can no longer be in time are dropped.
        max_step_s: Longest step that prompts are let fill, where chunks follow slack.
        split: Servers of each tier, tightest first, for `static_tiers`.
        seed: Of random choices.

    Raises:
        ConfigError: For a name that is not known, or a budget below zero.
    """

    name: RivalName
    budget: int = 0
    by_deadline: bool = False
    sheds: bool = False
    max_step_s: float = 0.1
    split: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the name."""
        if self.name not in RIVALS:
            raise ConfigError(f"name must be one of {', '.join(RIVALS)}, got {self.name!r}.")
        if self.budget < 0:
            raise ConfigError(f"budget must be zero or more tokens, got {self.budget}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTrace:
    """Requests as arrays, in order of arrival.

    Attributes:
        arrival: Clock times in seconds.
        prompt: Tokens of the prompts.
        output: Tokens that will be generated.
        ttft: Seconds to the first token that are wanted.
        tpot: Seconds per further token.

    Raises:
        ConfigError: If the arrays differ in length, arrivals decrease or a number is impossible.
    """

    arrival: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    ttft: np.ndarray
    tpot: np.ndarray

    def __post_init__(self) -> None:
        """Check the numbers."""
        count = len(self.arrival)
        for name in ("prompt", "output", "ttft", "tpot"):
            values = getattr(self, name)
            if len(values) != count:
                raise ConfigError(f"{name} has {len(values)} values for {count} requests.")
            if count and not (np.isfinite(values).all() and (values > 0).all()):
                at = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
                raise ConfigError(
                    f"{name} must be a finite number above zero, but request {at} has {values[at]}."
                )
        if not np.isfinite(self.arrival).all() or (np.diff(self.arrival) < 0).any():
            raise ConfigError("arrivals must be finite and must not decrease; sort the requests.")

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival)

    @classmethod
    def of(cls, requests: Sequence[SimRequest]) -> "FleetTrace":
        """Bring requests into this form.

        Raises:
            ConfigError: If one has no objectives of its first token and per token.
        """
        for one in requests:
            if one.slo is None or one.slo.ttft_ms is None or one.slo.tpot_ms is None:
                raise ConfigError(
                    f"request {one.request_id} has no objectives of the first token and per token; "
                    "leave it out."
                )
        slos = [one.slo for one in requests if one.slo is not None]
        return cls(
            arrival=np.array([one.arrival for one in requests]),
            prompt=np.array([one.prompt_len for one in requests], np.int64),
            output=np.array([one.output_len for one in requests], np.int64),
            ttft=np.array([(slo.ttft_ms or 0.0) / 1000 for slo in slos]),
            tpot=np.array([(slo.tpot_ms or 0.0) / 1000 for slo in slos]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """What became of a fleet's requests.

    Attributes:
        trace: The requests.
        tier: `[requests]`: tier of each.
        first: `[requests]`: when the first token came; not a number without one.
        finish: `[requests]`: when the last one came, or when the request was declined.
        missed: `[requests]`: bits of `fleet_board`.
        server: `[requests]`: where it ended, or -1.
        preemptions: `[requests]`: how often it lost its pages.
        timeline: `[checks, columns]`, see `columns`.
        columns: What the timeline holds.
        steps: Steps of all servers.
        events: How many events they took.
        server_seconds: Seconds of servers that were on, from the first check to the last end.
        drained: Servers that were let drain.
        started: Servers that were started.
        promoted: Requests that went to a tighter tier's server.
    """

    trace: FleetTrace
    tier: np.ndarray
    first: np.ndarray
    finish: np.ndarray
    missed: np.ndarray
    server: np.ndarray
    preemptions: np.ndarray
    timeline: np.ndarray
    columns: tuple[str, ...]
    steps: int
    events: int
    server_seconds: float
    drained: int
    started: int
    promoted: int

    def attained(self, reading: Reading = "tpot") -> np.ndarray:
        """Return who kept every objective, with one reading of the time per token."""
        bad = DECLINED | LATE_FIRST
        if reading == "tpot":
            bad |= LATE_TOKEN
        elif reading == "tpot_gap":
            bad |= LATE_GAP
        kept = (self.missed & bad) == 0
        if reading == "tpot_mean":
            spent = self.finish - self.first
            with np.errstate(invalid="ignore"):
                kept &= spent <= self.trace.tpot * (self.trace.output - 1) + 1e-9
        return kept

    def attainment(self, reading: Reading = "tpot", *, warm_up_s: float = 0.0) -> float:
        """Return the share that kept every objective, of those that arrived after a warm-up."""
        if reading not in READINGS:
            raise ConfigError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}.")
        judged = self.trace.arrival >= warm_up_s
        return float(self.attained(reading)[judged].mean()) if judged.any() else 1.0

    def declined(self) -> np.ndarray:
        """Return who was declined."""
        return (self.missed & DECLINED) != 0

    def log(self) -> bytes:
        """Return everything that became of requests as bytes, the same for the same run."""
        parts = (self.first, self.finish, self.missed, self.server, self.preemptions, self.timeline)
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def simulate_fleet(
    trace: FleetTrace,
    spec: FleetSpec,
    policy: PolyServeConfig | FleetRival,
    *,
    tiers: tuple[float, ...] = (0.02, 0.03, 0.05, 0.1),
    jumps: bool = True,
    elastic: bool = False,
    initial: int | None = None,
) -> FleetReport:
    """Serve requests to the end.

    Args:
        trace: In order of arrival.
        spec: The servers.
        policy: PolyServe's settings, or a rival.
        tiers: Seconds per token of the bins, for a rival; PolyServe has its own.
        jumps: Whether steps of decodes are done at once; results are the same.
        elastic: Whether servers are started and turned off. Otherwise all are on all the time.
        initial: Servers that are on at first if they are.

    Returns:
        What became of each request.

    Raises:
        ConfigError: If a request is too large for a server, tighter than the tightest tier, or the
            servers of `static_tiers` do not add up.
    """
    rival = policy if isinstance(policy, FleetRival) else None
    config = policy if isinstance(policy, PolyServeConfig) else PolyServeConfig(tiers=tiers)
    tiers = config.tiers
    check_tiers(tiers)
    tier = tier_of(trace.tpot, tiers)
    _check_sizes(trace, spec)
    count, many = len(trace), len(tiers)
    rules = rules_for(
        config, capacity=spec.capacity, seats=spec.seats, max_tokens=spec.max_tokens,
        transfer=(spec.transfer_base_s, spec.transfer_token_s),
    )  # fmt: skip
    if rival is not None:
        rules = rules._replace(max_step=rival.max_step_s)
    rq = empty_requests(count)
    rq.arrival[:], rq.prompt[:], rq.output[:] = trace.arrival, trace.prompt, trace.output
    rq.tier[:], rq.due[:], rq.tpot[:] = tier, trace.arrival + trace.ttft, trace.tpot
    rq.total[:] = trace.prompt
    sv = empty_servers(spec.servers, spec.seats, many)
    gr = empty_gradient(spec.servers, many)
    if spec.prefill_servers:
        sv.one.stage[: spec.prefill_servers] = PREFILL
        sv.one.stage[spec.prefill_servers :] = DECODE
    if elastic and initial is not None:
        sv.one.state[initial:] = OFF
    if rival is not None:
        fleet_loop.start_rivals(sv, gr, _labels(rival, spec, many), many)
    reserve = max(1, round(config.reserve_share * spec.servers)) if elastic else -1
    setup = Setup(
        kind=POLYSERVE if rival is None else RIVALS.index(rival.name),
        is_split=int(spec.prefill_servers > 0),
        budget=rival.budget if rival else 0,
        by_deadline=int(rival.by_deadline) if rival else 1,
        sheds=int(rival.sheds) if rival else 1,
        promotes=int(config.promotes and rival is None),
        jumps=int(jumps),
        scales=int(config.scales and rival is None),
        tick=config.check_s, hold=config.hold_checks, cooldown=config.cooldown_s,
        most=config.down_load, share=config.drain_share, reserve=reserve, start=config.start_s,
    )  # fmt: skip
    board = _board(spec.servers, many, rival.seed if rival else 0)
    out = records(fleet_board.RESULT, count)
    out.first[:], out.finish[:], out.last[:], out.server[:] = np.nan, np.nan, -1.0, NOBODY
    length = float(trace.arrival[-1]) if count else 0.0
    timeline = np.zeros((int(length / config.check_s) + 500, 6 + many))
    left = fleet_loop.run(
        step_times(spec.cost), rules, setup, rq, sv, gr, board, out, empty_watch(many), timeline
    )
    if left:
        raise ConfigError(f"{left} requests are left that no server of the fleet serves.")
    rows = tuple(f"tier {tau * 1000:g} ms" for tau in tiers)
    return FleetReport(
        trace=trace, tier=tier, first=out.first, finish=out.finish, missed=out.missed,
        server=out.server, preemptions=out.preemptions,
        timeline=timeline[: int(board.whole[fleet_board.TICKS])],
        columns=("time", *rows, "prompts", "draining", "pooled", "starting", "waiting"),
        steps=int(board.whole[fleet_board.STEPS]), events=int(board.whole[fleet_board.EVENTS]),
        server_seconds=float(board.real[0]), drained=int(board.whole[fleet_board.DRAINED]),
        started=int(board.whole[fleet_board.STARTED]),
        promoted=int(board.whole[fleet_board.PROMOTED]),
    )  # fmt: skip


def _check_sizes(trace: FleetTrace, spec: FleetSpec) -> None:
    sizes = trace.prompt + trace.output
    if len(trace) and sizes.max() > spec.capacity:
        at = int(sizes.argmax())
        raise ConfigError(
            f"request {at} needs {sizes[at]} tokens of cache, more than the {spec.capacity} of a "
            "server. Leave it out, or simulate a larger server."
        )


def _labels(rival: FleetRival, spec: FleetSpec, tiers: int) -> np.ndarray:
    """Return which tier each server belongs to, under a rival."""
    labels = np.full(spec.servers, NOBODY)
    if rival.name != "static_tiers":
        return labels
    own = spec.servers - spec.prefill_servers
    if len(rival.split) != tiers or sum(rival.split) != own or min(rival.split) < 1:
        raise ConfigError(
            f"static_tiers needs a number of servers for each of the {tiers} tiers, at least one "
            f"each and {own} together, got {rival.split}."
        )
    labels[spec.prefill_servers :] = np.repeat(np.arange(tiers), rival.split)
    return labels


def _board(servers: int, tiers: int, seed: int) -> Board:
    desk = records(fleet_board.DESK, servers)
    desk.tail[:] = desk.spot[:] = NOBODY
    lines = records(fleet_board.LINE, tiers + 1)
    lines.queue[:] = NOBODY
    return Board(
        desk, lines, np.array([(seed * 7919 + 12345) % (1 << 31), -1]),
        np.array([0] * 8 + [NOBODY]), np.zeros(2),
    )  # fmt: skip
