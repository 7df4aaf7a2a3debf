"""How long an all-to-all takes in a model of links, over the least that any scheme takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.pictures import pyplot, save
from benchmarks.record import Recorder, table
from benchmarks.rooms.flash.matrices import MATRICES, MIB, make
from benchmarks.rooms.flash.optimum import fluid_optimum
from benchmarks.rooms.flash.planning import lines_of
from jaxserve.sharding.flash import CostModel, Schedule, plan
from jaxserve.sharding.flash.loads import Loads, measure_loads
from jaxserve.sharding.flash.policy import choose
from jaxserve.sharding.flash.simulate import ALGORITHMS, simulate

SERVERS: Final = (2, 4, 8, 16, 32, 64, 128)
SIZES: Final = (MIB // 4, 4 * MIB, 64 * MIB, 512 * MIB)
LINKS: Final = {
    "450:50": CostModel(up_rate=450e9, out_rate=50e9),
    "448:12.5": CostModel(up_rate=448e9, out_rate=12.5e9),
}
"""Gigabytes per second inside servers and between them: of an H200's, and of an MI300X's."""
INCASTS: Final = (0.0, 0.1)
_ONE_SEED_FROM: Final = 64
_SMALL: Final = ((2, 2), (2, 4), (3, 2), (4, 2), (3, 4), (4, 4))
_MAIN: Final = (64 * MIB, "448:12.5")


def measure(recorder: Recorder, min_servers: int, max_servers: int, seeds: int) -> None:
    """Simulate all matrices, sizes and links, compare small ones with their optima, and record."""
    for n in (n for n in SERVERS if min_servers <= n <= max_servers):
        for size in SIZES:
            ratios: dict[tuple[str, float], dict[str, Any]] = {}
            for name in MATRICES:
                many = 1 if n >= _ONE_SEED_FROM else seeds
                samples = [_Sample.make(name, n, size, seed) for seed in range(many)]
                for links, cost in LINKS.items():
                    for incast in INCASTS:
                        own = replace(cost, incast=incast)
                        found = [_ratios(one, own) for one in samples]
                        mean = {
                            key: round(float(np.mean([one[key] for one in found])), 4)
                            for key in found[0]
                        }
                        ratios.setdefault((links, incast), {})[name] = mean
            for (links, incast), values in ratios.items():
                recorder.write(
                    "model", servers=n, gpus=8, bytes_per_gpu=size, links=links, incast=incast,
                    up_latency=3e-6, out_latency=10e-6, ratios=values,
                )  # fmt: skip
    for n, m in _SMALL:
        for links in (*LINKS, "100:50"):
            cost = LINKS.get(links, CostModel(up_rate=100e9, out_rate=50e9))
            cost = replace(cost, gpus=m, up_latency=0.0, out_latency=0.0)
            values = {name: _against_optimum(name, n, m, cost, seeds) for name in MATRICES}
            recorder.write("optimum", servers=n, gpus=m, links=links, ratios=values)


class _Sample(NamedTuple):
    """Traffic, and what does not depend on links."""

    loads: Loads
    paper: Schedule

    @classmethod
    def make(cls, name: str, n: int, size: int, seed: int) -> "_Sample":
        """Make traffic, and the published schedule."""
        cost = LINKS["450:50"]
        loads = measure_loads(make(name, n, 8, size, seed), cost)
        return cls(loads, plan(loads.servers, cost, "paper"))


def _ratios(sample: _Sample, cost: CostModel) -> dict[str, float]:
    """Return the time of each algorithm over the bound, and of what the policy chooses."""
    loads = sample.loads
    found = {
        name: simulate(loads, cost, name, schedule=sample.paper if name == "paper" else None)
        for name in ALGORITHMS
    }
    choice, bound = choose(loads, cost), found["flash"].bound
    best = min(one.seconds for one in found.values())
    return {
        **{name: one.ratio for name, one in found.items()},
        "auto": choice.seconds / bound if bound else 1.0,
        "auto over best": choice.seconds / best if best else 1.0,
        "stages": float(found["flash"].num_stages),
    }


def _against_optimum(name: str, n: int, m: int, cost: CostModel, seeds: int) -> dict[str, float]:
    found: list[dict[str, float]] = []
    for seed in range(seeds):
        traffic = make(name, n, m, 64 * MIB, seed)
        loads = measure_loads(traffic, cost)
        flash, paper = simulate(loads, cost, "flash"), simulate(loads, cost, "paper")
        least = fluid_optimum(traffic, cost)
        assert flash.bound <= least * (1 + 1e-6)
        assert least <= min(flash.seconds, paper.seconds) * (1 + 1e-6)
        over = least or 1.0
        found.append(
            {
                "optimum over bound": least / flash.bound if least else 1.0,
                "flash over optimum": flash.seconds / over if least else 1.0,
                "paper over optimum": paper.seconds / over if least else 1.0,
                "auto over optimum": choose(loads, cost).seconds / over if least else 1.0,
            }
        )
    return {key: round(float(np.mean([one[key] for one in found])), 4) for key in found[0]}


def _model_lines(path: Path) -> list[dict[str, Any]]:
    return lines_of(path, "model", "servers", "bytes_per_gpu", "links", "incast")


def report(path: Path) -> str:
    """Return tables of what has been recorded, and which targets are met."""
    lines = _model_lines(path)
    parts: list[str] = []
    shown = (*ALGORITHMS, "auto", "stages")
    for incast in INCASTS:
        rows = []
        for line in lines:
            if (line["bytes_per_gpu"], line["links"]) != _MAIN or line["incast"] != incast:
                continue
            for name, values in line["ratios"].items():
                if name not in ("uniform", "zipf 0.4", "zipf 0.8", "zipf 1.2", "moe", "hot pair"):
                    continue
                cells = [f"{values[key]:.0f}" if key == "stages" else f"{values[key]:.2f}"
                         for key in shown]  # fmt: skip
                rows.append([f"{line['servers']} {name}", *cells])
        parts += [f"\n448:12.5 GB/s, 64 MiB per GPU, incast {incast}: time over the bound"]
        parts += [table(["servers", *shown], rows)]
    rows = []
    for line in lines_of(path, "optimum", "servers", "gpus", "links"):
        keys = ("optimum over bound", "flash over optimum", "paper over optimum",
                "auto over optimum")  # fmt: skip
        for key in keys:
            values = [one[key] for one in line["ratios"].values()]
            label = f"{line['servers']} x {line['gpus']}, {line['links']}: {key}"
            rows.append([label, f"{np.mean(values):.3f}", f"{np.max(values):.3f}"])
    parts += ["\nFluid optimum, no fixed times, over all matrices"]
    parts += [table(["servers x GPUs", "mean", "largest"], rows), "\nTargets"]
    parts += [table(["target", "found", ""], targets(lines))]
    return "\n".join(parts)


def targets(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Return what was aimed at in the model, what was found, and whether it is met."""
    rows: list[list[str]] = []

    def check(label: str, found: float, most: float) -> None:
        rows.append([f"{label} <= {most}", f"{found:.3f}", "met" if found <= most else "MISSED"])

    for line in lines:
        if (line["bytes_per_gpu"], line["links"], line["incast"]) != (*_MAIN, 0.0):
            continue
        n, ratios = line["servers"], line["ratios"]
        if n in (4, 8, 16):
            check(f"flash, zipf 0.8, n = {n}", ratios["zipf 0.8"]["flash"], 1.12 if n <= 8 else 1.3)
        check(f"flash, moe, n = {n}", ratios["moe"]["flash"], 1.15)
    worst = max(values["auto over best"] for line in lines for values in line["ratios"].values())
    check("auto over the best of all", worst, 1.03)
    return rows


def draw(path: Path) -> None:
    """Draw time over the bound by size of the cluster, by skew and by size of messages.

    Raises:
        SystemExit: Without matplotlib.
    """
    plt = pyplot()
    found = {
        (line["servers"], line["bytes_per_gpu"], line["links"], line["incast"]): line["ratios"]
        for line in _model_lines(path)
    }
    servers = sorted({key[0] for key in found})
    middle = 16 if 16 in servers else servers[-1]
    size, links = _MAIN
    skews = ("uniform", "zipf 0.4", "zipf 0.8", "zipf 1.2", "moe")
    megabytes = [f"{one / MIB:g}" for one in SIZES]
    panels = (
        ("servers, zipf 0.8, 64 MiB per GPU", list(map(str, servers)),
         [found[n, size, links, 0.1]["zipf 0.8"] for n in servers]),
        ("servers, moe, 64 MiB per GPU", list(map(str, servers)),
         [found[n, size, links, 0.1]["moe"] for n in servers]),
        (f"matrix, n = {middle}, 64 MiB per GPU", list(skews),
         [found[middle, size, links, 0.1][name] for name in skews]),
        (f"MiB per GPU, zipf 0.8, n = {middle}", megabytes,
         [found[middle, one, links, 0.1]["zipf 0.8"] for one in SIZES]),
    )  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), sharey=True)
    for axis, (label, ticks, values) in zip(axes, panels, strict=True):
        for name in (*ALGORITHMS, "auto"):
            style = {"ls": "--", "color": "black"} if name == "auto" else {"marker": "."}
            axis.plot(range(len(ticks)), [one[name] for one in values], label=name, **style)
        axis.set_xticks(range(len(ticks)), ticks, fontsize=7)
        axis.set_xlabel(label, fontsize=8)
        axis.set_yscale("log")
        axis.grid(visible=True, which="both", lw=0.3)
    axes[0].set_ylabel("modelled time / lower bound")
    axes[1].legend(fontsize=6, ncol=2, loc="upper left")
    figure.suptitle("8 GPUs per server, 448 and 12.5 GB/s, incast 0.1", fontsize=9)
    save(figure, "flash_model.png", dpi=80)
