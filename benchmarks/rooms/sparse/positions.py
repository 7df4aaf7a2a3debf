"""How well the model knows its way at far positions, plain and interpolated, with dense attention.

Says up to where results on long contexts are results on contexts that the model can use.
"""

import argparse
import statistics
from collections.abc import Mapping

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.sparse import captures, texts
from benchmarks.rooms.sparse.cases import Case, Cases
from benchmarks.rooms.sparse.intervals import interval
from jaxserve.models.layers import CausalLM

_RANGE = 1024
"""Tokens whose likelihoods are taken together."""


def _by_range(model: CausalLM, ids: np.ndarray) -> list[float]:
    """Return the mean log-likelihood of each range of positions."""
    hidden, _ = captures.run(model, ids)
    found = []
    for first in range(0, len(ids) - 1, _RANGE):
        last = min(first + _RANGE, len(ids) - 1)
        made, _ = captures.log_likelihood(model, hidden[first : last + 1], ids[first : last + 1])
        found.append(float(made.mean()))
    return found


def report(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record."""
    rows: list[list[str]] = []
    header: list[str] = []
    for factor in args.factors:
        model, tokenizer = captures.load(args.model, stretch=factor)
        documents = texts.documents(tokenizer, args.context, args.data, args.texts)
        settings = {
            "model": args.model,
            "context": args.context,
            "interpolation": factor,
            "texts": texts.checksum(documents),
        }
        cases = Cases("positions", settings, minutes=args.minutes, fresh=args.fresh)
        done: dict[str, Case] = {}
        for name, ids in documents.items():
            case = cases.run(name, lambda model=model, ids=ids: {"made": _by_range(model, ids)})
            if case is not None:
                done[name] = case
        if not done:
            continue
        line = _describe(done)
        facts = {**settings, "documents": list(done), "complete": not cases.missing}
        recorder.write("positions", **line, **facts)
        header = [f"to {end}" for end in line["ends"]]
        rows.append([f"/ {factor:g}", *(f"{mean:.3f}" for mean in line["log_likelihoods"])])
    print(
        "\nmean log-likelihood of tokens by position, dense attention, rotary frequencies divided"
    )
    print(table(["", *header], rows))


def _describe(done: Mapping[str, Case]) -> dict[str, list]:
    ranges = list(zip(*(case["made"] for case in done.values()), strict=True))
    return {
        "ends": [(i + 1) * _RANGE for i in range(len(ranges))],
        "log_likelihoods": [statistics.fmean(values) for values in ranges],
        "intervals": [interval(values) for values in ranges],
    }
