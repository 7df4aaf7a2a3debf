"""`jaxserve sim run | capacity | fleet | replay`: policies without an engine."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxserve.cli.sim_fleet import add_fleet, run_fleet
from jaxserve.cli.sim_values import (
    MS,
    aligned,
    cost_of,
    count,
    not_negative,
    opened,
    positive,
    share,
)
from jaxserve.core.cost import PUBLISHED_COSTS, CostModel
from jaxserve.core.errors import ConfigError
from jaxserve.core.protocols import Router, Scheduler
from jaxserve.scheduling.policies import POLICIES, PolicySettings, make_policy
from jaxserve.scheduling.slos_serve import HandOffRouter, SlosServeScheduler
from jaxserve.scheduling.slos_serve.handoff import RoundRobinRouter
from jaxserve.sim.capacity import CapacitySearch
from jaxserve.sim.live import LiveDisplay
from jaxserve.sim.loop import simulate
from jaxserve.sim.replay import replay
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import READINGS, Reading, attainment, is_attained, latencies, log_lines
from jaxserve.sim.request import Completion, SimRequest
from jaxserve.sim.trace import TraceRecorder
from jaxserve.sim.traces import SHIPPED, Trace, read_trace

DEFAULT_POLICIES = ("fcfs", "deadline_hybrid", "slo")
ROUTERS = ("round_robin", "hand_off")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is simulated, whatever the policy.

    Attributes:
        trace: Arrivals and lengths.
        cost: Times of steps.
        settings: What policies may want to know.
        spec: Sizes of a replica.
        given: The command line.
    """

    trace: Trace
    cost: CostModel
    settings: PolicySettings
    spec: ReplicaSpec
    given: argparse.Namespace

    @property
    def reading(self) -> Reading:
        """How the target per token is read."""
        return self.given.reading

    def requests(self, rate: float, seed: int) -> list[SimRequest]:
        """Return the requests at a rate, with their objectives."""
        given = self.given
        workload = self.trace.workload(
            ttft_slowdown=given.ttft_slowdown, tpot_s=given.tpot_ms / MS
        )  # fmt: skip
        how_many = given.requests or len(self.trace.arrivals)
        found = workload.offer(rate, how_many, self.cost, seed=seed, max_output=given.max_output)
        if given.ttft_ms is None and given.on_decline == "best_effort":
            return found
        changes = {"on_decline": given.on_decline}
        if given.ttft_ms is not None:
            changes["ttft_ms"] = given.ttft_ms
        return [
            replace(one, slo=replace(one.slo, **changes)) if one.slo is not None else one
            for one in found
        ]

    def replicas(
        self, policy: str, seed: int, observer: TraceRecorder | None = None
    ) -> tuple[list[Replica], Router | None]:
        """Return idle replicas with a policy, and who places requests among them."""
        planners = [
            make_policy(policy, self.cost, self.settings) for _ in range(self.given.replicas)
        ]
        found = [
            Replica(
                self.spec, planner, self.cost, index=index, seed=seed + index, observer=observer
            )
            for index, planner in enumerate(planners)
        ]
        return found, _router(self.given.router, planners) if len(found) > 1 else None


def sim_parser[P: argparse.ArgumentParser](parser: P) -> P:
    """Add the commands of `jaxserve sim` to a parser, and return it."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runner = commands.add_parser("run", help="serve a trace under one or several policies")
    _add_case(runner)
    runner.add_argument(
        "--rate", type=positive, metavar="R", help="requests per second [that of the trace]"
    )
    runner.add_argument(
        "--chrome-trace", type=Path, metavar="FILE",
        help="write every step and request of the last policy for chrome://tracing or Perfetto",
    )  # fmt: skip
    runner.add_argument(
        "--log", type=Path, metavar="FILE",
        help="write a JSON line per request of the last policy",
    )  # fmt: skip
    searcher = commands.add_parser(
        "capacity", help="find the rate at which a policy still keeps enough objectives"
    )
    _add_case(searcher)
    searcher.add_argument(
        "--level", type=share, default=0.9, metavar="S", help="share of the requests [0.9]"
    )
    searcher.add_argument("--seeds", type=count, default=1, metavar="N", help="runs per rate [1]")
    add_fleet(
        commands.add_parser("fleet", help="place requests of several tiers on a fleet of servers")
    )
    player = commands.add_parser("replay", help="run a policy again on a decision log")
    player.add_argument(
        "log", metavar="LOG", help="file that `serve --decision-log` or `--fleet-log` has written"
    )
    return parser


def _add_case(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--workload", default=SHIPPED[0], metavar="TRACE",
        help=f"{', '.join(SHIPPED)}, or a CSV or JSON-lines file of arrivals and lengths",
    )  # fmt: skip
    add(
        "--cost-model", default="7b-a100", metavar="COST",
        help="times of steps: a file of `jaxserve profile`, a table (CSV), or one of "
        f"{', '.join(PUBLISHED_COSTS)} [7b-a100]",
    )  # fmt: skip
    add(
        "--policy", nargs="+", default=list(DEFAULT_POLICIES), metavar="NAME",
        help=f"of {', '.join(sorted(POLICIES))} [{' '.join(DEFAULT_POLICIES)}]",
    )  # fmt: skip
    add("--requests", type=count, metavar="N", help="how many [all of the trace]")
    first = parser.add_mutually_exclusive_group()
    first.add_argument(
        "--ttft-slowdown", type=positive, default=5.0, metavar="X",
        help="time to the first token, in multiples of an idle server's [5]",
    )  # fmt: skip
    first.add_argument("--ttft-ms", type=positive, metavar="MS", help="the same for all requests")
    add("--tpot-ms", type=positive, default=100.0, metavar="MS", help="per further token [100]")
    add("--reading", choices=READINGS, default="tpot", help="of the time per token [tpot]")
    add(
        "--on-decline", choices=("best_effort", "reject", "asap"), default="best_effort",
        help="what becomes of those who cannot be promised anything [best_effort]",
    )  # fmt: skip
    add("--replicas", type=count, default=1, metavar="N", help="servers [1]")
    add("--router", choices=ROUTERS, default=ROUTERS[0], help="among replicas [round_robin]")
    add("--num-pages", type=count, default=22_000, metavar="N", help="of 16 tokens [22000]")
    add("--max-num-seqs", type=count, default=256, metavar="N", help="rows of a step [256]")
    add("--max-num-batched-tokens", type=count, default=8192, metavar="N", help="[8192]")
    add(
        "--max-output", type=count, default=4096, metavar="N",
        help="output tokens that policies must reckon with, as they do not know lengths [4096]",
    )  # fmt: skip
    add("--noise", type=not_negative, default=0.0, metavar="S", help="of times of steps [0]")
    add("--seed", type=int, default=0, metavar="N", help="where in the trace to begin [0]")
    add("--quiet", action="store_true", help="show no progress")


def run(given: argparse.Namespace, out: Callable[[str], None]) -> int:
    """Do what the command line asks for.

    Args:
        given: The arguments, as `sim_parser` parses them.
        out: Prints a line.

    Returns:
        The exit code: 1 if a replayed policy decides anything else than it did.

    Raises:
        JaxserveError: For a bad trace, cost model, log or setting.
    """
    if given.command == "replay":
        return _replay(given, out)
    if given.command == "fleet":
        run_fleet(given, out)
        return 0
    case = _case(given)
    if given.command == "capacity":
        _find_capacities(case, out)
    else:
        _run_policies(case, out)
    return 0


def _replay(given: argparse.Namespace, out: Callable[[str], None]) -> int:
    found = replay(Path(given.log))
    for line in found.shown:
        out(line)
    out(
        f"{found.policy}: {found.plans} plans and {found.observations} timed steps replayed, "
        f"{found.differences} differences"
    )
    return 1 if found.differences else 0


def _case(given: argparse.Namespace) -> Case:
    for name in given.policy:
        POLICIES[name]  # raises for an unknown one
    if given.router == "hand_off" and set(given.policy) != {"slo"}:
        raise ConfigError(
            "the router hand_off asks planners what they could promise, which slo alone can say; "
            f"got the policies {', '.join(given.policy)}."
        )
    file = cost_of(given.cost_model)
    return Case(
        trace=read_trace(given.workload),
        cost=file.cost,
        settings=PolicySettings(pace=given.reading, margin=file.margin),
        spec=ReplicaSpec(
            num_pages=given.num_pages,
            max_num_seqs=given.max_num_seqs,
            max_num_batched_tokens=given.max_num_batched_tokens,
            noise=given.noise,
        ),
        given=given,
    )


def _router(name: str, planners: Sequence[Scheduler]) -> Router:
    if name == "hand_off":
        return HandOffRouter([one for one in planners if isinstance(one, SlosServeScheduler)])
    return RoundRobinRouter()


def _serve(
    case: Case,
    policy: str,
    rate: float,
    seed: int,
    observer: TraceRecorder | None = None,
    label: str | None = None,
) -> tuple[list[Completion], list[Replica]]:
    requests = case.requests(rate, seed)
    replicas, router = case.replicas(policy, seed, observer)
    is_shown = False if case.given.quiet else None
    with LiveDisplay(
        label or policy, len(requests), replicas, case.reading, is_shown=is_shown
    ) as display:
        done = simulate(requests, replicas, router=router, stop=display.note)
    return done, replicas


def _run_policies(case: Case, out: Callable[[str], None]) -> None:
    given = case.given
    for path in filter(None, (given.chrome_trace, given.log)):
        opened(path).close()  # before anything is computed that would be lost
    rate = given.rate or case.trace.rate
    lines = [["policy", "kept", "TTFT", "p99", "TPOT", "p99", "e2e", "p99", "refused", "preempted"]]
    done: list[Completion] = []
    recorder: TraceRecorder | None = None
    for policy in given.policy:
        is_last = policy == given.policy[-1]
        recorder = TraceRecorder() if given.chrome_trace and is_last else None
        done, _ = _serve(case, policy, rate, given.seed, recorder)
        served = [one for one in done if one.rejection is None]
        times = latencies(served)
        lines.append(
            [
                policy,
                f"{attainment(done, case.reading):.1%}",
                *(f"{MS * times[f'ttft_{what}']:.0f}" for what in ("mean", "p99")),
                *(f"{MS * times[f'tpot_{what}']:.1f}" for what in ("mean", "p99")),
                *(f"{times[f'e2e_{what}']:.2f}" for what in ("mean", "p99")),
                str(len(done) - len(served)),
                str(sum(one.preemptions for one in done)),
            ]
        )
    out(
        f"{len(done)} requests of {case.trace.name} at {rate:.2f}/s, {given.replicas} "
        f"replica{'s' if given.replicas > 1 else ''}; TTFT and TPOT in ms, e2e in s"
    )
    for line in aligned(lines):
        out(line)
    if given.chrome_trace and recorder is not None:
        with opened(given.chrome_trace) as file:
            recorder.write(file, done)
    if given.log:
        with opened(given.log) as file:
            file.write(log_lines(done))


def _find_capacities(case: Case, out: Callable[[str], None]) -> None:
    given = case.given
    lines = [["policy", "requests/s", "95 % interval"]]
    guess = case.trace.rate * given.replicas
    for policy in given.policy:

        def attained(rate: float, policy: str = policy) -> dict[str, np.ndarray]:
            flags: list[bool] = []
            for seed in range(given.seed, given.seed + given.seeds):
                done, _ = _serve(case, policy, rate, seed, label=f"{policy} at {rate:.2f}/s")
                flags += [is_attained(one, case.reading) for one in done]
            return {case.reading: np.array(flags, float)}

        found = CapacitySearch(attained).find(case.reading, level=given.level, guess=guess)
        guess = found.rate
        lines.append([policy, f"{found.rate:.2f}", f"{found.low:.2f} to {found.high:.2f}"])
    out(f"rates of {case.trace.name} at which {given.level:.0%} of the requests keep everything")
    for line in aligned(lines):
        out(line)
