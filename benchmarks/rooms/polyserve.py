"""A fleet with four latency tiers: PolyServe's router and scaler beside other routers.

Goodput is the request rate at which 90 % keep every objective (the time per token read as
deadlines), over the best other router, and over the optimum G*. Every server is the published model
of a 7B on an A100; lengths are those of Azure's conversations, arrivals a Poisson process.

    python -m benchmarks.rooms.polyserve                            # everything; an hour or more
    python -m benchmarks.rooms.polyserve --servers 20 --minutes 1   # a quick look
    python -m benchmarks.rooms.polyserve --only diurnal             # server-seconds with the scaler
    python -m benchmarks.rooms.polyserve --only speed               # how fast the simulation is
    python -m benchmarks.rooms.polyserve --tables                   # of what has been recorded
    python -m benchmarks.rooms.polyserve --plot                     # pictures of it, for the docs
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import pyplot, save
from benchmarks.record import Recorder, table
from benchmarks.rooms.scenarios import TRACES, azure
from jaxserve.core.cost import PUBLISHED_COSTS, LinearCost
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.sim.bounds import class_rate, fleet_bound
from jaxserve.sim.capacity import Capacity, CapacitySearch
from jaxserve.sim.fleet import (
    FleetReport,
    FleetRival,
    FleetSpec,
    FleetTrace,
    simulate_fleet,
)

LEVEL = 0.9
TIERS = (0.02, 0.03, 0.05, 0.1)
MIXES = {
    "loose": (0.1, 0.2, 0.3, 0.4),
    "even": (0.25, 0.25, 0.25, 0.25),
    "tight": (0.4, 0.3, 0.2, 0.1),
}
"""Shares of the tiers, tightest first."""
TTFT_S = (0.3, 0.5, 1.0)
"""Targets of the first token, equally likely; never less than three times an idle server's time."""
CAPACITY = 352_000
"""Tokens of cache: what is left of 80 GB at 160 KB each."""
LINK_BYTES = 25e9
"""Bytes per second between servers, 200 Gb/s."""
TOKEN_BYTES = 160e3
TARGETS = {"split": 1.23, "shared": 1.18}
OPTIMUM = 0.925
COST: LinearCost = PUBLISHED_COSTS["7b-a100"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths to draw from, in pairs."""

    prompt: np.ndarray
    output: np.ndarray


def lengths(traces: Path) -> Lengths:
    """Return the lengths of Azure's conversations."""
    _, pairs = azure("conv", traces)
    values = np.array([pair for pair in pairs if min(pair) > 0])
    return Lengths(prompt=values[:, 0], output=np.maximum(2, values[:, 1]))


def draw(
    pool: Lengths, arrivals: np.ndarray, mix: Sequence[float], rng: np.random.Generator
) -> FleetTrace:
    """Draw a request for every arrival."""
    count = len(arrivals)
    at = rng.integers(len(pool.prompt), size=count)
    prompt, output = pool.prompt[at], pool.output[at]
    plane = COST.planes[0]
    alone = plane.base + plane.request + plane.token * prompt
    return FleetTrace(
        arrival=arrivals, prompt=prompt, output=output,
        ttft=np.maximum(rng.choice(TTFT_S, count), 3 * alone),
        tpot=np.array(TIERS)[rng.choice(len(TIERS), count, p=mix)],
    )  # fmt: skip


def steady(
    pool: Lengths, rate: float, seconds: float, mix: Sequence[float], seed: int
) -> FleetTrace:
    """Return a Poisson process of one rate."""
    rng = np.random.default_rng([seed, 1])
    gaps = rng.exponential(size=int(rate * seconds) + 1)
    return draw(pool, np.cumsum(gaps) / rate, mix, rng)


def diurnal(
    pool: Lengths, peak: float, seconds: float, mix: Sequence[float], seed: int
) -> FleetTrace:
    """Return a Poisson process whose rate goes from a third of its peak up and back, twice."""
    rng = np.random.default_rng([seed, 2])
    arrivals = np.cumsum(rng.exponential(size=int(peak * seconds)) / peak)
    level = (2 - np.cos(4 * np.pi * arrivals / seconds)) / 3
    return draw(pool, arrivals[rng.random(len(arrivals)) < level], mix, rng)


def fleet(servers: int, prefill_servers: int = 0) -> FleetSpec:
    """Return the servers."""
    return FleetSpec(
        servers=servers, cost=COST, capacity=CAPACITY, prefill_servers=prefill_servers,
        transfer_base_s=0.001, transfer_token_s=TOKEN_BYTES / LINK_BYTES,
    )  # fmt: skip


def best_split(sample: FleetTrace, servers: int) -> int:
    """Return how many servers should compute prompts, by the optimum."""
    shares = np.unique(np.clip(np.round(servers * np.arange(0.1, 0.75, 0.04)), 1, servers - 4))
    found = [fleet_bound(sample, fleet(servers, int(n)), TIERS, buckets=2) for n in shares]
    return int(shares[int(np.argmax(found))])


def tier_sizes(pool: Lengths, mix: Sequence[float], servers: int, *, is_split: bool) -> np.ndarray:
    """Return servers per tier in proportion to what each takes, for the static partition."""
    prompt, output = float(pool.prompt.mean()), float(pool.output.mean())
    need = np.array([
        share / class_rate(
            COST, prompt=prompt, output=output, tau=tau, capacity=CAPACITY, seats=256,
            has_prompts=not is_split,
        ) for share, tau in zip(mix, TIERS, strict=True)
    ])  # fmt: skip
    wanted = need / need.sum() * servers
    sizes = np.maximum(1, np.floor(wanted).astype(int))
    for at in np.argsort(sizes - wanted)[: servers - sizes.sum()]:
        sizes[at] += 1
    sizes[np.argmax(sizes)] += servers - sizes.sum()
    return sizes


type Policy = PolyServeConfig | FleetRival


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fleet under one mix, and how long it is watched."""

    servers: int
    pool: str
    mix: str
    prefill_servers: int
    seconds: float
    warm_up: float
    seeds: int

    @property
    def spec(self) -> FleetSpec:
        """The servers."""
        return fleet(self.servers, self.prefill_servers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A policy and the fleet that it gets."""

    policy: Policy
    case: Case


def contenders(
    case: Case, pool: Lengths, budgets: Sequence[int], shifts: Sequence[float]
) -> dict[str, list[Variant]]:
    """Return policies with the variants from which each one's best is taken.

    In shared pools rivals try sizes of chunks; in split ones everybody tries numbers of servers for
    prompts, by shares of the fleet more or less than the optimum has.
    """
    is_split = case.pool == "split"
    cases = [case]
    if is_split:
        numbers = {case.prefill_servers + round(shift * case.servers) for shift in shifts}
        numbers = sorted(min(max(1, n), case.servers - len(TIERS)) for n in numbers)
        cases = [replace(case, prefill_servers=n) for n in numbers]
        # On servers that do one thing only, a budget would do nothing but limit prompts.
        budgets = (0,)
    found = {"polyserve": [Variant(policy=PolyServeConfig(tiers=TIERS), case=one) for one in cases]}
    names = (
        "random", "round_robin", "least_requests", "least_kv", "power_of_two", "slo_headroom",
        "freeness", "static_tiers",
    )  # fmt: skip
    for name in names:
        found[name] = [
            Variant(policy=rival(name, one, pool, budget), case=one)
            for one in cases for budget in budgets
        ]  # fmt: skip
    return found


def rival(name: str, case: Case, pool: Lengths, budget: int) -> FleetRival:
    """Return a rival for a fleet."""
    split: tuple[int, ...] = ()
    if name == "static_tiers":
        own = case.servers - case.prefill_servers
        sizes = tier_sizes(pool, MIXES[case.mix], own, is_split=case.pool == "split")
        split = tuple(map(int, sizes))
    return FleetRival(name=name, budget=budget, by_deadline=True, sheds=True, split=split)


def scaled(variant: Variant, case: Case, pool: Lengths) -> Variant:
    """Return the variant of a larger fleet that has the same shares."""
    before = variant.case
    prefills = round(before.prefill_servers / before.servers * case.servers)
    case = replace(case, prefill_servers=prefills)
    policy = variant.policy
    if isinstance(policy, FleetRival):
        policy = rival(policy.name, case, pool, policy.budget)
    return Variant(policy=policy, case=case)


def runner(variant: Variant, pool: Lengths) -> Callable[[float], dict[str, np.ndarray]]:
    """Return a function from a rate to who kept the objectives."""
    case, policy = variant.case, variant.policy

    def run(rate: float) -> dict[str, np.ndarray]:
        kept: dict[str, list[np.ndarray]] = {"tpot": [], "tpot_gap": []}
        for seed in range(case.seeds):
            trace = steady(pool, rate * case.servers, case.seconds, MIXES[case.mix], seed)
            report = simulate_fleet(trace, case.spec, policy, tiers=TIERS)
            judged = trace.arrival >= case.warm_up
            kept["tpot"].append(report.attained("tpot")[judged])
            kept["tpot_gap"].append(report.attained("tpot_gap")[judged])
        return {name: np.concatenate(parts) for name, parts in kept.items()}

    return run


def goodput(
    variants: Iterable[Variant], pool: Lengths, guess: float
) -> tuple[Variant, Capacity, float]:
    """Return the best of some variants, its capacity per server, and the seconds that took."""
    began = time.process_time()
    best: tuple[Variant, Capacity] | None = None
    for variant in variants:
        found = CapacitySearch(runner(variant, pool)).find("tpot", level=LEVEL, guess=guess)
        guess = found.rate
        if best is None or found.rate > best[1].rate:
            best = variant, found
    assert best is not None
    return *best, time.process_time() - began


def describe(policy: Policy) -> dict[str, Any]:
    """Return the settings of a policy that a line should hold."""
    if isinstance(policy, PolyServeConfig):
        return {"max_step_s": policy.max_step_s, "interference": policy.interference}
    return {"budget": policy.budget, "split": policy.split}


def measure_goodput(args: argparse.Namespace, pool: Lengths, recorder: Recorder) -> None:
    """Find the goodput of every policy in every case."""
    tuned: dict[tuple[str, str, str], tuple[Variant, float]] = {}
    for servers in args.servers:
        for kind in args.pools:
            for mix in args.mixes:
                sample = steady(pool, 1000.0, 20.0, MIXES[mix], 99)
                prefills = best_split(sample, servers) if kind == "split" else 0
                # A large fleet needs less time for as many requests.
                seconds = 60 * args.minutes if servers < 500 else max(60.0, 15 * args.minutes)
                case = Case(
                    servers=servers, pool=kind, mix=mix, prefill_servers=prefills,
                    seconds=seconds, warm_up=min(30.0, seconds / 3),
                    seeds=args.seeds if servers < 500 else 1,
                )  # fmt: skip
                _measure_case(args, case, pool, sample, tuned, recorder)


def _measure_case(
    args: argparse.Namespace,
    case: Case,
    pool: Lengths,
    sample: FleetTrace,
    tuned: dict[tuple[str, str, str], tuple[Variant, float]],
    recorder: Recorder,
) -> None:
    optimum = fleet_bound(sample, case.spec, TIERS) / case.servers
    bound = fleet_bound(sample, case.spec, TIERS, level=LEVEL, is_banked=True) / case.servers
    for name, variants in contenders(case, pool, args.budgets, args.shifts).items():
        if args.policies and name not in args.policies:
            continue
        key = (case.pool, case.mix, name)
        guess = optimum if name in ("polyserve", "static_tiers") else optimum / 2
        if key in tuned:  # in a larger fleet with the settings that were best in the smaller one
            variant, guess = tuned[key]
            variants = [scaled(variant, case, pool)]  # noqa: PLW2901
            others = [r for (k, m, _), (_, r) in tuned.items() if (k, m) == key[:2] and r > guess]
            if name != "polyserve" and len(others) > args.best:  # not near the best
                continue
        variant, found, seconds = goodput(variants, pool, guess)
        tuned[key] = variant, found.rate
        recorder.write(
            "goodput", servers=case.servers, pool=case.pool, mix=case.mix, policy=name,
            level=LEVEL, reading="tpot", requests_per_second_per_server=found.rate,
            interval_95=[found.low, found.high], tried=found.tried, optimum=optimum, bound=bound,
            prefill_servers=variant.case.prefill_servers, seconds=case.seconds,
            warm_up=case.warm_up, seeds=case.seeds, settings=describe(variant.policy),
            cpu_seconds=seconds,
        )  # fmt: skip
        print(
            f"{case.servers} {case.pool} {case.mix} {name}: {found.rate:.3f} "
            f"({found.low:.3f}-{found.high:.3f}), G* {optimum:.3f}, bound {bound:.3f} "
            f"{variant.case.prefill_servers} {describe(variant.policy)} ({seconds:.0f} s)",
            flush=True,
        )  # fmt: skip
    for at, best, ratio, over in ratios(recorder.path):
        if at == (case.servers, case.pool, case.mix):
            recorder.write(
                "ratio", servers=case.servers, pool=case.pool, mix=case.mix, best_rival=best,
                over_best_rival=ratio, target=TARGETS[case.pool], over_optimum=over,
                target_optimum=OPTIMUM, over_bound=over * optimum / bound,
            )  # fmt: skip


def measure_diurnal(args: argparse.Namespace, pool: Lengths, recorder: Recorder) -> None:
    """Compare the server-seconds of a fleet with the scaler to those of fleets of one size."""
    servers = min(50, *args.servers)
    seconds = 60 * args.minutes * 5
    sample = steady(pool, 1000.0, 20.0, MIXES["loose"], 99)
    peak = 0.8 * fleet_bound(sample, fleet(servers), TIERS)
    trace = diurnal(pool, peak, seconds, MIXES["loose"], 0)
    config = PolyServeConfig(tiers=TIERS)
    own = simulate_fleet(trace, fleet(servers), config, elastic=True, initial=max(5, servers // 2))
    kept = own.attainment()
    low, high = 1, servers
    fixed = config
    while high - low > 1:  # the smallest that keeps as many objectives
        middle = (low + high) // 2
        report = simulate_fleet(trace, fleet(middle), fixed)
        low, high = (low, middle) if report.attainment() >= min(kept, 0.99) else (middle, high)
    static = simulate_fleet(trace, fleet(high), fixed)
    ratio = own.server_seconds / static.server_seconds
    rows = np.linspace(0, len(own.timeline) - 1, 200).astype(int)
    recorder.write(
        "diurnal", servers=servers, mix="loose", peak_rate=peak, seconds=seconds,
        attainment=kept, server_seconds=own.server_seconds, static_servers=high,
        static_attainment=static.attainment(), static_server_seconds=static.server_seconds,
        ratio=ratio, target=1.1, started=own.started, drained=own.drained,
        columns=own.columns, timeline=np.round(own.timeline[rows], 1).tolist(),
        attainment_over_time=_over_time(own, 60),
    )  # fmt: skip
    print(
        f"diurnal, {servers} servers at most: {kept:.3f} attained with {own.server_seconds:.0f} "
        f"server-seconds; {high} fixed servers {static.attainment():.3f} with "
        f"{static.server_seconds:.0f}: ratio {ratio:.3f}, target at most 1.1"
    )


def _over_time(report: FleetReport, bins: int) -> list[list[float]]:
    """Return time and attainment of requests by when they arrived."""
    arrival = report.trace.arrival
    edges = np.linspace(0, arrival[-1], bins + 1)
    at = np.clip(np.searchsorted(edges, arrival, side="right") - 1, 0, bins - 1)
    kept = np.bincount(at, report.attained(), bins) / np.maximum(1, np.bincount(at, minlength=bins))
    return [[round(float(t), 1), round(float(k), 4)] for t, k in zip(edges, kept, strict=False)]


def measure_speed(args: argparse.Namespace, pool: Lengths, recorder: Recorder) -> None:
    """Time the simulation: one server step by step, and the largest fleet."""
    one = steady(pool, 4.0, 600.0, MIXES["loose"], 0)
    rival = FleetRival(name="round_robin", budget=2048)
    simulate_fleet(one, fleet(1), rival, tiers=TIERS)  # compiled, or read from where that is kept
    for jumps in (False, True):
        began = time.process_time()
        report = simulate_fleet(one, fleet(1), rival, tiers=TIERS, jumps=jumps)
        seconds = time.process_time() - began
        recorder.write(
            "speed", servers=1, policy="chunked_fcfs", jumps=jumps, steps=report.steps,
            cpu_seconds=seconds, steps_per_second=report.steps / seconds, target=50_000,
        )  # fmt: skip
        print(f"one server, jumps {jumps}: {report.steps / seconds:,.0f} steps/s")
    servers = max(args.servers)
    sample = steady(pool, 1000.0, 20.0, MIXES["loose"], 99)
    rate = 0.95 * fleet_bound(sample, fleet(servers), TIERS)
    trace = steady(pool, rate, 600.0, MIXES["loose"], 0)
    began = time.process_time()
    report = simulate_fleet(trace, fleet(servers), PolyServeConfig(tiers=TIERS))
    seconds = time.process_time() - began
    recorder.write(
        "speed", servers=servers, policy="polyserve", jumps=True, steps=report.steps,
        events=report.events, requests=len(trace), virtual_seconds=600.0, cpu_seconds=seconds,
        steps_per_second=report.steps / seconds, target_seconds=600,
        attainment=report.attainment(),
    )  # fmt: skip
    print(
        f"{servers} servers x 10 minutes, {len(trace):,} requests, {report.steps:,} steps, "
        f"{report.events:,} events: {seconds:.0f} s of processor, target at most 600"
    )


def rows_of(path: Path, what: str) -> list[dict[str, Any]]:
    """Read lines of one kind back; of equal ones the last counts."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["what"] == what:
            names = ("servers", "pool", "mix", "policy", "jumps")
            found[tuple(row.get(name) for name in names)] = row
    return list(found.values())


def report(path: Path) -> None:
    """Print tables."""
    lines = [
        [
            f"{row['servers']} {row['pool']} {row['mix']}", row["policy"],
            f"{row['requests_per_second_per_server']:.3f}",
            f"{row['requests_per_second_per_server'] / row['optimum']:.3f}",
            f"{row['requests_per_second_per_server'] / row['bound']:.3f}",
        ] for row in rows_of(path, "goodput")
    ]  # fmt: skip
    print(table(["fleet", "policy", "requests/s per server", "over G*", "over bound"], lines))
    lines = [
        [
            f"{servers} {pool} {mix}", best, f"{ratio:.3f}", f"{TARGETS[pool]}", f"{optimum:.3f}",
        ] for (servers, pool, mix), best, ratio, optimum in ratios(path)
    ]  # fmt: skip
    print()
    print(table(["fleet", "best rival", "polyserve over it", "target", "over G*"], lines))


def ratios(path: Path) -> list[tuple[tuple[Any, ...], str, float, float]]:
    """Return each fleet, its best rival, and PolyServe's goodput over that one's and over G*."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows_of(path, "goodput"):
        case = (row["servers"], row["pool"], row["mix"])
        cases.setdefault(case, {})[row["policy"]] = row
    name = "requests_per_second_per_server"
    found: list[tuple[tuple[Any, ...], str, float, float]] = []
    for case, rows in cases.items():
        rivals = {policy: row[name] for policy, row in rows.items() if policy != "polyserve"}
        if "polyserve" in rows and rivals:
            best = max(rivals, key=lambda policy: rivals[policy])
            own = rows["polyserve"]
            found.append((case, best, own[name] / rivals[best], own[name] / own["optimum"]))
    return found


def plot(path: Path) -> None:
    """Draw attainment over rate, goodput as bars, and the fleet over a day.

    Raises:
        SystemExit: Without matplotlib.
    """
    plt = pyplot()
    goods = rows_of(path, "goodput")
    sizes = [row["servers"] for row in goods if len(row["tried"]) > 2]
    biggest = max(sizes, key=lambda size: (sizes.count(size), size))
    curves = [r for r in goods if r["servers"] == biggest and r["mix"] == "loose"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, kind in zip(axes, ("shared", "split"), strict=True):
        for row in (r for r in curves if r["pool"] == kind):
            rates, kept = zip(*row["tried"], strict=True)
            axis.plot(rates, kept, marker=".", label=row["policy"])
            axis.axvline(row["optimum"], color="gray", lw=0.8, ls=":")
        axis.axhline(LEVEL, color="gray", lw=0.8)
        axis.set_title(f"{kind} pool, {biggest} servers")
        axis.set_xlabel("requests/s per server")
    axes[0].set_ylabel("attainment")
    axes[0].legend(fontsize=7)
    save(figure, "polyserve_attainment.png")
    _plot_bars(plt, goods)
    days = rows_of(path, "diurnal")
    if days:
        _plot_day(plt, days[-1])


def _plot_bars(plt: Any, goods: list[dict[str, Any]]) -> None:  # noqa: ANN401  a module
    cases = list(dict.fromkeys((r["servers"], r["pool"], r["mix"]) for r in goods))
    names = list(dict.fromkeys(r["policy"] for r in goods))
    figure, axis = plt.subplots(figsize=(9, 3.4))
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        found = {
            (r["servers"], r["pool"], r["mix"]):
            r["requests_per_second_per_server"] / r["optimum"]
            for r in goods if r["policy"] == name
        }  # fmt: skip
        xs = np.arange(len(cases)) + place * width
        axis.bar(xs, [found.get(case, 0.0) for case in cases], width, label=name)
    axis.axhline(1.0, color="gray", lw=0.8, ls=":")
    axis.set_xticks(np.arange(len(cases)) + 0.4, ["\n".join(map(str, case)) for case in cases])
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylabel("goodput / G*")
    axis.legend(fontsize=6, ncols=3)
    save(figure, "polyserve_goodput.png")


def _plot_day(plt: Any, row: dict[str, Any]) -> None:  # noqa: ANN401  a module
    timeline = np.array(row["timeline"])
    columns = row["columns"]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 4.2), sharex=True, height_ratios=(3, 1)
    )  # fmt: skip
    shown = [i for i, c in enumerate(columns) if c not in ("time", "waiting", "prompts")]
    upper.stackplot(
        timeline[:, 0] / 60, timeline[:, shown].T, labels=[columns[i] for i in shown], lw=0
    )
    upper.axhline(row["static_servers"], color="black", lw=0.8, ls="--", label="fixed fleet")
    upper.set_ylabel("servers")
    upper.legend(fontsize=7, ncols=4, loc="upper left")
    kept = np.array(row["attainment_over_time"])
    lower.plot(kept[:, 0] / 60, kept[:, 1])
    lower.set_ylim(min(0.8, kept[:, 1].min()), 1.01)
    lower.set_ylabel("attainment")
    lower.set_xlabel("minutes")
    save(figure, "polyserve_timeline.png")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="PolyServe's router and scaler in a fleet")
    parser.add_argument("--servers", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--minutes", type=float, default=4.0, help="of virtual time per run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pools", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--policies", nargs="+", default=[], help="only these")
    parser.add_argument(
        "--budgets", nargs="+", type=int, default=[0, 512, 1024],
        help="tokens of a step that rivals try in shared pools; 0 follows slack",
    )  # fmt: skip
    parser.add_argument(
        "--shifts", nargs="+", type=float, default=[-0.04, 0.0, 0.04],
        help="more or fewer servers for prompts that are tried in split pools, as shares",
    )  # fmt: skip
    parser.add_argument(
        "--best", type=int, default=3, help="rivals that are measured again in larger fleets"
    )
    parser.add_argument(
        "--only", nargs="+", default=["speed", "diurnal", "goodput"],
        choices=["speed", "diurnal", "goodput"], help="parts to measure",
    )  # fmt: skip
    parser.add_argument("--tables", action="store_true", help="print what has been recorded")
    parser.add_argument("--plot", action="store_true", help="draw it into docs/images")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    args = parser.parse_args()
    if min(args.servers) < 8:
        parser.error(f"a fleet needs 8 servers for its tiers and pools, got {min(args.servers)}")
    if not args.traces.is_dir():
        parser.error(f"there are no traces in {args.traces.name}; name their folder with --traces")
    is_whole = min(args.servers) >= 100
    recorder = Recorder("polyserve" if is_whole else "polyserve_quick")
    if args.tables:
        report(recorder.path)
    elif args.plot:
        plot(recorder.path)
    else:
        pool = lengths(args.traces)
        for part, measure in (
            ("speed", measure_speed), ("diurnal", measure_diurnal), ("goodput", measure_goodput)
        ):  # fmt: skip
            if part in args.only:
                measure(args, pool, recorder)


if __name__ == "__main__":
    main()
