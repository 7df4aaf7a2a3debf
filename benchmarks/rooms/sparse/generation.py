"""Text that the engine generates with sparse attention, beside what it generates with dense one.

One engine serves both: requests say their share of the mass, and 1 is dense attention. Prompts are
computed once, as the later requests find them, and their clusters, in the prefix cache. As in any
use, a prompt is computed with dense attention, and so is the first token that follows from it.

Tasks are judged by their answers, and by whether the output is the dense one. Long outputs are
drawn with fixed seeds; what counts is whether they get longer.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.sparse import captures, tasks, texts
from benchmarks.rooms.sparse.cases import Case, Cases
from benchmarks.rooms.sparse.contestants import TARGETS
from benchmarks.rooms.sparse.intervals import interval
from jaxserve.core.config import EngineConfig
from jaxserve.core.request import SamplingParams
from jaxserve.engine.llm import LLM
from jaxserve.engine.source import load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.hub import resolve_model

SHARES = (1.0, *TARGETS)
_MARGIN = 64
"""Tokens of the context beyond prompt and output."""
_ASKED = "Here is a text.\n\n{text}\n\nExplain in a few paragraphs what it is about."


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What one request gave.

    Attributes:
        ids: Its tokens.
        text: Its text.
        finish: Why it ended.
    """

    ids: list[int]
    text: str
    finish: str


class Bench:
    """An engine with sparse attention, and what it read.

    Args:
        args: Settings.
        output: Most tokens of an output.
        estimator: The estimator.
    """

    def __init__(self, args: argparse.Namespace, output: int, estimator: str) -> None:
        """Load the model; nothing is compiled yet."""
        loaded = load_model(args.model, EngineConfig.from_settings({"dtype": "float32"}))
        self.tokenizer = Tokenizer.from_path(resolve_model(args.model))
        self.sparse = {
            "p": TARGETS[0],
            "estimator": estimator,
            "min_context": 256,
            "segment": min(args.segment_len, args.context // 4),
            "measure_every": 4,
        }
        self._llm = LLM(
            (captures.stretched(loaded.config, args.interpolate), loaded.state),
            tokenizer=self.tokenizer,
            sparse_attention=",".join(f"{key}={value}" for key, value in self.sparse.items()),
            max_model_len=args.context + output + _MARGIN,
            max_num_seqs=args.batch,
        )

    def __call__(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> tuple[list[Answer], dict[str, float]]:
        """Generate, and count what sparse attention read."""
        made = self._llm.metrics
        names = (
            "sparse_tokens_read", "sparse_tokens_there", "measured_heads", "measured_mass",
            "missed_heads",
        )  # fmt: skip
        before = [getattr(made, name) for name in names]
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], list(params), use_tqdm=False
        )
        counts = {name: getattr(made, name) - was for name, was in zip(names, before, strict=True)}
        answers = [
            Answer(one.outputs[0].token_ids, one.outputs[0].text, str(one.outputs[0].finish_reason))
            for one in outputs
        ]
        return answers, counts

    def close(self) -> None:
        """Give memory back."""
        self._llm.close()


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """Count the tokens at which two outputs begin alike."""
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return i
    return min(len(one), len(two))


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _sum(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Turn counts into shares: tokens read, mass measured, heads below their target."""
    total = {key: sum(one[key] for one in counts) for key in counts[0]}
    heads = max(total["measured_heads"], 1)
    return {
        "read": total["sparse_tokens_read"] / max(total["sparse_tokens_there"], 1),
        "mass": total["measured_mass"] / heads,
        "missed": total["missed_heads"] / heads,
        "heads_measured": total["measured_heads"],
    }


def _settings(args: argparse.Namespace, bench: Bench, **others: object) -> dict[str, Any]:
    return {
        "model": args.model,
        "context": args.context,
        "interpolation": args.interpolate,
        "batch": args.batch,
        "sparse_attention": bench.sparse,
        **others,
    }


# Tasks ------------------------------------------------------------------------------------------


def _solve(bench: Bench, samples: Sequence[tasks.Sample]) -> Case:
    """Let the engine solve some tasks at every share."""
    prompts = [bench.tokenizer.encode(sample.prompt) for sample in samples]
    found: Case = {"tasks": [sample.task for sample in samples], "tokens": list(map(len, prompts))}
    dense: list[Answer] = []
    for p in SHARES:
        params = [
            SamplingParams(temperature=0, max_tokens=x.max_tokens, attention_mass=p)
            for x in samples
        ]
        answers, counts = bench(prompts, params)
        dense = dense or answers
        found[str(p)] = {
            "scores": [s.score(a.text) for s, a in zip(samples, answers, strict=True)],
            "same": [a.ids == d.ids for a, d in zip(answers, dense, strict=True)],
            "prefix": [
                common_prefix(a.ids, d.ids) / max(len(d.ids), 1)
                for a, d in zip(answers, dense, strict=True)
            ],
            "texts": [answer.text for answer in answers],
            "counts": counts,
        }
    return found


def report_tasks(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record tasks."""
    for estimator in args.estimators:
        _report_estimator(Bench(args, 64, estimator), recorder, args)


def _report_estimator(bench: Bench, recorder: Recorder, args: argparse.Namespace) -> None:
    settings = _settings(args, bench, samples=args.samples, tasks=list(tasks.TASKS))
    cases = Cases("tasks", settings, minutes=args.minutes, fresh=args.fresh)
    samples = tasks.make_samples(
        list(tasks.TASKS),
        args.context,
        args.samples,
        lambda text: len(bench.tokenizer.encode(text)),
    )
    done = []
    for number, some in enumerate(_chunks(samples, args.batch)):
        case = cases.run(f"samples {number}", lambda some=some: _solve(bench, some))
        if case is not None:
            done.append(case)
    bench.close()
    if done:
        _report_done(done, recorder, {**settings, "complete": not cases.missing})


def _describe_task(done: Sequence[Case], p: float, task: str) -> dict[str, float]:
    """Return means and intervals of one kind of tasks; empty if there are none."""
    line: dict[str, float] = {}
    for key in ("scores", "same", "prefix"):
        values = [
            float(value)
            for case in done
            for kind, value in zip(case["tasks"], case[str(p)][key], strict=True)
            if task in (kind, "all")
        ]
        if values:
            line |= {key: statistics.fmean(values), f"{key}_interval": interval(values)}
            line["number"] = len(values)
    return line


def _report_done(done: Sequence[Case], recorder: Recorder, facts: Mapping) -> None:
    rows, number = [], 0
    for p in SHARES:
        made = _sum([case[str(p)]["counts"] for case in done])
        cells = ["dense" if p == 1 else f"p = {p}"]
        for task in (*tasks.TASKS, "all"):
            line = _describe_task(done, p, task)
            if not line:
                cells.append("-")
                continue
            number = int(line["number"])
            read = made if task == "all" and p < 1 else {}
            recorder.write("tasks", task=task, p=p, **line, **read, **facts)
            same = "" if p == 1 else f" ({line['same']:.0%})"
            cells.append(f"{line['scores']:.2f}{same}")
        cells += [f"{made['read']:.1%}", f"{made['mass']:.3f}"] if p < 1 else ["", ""]
        rows.append(cells)
    print(f"\nestimator {facts['sparse_attention']['estimator']}, {number} tasks in the engine:")
    print("share of expected answers in the output (outputs alike to the last token)")
    header = ["attention", *(task.removesuffix(" needle") for task in (*tasks.TASKS, "all"))]
    print(table([*header, "read", "mass"], rows))


# Long outputs -----------------------------------------------------------------------------------


def _prompts(bench: Bench, args: argparse.Namespace) -> dict[str, list[int]]:
    """Make questions about the beginnings of long texts."""
    room = args.context - 128
    found = {}
    for name, ids in texts.documents(bench.tokenizer, room, args.data, args.texts).items():
        asked = _ASKED.format(text=bench.tokenizer.decode(ids.tolist()))
        found[name] = bench.tokenizer.encode_chat([{"role": "user", "content": asked}])
    return found


def _generate(bench: Bench, prompts: Sequence[list[int]], seeds: Sequence[int], most: int) -> Case:
    found: Case = {}
    dense: list[Answer] = []
    for p in SHARES:
        params = [
            SamplingParams(temperature=0.7, seed=seed, max_tokens=most, attention_mass=p)
            for seed in seeds
        ]
        answers, counts = bench(prompts, params)
        dense = dense or answers
        found[str(p)] = {
            "lengths": [len(answer.ids) for answer in answers],
            "ended": [answer.finish == "stop" for answer in answers],
            "prefix": [common_prefix(a.ids, d.ids) for a, d in zip(answers, dense, strict=True)],
            "repeated": [repetition(answer.ids) for answer in answers],
            "counts": counts,
        }
    return found


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of runs of n tokens that have been there before."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def report_outputs(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record lengths of outputs."""
    bench = Bench(args, args.output, args.estimators[0])
    prompts = _prompts(bench, args)
    settings = _settings(args, bench, output=args.output, temperature=0.7, question=_ASKED)
    cases = Cases("outputs", settings, minutes=args.minutes, fresh=args.fresh)
    jobs = [(ids, seed) for seed in range(args.samples) for ids in prompts.values()]
    done = []
    for number, some in enumerate(_chunks(jobs, args.batch)):
        ids, seeds = zip(*some, strict=True)
        case = cases.run(
            f"outputs {number}",
            lambda ids=ids, seeds=seeds: _generate(bench, ids, seeds, args.output),
        )
        if case is not None:
            done.append(case)
    bench.close()
    if not done:
        raise SystemExit("no output was generated in the time; run the command again")
    facts = {**settings, "documents": list(prompts), "complete": not cases.missing}
    rows = []
    for p in SHARES:
        line = _lengths(done, p)
        recorder.write("outputs", p=p, **line, **facts)
        rows.append(
            [
                "dense" if p == 1 else f"p = {p}",
                f"{line['length']:.0f}",
                "" if p == 1 else f"{line['longer']:+.1f}±{line['longer_interval']:.1f}",
                f"{line['ended']:.0%}",
                f"{line['prefix']:.0f}",
                f"{line['repeated']:.1%}",
                f"{line['read']:.1%}" if p < 1 else "",
            ]
        )
    print(f"\n{len(jobs)} outputs of at most {args.output} tokens behind {args.context}")
    header = ["attention", "tokens", "longer (±95 %)", "ended", "as dense", "repeated", "read"]
    print(table(header, rows))


def _lengths(done: Sequence[Case], p: float) -> dict[str, float]:
    def all_of(key: str, share: float = p) -> list[float]:
        return [float(value) for case in done for value in case[str(share)][key]]

    longer = np.subtract(all_of("lengths"), all_of("lengths", 1.0)).tolist()
    return {
        "number": len(longer),
        "length": statistics.fmean(all_of("lengths")),
        **(
            {"longer": statistics.fmean(longer), "longer_interval": interval(longer)}
            if p < 1
            else {}
        ),
        "ended": statistics.fmean(all_of("ended")),
        "prefix": statistics.fmean(all_of("prefix")),
        "repeated": statistics.fmean(all_of("repeated")),
        **(_sum([case[str(p)]["counts"] for case in done]) if p < 1 else {}),
    }
