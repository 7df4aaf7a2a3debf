"""Capacity of one server: the token planner beside other policies, on traces.

Capacity is the rate at which 90 % of the requests keep every objective; those refused, and those
still waiting at the end, did not. The target per token is read in three ways (as deadlines, for
every gap, for the mean gap). Output lengths are known to no policy but `slos_serve_told`.

    python -m benchmarks.rooms.slos_serve            # everything; hours
    python -m benchmarks.rooms.slos_serve --quick    # two scenarios, few requests; minutes
    python -m benchmarks.rooms.slos_serve --tables   # of what has been recorded before
    python -m benchmarks.rooms.slos_serve --bounds   # what no policy can exceed; minutes
    python -m benchmarks.rooms.slos_serve --plot     # pictures of it, for the docs
    python -m benchmarks.rooms.slos_serve --overhead # thread time of one decision of the planner
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.scenarios import NAMES, TRACES, Machine, load, machine
from benchmarks.rooms.slos_serve_plots import draw
from jaxserve.core.cost import CostModel, LinearCost, StepLoad
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.baselines import (
    DeadlineHybridScheduler,
    DeadlineScheduler,
    PrefillFirstScheduler,
    SlackGreedyScheduler,
)  # fmt: skip
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.slos_serve import SlosServeConfig, SlosServeScheduler
from jaxserve.scheduling.slos_serve.fast import admit_greedily
from jaxserve.scheduling.slos_serve.programme import Item, choose
from jaxserve.scheduling.slos_serve.segment import SegmentPlanner
from jaxserve.sim.bounds import clairvoyant_share
from jaxserve.sim.capacity import Capacity, CapacitySearch, geometric_mean
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica
from jaxserve.sim.report import READINGS, Reading, is_attained
from jaxserve.sim.request import Completion, SimRequest
from jaxserve.sim.workload import Workload

LEVEL = 0.9
GIVE_UP = 0.2
"""Share of missed objectives at which a run has nothing more to say."""
MAX_OUTPUT = 4096
"""Most output tokens that clients ask for, which is all that policies know about lengths."""
BUDGETS = (256, 512, 1024, 2048, 4096)
PLANNER = "slos_serve"
TOLD = "slos_serve_told"
"""The planner, told how long each output will be."""
RIVALS = ("fcfs", "sarathi_tuned", "deadline_hybrid")
_TRIES = 3
TARGETS = {
    ("tpot_gap", "fcfs"): 2.2, ("tpot", "fcfs"): 1.6,
    ("tpot_gap", "sarathi_tuned"): 1.6, ("tpot", "sarathi_tuned"): 1.25,
    ("tpot_gap", "deadline_hybrid"): 1.6, ("tpot", "deadline_hybrid"): 1.25,
}  # fmt: skip


def sarathi_budget(cost: CostModel, workload: Workload) -> int:
    """Return the largest batch that meets the tightest target, 32 of it decodes."""
    tightest = min(shape.tpot_s for shape in workload.shapes)
    load = StepLoad(decodes=32, context=32_000)
    return max(64, cost.prefill_within(tightest, load) + 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One contender.

    Attributes:
        name: As the tables call it.
        make: Makes the policy for a server and a reading.
        budgets: Token budgets of a step; several are tuned by taking the best.
        knows_reading: Whether it behaves differently for each reading.
        knows_outputs: Whether it is told how long outputs will be.
    """

    name: str
    make: Callable[[CostModel, Reading], Scheduler]
    budgets: tuple[int, ...] = (8192,)
    knows_reading: bool = False
    knows_outputs: bool = False


def policies(cost: CostModel, workload: Workload) -> list[Policy]:
    """Return the contenders for one server and scenario."""
    gap: Reading = "tpot_gap"
    return [
        Policy(name="fcfs", make=lambda *_: PrefillFirstScheduler()),
        Policy(name="chunked_fcfs_2048", make=lambda *_: FcfsScheduler(), budgets=(2048,)),
        Policy(name="chunked_fcfs_8192", make=lambda *_: FcfsScheduler()),
        Policy(
            name="sarathi", make=lambda *_: FcfsScheduler(),
            budgets=(sarathi_budget(cost, workload),),
        ),
        Policy(name="sarathi_tuned", make=lambda *_: FcfsScheduler(), budgets=BUDGETS),
        Policy(name="edf", make=lambda *_: DeadlineScheduler(), budgets=BUDGETS),
        Policy(
            name="deadline_hybrid", knows_reading=True,
            make=lambda c, r: DeadlineHybridScheduler(c, every_gap=r == gap),
        ),
        Policy(
            name="slack_greedy", knows_reading=True,
            make=lambda c, r: SlackGreedyScheduler(c, every_gap=r == gap),
        ),
        Policy(
            name=PLANNER, knows_reading=True,
            make=lambda c, r: SlosServeScheduler(c, SlosServeConfig(pace=r)),
        ),
        Policy(
            name=TOLD, knows_reading=True, knows_outputs=True,
            make=lambda c, r: SlosServeScheduler(
                c, SlosServeConfig(pace=r, initial_output=1 << 20)
            ),
        ),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One policy in one scenario, in one reading or, where that changes nothing, in all."""

    machine: str
    scenario: str
    policy: str
    readings: tuple[Reading, ...]
    count: int
    seeds: int
    guess: float
    traces: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The capacities of one task by reading, and the seconds of processor that they took."""

    task: Task
    found: dict[Reading, tuple[int, Capacity]]
    seconds: float


def measure(task: Task) -> Result:
    """Find the capacities of one task."""
    began = time.process_time()
    server = machine(task.machine, task.traces)
    workload = load(task.scenario, task.traces)
    policy = next(p for p in policies(server.cost, workload) if p.name == task.policy)
    found: dict[Reading, tuple[int, Capacity]] = {}
    guess = task.guess
    for budget in policy.budgets:
        spec = replace(server.spec, max_num_batched_tokens=budget)
        search = CapacitySearch(_runner(task, policy, replace_spec(server, spec), workload))
        for reading in task.readings:
            capacity = search.find(reading, level=LEVEL, guess=guess)
            guess = capacity.rate
            if reading not in found or capacity.rate > found[reading][1].rate:
                found[reading] = (budget, capacity)
    return Result(task=task, found=found, seconds=time.process_time() - began)


def replace_spec(server: Machine, spec: object) -> Machine:
    """Return the server with other sizes."""
    return replace(server, spec=spec)


def _runner(
    task: Task, policy: Policy, server: Machine, workload: Workload
) -> Callable[[float], dict[str, np.ndarray]]:
    skip = task.count // 11  # the first tenth warms up

    def run(rate: float) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {reading: [] for reading in task.readings}
        for seed in range(task.seeds):
            most = None if policy.knows_outputs else MAX_OUTPUT
            requests = workload.offer(rate, task.count, server.cost, seed=seed, max_output=most)
            if policy.knows_outputs:
                requests = _in_tiers_of_one(requests)
            scheduler = policy.make(server.cost, task.readings[0])
            replica = Replica(server.spec, scheduler, server.cost, seed=seed)
            kept = {reading: np.zeros(task.count - skip) for reading in task.readings}
            limit = GIVE_UP * (task.count - skip)
            missed = dict.fromkeys(task.readings, 0)

            def stop(one: Completion, kept=kept, missed=missed, limit=limit) -> bool:  # noqa: ANN001
                place = one.request.request_id - skip
                if place < 0:
                    return False
                for reading in task.readings:
                    if is_attained(one, reading):
                        kept[reading][place] = 1
                    else:
                        missed[reading] += 1
                return min(missed.values()) > limit

            simulate(requests, [replica], stop=stop)
            for reading in task.readings:
                parts[reading].append(kept[reading])
        return {reading: np.concatenate(flags) for reading, flags in parts.items()}

    return run


def _in_tiers_of_one(requests: Sequence[SimRequest]) -> list[SimRequest]:
    """Name tiers so that nobody learns lengths from others."""
    return [
        replace(one, slo=replace(one.slo, tier=f"r{one.request_id}"))
        for one in requests if one.slo is not None
    ]  # fmt: skip


def tasks(args: argparse.Namespace) -> list[Task]:
    """Return what is to be measured."""
    found: list[Task] = []
    for server in args.machines:
        cost = machine(server, args.traces).cost
        for scenario in args.scenarios:
            workload = load(scenario, args.traces)
            for policy in policies(cost, workload):
                if args.policies and policy.name not in args.policies:
                    continue
                guess = 1 / work(cost, workload)
                wanted = tuple(args.readings)
                groups = [(r,) for r in wanted] if policy.knows_reading else [wanted]
                for readings in groups:
                    found.append(  # noqa: PERF401
                        Task(
                            machine=server, scenario=scenario, policy=policy.name,
                            readings=readings, count=args.requests * 11 // 10, seeds=args.seeds,
                            guess=guess, traces=args.traces,
                        )
                    )  # fmt: skip
    return found


def work(cost: CostModel, workload: Workload) -> float:
    """Return the seconds of server time of a mean request, decoding among 32."""
    base = cost.step_time(StepLoad())
    total = 0.0
    some = workload.shapes[:: max(1, len(workload.shapes) // 500)]
    for shape in some:
        left = shape.prompt_len - shape.cached_len
        prefill = cost.step_time(StepLoad().with_chunk(left, shape.cached_len)) - base
        step = cost.step_time(StepLoad(decodes=32, context=32 * shape.prompt_len))
        total += prefill + shape.output_len * step / 32
    return total / len(some)


type Found = dict[tuple[str, str, str, Reading], Capacity]


def record(result: Result, recorder: Recorder) -> None:
    """Write the capacities of one task."""
    task = result.task
    for reading, (budget, capacity) in result.found.items():
        recorder.write(
            "capacity", machine_model=task.machine, scenario=task.scenario,
            policy=task.policy, reading=reading, level=LEVEL, requests_per_second=capacity.rate,
            interval_95=[capacity.low, capacity.high], budget=budget, seeds=task.seeds,
            requests=task.count, is_monotone=capacity.is_monotone, tried=capacity.tried,
            seconds=result.seconds,
        )  # fmt: skip


def recorded(path: Path) -> Found:
    """Read capacities back; the last line of a kind counts."""
    found: Found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["what"] == "capacity":
            low, high = row["interval_95"]
            key = (row["machine_model"], row["scenario"], row["policy"], row["reading"])
            found[key] = Capacity(
                rate=row["requests_per_second"], low=low, high=high, tried=(),
                is_monotone=row["is_monotone"],
            )  # fmt: skip
    return found


def clairvoyant(task: Task, *, knows_outputs: bool = True) -> float | None:
    """Return an upper bound of the capacity of any policy; None where costs do not add up."""
    server = machine(task.machine, task.traces)
    if not isinstance(server.cost, LinearCost):
        return None
    workload, cost, spec = load(task.scenario, task.traces), server.cost, server.spec
    low, high = task.guess / 4, task.guess * 16
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        requests = workload.offer(middle, task.count, cost)
        share = clairvoyant_share(
            requests, cost, capacity=spec.num_pages * spec.page_size, seats=spec.max_num_seqs,
            knows_outputs=knows_outputs,
        )  # fmt: skip
        low, high = (middle, high) if share >= LEVEL else (low, middle)
    return math.sqrt(low * high)


def _bounds(todo: Sequence[Task], recorder: Recorder) -> None:
    """Tell what nobody can exceed, with and without knowledge of the lengths of outputs."""
    for task in {(one.machine, one.scenario): one for one in todo}.values():
        for knows_outputs in (True, False):
            bound = clairvoyant(task, knows_outputs=knows_outputs)
            if bound is None:
                continue
            who = "nobody" if knows_outputs else "nobody without knowledge of outputs"
            print(f"{task.machine} {task.scenario}: {who} can do more than {bound:.2f}", flush=True)
            recorder.write(
                "bound", machine_model=task.machine, scenario=task.scenario, level=LEVEL,
                knows_outputs=knows_outputs, requests_per_second=bound, requests=task.count,
            )  # fmt: skip


def report(found: Found, recorder: Recorder) -> None:
    """Print tables, and write the ratios."""
    machines = list(dict.fromkeys(key[0] for key in found))
    names = list(dict.fromkeys(key[2] for key in found))
    for server in machines:
        scenarios = list(dict.fromkeys(key[1] for key in found if key[0] == server))
        for reading in READINGS:
            lines: list[list[str]] = []
            for name in names:
                own = [found.get((server, scenario, name, reading)) for scenario in scenarios]
                cells = [
                    "-" if c is None else f"{c.rate:.2f} ({c.low:.2f}-{c.high:.2f})" for c in own
                ]
                mean = geometric_mean([c.rate for c in own if c]) if all(own) else math.nan
                lines.append([name, *cells, f"{mean:.2f}"])
            print(f"\n{server}, {reading}: requests/s at {LEVEL:.0%} (95 % interval)")
            print(table(["policy", *scenarios, "geo. mean"], lines))
            _ratios(found, server, reading, scenarios, names, recorder)


def _ratios(
    found: dict[tuple[str, str, str, Reading], Capacity],
    server: str,
    reading: Reading,
    scenarios: Sequence[str],
    names: Sequence[str],
    recorder: Recorder,
) -> None:
    if PLANNER not in names:
        return
    for rival in names:
        pairs = [
            (found.get((server, s, PLANNER, reading)), found.get((server, s, rival, reading)))
            for s in scenarios
        ]
        if rival == PLANNER or not all(a and b for a, b in pairs):
            continue
        ratios = [a.rate / b.rate for a, b in pairs if a and b]
        # Independent intervals, added up as logarithms.
        spread = [
            math.hypot(math.log(a.high / a.low), math.log(b.high / b.low)) / 2
            for a, b in pairs if a and b
        ]  # fmt: skip
        mean = geometric_mean(ratios)
        half = math.sqrt(sum(width**2 for width in spread)) / len(spread)
        target = TARGETS.get((reading, rival))
        shown = "" if target is None else f"   target {target}"
        low, high = mean * math.exp(-half), mean * math.exp(half)
        print(
            f"{PLANNER} / {rival}: geometric mean {mean:.2f} ({low:.2f}-{high:.2f}), "
            f"least {min(ratios):.2f}{shown}"
        )
        recorder.write(
            "ratio", machine_model=server, reading=reading, policy=PLANNER, rival=rival,
            geometric_mean=mean, interval_95=[low, high], least=min(ratios),
            by_scenario=dict(zip(scenarios, ratios, strict=True)), target=target,
        )  # fmt: skip


def overhead(recorder: Recorder, repeats: int = 200) -> None:
    """Time the planner's decisions on random states: 64 promised requests and some new ones.

    Each decision is made three times and the quickest counts, for others use the machine as well.
    """
    cost = machine("a100").cost
    for name, num_new in (("programme", 8), ("fast_admission", 8), ("fast_admission", 32)):
        samples: list[float] = []
        for seed in range(repeats):
            rng = random.Random(seed)
            items = [
                Item(key=i, deadline=0.0, prefill=0, pages=0, tier=rng.randrange(2), is_forced=True)
                for i in range(64)
            ] + [
                Item(
                    key=100 + i, deadline=rng.uniform(0.2, 1.5), prefill=rng.randint(50, 3000),
                    pages=100, tier=rng.randrange(2),
                ) for i in range(num_new)
            ]  # fmt: skip
            decide = choose if name == "programme" else admit_greedily
            samples.append(min(_decision_ms(decide, items, cost) for _ in range(_TRIES)))
        _told(recorder, f"{name}, {num_new} new", samples)
    samples = [min(_plan_ms(seed, cost) for _ in range(_TRIES)) for seed in range(repeats)]
    _told(recorder, "plan, 64 running and 8 new", samples)


def _decision_ms(decide: Callable[..., object], items: Sequence[Item], cost: CostModel) -> float:
    """Return the thread time of one decision in milliseconds."""
    began = time.thread_time()
    planner = SegmentPlanner(cost, (0.05, 0.1), mean_context=1500, max_step_s=0.05)
    decide(items, planner, free_pages=9000)
    return 1000 * (time.thread_time() - began)


def _told(recorder: Recorder, what: str, samples: Sequence[float]) -> None:
    p50, p99 = (float(np.quantile(samples, q)) for q in (0.5, 0.99))
    print(f"{what}: {p50:.2f} ms (p99 {p99:.2f})")
    recorder.write("overhead", part=what, p50_ms=p50, p99_ms=p99, repeats=len(samples))


def _plan_ms(seed: int, cost: CostModel) -> float:
    """Return the thread time of a whole plan in which eight requests arrive at once."""
    rng = random.Random(seed)
    running: list[SequenceView] = []
    for i in range(64):
        prompt, made = rng.randint(50, 3000), rng.randint(1, 200)
        running.append(
            SequenceView(
                seq_id=i, arrival=-0.06 * made - 0.3, priority=0, prompt_len=prompt,
                num_tokens=prompt + made, num_computed=prompt + made - 1,
                max_total_len=prompt + 1000, num_pages=-(-(prompt + made) // 16), is_running=True,
                is_decoding=True, slo=Slo(ttft_ms=400, tpot_ms=rng.choice([50, 100])),
                first_token_time=-0.06 * made,
            )
        )  # fmt: skip
    new = [
        SequenceView(
            seq_id=100 + i, arrival=0.0, priority=0, prompt_len=prompt, num_tokens=prompt,
            num_computed=0, max_total_len=prompt + 1000, num_pages=0, is_running=False,
            slo=Slo(ttft_ms=rng.uniform(200, 1500), tpot_ms=rng.choice([50, 100])),
        ) for i, prompt in enumerate(rng.randint(50, 3000) for _ in range(8))
    ]  # fmt: skip
    view = ReplicaView(
        now=0.0, running=tuple(running), waiting=(), num_pages=22_000, page_size=16,
        num_free_pages=22_000 - sum(s.num_pages for s in running), max_num_seqs=256,
        max_num_batched_tokens=8192,
    )  # fmt: skip
    scheduler = SlosServeScheduler(cost)
    scheduler.adopt(view)
    began = time.thread_time()
    scheduler.plan(replace(view, waiting=tuple(new)))
    return 1000 * (time.thread_time() - began)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two scenarios, 400 requests, 1 seed")
    parser.add_argument("--tables", action="store_true", help="print what has been recorded")
    parser.add_argument("--plot", action="store_true", help="draw it into docs/images")
    parser.add_argument("--overhead", action="store_true", help="time decisions of the planner")
    parser.add_argument("--bounds", action="store_true", help="compute clairvoyant bounds only")
    parser.add_argument("--machines", nargs="+", default=["a100", "h100"], choices=["a100", "h100"])
    parser.add_argument("--scenarios", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--policies", nargs="+", default=[], help="only these")
    parser.add_argument("--readings", nargs="+", default=list(READINGS), choices=READINGS)
    parser.add_argument("--requests", type=int, default=2000, help="judged, per seed and rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    args = parser.parse_args()
    if not args.traces.is_dir():
        parser.error(f"there are no traces in {args.traces.name}; name their folder with --traces")
    if args.quick:
        args.machines, args.scenarios = ["a100"], ["chatbot", "mixed"]
        args.requests, args.seeds = 400, 1
        args.policies = args.policies or ["fcfs", "chunked_fcfs_2048", "deadline_hybrid", PLANNER]
    recorder = Recorder("slos_serve_quick" if args.quick else "slos_serve")
    if args.overhead:
        overhead(recorder)
        return
    if args.plot:
        draw(recorder.path, args.machines[0])
        return
    if args.tables:
        report(recorded(recorder.path), recorder)
        return
    todo = tasks(args)
    if args.bounds:
        _bounds(todo, recorder)
        return
    found: Found = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for result in pool.map(measure, todo):
            record(result, recorder)
            for reading, (_, capacity) in result.found.items():
                key = (result.task.machine, result.task.scenario, result.task.policy, reading)
                found[key] = capacity
            task = result.task
            rates = ", ".join(f"{r} {c.rate:.2f}" for r, (_, c) in result.found.items())
            print(
                f"{task.machine} {task.scenario} {task.policy}: {rates} ({result.seconds:.0f} s)",
                flush=True,
            )
    report(found, recorder)


if __name__ == "__main__":
    main()
