"""Parts that look at long texts: the model runs over each text once, for all of them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.record import Recorder
from benchmarks.rooms.sparse import captures, likelihood, quality, texts
from benchmarks.rooms.sparse.cases import Case, Cases
from benchmarks.rooms.sparse.contestants import ABLATION, CONTESTANTS
from jaxserve.models.layers import CausalLM

_REPORTS: Mapping[str, Callable[[Mapping[str, Case], Recorder, Mapping, int], None]] = {
    "mass": quality.report_masses,
    "ablation": quality.report_ablation,
    "perplexity": likelihood.report,
}
_ENDS = ("generated", "queries", "first_layer", "every")


class _Text:
    """A text, and what attention works on over it once somebody asks."""

    def __init__(self, model: CausalLM, ids: np.ndarray, num_layers: int | None) -> None:
        self.ids = ids
        self._model = model
        self._num_layers = num_layers
        self._layers: list[captures.Capture] | None = None

    @property
    def layers(self) -> Sequence[captures.Capture]:
        """The layers, as many as are looked at."""
        if self._layers is None:
            _, self._layers = captures.run(self._model, self.ids, num_layers=self._num_layers)
        return self._layers


def report(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record masses, the ablation and perplexity, as far as they are wanted."""
    model, tokenizer = captures.load(args.model, stretch=args.interpolate)
    documents = texts.documents(tokenizer, args.context, args.data, args.texts)
    measures: Mapping[str, Callable[[_Text], Case]] = {
        "mass": lambda text: quality.measure_text(text.layers, CONTESTANTS, args),
        "ablation": lambda text: quality.measure_text(text.layers, ABLATION, args),
        "perplexity": lambda text: likelihood.score_text(model, text.ids, text.layers, args),
    }
    num_layers = None if args.perplexity or args.last_layer is None else args.last_layer + 1
    wanted = [part for part in _REPORTS if getattr(args, part)]
    cases = {
        part: Cases(part, _settings(part, args, documents), minutes=args.minutes, fresh=args.fresh)
        for part in wanted
    }
    done: dict[str, dict[str, Case]] = {part: {} for part in wanted}
    for name, ids in documents.items():
        text = _Text(model, ids, num_layers)
        for part in wanted:
            measure = measures[part]
            case = cases[part].run(name, lambda measure=measure, text=text: measure(text))
            if case is not None:
                done[part][name] = case
    for part in wanted:
        if not done[part]:
            print(f"{part}: the time was over before a text was done; the same command goes on")
            continue
        facts = {
            **cases[part].settings,
            "documents": list(done[part]),
            "complete": not cases[part].missing,
        }
        _REPORTS[part](done[part], recorder, facts, args.seeds)


def _settings(
    part: str, args: argparse.Namespace, documents: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return what decides about results."""
    names = ("scored",) if part == "perplexity" else _ENDS
    return {
        "model": args.model,
        "context": args.context,
        "interpolation": args.interpolate,
        "clustering_seeds": args.seeds,
        "segment_len": args.segment_len,
        "texts": texts.checksum(documents),
        **({"last_layer": args.last_layer} if args.last_layer is not None else {}),
        **{name: getattr(args, name) for name in names},
    }
