"""Pictures of what has been recorded, for the documentation."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pictures import pyplot, save
from benchmarks.rooms.sparse.contestants import DEFAULT, TARGETS

_SHOWN = {
    "oracle top-p": "tab:gray",
    "cluster order, oracle count": "tab:green",
    DEFAULT: "tab:blue",
    "hyperbola (Tactic)": "tab:orange",
    "centroid mass (Double-P)": "tab:red",
    "page bounds, oracle count": "tab:purple",
}


def rows_of(path: Path, what: str) -> list[dict[str, Any]]:
    """Return the newest lines of one kind that have all cases, one for each setting."""
    found: dict[tuple, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["what"] == what and line.get("complete"):
            names = ("context", "interpolation", "method", "p", "task")
            found[(_same(line), *map(line.get, names))] = line
    return list(found.values())


def draw(path: Path) -> None:
    """Draw tokens read and promises kept over contexts, and heads where most layers were measured.

    Args:
        path: The result lines.

    Raises:
        SystemExit: Without matplotlib, or if nothing has been recorded.
    """
    plt = pyplot()
    lines = rows_of(path, "equal p")
    if not lines:
        raise SystemExit("nothing has been recorded; measure with --mass first")
    _draw_contexts(plt, lines)
    _draw_heads(plt, rows_of(path, "heads"))


def _same(line: dict[str, Any]) -> tuple:
    """Return what must be alike in lines of different contexts that are compared."""
    return (line.get("every"), line.get("last_layer"), *line.get("documents", ()))


def _setting(line: dict[str, Any]) -> tuple[int, float]:
    return line["context"], line["interpolation"]


def _label(setting: tuple[int, float]) -> str:
    context, stretch = setting
    return f"{context}" + (f"\n(x{stretch:g})" if stretch != 1 else "")


def _draw_contexts(plt: Any, lines: list[dict[str, Any]]) -> None:  # noqa: ANN401  a module
    series = {_same(line): set() for line in lines}
    for line in lines:
        series[_same(line)].add(_setting(line))
    widest = max(series, key=lambda one: len(series[one]))
    lines = [line for line in lines if _same(line) == widest]
    settings = sorted(series[widest])
    if len(settings) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, color in _SHOWN.items():
        own = {_setting(line): line for line in lines if (line["method"], line["p"]) == (name, 0.9)}
        xs = [settings.index(setting) for setting in own]
        order = np.argsort(xs)
        for axis, key in zip(axes, ("read", "kept_promise"), strict=True):
            values = list(own.values())
            mean = [values[i][key]["mean"] for i in order]
            error = [values[i][key]["documents"] for i in order]
            axis.errorbar(
                np.asarray(xs)[order], mean, error, color=color, marker=".", capsize=2, label=name
            )
    axes[0].set_ylabel("share of optional tokens read")
    axes[1].set_ylabel("share of cases within 0.02 of p")
    axes[1].axhline(0.95, color="gray", lw=0.8, ls=":")
    for axis in axes:
        axis.set_xticks(range(len(settings)), [_label(setting) for setting in settings])
        axis.set_xlabel("context")
    axes[0].set_ylim(0)
    axes[1].legend(fontsize=7)
    figure.suptitle("p = 0.9, 95 % intervals over documents", fontsize=9)
    save(figure, "tactic_contexts.png")


def _draw_heads(plt: Any, lines: list[dict[str, Any]]) -> None:  # noqa: ANN401  a module
    if not lines:
        return
    most = max(len(line["layers_measured"]) for line in lines)
    own = {line["p"]: line for line in lines if len(line["layers_measured"]) == most}
    figure, axes = plt.subplots(2, len(TARGETS), figsize=(9, 3.8), sharex="col")
    for column, p in enumerate(TARGETS):
        for row, (key, low) in enumerate((("read", 0.0), ("mass", p - 0.05))):
            picture = axes[row, column].imshow(
                np.asarray(own[p][key]).T, aspect="auto", vmin=low, vmax=1.0
            )
            figure.colorbar(picture, ax=axes[row, column])
            axes[row, column].set_yticks(range(len(own[p][key][0])))
            axes[row, column].tick_params(labelsize=7)
        axes[0, column].set_title(f"p = {p}", fontsize=9)
        layers = own[p]["layers_measured"]
        axes[1, column].set_xticks(range(len(layers)), layers, fontsize=7)
        axes[1, column].set_xlabel("layer")
    axes[0, 0].set_ylabel("read, key head")
    axes[1, 0].set_ylabel("mass, query head")
    save(figure, "tactic_heads.png")
