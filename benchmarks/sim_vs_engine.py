"""The simulator beside the real engine: the same requests, the same policies, the same objectives.

The engine is measured first, and the simulator takes the times of its steps from that, corrected by
what steps took among requests of earlier runs, of which the first is a rehearsal that is not
compared, and by how much slower than then the machine was in the run as a whole; how much single
steps differ from that is as recorded there, too. Then a trace of
requests goes through both, at rates below and above what the planner can keep its promises at,
under several policies. Medians of TTFT and TPOT must agree within 15 %, capacities (the rate at
which 90 % keep their objectives) within 10 %, and policies must rank alike.

    python -m benchmarks.sim_vs_engine                  # SmolLM2-135M, three scenarios; an hour
    python -m benchmarks.sim_vs_engine --scenarios mixed --requests 100 --policies fcfs slo
    taskset -c 0 python -m benchmarks.sim_vs_engine --processor-time   # beside other work

With `--processor-time` a second is one of processor that this process uses; nobody sleeps, since
the clock moves on to the next arrival when the engine has nothing to do. On one core that is what a
clock on the wall would show if nothing else ran.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.record import Recorder, table
from benchmarks.rooms.scenarios import TRACES, azure
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost import CostModel, StepLoad, zero_load_time
from jaxserve.core.cost_drift import Drift, LearnedCost
from jaxserve.core.cost_file import write_cost
from jaxserve.core.event import TokenEvent
from jaxserve.core.request import Request, RequestId, SamplingParams
from jaxserve.engine.measure import Effort, measure_engine
from jaxserve.engine.policy import EnginePolicy
from jaxserve.engine.setup import assemble
from jaxserve.engine.shapes import StepShape
from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.sim.learning import CostLearner
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.request import SimRequest
from jaxserve.sim.workload import Shape, Workload, gamma_arrivals

LEVEL = 0.9
RATES = (0.5, 0.8, 1.0, 1.2)
"""Shares of the planner's simulated capacity at which requests are offered."""
MEDIAN_LIMIT, P90_LIMIT, ATTAINMENT_LIMIT, CAPACITY_LIMIT = 0.15, 0.25, 0.05, 0.10
NAMES = ("tight", "loose", "mixed")
POLICIES = ("fcfs", "edf", "slo")
MAX_MODEL_LEN = 1024
_WINDOW_S, _MOST_DELAY, _TRIES = 4.0, 1.2, 3
"""A run is repeated, so many times at most, if its steps took so much longer for so many seconds:
then others have used the machine."""
_ALL_ALIKE = 1e9
"""Half-life of observations in steps, so that none counts less than another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one run, request by request; NaN where there is no figure.

    Attributes:
        ttft: Seconds to the first token.
        tpot: Mean seconds per further token.
        kept: Whether all objectives were kept.
    """

    ttft: np.ndarray
    tpot: np.ndarray
    kept: np.ndarray

    def figures(self) -> dict[str, float]:
        """Return medians, 90th percentiles and the attainment."""
        found = {"attainment": float(self.kept.mean())}
        for name, values in (("ttft", self.ttft), ("tpot", self.tpot)):
            known = values[np.isfinite(values)]
            for what, q in (("median", 0.5), ("p90", 0.9)):
                found[f"{name}_{what}_ms"] = 1000 * float(np.quantile(known, q))
        return found


def scenario(name: str, cost: CostModel, arrivals: tuple[float, ...], count: int) -> Workload:
    """Return a scenario scaled to the machine.

    Time to the first token is 5 or 3 times that of an idle engine, time per token 3 or 6 times that
    of a single decode; `mixed` holds both in equal parts.
    """
    rng = random.Random(name)
    step = cost.step_time(StepLoad(decodes=1, context=256))
    kinds = {"tight": [(3.0, 3.0)], "loose": [(5.0, 6.0)], "mixed": [(5.0, 3.0), (3.0, 6.0)]}
    shapes = tuple(
        Shape(
            prompt_len=round(math_uniform(rng, 32, 512)),
            output_len=round(math_uniform(rng, 16, 128)),
            ttft_slowdown=slowdown,
            tpot_s=pace * step,
            name=name,
        )
        for number in range(max(64, count))
        for slowdown, pace in [kinds[name][number % len(kinds[name])]]
    )
    return Workload(name=name, arrivals=arrivals, shapes=shapes)


def math_uniform(rng: random.Random, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


class ProcessorClock:
    """Seconds of processor that this process has used, and those that it would have slept."""

    def __init__(self) -> None:
        """Start without sleep."""
        self._slept = 0.0

    def now(self) -> float:
        """Return seconds since an arbitrary fixed instant; never goes back."""
        return time.process_time() + self._slept

    def unix(self) -> float:
        """Return the same as `now`."""
        return self.now()

    def sleep(self, seconds: float) -> None:
        """Move on at once."""
        self._slept += seconds


class _Slower:
    """Another cost model's times, all longer by one factor."""

    def __init__(self, cost: CostModel, factor: float) -> None:
        self._cost, self._factor = cost, factor

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        return self._factor * self._cost.step_time(load)

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        return [self._factor * time for time in self._cost.decode_times(load, count)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time."""
        return self._cost.prefill_within(seconds / self._factor, load, past)


class Machine:
    """The real engine with its measured cost model, and its likeness in the simulator.

    Args:
        model: Name or path.
        dtype: Precision.
        effort: How thoroughly to measure.
        clock: Where time comes from.
    """

    def __init__(
        self, model: str, dtype: str, effort: Effort, clock: WallClock | ProcessorClock
    ) -> None:
        """Load, compile everything, measure."""
        config = EngineConfig.from_settings(
            {
                "dtype": dtype,
                "max_model_len": MAX_MODEL_LEN,
                "warmup": "full",
                "enable_prefix_caching": False,
            }
        )
        self.clock = clock
        made = assemble(model, config, clock=self.clock)
        self.engine = made.engine
        self._dir = tempfile.TemporaryDirectory()
        self.measured = measure_engine(self.engine, self.clock, effort)
        self.cost = self.measured.file.cost
        self._costs: dict[str, LearnedCost] = {}
        """What steps take under a policy, where that has been rehearsed."""
        self._deviations: dict[str, list[float]] = {}
        """What they took over that, one after the other."""
        self._steps: list[tuple[StepLoad, float]] = []
        """What the steps of the latest run held, and how long each took."""
        self.speed = 1.0
        """Time that the steps of the latest run took in all, over what was expected of them."""
        self.delay = 1.0
        """The same of the slowest seconds of that run, over that of the whole run."""
        self._path = Path(self._dir.name) / "cost.json"
        write_cost(self._path, self.measured.file)
        self._options = options = made.config.scheduler
        self._vocab = made.model.config.vocab_size
        self.drift = 1.0
        self._settings = PolicySettings(
            margin=self.measured.file.margin, max_mixed_prefill=options.max_mixed_prefill_tokens
        )
        spec = self.engine.runner.spec
        self.spec = ReplicaSpec(
            num_pages=self.engine.pool.num_pages,
            page_size=spec.page_size,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=self.engine.max_num_batched_tokens,
            overlap=options.async_scheduling,
        )
        self._rng = np.random.default_rng(0)

    def rehearse(self, policy: str, requests: Sequence[SimRequest]) -> Drift:
        """Learn by how much steps among requests take longer than those that were measured alone.

        Requests are met, planned for and answered between the steps that they share; what that
        costs shows only when there are some, and depends on the policy. From now on the simulator
        goes by it, and the policy in it.
        """
        for _ in range(_TRIES):
            self.served(policy, requests)
            learned = LearnedCost(self.cost, half_life=_ALL_ALIKE)
            self._costs[policy], self._deviations[policy] = learned, []
            self.learn(policy)
            if _speeds(self._steps, learned)[1] <= _MOST_DELAY:
                break
            print("the rehearsal was held up", flush=True)
        return self._costs[policy].drift()

    def learn(self, policy: str) -> None:
        """Let what the simulator knows of a policy's steps take in those of the latest run."""
        cost = self._costs[policy]
        for load, seconds in self._steps:
            cost.observe(load, seconds)
        whole = _speeds(self._steps, cost)[0]
        self._deviations[policy] += [
            seconds / cost.step_time(load) / whole for load, seconds in self._steps
        ]

    def noise_of(self, policy: str) -> float:
        """Return the deviation of logarithms of the times of steps under a policy."""
        return float(np.std(np.log(self._deviations.get(policy, [1.0]))))

    def simulated(
        self, policy: str, requests: Sequence[SimRequest], *, speed: float = 1.0
    ) -> Outcome:
        """Serve requests in the simulator.

        The policy believes what it believes in the engine: what was measured first, corrected by
        the steps that it has seen.

        Args:
            policy: Its name.
            requests: In order of arrival.
            speed: By how much longer steps take than is known, because the machine does.
        """
        belief = LearnedCost(self.cost)
        taken = _Slower(self._costs.get(policy, self.cost), speed)
        replica = Replica(
            replace(self.spec, deviations=tuple(self._deviations.get(policy, ()))),
            make_policy(policy, belief, self._settings),
            taken,
            observer=CostLearner(belief),
        )
        done = simulate(requests, [replica])
        done = sorted(done, key=lambda one: one.request.request_id)
        return Outcome(
            ttft=np.array([one.ttft for one in done]),
            tpot=np.array([one.tpot if one.request.output_len > 1 else np.nan for one in done]),
            kept=np.array([one.rejection is None and one.outcome.attained for one in done]),
        )

    def served(self, policy: str, requests: Sequence[SimRequest]) -> Outcome:
        """Serve requests in the engine, each at its time."""
        engine = self.engine
        options = replace(self._options, scheduling_policy=policy, cost_model=str(self._path))
        made = EnginePolicy(options, self._settings, clock=self.clock, metrics=engine.metrics)
        made.install(engine)
        self._steps = steps = []

        def note(load: StepLoad, shape: StepShape, seconds: float, now: float) -> None:
            del shape, now
            steps.append((load, seconds))

        engine.times.sink = note
        ends: dict[int, TokenEvent] = {}
        prompts = [
            tuple(int(t) for t in self._rng.integers(0, self._vocab, one.prompt_len))
            for one in requests
        ]
        gc.collect()
        start = self.clock.now() + 0.1
        coming = deque(zip(requests, prompts, strict=True))

        def take(event: TokenEvent) -> None:
            if event.finish_reason is not None:
                ends[int(event.request_id)] = event

        while coming or engine.has_work:
            while coming and start + coming[0][0].arrival <= self.clock.now():
                one, prompt = coming.popleft()
                engine.submit(
                    Request(
                        request_id=RequestId(str(one.request_id)),
                        prompt_token_ids=prompt,
                        sampling=SamplingParams(
                            temperature=0.0, max_tokens=one.output_len, ignore_eos=True,
                            detokenize=False,
                        ),
                        arrival=start + one.arrival,
                        slo=one.slo,
                    ),
                    take,
                )  # fmt: skip
            if engine.has_work:
                engine.step()
            elif coming:
                self._sleep(start + coming[0][0].arrival - self.clock.now())
        self.drift = engine.times.cost.ratio if engine.times.cost is not None else 1.0
        self.speed, self.delay = _speeds(steps, self._costs.get(policy, self.cost))
        ttft, tpot, kept = [], [], []
        for one in requests:
            times = ends[one.request_id].metrics
            first, last = times.first_token_time, times.last_token_time
            ttft.append(np.inf if first is None else first - start - one.arrival)
            span = np.nan if first is None or last is None else last - first
            tpot.append(span / (one.output_len - 1) if one.output_len > 1 else np.nan)
            kept.append(times.slo is not None and times.slo.attained)
        return Outcome(ttft=np.array(ttft), tpot=np.array(tpot), kept=np.array(kept))

    def undisturbed(self, policy: str, requests: Sequence[SimRequest]) -> tuple[Outcome, int]:
        """Serve requests, again if the machine was slow meanwhile; say how often again."""
        for attempt in range(_TRIES - 1):
            found = self.served(policy, requests)
            if self.delay <= _MOST_DELAY:
                return found, attempt
            print(f"a run was held up, {self.delay:.2f} times as slow for a while", flush=True)
        return self.served(policy, requests), _TRIES - 1

    def _sleep(self, seconds: float) -> None:
        if isinstance(self.clock, ProcessorClock):
            self.clock.sleep(max(0.0, seconds))
        elif seconds > 0:
            time.sleep(seconds)

    def close(self) -> None:
        """Free the engine."""
        self.engine.stop("the measurement is over")
        self.engine.constraints.close()
        self.engine.runner.close()
        self._dir.cleanup()


def _speeds(steps: Sequence[tuple[StepLoad, float]], cost: CostModel) -> tuple[float, float]:
    """Return by how much longer steps took than expected, and by how much more for some seconds."""
    taken = np.array([seconds for _, seconds in steps])
    wanted = np.array([cost.step_time(load) for load, _ in steps])
    whole = float(taken.sum() / wanted.sum())
    window = (np.cumsum(taken) // _WINDOW_S).astype(int)
    slow = np.bincount(window, taken) / np.bincount(window, wanted)
    return whole, float(slow[: max(1, len(slow) - 1)].max() / whole)


def capacity(rates: Sequence[float], attainments: Sequence[float]) -> float | None:
    """Return the rate at which attainment falls below the level, between the rates tried.

    More requests should not be kept more often; where they are, chance made it so, and neighbours
    share their mean. None if it never falls so low; the lowest rate, scaled down, if it is below at
    once.
    """
    falling = -isotonic_regression(-np.asarray(attainments)).x
    if falling[0] < LEVEL:
        return rates[0] * falling[0] / LEVEL
    for number in range(1, len(rates)):
        (a, b), (x, y) = rates[number - 1 : number + 1], falling[number - 1 : number + 1]
        if y < LEVEL:
            return float(a + (b - a) * (x - LEVEL) / (x - y))
    return None


def simulated_capacity(machine: Machine, workload: Workload, count: int) -> float:
    """Return the rate at which 90 % keep their objectives under the planner, in the simulator."""
    low, high = 0.01, 0.02

    def attained(rate: float) -> float:
        requests = workload.offer(rate, count, machine.cost)
        return float(machine.simulated("slo", requests).kept.mean())

    while attained(high) >= LEVEL and high < 1000:
        low, high = high, 2 * high
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attained(middle) >= LEVEL else (low, middle)
    return low


def compare(
    machine: Machine, workload: Workload, args: argparse.Namespace, recorder: Recorder
) -> bool:
    """Run one scenario through both and judge; tell whether everything is within its limit."""
    base = simulated_capacity(machine, workload, args.requests)
    rates = [share * base for share in args.rates]
    lines: list[list[str]] = []
    found: dict[tuple[str, str], list[float]] = {}
    medians_ok: list[bool] = []
    for policy in args.policies:
        for share, rate in zip(args.rates, rates, strict=True):
            requests = workload.offer(rate, args.requests, machine.cost)
            outcome, repeated = machine.undisturbed(policy, requests)
            real = outcome.figures()
            ours = machine.simulated(policy, requests, speed=machine.speed).figures()
            if args.rehearsal:
                machine.learn(policy)  # for runs to come; one's own steps are never known before
            off = {name: ours[name] / real[name] - 1 for name in ours if name != "attainment"} | {
                "attainment": ours["attainment"] - real["attainment"]
            }
            for where, figures in (("simulator", ours), ("engine", real)):
                found.setdefault((policy, where), []).append(figures["attainment"])
            within = all(abs(off[f"{name}_median_ms"]) <= MEDIAN_LIMIT for name in ("ttft", "tpot"))
            medians_ok.append(within)
            lines.append(
                [
                    f"{policy} {share:.0%}",
                    *(
                        f"{ours[name]:.1f} / {real[name]:.1f} ({off[name]:+.0%})"
                        for name in ("ttft_median_ms", "tpot_median_ms", "ttft_p90_ms")
                    ),
                    f"{ours['attainment']:.0%} / {real['attainment']:.0%}",
                    f"{machine.speed:.2f}",
                ]
            )
            print(" | ".join(lines[-1]), flush=True)
            recorder.write(
                "run", scenario=workload.name, policy=policy, rate=rate, share=share,
                requests=args.requests, simulator=ours, engine=real, difference=off,
                drift=machine.drift, speed=machine.speed, delay=machine.delay,
                repeated=repeated, is_median_within=within,
            )  # fmt: skip
    head = ["policy, rate", "TTFT median", "TPOT median", "TTFT p90", "attained", "speed"]
    print(f"\n{workload.name}: simulator / engine, ms; the planner's capacity is {base:.2f}/s")
    print(table(head, lines))
    return _judge(workload.name, rates, found, medians_ok, args, recorder)


def _judge(
    name: str,
    rates: Sequence[float],
    found: dict[tuple[str, str], list[float]],
    medians_ok: Sequence[bool],
    args: argparse.Namespace,
    recorder: Recorder,
) -> bool:
    capacities: dict[str, dict[str, float | None]] = {}
    for where in ("simulator", "engine"):
        capacities[where] = {p: capacity(rates, found[p, where]) for p in args.policies}
    ranking = {
        where: sorted(args.policies, key=lambda p: -float(np.mean(found[p, where])))
        for where in capacities
    }
    off = {
        policy: (mine / theirs - 1)
        for policy in args.policies
        if (mine := capacities["simulator"][policy]) and (theirs := capacities["engine"][policy])
    }
    close = all(abs(value) <= CAPACITY_LIMIT for value in off.values())
    alike = ranking["simulator"] == ranking["engine"]
    print(f"capacities, simulator over engine: { {p: f'{v:+.1%}' for p, v in off.items()} }")
    print(f"ranking: {ranking['simulator']} and {ranking['engine']}")
    recorder.write(
        "scenario", scenario=name, capacities=capacities, capacity_difference=off,
        ranking=ranking, medians_within=sum(medians_ok), runs=len(medians_ok),
        is_capacity_within=close, is_ranking_same=alike,
    )  # fmt: skip
    return close and alike and all(medians_ok)


def _rehearse(machine: Machine, args: argparse.Namespace, recorder: Recorder) -> None:
    """Serve requests of their own under each policy, with arrivals that are not the trace's."""
    count = args.rehearsal
    practice = scenario("mixed", machine.cost, gamma_arrivals(count, seed=1), count)
    rate = 0.8 * simulated_capacity(machine, practice, count)
    requests = practice.offer(rate, count, machine.cost, seed=1)
    for policy in args.policies:
        drift = machine.rehearse(policy, requests)
        print(f"{policy}: steps among requests take {drift.ratio:.2f} times as long", flush=True)
        recorder.write(
            "rehearsal", policy=policy, requests=count, ratio=drift.ratio, buckets=drift.buckets,
            steps=drift.observations, noise=machine.noise_of(policy),
        )  # fmt: skip


def main() -> None:
    """Measure, compare, record, and fail if anything is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenarios", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10, help="steps per shape when measuring")
    parser.add_argument(
        "--rehearsal", type=int, default=80,
        help="requests that are served first, to learn what steps take among requests",
    )  # fmt: skip
    parser.add_argument(
        "--rates", nargs="+", type=float, default=list(RATES),
        help="shares of the planner's simulated capacity",
    )  # fmt: skip
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    parser.add_argument(
        "--processor-time", action="store_true",
        help="count this process's seconds of processor; for use beside other work, on one core",
    )  # fmt: skip
    args = parser.parse_args()
    arrivals = gamma_arrivals(max(1000, args.requests))
    if args.traces.is_dir():
        arrivals = azure("conv", args.traces)[0]
    else:
        print("there is no folder of traces; arrivals are a Poisson process", file=sys.stderr)
    recorder = Recorder("sim_vs_engine", out=args.out)
    effort = Effort(repeats=args.repeats, contexts=(256, 448))
    clock = ProcessorClock() if args.processor_time else WallClock()
    machine = Machine(args.model, args.dtype, effort, clock)
    report = machine.measured.report
    print(
        f"one decode {1000 * machine.cost.step_time(StepLoad(decodes=1, context=256)):.1f} ms, "
        f"256 prompt tokens {1000 * zero_load_time(machine.cost, 256):.0f} ms; the cost model errs "
        f"by {report.mean_error:.1%} in the mean, margin {machine.measured.file.margin:.1%}",
        flush=True,
    )
    recorder.write(
        "cost model", model=args.model, clock="processor" if args.processor_time else "wall",
        cores=len(os.sched_getaffinity(0)), steps=len(machine.measured.samples.seconds),
        mean_error=report.mean_error, p99_error_ms=1000 * report.p99_error, r2=report.r2,
        margin=machine.measured.file.margin, engine=machine.measured.file.facts["engine"],
    )  # fmt: skip
    good = True
    try:
        if args.rehearsal:
            _rehearse(machine, args, recorder)
        for name in args.scenarios:
            workload = scenario(name, machine.cost, arrivals, args.requests)
            good &= compare(machine, workload, args, recorder)
    finally:
        machine.close()
    if not good:
        sys.exit("some figures are beyond their limits; see the tables")


if __name__ == "__main__":
    main()
