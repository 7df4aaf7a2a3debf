"""Speculative decoding: tokens per step, and speed against plain decoding, in one process.

    python -m benchmarks.speculation

Prompts whose answers repeat them: passages to be summarised, and functions to be written again with
a change. Each group of prompts is completed greedily by two engines over the same weights, in turn,
one prompt after the other and eight at once; the ratio of neighbouring runs counts, as the speed of
a shared machine drifts. Completions end where the model ends them, so that no ratio lives from the
endless repetition that follows.

Both engines must give the same ids. A product of six rows rounds in another order than one of a
single row, so where the two likeliest tokens are closer than what that makes (0.02 in float32, as
in the golden file; 0.5 in bfloat16), either may come, and what follows is not compared.
"""

import argparse
import gzip
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Recorder, summary, table
from jaxserve import LLM, RequestOutput, SamplingParams, SpecDecodeMetrics

DATA = ROOT.parent / "shared" / "data"
NEAR = {"float32": 0.02, "bfloat16": 0.5}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 5,
}
SHORTEST, LONGEST = 500, 1200


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a compressed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summaries(data: Path, count: int) -> list[str]:
    """Ask for summaries of the first passages of a middle length."""
    passages = [
        line["text"]
        for line in read_lines(data / "rag" / "xquad_en.jsonl.gz")
        if line["type"] == "passage" and SHORTEST <= len(line["text"]) <= LONGEST
    ]
    ask = "Summarize the following text. Keep names and numbers.\n\n"
    return [ask + passage for passage in passages[:count]]


def edits(data: Path, count: int) -> list[str]:
    """Ask for a change of the first functions of a middle length."""
    codes = [
        line["prompt"] + line["canonical_solution"]
        for line in read_lines(data / "requests" / "HumanEval.jsonl.gz")
    ]
    codes = [code for code in codes if SHORTEST <= len(code) <= LONGEST]
    ask = "Write this Python code again, and add type hints to all variables.\n\n"
    return [f"{ask}```python\n{code}```" for code in codes[:count]]


KINDS = {"summary": summaries, "code": edits}


@dataclass(slots=True)
class Agreement:
    """How the ids of both engines compare.

    Attributes:
        equal: Tokens that are the same.
        tied: Completions that part at a near tie.
        wrong: What differs without one.
    """

    equal: int
    tied: int
    wrong: list[str]


def compare(
    plain: Sequence[RequestOutput], drafted: Sequence[RequestOutput], near: float
) -> Agreement:
    """Compare ids up to the first near tie at which two completions part.

    Args:
        plain: Completions with the log-probabilities of two candidates per token.
        drafted: The same prompts' with drafts.
        near: Gap between the two likeliest tokens below which either may come.
    """
    found = Agreement(equal=0, tied=0, wrong=[])
    for index, (one, two) in enumerate(zip(plain, drafted, strict=True)):
        first, second = one.outputs[0], two.outputs[0]
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        parting = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if parting is None:
            found.equal += len(first.token_ids)
            if len(first.token_ids) != len(second.token_ids):
                found.wrong.append(f"completion {index}: lengths differ")
            continue
        found.equal += parting
        values = sorted(lp.logprob for lp in (first.logprobs or [])[parting].values())
        gap = values[-1] - values[-2]
        if gap < near:
            found.tied += 1
        else:
            found.wrong.append(f"completion {index}: token {parting} differs at a gap of {gap:.3f}")
    return found


def complete(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, batch: int
) -> tuple[list[RequestOutput], float]:
    """Complete prompts in groups, and return the seconds that it took.

    Prompts are not computed from a cache, and their time counts: it is the same on both sides.
    """
    llm.reset_prefix_cache()
    outputs: list[RequestOutput] = []
    start = time.perf_counter()
    for low in range(0, len(prompts), batch):
        group = [[{"role": "user", "content": text}] for text in prompts[low : low + batch]]
        outputs += llm.chat(group, params, use_tqdm=False)
    return outputs, time.perf_counter() - start


def num_tokens(outputs: Sequence[RequestOutput]) -> int:
    """Count generated tokens."""
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def drafting(outputs: Sequence[RequestOutput]) -> SpecDecodeMetrics:
    """Add up what drafts did for some completions."""
    parts = [output.outputs[0].spec_decode_metrics or SpecDecodeMetrics() for output in outputs]
    return SpecDecodeMetrics(
        num_drafts=sum(part.num_drafts for part in parts),
        num_draft_tokens=sum(part.num_draft_tokens for part in parts),
        num_accepted_tokens=sum(part.num_accepted_tokens for part in parts),
    )


def measure(
    engines: Mapping[str, LLM], prompts: Sequence[str], batch: int, args: argparse.Namespace
) -> tuple[dict[str, Any], Agreement]:
    """Complete the same prompts with both engines, in turn."""
    params = SamplingParams(temperature=0, max_tokens=args.num_tokens)
    scored, _ = complete(engines["plain"], prompts, params.replace(logprobs=2), batch)
    drafted, _ = complete(engines["drafted"], prompts, params, batch)
    dtype = engines["plain"].config.model.dtype
    agreement = compare(scored, drafted, NEAR[dtype])
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(args.repeats):
        for name in sorted(engines, reverse=bool(repeat % 2)):
            outputs, seconds = complete(engines[name], prompts, params, batch)
            speeds[name].append(num_tokens(outputs) / seconds)
    ratios = [b / a for a, b in zip(speeds["plain"], speeds["drafted"], strict=True)]
    totals = drafting(drafted)
    count = num_tokens(drafted)
    facts = {
        "batch": batch,
        "prompts": len(prompts),
        "tokens": count,
        "tokens per draft step": round(totals.mean_acceptance_length, 3),
        "tokens per decode": round(count / max(1, count - totals.num_accepted_tokens), 3),
        "draft acceptance rate": round(totals.draft_acceptance_rate, 3),
        "plain tokens/s": summary(speeds["plain"]),
        "drafted tokens/s": summary(speeds["drafted"]),
        "speed-up": summary(ratios),
        "equal ids": agreement.equal,
        "near ties": agreement.tied,
    }
    return facts, agreement


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtypes", nargs="+", default=["auto"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8, help="prompts per kind")
    parser.add_argument("--num-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the public data")
    parser.add_argument("--config", type=json.loads, default=NGRAM, help="speculative_config")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    return parser.parse_args()


def run(args: argparse.Namespace, dtype: str, recorder: Recorder) -> list[str]:
    """Measure in one precision; return what is wrong."""
    settings = {"max_model_len": 1024, "max_num_seqs": max(args.batches), "warmup": "full"}
    plain = LLM(args.model, dtype=dtype, **settings)
    drafted = LLM(
        (plain.model_config, plain.params),
        tokenizer=plain.get_tokenizer(),
        speculative_config=args.config,
        **settings,
    )
    dtype = plain.config.model.dtype
    wrong: list[str] = []
    rows: list[list[str]] = []
    for kind in args.kinds:
        prompts = KINDS[kind](args.data, args.prompts)
        for batch in args.batches:
            engines = {"plain": plain, "drafted": drafted}
            facts, agreement = measure(engines, prompts, batch, args)
            recorder.write(kind, dtype=dtype, config=args.config, **facts, wrong=agreement.wrong)
            wrong += [f"{dtype} {kind} x{batch}: {text}" for text in agreement.wrong]
            cells = [
                facts["tokens per draft step"],
                facts["tokens per decode"],
                facts["draft acceptance rate"],
                facts["plain tokens/s"]["median"],
                facts["drafted tokens/s"]["median"],
                facts["speed-up"]["median"],
            ]
            shown = [f"{cell:.2f}" for cell in cells]
            rows.append([f"{kind} x{batch}", *shown, str(agreement.equal), str(agreement.tied)])
    header = [
        dtype, "tokens/draft step", "tokens/decode", "accepted", "plain tok/s", "drafted tok/s",
        "speed-up", "equal ids", "near ties",
    ]  # fmt: skip
    print(table(header, rows), flush=True)
    drafted.close()
    plain.close()
    return wrong


def main() -> None:
    """Measure; exit with 1 if ids differ."""
    args = parse_args()
    recorder = Recorder("speculation", out=args.out)
    wrong = [text for dtype in args.dtypes for text in run(args, dtype, recorder)]
    for text in wrong:
        print(f"WRONG: {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
