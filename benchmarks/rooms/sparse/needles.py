"""Whether a planted needle is read, and whether the model still finds it.

A fact is hidden at a random depth of a text and asked for behind it. The text is the prompt;
question and answer are decoded, each token given, with sparse attention in every layer that may be
sparse. Greedy decoding gives the answer exactly if each of its tokens is the likeliest one.

A needle's token *matters* to a head as much as its share of the mass of dense attention, the
largest over the query heads that read together. The mass promised is p, so whatever holds more than
1 - p must be read; how much of what holds less is read is measured at several levels.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.record import Recorder, table
from benchmarks.rooms.sparse import captures, decode, mass, tasks
from benchmarks.rooms.sparse.cases import Case, Cases
from benchmarks.rooms.sparse.contestants import ESTIMATORS, TARGETS, segmented
from benchmarks.rooms.sparse.intervals import interval
from jaxserve.attention.tactic.config import ClusterConfig, TacticConfig
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.layers import CausalLM

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the mass from which on a token is counted."""
_KINDS = ("single needle", "multi-key needle")
_ESTIMATORS = ("sampled", "hyperbola", "centroid")
_SELECTED: Mapping[str, TacticConfig] = {
    **{name: ESTIMATORS[name] for name in _ESTIMATORS},
    "exact head of 64": mass.with_estimator(ESTIMATORS["sampled"], head_len=64),
    **{
        f"clusters of {size}": dataclasses.replace(
            ESTIMATORS["sampled"], clusters=ClusterConfig(cluster_size=size)
        )
        for size in (8, 32)
    },
    "failure rate 0.02": mass.with_estimator(ESTIMATORS["sampled"], failure_rate=0.02),
}
"""Settings whose selections are looked at; those behind the estimators are not decoded with."""
_EVERY = 2
"""Layers from one that is looked at to the next."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A needle in tokens.

    Attributes:
        ids: Text, question and answer.
        prompt: Tokens of the text.
        answer: First token of the answer.
        needle: First token of the needle, and the one behind its last.
        depth: Where it is, as a share of the text.
    """

    ids: np.ndarray
    prompt: int
    answer: int
    needle: tuple[int, int]
    depth: float


def make_trial(sample: tasks.Sample, tokenizer: Tokenizer) -> Trial:
    """Turn a sample into tokens."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    at = sample.context.index(sample.needle)
    ids = tokenizer.encode(f"{sample.prompt} {sample.answers[0]}")
    return Trial(
        ids=np.asarray(ids, np.int32),
        prompt=count(sample.context),
        answer=count(sample.prompt),
        needle=(count(sample.context[:at].rstrip()), count(sample.context[:at] + sample.needle)),
        depth=at / len(sample.context),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What is read where answers are given.

    Attributes:
        needle: By p, shares of the needle's tokens that matter, and whether each was read.
        read: By p, share of all tokens that are read.
    """

    needle: dict[str, list[list[float]]]
    read: dict[str, float]


@partial(jax.jit, static_argnames=("config", "width"))
def needle_reading(
    layer: mass.Layer, p: Array, first: Array, *, config: TacticConfig, width: int
) -> tuple[Array, Array, Array]:
    """Return how much each token of a needle matters, and whether it is read; and what is in all.

    Args:
        layer: Queries of one layer, and what they attend to.
        p: Share of the mass.
        first: First token of the needle.
        config: Settings.
        width: Tokens of the needle.

    Returns:
        Both `[queries, kv_heads, width]`; and the share of all tokens that is read.
    """
    read = mass.clustered(layer, p, config).read
    whole = jnp.mean(jnp.sum(read, axis=-1) / layer.length[:, None])
    position = jnp.broadcast_to(layer.index.permutation, read.shape)
    read = jnp.put_along_axis(read, position, read, axis=-1, inplace=False)
    scores = jnp.einsum("rkgd,ksd->rkgs", layer.q, layer.keys)
    seen = jnp.arange(layer.keys.shape[1]) < layer.length[:, None]
    shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).max(2)
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=width, axis=-1)
    return cut(shares), cut(read), whole


def selection(
    layers: Sequence[captures.Capture], trial: Trial, config: TacticConfig, segment_len: int
) -> Selection:
    """Tell what is read of a needle, and in all, in every second layer."""
    first, behind = trial.needle
    at = np.arange(trial.answer - 1, len(trial.ids) - 1) - trial.prompt
    chosen = segmented(config, segment_len)
    found: dict[str, list[list[float]]] = {str(p): [] for p in TARGETS}
    tokens: dict[str, list[float]] = {str(p): [] for p in TARGETS}
    for capture in layers[chosen.dense_layers :: _EVERY]:
        layer = mass.make_layer(
            capture.q[trial.prompt :], capture.k, capture.v, at.tolist(), capture.scale,
            trial.prompt, config=chosen,
        )  # fmt: skip
        for p in TARGETS:
            shares, read, whole = needle_reading(
                layer, jnp.float32(p), jnp.int32(first), config=chosen, width=behind - first
            )
            shares, read = np.asarray(shares), np.asarray(read)
            matters = shares >= LEVELS[0]
            found[str(p)] += np.stack([shares[matters], read[matters]], -1).round(4).tolist()
            tokens[str(p)].append(float(whole))
    return Selection(
        needle=found, read={p: statistics.fmean(shares) for p, shares in tokens.items()}
    )


def _try(model: CausalLM, trial: Trial, args: argparse.Namespace) -> Case:
    """Measure one needle with every estimator."""
    _, layers = captures.run(model, trial.ids)
    runs = [
        (name, p, segmented(ESTIMATORS[name], args.segment_len))
        for name in _ESTIMATORS
        for p in (TARGETS if name != "sampled" else (1.0, *TARGETS))
    ]
    scores = decode.score(
        model, trial.ids, layers, trial.prompt, [(config, p) for _, p, config in runs],
        first=trial.answer,
    )  # fmt: skip
    found: Case = {"depth": trial.depth, "tokens": len(trial.ids)}
    for (name, p, _), one in zip(runs, scores, strict=True):
        found.setdefault(name, {})[str(p)] = dataclasses.asdict(one)
    for name, config in _SELECTED.items():
        chosen = selection(layers, trial, config, args.segment_len)
        found[f"{name}/selection"] = dataclasses.asdict(chosen)
    return found


def _selected(done: Mapping[str, Case], name: str, p: float) -> dict[str, dict[str, int]]:
    """Count the needle's tokens that matter by level, and those of them that were read."""
    pairs = np.concatenate(
        [np.reshape(case[f"{name}/selection"]["needle"][str(p)], (-1, 2)) for case in done.values()]
    )
    levels = {str(level): level for level in LEVELS} | {"1 - p": 1 - p}
    return {
        key: {
            "tokens": int((pairs[:, 0] >= level).sum()),
            "read": int(pairs[pairs[:, 0] >= level, 1].sum()),
        }
        for key, level in levels.items()
    }


def report(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record."""
    model, tokenizer = captures.load(args.model, stretch=args.interpolate)
    settings = {
        "model": args.model,
        "context": args.context,
        "interpolation": args.interpolate,
        "segment_len": args.segment_len,
        "selected": list(_SELECTED),
    }
    cases = Cases("needles", settings, minutes=args.minutes, fresh=args.fresh)
    samples = tasks.make_samples(
        _KINDS, args.context, args.samples, lambda text: len(tokenizer.encode(text))
    )
    done: dict[str, dict[str, Case]] = {kind: {} for kind in _KINDS}
    for number, sample in enumerate(samples):
        trial = make_trial(sample, tokenizer)
        case = cases.run(f"{sample.task} {number}", lambda trial=trial: _try(model, trial, args))
        if case is not None:
            done[sample.task][str(number)] = case
    facts = {**settings, "complete": not cases.missing}
    for kind, found in done.items():
        if found:
            _report_kind(kind, found, recorder, facts)


def _report_kind(kind: str, found: Mapping[str, Case], recorder: Recorder, facts: Mapping) -> None:
    dense = [case["sampled"]["1.0"] for case in found.values()]
    right = statistics.fmean(one["is_greedy"] for one in dense)
    facts = {**facts, "task": kind, "samples": len(found), "dense_accuracy": right}
    rows = [["dense", "", f"{right:.0%}", "", "", "", "", ""]]
    for name in _SELECTED:
        for p in TARGETS:
            line: dict[str, Any] = {
                "needle_tokens": _selected(found, name, p),
                "read": statistics.fmean(
                    case[f"{name}/selection"]["read"][str(p)] for case in found.values()
                ),
            }
            cells = ["", "", ""]
            if name in _ESTIMATORS:
                own = [case[name][str(p)] for case in found.values()]
                line |= _answers(own, dense)
                cells = [
                    f"{line['accuracy']:.0%}",
                    f"{line['agreement']:.0%}",
                    f"{line['lost']:+.3f}±{line['lost_interval']:.3f}",
                ]
            recorder.write("needles", method=name, p=p, **line, **facts)
            told = [
                "{read}/{tokens}".format(**line["needle_tokens"][key]) for key in ("1 - p", "0.05")
            ]
            rows.append([name, str(p), *cells, *told, f"{line['read']:.1%}"])
    print(f"\n{kind}, {len(found)} samples at random depths; lost: nats per token of the answer;")
    print("tokens of the needle that were read, of those that hold so much of a head's mass; share")
    print("of all tokens that is read")
    header = ["method", "p", "right", "as dense", "lost", "above 1 - p", "above 0.05", "read"]
    print(table(header, rows))


def _answers(own: Sequence[Mapping], dense: Sequence[Mapping]) -> dict[str, float]:
    """Compare answers with those of dense attention."""
    lost = [a["log_likelihood"] - b["log_likelihood"] for a, b in zip(dense, own, strict=True)]
    return {
        "accuracy": statistics.fmean(one["is_greedy"] for one in own),
        "agreement": statistics.fmean(
            a["is_greedy"] == b["is_greedy"] for a, b in zip(dense, own, strict=True)
        ),
        "lost": statistics.fmean(lost),
        "lost_interval": interval(lost),
    }
