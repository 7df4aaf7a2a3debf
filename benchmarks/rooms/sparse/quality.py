"""Mass that is reached and tokens that are read, on queries at the ends of long texts.

Every estimator and baseline at equal p, all of them at equal numbers of tokens (by interpolation
between settings), every head by itself, and an ablation of order, count and what stands in for the
rest. Masses are true ones, computed from all keys. A case is a text; its clusterings and layers are
measured together, since what takes long is to run the model over it.
"""

import argparse
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.sparse import captures, mass
from benchmarks.rooms.sparse.cases import Case
from benchmarks.rooms.sparse.contestants import (
    ABLATION,
    ABLATION_P,
    BASE,
    CLUSTERED,
    CONTESTANTS,
    DEFAULT,
    KNOBS,
    TARGETS,
    Contestant,
    segmented,
)
from benchmarks.rooms.sparse.intervals import spread

ALLOWANCE = 0.02
"""By how much a mass may miss its target and still count as kept."""

Results = dict[tuple[str, int], dict[str, list[float]]]
"""Per text and seed: quantities of one contestant, a value per knob."""


def make_layer(
    capture: captures.Capture, seed: int, queries: int, generated: int, segment_len: int
) -> mass.Layer:
    """Cluster a layer up to the last tokens of its text, and take some queries among these."""
    at = np.linspace(0, generated - 1, queries).astype(int).tolist()
    return mass.make_layer(
        capture.q[-generated:], capture.k, capture.v, at, capture.scale,
        len(capture.k) - generated, config=segmented(BASE, segment_len, seed),
    )  # fmt: skip


def measure_text(
    layers: Sequence[captures.Capture],
    contestants: Mapping[str, Contestant],
    args: argparse.Namespace,
) -> Case:
    """Measure contestants on some layers of one text, with every clustering.

    Args:
        layers: All layers of the model.
        contestants: Methods.
        args: Which layers and how many queries and clusterings.
    """
    end = len(layers) if args.last_layer is None else args.last_layer + 1
    chosen = range(args.first_layer, end, args.every)
    found: Case = {"layers": list(chosen), "heads": {}}
    for seed in range(args.seeds):
        parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in contestants}
        for capture in (layers[i] for i in chosen):
            layer = make_layer(capture, seed, args.queries, args.generated, args.segment_len)
            for name, each in contestants.items():
                if seed and each.method not in CLUSTERED:
                    continue  # what knows no clusters is the same for all seeds
                values = mass.measure(
                    each.method, layer, jnp.asarray(each.knobs), config=each.config
                )
                parts[name].append({key: np.asarray(value) for key, value in values.items()})
        for name, measured in parts.items():
            if measured:
                joined = {
                    key: np.stack([part[key] for part in measured], axis=1) for key in measured[0]
                }
                found[f"{name}/{seed}"] = _summary(joined, contestants[name])
                if name == DEFAULT and not seed:
                    found["heads"] = _heads(joined)
    return found


def _summary(values: Mapping[str, np.ndarray], contestant: Contestant) -> dict[str, list[float]]:
    """Describe cases, `[knobs, layers, queries, kv_heads(, group)]`, by knob."""
    flat = {key: value.reshape(value.shape[0], -1) for key, value in values.items()}
    targets = np.zeros(len(contestant.knobs)) if contestant.is_budget else contestant.knobs
    kept = flat["mass"] >= np.asarray(targets)[:, None] - ALLOWANCE
    return {
        "read": _rounded(flat["read"].mean(-1)),
        "mass": _rounded(flat["mass"].mean(-1)),
        "mass_p10": _rounded(np.percentile(flat["mass"], 10, axis=-1)),
        "kept_promise": _rounded(kept.mean(-1)),
        "error": _rounded(flat["error"].mean(-1)),
        "tail_error": _rounded(flat.get("tail_error", flat["error"]).mean(-1)),
        "num_cases": [flat["mass"].shape[1]] * len(contestant.knobs),
    }


def _heads(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, list]]:
    """Return for each layer and head, means over queries, by target."""
    found = {}
    for target in TARGETS:
        at = KNOBS.index(target)
        reached = values["mass"][at]  # [layers, queries, kv_heads, group]
        heads = reached.shape[2] * reached.shape[3]
        reached = reached.reshape(*reached.shape[:2], heads)
        found[str(target)] = {
            "mass": _rounded(reached.mean(1)),
            "least": _rounded(reached.min(1)),
            "read": _rounded(values["read"][at].mean(1)),
        }
    return found


def _rounded(values: np.ndarray) -> list:
    return np.round(np.asarray(values, np.float64), 5).tolist()


def describe(results: Results, knob: int) -> dict[str, dict[str, float]]:
    """Describe what a contestant does at one knob."""
    names = ("read", "mass", "mass_p10", "kept_promise", "error", "tail_error")
    return {name: spread(results, lambda one, name=name: one[name][knob]) for name in names}


def at_tokens(one: Mapping[str, list[float]], name: str, read: float) -> float:
    """Return a quantity where so many tokens are read, between settings of the knob."""
    order = np.argsort(one["read"])
    return float(np.interp(read, np.asarray(one["read"])[order], np.asarray(one[name])[order]))


def gather(done: Mapping[str, Case], name: str, seeds: int) -> Results:
    """Take the results of one contestant out of all cases."""
    found: Results = {}
    for text, case in done.items():
        for seed in range(seeds):
            # What knows no clusters was measured once.
            found[text, seed] = case.get(f"{name}/{seed}") or case[f"{name}/0"]
    return found


def report_equal_p(found: Mapping[str, Results], recorder: Recorder, facts: Mapping) -> None:
    """Print and record every method that knows a p, at the same ones."""
    rows = []
    for name, each in CONTESTANTS.items():
        if each.is_budget:
            continue
        cells = [name]
        for target in TARGETS:
            line = describe(found[name], KNOBS.index(target))
            recorder.write("equal p", method=name, p=target, **line, **facts)
            cells.append(
                f"{line['read']['mean']:.3f}±{line['read']['documents']:.3f} "
                f"{line['mass_p10']['mean']:.3f} {line['kept_promise']['mean']:.1%}"
            )
        rows.append(cells)
    print("\nshare of optional tokens read (±95 %, documents), 10th percentile of the mass,")
    print(f"share of cases within {ALLOWANCE} of the target")
    print(table(["method", *(f"p = {p}" for p in TARGETS)], rows))


def report_equal_tokens(found: Mapping[str, Results], recorder: Recorder, facts: Mapping) -> None:
    """Print and record all methods where they read as many tokens as the default does."""
    default = found[DEFAULT]
    budgets = [describe(default, KNOBS.index(target))["read"]["mean"] for target in TARGETS]
    rows = []
    for name in CONTESTANTS:
        cells = [name]
        for target, budget in zip(TARGETS, budgets, strict=True):
            values = {
                key: spread(found[name], lambda one, key=key, to=budget: at_tokens(one, key, to))
                for key in ("mass", "mass_p10", "error", "tail_error")
            }
            inside = all(
                min(one["read"]) <= budget <= max(one["read"]) for one in found[name].values()
            )
            recorder.write(
                "equal tokens", method=name, read=budget, default_p=target, inside=inside,
                **values, **facts,
            )  # fmt: skip
            cells.append(
                f"{values['mass']['mean']:.3f}±{values['mass']['documents']:.3f} "
                f"{values['mass_p10']['mean']:.3f} {values['error']['mean']:.3f}"
                + ("" if inside else "*")
            )
        rows.append(cells)
    print("\nmean mass (±95 %, documents), its 10th percentile, error of the output, at equal")
    print("numbers of tokens; *: beyond the settings of some document, the nearest one is taken")
    print(table(["method", *(f"read {budget:.3f}" for budget in budgets)], rows))


def report_ablation(
    done: Mapping[str, Case], recorder: Recorder, facts: Mapping, seeds: int
) -> None:
    """Print and record order, count and tail, at one p."""
    found = {name: gather(done, name, seeds) for name in ABLATION}
    rows = []
    for name in ABLATION:
        line = describe(found[name], 0)
        recorder.write("ablation", method=name, p=ABLATION_P, **line, **facts)
        rows.append(
            [
                name,
                f"{line['read']['mean']:.3f}±{line['read']['seeds']:.3f}",
                *(f"{line[key]['mean']:.3f}" for key in ("mass", "mass_p10")),
                f"{line['kept_promise']['mean']:.1%}",
                *(f"{line[key]['mean']:.3f}" for key in ("error", "tail_error")),
            ]
        )
    header = ["order | count", "read (±seeds)", "mass", "p10", "kept", "dropped", "stand-in"]
    print(f"\np = {ABLATION_P}; the last two are errors of the output without and with a stand-in")
    print(table(header, rows))


def report_heads(done: Mapping[str, Case], recorder: Recorder, facts: Mapping) -> None:
    """Print and record the default's heads, each by itself, means over texts and queries."""
    for target in TARGETS:
        heads = [case["heads"][str(target)] for case in done.values()]
        reached = np.mean([one["mass"] for one in heads], axis=0)
        least = np.min([one["least"] for one in heads], axis=0)
        read = np.mean([one["read"] for one in heads], axis=0)
        recorder.write(
            "heads", p=target, layers_measured=next(iter(done.values()))["layers"],
            mass=_rounded(reached), least_mass=_rounded(least), read=_rounded(read), **facts,
        )  # fmt: skip
        print(
            f"p = {target}: heads reach {reached.min():.3f} to {reached.max():.3f} on average, the "
            f"worst {(reached < target - ALLOWANCE).mean():.1%} below the target; they read "
            f"{read.min():.3f} to {read.max():.3f} of the optional tokens"
        )


def report_masses(done: Mapping[str, Case], recorder: Recorder, facts: Mapping, seeds: int) -> None:
    """Print and record estimators and baselines."""
    found = {name: gather(done, name, seeds) for name in CONTESTANTS}
    report_equal_p(found, recorder, facts)
    report_equal_tokens(found, recorder, facts)
    report_heads(done, recorder, facts)
