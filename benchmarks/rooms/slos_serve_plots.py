"""Pictures of recorded capacities of the token planner, for the documentation."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import pyplot, save
from benchmarks.rooms.scenarios import NAMES
from jaxserve.sim.report import READINGS

_SHOWN = ("fcfs", "sarathi_tuned", "deadline_hybrid", "slos_serve")
_LEAST = 0.01
"""Requests per second that are drawn as a bar; nothing would be, on a logarithmic axis."""


def draw(path: Path, machine: str = "a100") -> None:
    """Draw capacities as bars, and attainment over the rate.

    Args:
        path: The result lines; the last of each kind counts.
        machine: Whose.

    Raises:
        SystemExit: Without matplotlib, or if nothing has been recorded.
    """
    plt = pyplot()
    lines = _lines(path, machine)
    if not lines:
        raise SystemExit(f"nothing has been recorded for {machine}; measure it first")
    figure, axes = plt.subplots(len(READINGS), 1, figsize=(9, 7), sharex=True)
    for axis, reading in zip(axes, READINGS, strict=True):
        own = {key[0::2]: line for key, line in lines.items() if key[1] == reading}
        _bars(axis, own, _bounds(path, machine))
        axis.set_ylabel(f"{reading}\nrequests/s", fontsize=8)
    axes[0].legend(
        fontsize=7, ncols=len(_SHOWN) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )  # fmt: skip
    axes[-1].set_xticks(np.arange(len(NAMES)) + 0.4, NAMES)
    save(figure, "slos_serve_capacity.png")

    figure, axes = plt.subplots(2, 3, figsize=(10, 5))
    for axis, scenario in zip(axes.flat, NAMES, strict=True):
        for policy in _SHOWN:
            line = lines.get((scenario, "tpot", policy))
            if line is not None:
                rates, kept = zip(*sorted(line["tried"]), strict=True)
                axis.plot(rates, kept, marker=".", label=policy)
        axis.axhline(line["level"] if line else 0.9, color="gray", lw=0.8)
        axis.set_xscale("log")
        axis.set_title(scenario, fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("attainment")
    axes[1, 0].set_ylabel("attainment")
    axes[1, 1].set_xlabel("requests/s")
    axes[0, 0].legend(fontsize=7)
    save(figure, "slos_serve_attainment.png")


def _bars(
    axis: Any,  # noqa: ANN401  axes
    lines: dict[tuple[str, str], dict[str, Any]],
    bounds: list[float],
) -> None:
    width = 0.8 / len(_SHOWN)
    for place, policy in enumerate(_SHOWN):
        own = [lines.get((scenario, policy)) for scenario in NAMES]
        rates = np.array([line["requests_per_second"] if line else np.nan for line in own])
        ends = np.array([line["interval_95"] if line else [np.nan] * 2 for line in own]).T
        axis.bar(
            np.arange(len(NAMES)) + (place + 0.5) * width, np.maximum(rates, _LEAST), width,
            yerr=np.abs(ends - rates), error_kw={"lw": 0.8}, label=policy,
        )  # fmt: skip
    axis.plot(
        np.arange(len(NAMES)) + 0.4, bounds, "k_", ms=30, label="nobody can do more"
    )  # fmt: skip
    axis.set_yscale("log")
    axis.grid(visible=True, axis="y", lw=0.3)


def _bounds(path: Path, machine: str) -> list[float]:
    """Return the last bound of each scenario that is recorded, or else NaN."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = {
        row["scenario"]: row["requests_per_second"]
        for row in rows
        if row["what"] == "bound" and row["machine_model"] == machine and row["knows_outputs"]
    }
    return [found.get(name, np.nan) for name in NAMES]


def _lines(path: Path, machine: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the last line of each scenario, reading and policy."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        (row["scenario"], row["reading"], row["policy"]): row
        for row in rows if row["what"] == "capacity" and row["machine_model"] == machine
    }  # fmt: skip
