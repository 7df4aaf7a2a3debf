"""How likely the tokens behind a prompt are when they are decoded with sparse attention.

The tokens are given (teacher forcing), and each attends as a step of decoding does, in every layer
but the first ones; see `decode`. A case is a text with one estimator; dense decoding is one.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.sparse import captures, decode
from benchmarks.rooms.sparse.cases import Case
from benchmarks.rooms.sparse.contestants import ESTIMATORS, TARGETS, segmented
from benchmarks.rooms.sparse.intervals import interval
from jaxserve.models.layers import CausalLM


def score_text(
    model: CausalLM,
    ids: np.ndarray,
    layers: Sequence[captures.Capture],
    args: argparse.Namespace,
) -> Case:
    """Score one text with every estimator and clustering."""
    found: Case = {}
    for seed in range(args.seeds):
        runs = [
            (name, p, segmented(config, args.segment_len, seed))
            for name, config in ESTIMATORS.items()
            # Only the default is worth the time of several clusterings.
            if not seed or name == "sampled"
            for p in (TARGETS if found or name != "sampled" else (1.0, *TARGETS))
        ]
        scores = decode.score(
            model, ids, layers, len(ids) - args.scored, [(config, p) for _, p, config in runs]
        )
        for (name, p, _), one in zip(runs, scores, strict=True):
            found.setdefault(f"{name}/{seed}", {})[str(p)] = dataclasses.asdict(one)
    return found


def _rows(done: Mapping[str, Case], name: str, p: float, seeds: int) -> dict[str, float]:
    """Compare one estimator at one p with dense decoding."""
    lost, read = [], []
    for case in done.values():
        dense = case["sampled/0"]["1.0"]["log_likelihood"]
        own = [case[f"{name}/{seed}"][str(p)] for seed in range(seeds)]
        lost.append(dense - statistics.fmean(x["log_likelihood"] for x in own))
        read.append(statistics.fmean(x["read"] for x in own))
    seed_means = [
        statistics.fmean(case[f"{name}/{seed}"][str(p)]["log_likelihood"] for case in done.values())
        for seed in range(seeds)
    ]
    return {
        "lost": statistics.fmean(lost),
        "lost_documents": interval(lost),
        **({"lost_seeds": interval(seed_means)} if seeds > 1 else {}),
        "read": statistics.fmean(read),
        "read_documents": interval(read),
    }


def report(done: Mapping[str, Case], recorder: Recorder, facts: Mapping, seeds: int) -> None:
    """Print and record how likely texts are."""
    dense = {name: case["sampled/0"]["1.0"]["log_likelihood"] for name, case in done.items()}
    mean = statistics.fmean(dense.values())
    recorder.write(
        "perplexity", method="dense", p=1.0, perplexity=math.exp(-mean), log_likelihoods=dense,
        **facts,
    )  # fmt: skip
    rows = [["dense", "", "100.0%", f"{math.exp(-mean):.3f}", ""]]
    for name in ESTIMATORS:
        for p in TARGETS:
            line = _rows(done, name, p, seeds if name == "sampled" else 1)
            perplexity = math.exp(line["lost"] - mean)
            recorder.write("perplexity", method=name, p=p, perplexity=perplexity, **line, **facts)
            rows.append(
                [
                    name,
                    str(p),
                    f"{line['read']:.1%}",
                    f"{perplexity:.3f}",
                    f"{line['lost']:+.4f}±{line['lost_documents']:.4f}",
                ]
            )
    print(f"\n{facts['scored']} given tokens at the end of {len(done)} texts of {facts['context']}")
    print("tokens; share of all tokens read in layers that may be sparse; nats lost per token")
    print(table(["method", "p", "read", "perplexity", "lost (±95 %, documents)"], rows))
