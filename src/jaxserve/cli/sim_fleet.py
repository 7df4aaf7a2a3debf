"""`jaxserve sim fleet`: routers before hundreds of servers."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from jaxserve.cli.sim_values import MS, aligned, cost_of, count, opened, positive
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.sim.bounds import fleet_bound
from jaxserve.sim.fleet import (
    RIVALS,
    FleetReport,
    FleetRival,
    FleetSpec,
    FleetTrace,
    RivalName,
    simulate_fleet,
)
from jaxserve.sim.report import READINGS
from jaxserve.sim.traces import SHIPPED, read_trace

DEFAULT_ROUTERS = ("polyserve", "slo_headroom", "least_requests")
ROUTERS = ("polyserve", *(name for name in RIVALS if name != "static_tiers"))
"""`static_tiers` needs to be told how many servers each tier gets; in Python it can be."""


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `jaxserve sim fleet` to a parser."""
    add = parser.add_argument
    add(
        "--workload", default=SHIPPED[0], metavar="TRACE",
        help=f"where lengths are drawn from: {', '.join(SHIPPED)}, or a file",
    )  # fmt: skip
    add("--cost-model", default="7b-a100", metavar="COST", help="as for run [7b-a100]")
    add(
        "--router", nargs="+", default=list(DEFAULT_ROUTERS), choices=ROUTERS, metavar="NAME",
        help=f"of {', '.join(ROUTERS)} [{' '.join(DEFAULT_ROUTERS)}]",
    )  # fmt: skip
    add("--servers", type=count, default=100, metavar="N", help="[100]")
    add(
        "--prefill-servers", type=int, default=0, metavar="N",
        help="of these compute prompts only, the others further tokens [0: all do both]",
    )  # fmt: skip
    add(
        "--rate", type=positive, metavar="R",
        help="requests per second of the fleet [90 %% of the optimum, where that is known]",
    )  # fmt: skip
    add("--minutes", type=positive, default=2.0, metavar="M", help="of virtual time [2]")
    add(
        "--tiers-ms", nargs="+", type=positive, default=[20.0, 30.0, 50.0, 100.0], metavar="MS",
        help="times per token of the tiers, tightest first [20 30 50 100]",
    )  # fmt: skip
    add(
        "--mix", nargs="+", type=positive, metavar="W",
        help="weights of the tiers among requests [all alike]",
    )  # fmt: skip
    add(
        "--ttft-ms", nargs="+", type=positive, default=[300.0, 500.0, 1000.0], metavar="MS",
        help="times to the first token, one drawn for each request [300 500 1000]",
    )  # fmt: skip
    add("--reading", choices=READINGS, default="tpot", help="of the time per token [tpot]")
    add("--kv-tokens", type=count, default=352_000, metavar="N", help="per server [352000]")
    add("--max-num-seqs", type=count, default=256, metavar="N", help="per server [256]")
    add(
        "--elastic", action="store_true",
        help="let polyserve start servers and turn them off, beginning with half of them",
    )  # fmt: skip
    add(
        "--timeline", type=Path, metavar="FILE",
        help="write what servers do over time, under the last router, as CSV",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn [0]")


def run_fleet(given: argparse.Namespace, out: Callable[[str], None]) -> None:
    """Serve requests with each router, and print what was kept, by tier.

    Args:
        given: The arguments.
        out: Prints a line.

    Raises:
        JaxserveError: For a bad trace, cost model or setting.
    """
    tiers = tuple(one / MS for one in given.tiers_ms)
    mix = np.array(given.mix or [1.0] * len(tiers))
    if len(mix) != len(tiers):
        raise ConfigError(
            f"--mix has {len(mix)} weights for {len(tiers)} tiers; give one for each."
        )
    cost = cost_of(given.cost_model).cost
    spec = FleetSpec(
        servers=given.servers, cost=cost, capacity=given.kv_tokens, seats=given.max_num_seqs,
        prefill_servers=given.prefill_servers,
    )  # fmt: skip
    config = PolyServeConfig(tiers=tiers, pace=given.reading)
    if given.timeline:
        opened(given.timeline).close()  # before anything is computed that would be lost
    sample = _draw(given, tiers, mix, 1.0, 5000)
    optimum = None
    try:
        optimum = fleet_bound(sample, spec, tiers)
    except ConfigError:
        if given.rate is None:
            raise ConfigError(
                "the optimum is known only for a linear cost model; give the --rate."
            ) from None
    rate = given.rate or 0.9 * cast("float", optimum)
    trace = _draw(given, tiers, mix, rate, int(60 * rate * given.minutes))
    if not len(trace):
        raise ConfigError("no request comes in that time; give more --minutes or a higher --rate.")
    share = "" if optimum is None else f", {rate / optimum:.0%} of the optimum"
    out(
        f"{len(trace)} requests at {rate:.1f}/s{share}, {given.servers} servers; what was kept, in "
        "all and by tier"
    )
    lines = [["router", "all", *(f"{one:g} ms" for one in given.tiers_ms), "declined", "servers"]]
    report: FleetReport | None = None
    bar = tqdm(given.router, unit="router", file=sys.stderr, leave=False, disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        policy = (
            config if name == "polyserve"
            else FleetRival(name=cast("RivalName", name), by_deadline=True, sheds=True)
        )  # fmt: skip
        report = simulate_fleet(
            trace, spec, policy, tiers=tiers, elastic=given.elastic and name == "polyserve",
            initial=max(1, given.servers // 2),
        )  # fmt: skip
        lines.append(_line(name, report, given))
    bar.close()
    for line in aligned(lines):
        out(line)
    if given.timeline and report is not None:
        with opened(given.timeline) as file:
            file.write(",".join(report.columns) + "\n")
            for row in report.timeline:
                file.write(",".join(f"{value:g}" for value in row) + "\n")


def _line(name: str, report: FleetReport, given: argparse.Namespace) -> list[str]:
    kept = report.attained(given.reading)
    own = [kept[report.tier == place] for place in range(len(given.tiers_ms))]
    end = float(np.nanmax(report.finish))
    return [
        name,
        f"{kept.mean():.1%}",
        *(f"{one.mean():.1%}" if len(one) else "-" for one in own),
        str(int(report.declined().sum())),
        f"{report.server_seconds / end:.1f}",
    ]


def _draw(
    given: argparse.Namespace, tiers: Sequence[float], mix: np.ndarray, rate: float, most: int
) -> FleetTrace:
    """Draw a Poisson process of requests with the lengths of a trace."""
    found = read_trace(given.workload)
    rng = np.random.default_rng(given.seed)
    place = rng.integers(len(found.prompt_lens), size=most)
    return FleetTrace(
        arrival=np.cumsum(rng.exponential(1 / rate, most)),
        prompt=np.array(found.prompt_lens)[place],
        output=np.array(found.output_lens)[place],
        ttft=rng.choice(given.ttft_ms, most) / MS,
        tpot=np.array(tiers)[rng.choice(len(tiers), most, p=mix / mix.sum())],
    )
