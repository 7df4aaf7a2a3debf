"""What the token planner owes to its parts, what errors it can stand, and what bursts do to it.

Five studies beside the capacities of `slos_serve`, on the server and the scenarios of that:

* ablations: capacity without one of its parts, or with drafts to speculate on;
* robustness: capacity where steps take longer or shorter than it believes, differ at random, or
  where outputs are guessed too short or too long;
* replicas: capacity of several servers, with requests handed to whoever can promise something;
* burst: a load at ten times the rate for ten seconds, and how long it takes to recover;
* best_effort: what requests without objectives get beside others, and what these lose by it.

    python -m benchmarks.rooms.slos_serve_studies                      # everything; an hour
    python -m benchmarks.rooms.slos_serve_studies --only burst replicas
"""

import argparse
import itertools
import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.scenarios import NAMES, TRACES, Machine, load, machine
from benchmarks.rooms.slos_serve import GIVE_UP, LEVEL, MAX_OUTPUT, PLANNER, policies, work
from jaxserve.core.cost import LinearCost
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.protocols import Router, Scheduler
from jaxserve.scheduling.slos_serve import HandOffRouter, SlosServeConfig, SlosServeScheduler
from jaxserve.scheduling.slos_serve.handoff import RoundRobinRouter
from jaxserve.sim.capacity import Capacity, CapacitySearch
from jaxserve.sim.learning import CostLearner
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica
from jaxserve.sim.report import Reading, is_attained
from jaxserve.sim.request import Completion, SimRequest

STUDIES = ("ablations", "robustness", "replicas", "burst", "best_effort")
ABLATIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "greedy, no programme": {"max_candidates": 1},
    "steps of 50 ms": {"max_step_s": 0.05},
    "no exchange of promises": {"revises": False},
    "no price": {"price_gain": 0.0},
    "no notice of shortage": {"shortage_s": 0.0},
    "no margin": {"margin": 0.0},
}
ERRORS = (-0.2, -0.1, 0.1, 0.2)
NOISES = (0.05, 0.1, 0.2)
QUANTILES = (0.3, 0.5, 0.95)
DRAFTS = 4
ROUTERS = ("round_robin", "hand_off", "hand_off, least first")
SIZES = (1, 2, 4, 8)
BURST_AT, BURST_S, BURST_TIMES, UNTIL = 60.0, 10.0, 10, 200.0
WINDOW_S = 10.0
RIVALS = ("fcfs", "chunked_fcfs_2048", "edf", "deadline_hybrid", PLANNER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One capacity of the planner.

    Attributes:
        study: Which study it belongs to.
        label: What is different.
        scenario: Whose requests.
        reading: How the target per token is read.
        config: Settings of the planner that differ.
        error: By how much longer steps take than it believes, as a share.
        learns: Whether its cost model is corrected by the steps that it has seen.
        noise: Deviation of the logarithm of a step's time.
        drafts: Draft tokens offered per sequence and step.
        replicas: Servers.
        router: Who places requests on them.
        count: Requests per seed and rate, a tenth of which warms up.
        seeds: How many streams of requests.
        traces: Folder of the traces.
    """

    study: str
    label: str
    scenario: str
    reading: Reading
    config: tuple[tuple[str, Any], ...] = ()
    error: float = 0.0
    learns: bool = False
    noise: float = 0.0
    drafts: int = 0
    replicas: int = 1
    router: str = ""
    count: int = 2200
    seeds: int = 1
    traces: Path = TRACES


def capacity(case: Case) -> Capacity:
    """Find the rate at which 90 % keep their objectives."""
    server, workload = machine("a100", case.traces), load(case.scenario, case.traces)
    spec = replace(server.spec, noise=case.noise, max_draft=case.drafts)
    if not isinstance(server.cost, LinearCost):
        raise TypeError("only a linear model can be scaled")
    wrong = server.cost.scaled(1 / (1 + case.error), 0.0) if case.error else server.cost
    config = SlosServeConfig(pace=case.reading, **dict(case.config))
    skip = case.count // 11

    def run(rate: float) -> dict[str, np.ndarray]:
        flags: list[np.ndarray] = []
        for seed in range(case.seeds):
            requests = workload.offer(
                rate, case.count, server.cost, seed=seed, max_output=MAX_OUTPUT
            )
            beliefs = [LearnedCost(wrong) for _ in range(case.replicas)] if case.learns else []
            planners = [
                SlosServeScheduler(cost, config) for cost in beliefs or [wrong] * case.replicas
            ]
            fleet = [
                Replica(
                    spec, planner, server.cost, index=index, seed=seed,
                    observer=CostLearner(beliefs[index]) if beliefs else None,
                ) for index, planner in enumerate(planners)
            ]  # fmt: skip
            kept = np.zeros(case.count - skip)
            missed = 0

            def stop(one: Completion, kept: np.ndarray = kept) -> bool:
                nonlocal missed
                place = one.request.request_id - skip
                if place >= 0:
                    is_kept = is_attained(one, case.reading)
                    kept[place] = is_kept
                    missed += not is_kept
                return missed > GIVE_UP * len(kept)

            simulate(requests, fleet, router=_router(case.router, planners), stop=stop)
            flags.append(kept)
        return {case.reading: np.concatenate(flags)}

    guess = case.replicas / work(server.cost, workload)
    return CapacitySearch(run).find(case.reading, level=LEVEL, guess=guess)


def _router(name: str, planners: Sequence[SlosServeScheduler]) -> Router | None:
    if not name:
        return None
    if name == "round_robin":
        return RoundRobinRouter()
    return HandOffRouter(planners, least_first=name.endswith("least first"))


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the capacities that the chosen studies ask for."""
    found: list[Case] = []
    for scenario, reading in itertools.product(args.scenarios, args.readings):
        plain = Case(
            study="", label="", scenario=scenario, reading=reading, seeds=args.seeds,
            count=args.requests * 11 // 10, traces=args.traces,
        )  # fmt: skip
        if "ablations" in args.only:
            own = replace(plain, study="ablations")
            found += [
                replace(own, label=label, config=tuple(config.items()))
                for label, config in ABLATIONS.items()
            ]
            found.append(replace(own, label=f"with {DRAFTS} drafts", drafts=DRAFTS))
        if "robustness" in args.only:
            own = replace(plain, study="robustness")
            found.append(replace(own, label="as it believes"))
            for error, learns in itertools.product(ERRORS, (False, True)):
                label = f"steps {error:+.0%}" + (", learned" if learns else "")
                found.append(replace(own, label=label, error=error, learns=learns))
            found += [replace(own, label=f"noise {n:.0%}", noise=n) for n in NOISES]
            found += [
                replace(own, label=f"outputs at {q:.0%}", config=(("output_quantile", q),))
                for q in QUANTILES
            ]
        if "replicas" in args.only:
            for size, router in itertools.product(SIZES, ROUTERS):
                if size > 1 or router == ROUTERS[0]:
                    label = f"{size}, {router}" if size > 1 else "1"
                    found.append(
                        replace(
                            plain, study="replicas", label=label, replicas=size, router=router,
                            count=plain.count * max(1, size // 2),
                        )
                    )  # fmt: skip
    return found


def burst(server: Machine, name: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Send ten times as many requests for ten seconds; tell what was kept, by time of arrival.

    Returns:
        By policy: shares that kept their objectives before, during and after the burst, and the
        seconds from its end until windows of ten seconds keep 90 % again for good.
    """
    workload = load(name, args.traces)
    rate = args.load / work(server.cost, workload)
    found: dict[str, dict[str, Any]] = {}
    for policy in policies(server.cost, workload):
        if policy.name not in RIVALS:
            continue
        spec = replace(server.spec, max_num_batched_tokens=max(policy.budgets))
        marks: list[tuple[float, bool]] = []
        for seed in range(args.burst_seeds):
            times = _bursty(rate, seed)
            offered = workload.offer(1.0, len(times), server.cost, seed=seed, max_output=MAX_OUTPUT)
            requests = [
                replace(one, arrival=time) for one, time in zip(offered, times, strict=True)
            ]
            scheduler = policy.make(server.cost, args.readings[0])
            done = simulate(requests, [Replica(spec, scheduler, server.cost, seed=seed)])
            marks += [(one.request.arrival, is_attained(one, args.readings[0])) for one in done]
        found[policy.name] = _recovery(np.array(marks))
    return found


def _bursty(rate: float, seed: int) -> list[float]:
    """Draw the arrivals of a Poisson process whose rate is ten times as high for ten seconds."""
    rng = random.Random(f"burst {seed}")
    now, times = 0.0, list[float]()
    while now < UNTIL:
        now += rng.expovariate(rate * BURST_TIMES)
        in_burst = BURST_AT <= now < BURST_AT + BURST_S
        if in_burst or rng.random() < 1 / BURST_TIMES:
            times.append(now)
    return times


def _recovery(marks: np.ndarray) -> dict[str, Any]:
    when, kept = marks[:, 0], marks[:, 1]
    end = BURST_AT + BURST_S

    def share(low: float, high: float) -> float:
        inside = (low <= when) & (when < high)
        return float(kept[inside].mean()) if inside.any() else 1.0

    starts = np.arange(0.0, UNTIL - WINDOW_S, 1.0)
    shares = [share(start, start + WINDOW_S) for start in starts]
    bad = [s for s, kept in zip(starts, shares, strict=True) if s >= end and kept < LEVEL]
    return {
        "before": share(10.0, BURST_AT),
        "burst": share(BURST_AT, end),
        "after": share(end, UNTIL),
        "recovery_s": float(bad[-1] + 1 - end) if bad else 0.0,
        "timeline": [round(share(s, s + 5.0), 4) for s in np.arange(0.0, UNTIL, 5.0)],
    }


def best_effort(server: Machine, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Add requests without objectives until the server is never idle; tell what both get.

    Args:
        server: Where.
        name: The scenario.
        args: Of the command line.

    Returns:
        What is kept without and with them, and tokens per second, all told, over those of a policy
        that knows of no objectives and is given the same.
    """
    workload, cost = load(name, args.traces), server.cost
    count, rate = args.requests, args.load / work(server.cost, workload)
    base = workload.offer(rate, count, cost, max_output=MAX_OUTPUT)
    end = base[-1].arrival
    extra_rate = 1.0 / work(cost, workload)  # as much as the whole server
    extra = [
        replace(one, slo=None, request_id=count + one.request_id)
        for one in workload.offer(extra_rate, 8 * count, cost, seed=1, max_output=MAX_OUTPUT)
        if one.arrival < end
    ]
    both = sorted([*base, *extra], key=lambda one: (one.arrival, one.request_id))
    reading: Reading = args.readings[0]

    def serve(requests: Sequence[SimRequest], scheduler: Scheduler) -> list[Completion]:
        return simulate(requests, [Replica(server.spec, scheduler, cost)], keep_times=True)

    def kept(done: Sequence[Completion]) -> float:
        own = [is_attained(one, reading) for one in done if one.request.slo is not None]
        return float(np.mean(own))

    def tokens(done: Sequence[Completion], *, only_extra: bool = False) -> float:
        total = 0
        for one in done:
            if only_extra and one.request.slo is not None:
                continue
            if one.first_token is not None and one.first_token <= end:
                total += one.request.prompt_len - one.request.cached_len
            total += sum(time <= end for time in one.token_times)
        return total / end

    config = SlosServeConfig(pace=reading)
    alone = serve(base, SlosServeScheduler(cost, config))
    beside = serve(both, SlosServeScheduler(cost, config))
    plain = next(p for p in policies(cost, workload) if p.name == "chunked_fcfs_8192")
    most = serve(both, plain.make(cost, reading))
    return {
        "kept_alone": kept(alone),
        "kept_beside": kept(beside),
        "tokens_per_second": tokens(beside),
        "best_effort_tokens_per_second": tokens(beside, only_extra=True),
        "share_of_most_tokens": tokens(beside) / tokens(most),
        "kept_by_plain": kept(most),
    }


def _told(study: str, found: Mapping[Case, Capacity]) -> None:
    own = {case: one for case, one in found.items() if case.study == study}
    if not own:
        return
    columns = list(dict.fromkeys((case.scenario, case.reading) for case in own))
    lines: list[list[str]] = []
    for label in dict.fromkeys(case.label for case in own):
        line = [label]
        for column in columns:
            one = next(
                (o for c, o in own.items() if (c.scenario, c.reading, c.label) == (*column, label)),
                None,
            )
            cell = "-" if one is None else f"{one.rate:.2f} ({one.low:.2f}-{one.high:.2f})"
            line.append(cell)
        lines.append(line)
    print(f"\n{study}: requests/s at {LEVEL:.0%} (95 % interval)")
    print(table(["", *(f"{scenario}, {reading}" for scenario, reading in columns)], lines))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument(
        "--scenarios", nargs="+", default=["chatbot", "mixed", "coder"], choices=NAMES
    )
    parser.add_argument("--readings", nargs="+", default=["tpot"], choices=["tpot", "tpot_gap"])
    parser.add_argument("--requests", type=int, default=2000, help="judged, per seed and rate")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--burst-seeds", type=int, default=10)
    parser.add_argument(
        "--load", type=float, default=0.4, help="share of a server that a burst begins from"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    args = parser.parse_args()
    if not args.traces.is_dir():
        parser.error(f"there are no traces in {args.traces.name}; name their folder with --traces")
    recorder = Recorder("slos_serve_studies")
    todo, found = cases(args), dict[Case, Capacity]()
    with ProcessPoolExecutor(args.jobs) as pool:
        for case, one in zip(todo, pool.map(capacity, todo), strict=True):
            found[case] = one
            print(
                f"{case.study}, {case.scenario}, {case.reading}, {case.label}: {one.rate:.2f}",
                flush=True,
            )
            recorder.write(
                case.study, label=case.label, scenario=case.scenario, reading=case.reading,
                requests_per_second=one.rate, interval_95=[one.low, one.high], level=LEVEL,
                seeds=case.seeds, requests=case.count, replicas=case.replicas,
                is_monotone=one.is_monotone,
            )  # fmt: skip
    for study in args.only:
        _told(study, found)
    server = machine("a100", args.traces)
    for scenario in args.scenarios:
        if "burst" in args.only:
            for policy, figures in burst(server, scenario, args).items():
                print(
                    f"burst, {scenario}, {policy}: kept {figures['before']:.0%} before, "
                    f"{figures['burst']:.0%} in it and {figures['after']:.0%} after it; recovers "
                    f"after {figures['recovery_s']:.0f} s",
                    flush=True,
                )
                recorder.write(
                    "burst", scenario=scenario, policy=policy, reading=args.readings[0],
                    load=args.load, seeds=args.burst_seeds, **figures,
                )  # fmt: skip
        if "best_effort" in args.only:
            figures = best_effort(server, scenario, args)
            print(
                f"best effort, {scenario}: {figures['kept_alone']:.1%} kept alone, "
                f"{figures['kept_beside']:.1%} beside others, which get "
                f"{figures['best_effort_tokens_per_second']:.0f} tokens/s; "
                f"{figures['share_of_most_tokens']:.1%} of the tokens of a policy without "
                f"objectives, which keeps {figures['kept_by_plain']:.1%}",
                flush=True,
            )
            recorder.write(
                "best_effort", scenario=scenario, reading=args.readings[0],
                requests=args.requests, load=args.load, **figures,
            )  # fmt: skip


if __name__ == "__main__":
    main()
