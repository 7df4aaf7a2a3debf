"""Real replicas under a burst, and under the death of one of them.

Engines of one process serve requests of two latency tiers. For some seconds ten times as many come;
later the loop of a replica is made to fail in mid-stream. Told are the share of requests that kept
all objectives, by tier and time of arrival, how long it takes to be back above 90 %, and whether
anything was lost: every request must end whole, or be declined with a reason, and what moved must
be what a replica generates that nobody disturbs.

    python -m benchmarks.rooms.live_fleet             # PolyServe, least loaded, round robin
    python -m benchmarks.rooms.live_fleet --plot      # a picture of what has been recorded
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import pyplot, save
from benchmarks.record import Recorder, table
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.start import open_fleet
from jaxserve.core.cost import CostModel, StepLoad
from jaxserve.core.cost_file import CostFile, write_cost
from jaxserve.core.errors import JaxserveError
from jaxserve.core.event import FinishReason, TokenEvent
from jaxserve.core.request import SamplingParams, Slo
from jaxserve.engine.async_engine import AsyncLLM

LEVEL = 0.9
"""Share of objectives kept above which a fleet has recovered."""
BIN_S, WINDOW_S = 2.0, 6.0
ROUTERS = ("polyserve", "least_loaded", "round_robin")
TIERS = (("tight", 0.4), ("loose", 0.6))
"""Tiers, and their shares of the requests."""


@dataclass(slots=True)
class Ask:
    """A request of the load, and what became of it.

    Attributes:
        arrival: Seconds from the start.
        tier: `tight` or `loose`.
        prompt: Its ids.
        output_len: Tokens that it asks for.
        slo: What it wants.
        events: What it got.
        error: What it was refused with.
    """

    arrival: float
    tier: str
    prompt: list[int]
    output_len: int
    slo: Slo
    events: list[TokenEvent] = field(default_factory=list)
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        """Ids that it got."""
        return [token for event in self.events for token in event.token_ids]

    @property
    def is_declined(self) -> bool:
        """Whether it was declined, and told why."""
        return bool(self.events) and self.events[-1].rejection is not None

    @property
    def is_whole(self) -> bool:
        """Whether it got all of its tokens."""
        return len(self.tokens) == self.output_len

    @property
    def is_attained(self) -> bool:
        """Whether it kept every objective."""
        times = self.events[-1].metrics if self.events else None
        return self.is_whole and times is not None and times.slo is not None and times.slo.attained


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The load.

    Attributes:
        rate: Requests per second but for the burst.
        burst: How many times as many there are then.
        burst_at: When it begins.
        burst_s: Seconds that it lasts.
        kill_at: When a replica's loop is made to fail.
        seconds: The whole run.
    """

    rate: float
    burst: float
    burst_at: float
    burst_s: float
    kill_at: float
    seconds: float

    def arrivals(self, rng: np.random.Generator) -> list[float]:
        """Draw arrivals: a Poisson process whose rate is `burst` times as high for a while."""
        found: list[float] = []
        now = 0.0
        most = self.rate * self.burst
        while now < self.seconds:
            now += rng.exponential(1 / most)
            is_burst = self.burst_at <= now < self.burst_at + self.burst_s
            if is_burst or rng.random() < 1 / self.burst:
                found.append(now)
        return [t for t in found if t < self.seconds]


def paces(cost: CostModel) -> dict[str, float]:
    """Return the seconds per token of each tier, scaled to the machine."""
    step = cost.step_time(StepLoad(decodes=1, context=256))
    return {"tight": 3 * step, "loose": 8 * step}


def offer(plan: Plan, cost: CostModel, seed: int, vocab: int) -> list[Ask]:
    """Draw the requests; first tokens are due after five times what an idle replica needs."""
    rng = np.random.default_rng(seed)
    pace = paces(cost)
    names, shares = zip(*TIERS, strict=True)
    asks: list[Ask] = []
    for arrival in plan.arrivals(rng):
        tier = str(rng.choice(names, p=shares))
        length = round(float(np.exp(rng.uniform(np.log(16), np.log(128)))))
        output = round(float(np.exp(rng.uniform(np.log(8), np.log(32)))))
        alone = cost.step_time(StepLoad().with_chunk(length))
        slo = Slo(
            ttft_ms=1000 * (5 * alone + pace[tier]), tpot_ms=1000 * pace[tier], tier=tier,
            on_decline="reject",
        )  # fmt: skip
        prompt = [int(token) for token in rng.integers(100, vocab - 100, length)]
        asks.append(Ask(arrival, tier, prompt, output, slo))
    return asks


def work(cost: CostModel, asks: Sequence[Ask]) -> float:
    """Return the seconds of a replica that a mean request takes, decoding among four."""
    base = cost.step_time(StepLoad())
    total = 0.0
    for ask in asks:
        prefill = max(0.0, cost.step_time(StepLoad().with_chunk(len(ask.prompt))) - base / 2)
        step = cost.step_time(StepLoad(decodes=4, context=4 * len(ask.prompt)))
        total += prefill + ask.output_len * step / 4
    return total / len(asks)


async def serve(llm: AsyncLLM, plan: Plan, asks: Sequence[Ask]) -> dict[str, Any]:
    """Offer requests at their times; returns what was seen of the replica that was killed."""
    start = time.monotonic()
    seen: dict[str, Any] = {}

    async def one(ask: Ask) -> None:
        await asyncio.sleep(max(0.0, ask.arrival - (time.monotonic() - start)))
        sampling = SamplingParams(
            temperature=0.0, max_tokens=ask.output_len, ignore_eos=True, detokenize=False
        )
        try:
            async for event in llm.events(llm.make_request(ask.prompt, sampling, slo=ask.slo)):
                ask.events.append(event)
        except JaxserveError as error:
            ask.error = f"{type(error).__name__}: {error}"

    async def kill() -> None:
        await asyncio.sleep(plan.kill_at)
        seen.update(await asyncio.to_thread(end_one, llm))

    await asyncio.gather(kill(), *map(one, asks))
    seen["seconds"] = round(time.monotonic() - start, 2)
    return seen


def end_one(llm: AsyncLLM) -> dict[str, Any]:
    """Kill the replica with the most open completions, and wait until another is in its place."""
    while not any(one.num_open for one in llm.replicas):
        time.sleep(0.002)
    index = max(llm.replicas, key=lambda one: one.num_open).index
    seen: dict[str, Any] = {"replica": index, "open": llm.replicas[index].num_open}
    end_loop(llm, index)
    began = time.monotonic()
    while True:
        status = llm.replicas[index]
        if status.deaths and status.state in ("pooled", "serving"):
            return seen | {"up_again_s": round(time.monotonic() - began, 3)}
        time.sleep(0.005)


def end_loop(llm: AsyncLLM, index: int) -> None:
    """Have the loop of a replica end with an error that nothing in it expects."""
    replica = llm.host.fleet.roster.slots[index].replica

    def fail() -> None:
        raise SystemExit("killed by the benchmark")

    replica.host.engine.step = fail
    replica.host.thread.call(lambda: None)


async def check_moved(llm: AsyncLLM, asks: Sequence[Ask], least: float) -> tuple[int, int]:
    """Generate again what was under way at the kill; returns how many there were, and differ."""
    under_way = [
        ask for ask in asks
        if ask.is_whole and ask.arrival <= least <= ask.arrival + 60
        and ask.events[-1].metrics is not None
    ][-24:]  # fmt: skip
    different = 0
    for ask in under_way:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=ask.output_len, ignore_eos=True, detokenize=False
        )
        again = [e async for e in llm.events(llm.make_request(ask.prompt, sampling))]
        different += [t for e in again for t in e.token_ids] != ask.tokens
    return len(under_way), different


def over_time(asks: Sequence[Ask], seconds: float) -> dict[str, list[float | None]]:
    """Return the share that kept all objectives, by tier, of each two seconds of arrivals."""
    count = math.ceil(seconds / BIN_S)
    found: dict[str, list[float | None]] = {}
    for name in [*(tier for tier, _ in TIERS), "all"]:
        bins: list[list[bool]] = [[] for _ in range(count)]
        for ask in asks:
            if name in ("all", ask.tier):
                bins[min(count - 1, int(ask.arrival / BIN_S))].append(ask.is_attained)
        found[name] = [round(sum(b) / len(b), 4) if b else None for b in bins]
    return found


def recovery(asks: Sequence[Ask], since: float, until: float) -> float | None:
    """Return the seconds after which at least 90 % kept their objectives, for six seconds.

    None if that is never so; arrivals between `since` and `until` count.
    """
    begin = since
    while begin + WINDOW_S <= until:
        there = [a for a in asks if begin <= a.arrival < begin + WINDOW_S]
        if there and sum(a.is_attained for a in there) >= LEVEL * len(there):
            return round(begin - since, 1)
        begin += 0.5
    return None


def measure(router: str, args: argparse.Namespace, file: CostFile, path: Path) -> dict[str, Any]:
    """Run the load through one router."""
    cost = file.cost
    pace = paces(cost)
    options = ClusterOptions(
        replicas=args.replicas, routing_policy=router,
        polyserve_config=None if router != "polyserve" else {
            "tiers": sorted(pace.values()), "initial_output": 17.0, "initial_prompt": 54.0,
            "max_step_s": max(0.05, 2 * pace["tight"]),
        },
    )  # fmt: skip
    llm = open_fleet(
        args.model, options, cost_model=str(path), **engine_settings(args), progress=False
    )
    try:
        vocab = llm.vocab_size
        plan = load_plan(args, cost, vocab)
        asks = offer(plan, cost, args.seed, vocab)
        seen = asyncio.run(serve(llm, plan, asks))
        checked, different = asyncio.run(check_moved(llm, asks, plan.kill_at))
        moved = sum(llm.host.fleet.metrics.moved.values())
    finally:
        llm.close()
    lost = [a for a in asks if not (a.is_whole or a.is_declined or a.error is not None)]
    failed = [a for a in asks if a.events and a.events[-1].finish_reason is FinishReason.ERROR]
    end = plan.burst_at + plan.burst_s
    shares = {
        name: {
            "before": share(asks, name, 0, plan.burst_at),
            "burst": share(asks, name, plan.burst_at, end),
            "after": share(asks, name, end, plan.kill_at),
            "killed": share(asks, name, plan.kill_at, plan.seconds),
        }
        for name in ("tight", "loose", "all")
    }
    return {
        "router": router, "replicas": args.replicas, "requests": len(asks), "rate": plan.rate,
        "burst": plan.burst, "burst_at": plan.burst_at, "burst_s": plan.burst_s,
        "kill_at": plan.kill_at, "run_s": plan.seconds,
        "tiers_ms": {name: round(1000 * tau, 1) for name, tau in pace.items()},
        "attainment": shares, "attainment_over_time": over_time(asks, plan.seconds),
        "bin_s": BIN_S,
        "recovery_s": recovery(asks, end, plan.kill_at),
        "recovery_after_kill_s": recovery(asks, plan.kill_at, plan.seconds),
        "offered": {
            name: sum(a.tier == name for a in asks) for name, _ in TIERS
        },
        "declined": sum(a.is_declined for a in asks),
        "refused": sum(a.error is not None for a in asks),
        "whole": sum(a.is_whole for a in asks), "lost": len(lost) , "failed": len(failed),
        "killed": seen, "completions_moved": moved, "compared_again": checked,
        "different": different,
    }  # fmt: skip


def share(asks: Sequence[Ask], tier: str, low: float, high: float) -> float | None:
    """Return the share of arrivals of a time that kept all objectives."""
    there = [a for a in asks if low <= a.arrival < high and tier in ("all", a.tier)]
    return round(sum(a.is_attained for a in there) / len(there), 4) if there else None


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of each engine."""
    return {
        "dtype": args.dtype, "max_model_len": 512, "max_num_seqs": 8,
        "max_num_batched_tokens": 128, "warmup": "full",
        "scheduling_policy": "deadline_hybrid",
    }  # fmt: skip


def load_plan(args: argparse.Namespace, cost: CostModel, vocab: int) -> Plan:
    """Return a load whose steady part takes a share of what the replicas can do."""
    draft = Plan(rate=5.0, burst=1.0, burst_at=0, burst_s=0, kill_at=0, seconds=60)
    alone = work(cost, offer(draft, cost, args.seed, vocab))
    rate = args.share * args.replicas / alone
    before, after, killed = args.phases
    return Plan(
        rate=round(rate, 3), burst=args.burst, burst_at=before, burst_s=10.0,
        kill_at=before + 10.0 + after, seconds=before + 10.0 + after + killed,
    )  # fmt: skip


def measured(args: argparse.Namespace) -> CostFile:
    """Measure steps of all replicas at once, as they share the machine when they serve."""
    options = ClusterOptions(replicas=args.replicas, routing_policy="polyserve")
    llm = open_fleet(args.model, options, **engine_settings(args))
    try:
        file: CostFile = llm.host.cost_file
    finally:
        llm.close()
    return file


def report(path: Path) -> None:
    """Print what has been recorded; of equal runs the last one counts."""
    rows = latest(path)
    lines = [
        [
            router, *(shown(row["attainment"]["all"][when]) for when in
                      ("before", "burst", "after", "killed")),
            shown(row["recovery_s"], "s"), shown(row["recovery_after_kill_s"], "s"),
            str(row["declined"]), str(row["lost"] + row["failed"]),
            f"{row['completions_moved']}", f"{row['different']} of {row['compared_again']}",
        ]
        for router, row in rows.items()
    ]  # fmt: skip
    head = ["router", "before", "burst", "after", "killed", "recovers", "after kill", "declined",
            "lost", "moved", "different"]  # fmt: skip
    print(table(head, lines))


def shown(value: float | None, unit: str = "") -> str:
    """Write a share or a number of seconds."""
    if value is None:
        return "-"
    return f"{value:.1f} {unit}" if unit else f"{value:.0%}"


def latest(path: Path) -> dict[str, dict[str, Any]]:
    """Read the latest run of each router."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["what"] == "run":
            found[row["router"]] = row
    return found


def plot(path: Path) -> None:
    """Draw attainment over time.

    Raises:
        SystemExit: Without matplotlib.
    """
    plt = pyplot()
    rows = latest(path)
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(9, 2.0 * len(rows)), sharex=True, squeeze=False
    )  # fmt: skip
    for axis, (router, row) in zip(axes[:, 0], rows.items(), strict=True):
        width = row["bin_s"]
        for name in ("tight", "loose"):
            points = [
                (width * (i + 0.5), kept)
                for i, kept in enumerate(row["attainment_over_time"][name]) if kept is not None
            ]  # fmt: skip
            pace = row["tiers_ms"][name]
            axis.plot(*zip(*points, strict=True), marker=".", lw=1, label=f"{name}, {pace:g} ms")
        axis.axvspan(
            row["burst_at"], row["burst_at"] + row["burst_s"], color="orange", alpha=0.2,
            label=f"{row['burst']:g} times the load",
        )  # fmt: skip
        axis.axvline(row["kill_at"], color="red", lw=1, ls="--", label="a replica is killed")
        axis.set_ylim(-0.05, 1.05)
        axis.set_ylabel("attainment")
        axis.set_title(router, fontsize=9)
    axes[0, 0].legend(fontsize=7, loc="lower left")
    axes[-1, 0].set_xlabel("time of arrival, s")
    save(figure, "live_fleet.png")


def main() -> None:
    """Measure, record, and fail if anything was lost or came out differently."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=ROUTERS)
    parser.add_argument("--share", type=float, default=0.25, help="of what the replicas can do")
    parser.add_argument("--burst", type=float, default=10.0, help="times the load, for 10 s")
    parser.add_argument(
        "--phases", nargs=3, type=float, default=[12.0, 24.0, 16.0],
        help="seconds before the burst, after it, and after the kill",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    parser.add_argument("--tables", action="store_true", help="print what has been recorded")
    parser.add_argument("--plot", action="store_true", help="draw it into docs/images")
    args = parser.parse_args()
    recorder = Recorder("live_fleet", out=args.out)
    if args.tables or args.plot:
        report(recorder.path)
        if args.plot:
            plot(recorder.path)
        return
    file = measured(args)
    pace = paces(file.cost)
    print(
        f"tiers {1000 * pace['tight']:.0f} and {1000 * pace['loose']:.0f} ms per token; steps of "
        f"{args.replicas} replicas at once, margin {file.margin:.0%}", flush=True,
    )  # fmt: skip
    path = recorder.path.parent / "live_fleet_cost.json"
    write_cost(path, file)
    bad: list[str] = []
    try:
        for router in args.routers:
            row = measure(router, args, file, path)
            recorder.write("run", model=args.model, dtype=args.dtype, **row)
            if row["lost"] or row["failed"] or row["different"] or not row["completions_moved"]:
                bad.append(router)
            print(json.dumps({k: v for k, v in row.items() if k != "attainment_over_time"}),
                  flush=True)  # fmt: skip
    finally:
        path.unlink(missing_ok=True)
    report(recorder.path)
    if bad:
        sys.exit(f"something was lost, failed, differs or never moved under {', '.join(bad)}")


if __name__ == "__main__":
    main()
