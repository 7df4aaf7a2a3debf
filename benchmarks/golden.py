"""Reproduce the golden continuations of SmolLM2-135M-Instruct in float32, however they are run.

    python -m benchmarks.golden

The file holds prompts with 64 greedy tokens and their log-probabilities from transformers on the
dequantised weights. They must come out alike from each way through the engine: a prompt alone, all
in one batch, prefill in chunks, with a prefix-cache hit, and preempted and resumed. Ids must be
equal up to the first marked near tie of a case (two best logits closer than 0.02), and the
log-probabilities of all equal tokens within 1e-3. Scoring the golden tokens as a prompt checks the
log-probabilities behind near ties as well.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Recorder, table
from jaxserve import LLM, RequestOutput, SamplingParams

GOLDEN = ROOT.parent / "shared" / "data" / "requests" / "golden_smollm2.json"
TOLERANCE = 1e-3
TOP = 5
MAX_MODEL_LEN = 256


@dataclass(slots=True)
class Verdict:
    """How one way through the engine compares with the golden file.

    Attributes:
        mode: The way.
        num_cases: Prompts run.
        num_ids: Token ids compared and equal.
        num_tied: Cases that took another token at a marked near tie.
        max_diff: Largest difference of a log-probability.
        evidence: Proof that the way was really taken.
        failures: What is wrong.
        seconds: How long it took.
    """

    mode: str
    num_cases: int = 0
    num_ids: int = 0
    num_tied: int = 0
    max_diff: float = 0.0
    evidence: str = ""
    failures: list[str] | None = None
    seconds: float = 0.0

    def fail(self, text: str) -> None:
        """Note one failure."""
        self.failures = [*(self.failures or []), text]

    def close(self, case_id: str, what: str, found: float, expected: float) -> None:
        """Compare one log-probability."""
        diff = abs(found - expected)
        self.max_diff = max(self.max_diff, diff)
        if not diff <= TOLERANCE:
            self.fail(f"{case_id}: {what} is {found:.5f}, expected {expected:.5f}")


def sampling(num_tokens: int) -> SamplingParams:
    """Return the parameters of the golden run."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=TOP)


def compare(verdict: Verdict, case: Mapping[str, Any], output: RequestOutput) -> None:
    """Compare one completion with its golden case."""
    name, expected = case["id"], case["greedy_ids"]
    found = output.outputs[0]
    logprobs = found.logprobs or []
    verdict.num_cases += 1
    if len(found.token_ids) != len(expected):
        verdict.fail(f"{name}: {len(found.token_ids)} tokens, expected {len(expected)}")
    equal = 0
    for token, golden, entry in zip(found.token_ids, expected, logprobs, strict=False):
        if token != golden:
            tie = case["first_small_gap_pos"]
            if tie is None or equal < tie:
                verdict.fail(f"{name}: token {equal} is {token}, expected {golden}")
            else:
                verdict.num_tied += 1
            break
        verdict.close(name, f"token {equal}", entry[token].logprob, case["greedy_logprobs"][equal])
        equal += 1
    verdict.num_ids += equal
    for token, expected_logprob in case["first_top5"]:
        if logprobs and token in logprobs[0]:
            verdict.close(name, f"candidate {token}", logprobs[0][token].logprob, expected_logprob)
        else:
            verdict.fail(f"{name}: candidate {token} of the first token is missing")
    # The file's text stops at the first end-of-sequence token; the ids go on.
    text, whole = case["greedy_text_skip_special"], case["eos_position"] is None
    if equal == len(expected) and (
        found.text != text if whole else not found.text.startswith(text)
    ):
        verdict.fail(f"{name}: text is {found.text!r}, expected {text!r}")


class Modes:
    """The ways through the engine, over one set of weights.

    Args:
        model: Name or path.
        cases: The golden cases.
    """

    def __init__(self, model: str, cases: Sequence[Mapping[str, Any]]) -> None:
        """Load the weights once; every engine serves them in place."""
        self._cases = cases
        self._prompts = [case["prompt_ids"] for case in cases]
        self._params = sampling(len(cases[0]["greedy_ids"]))
        self._base = LLM(model, dtype="float32", max_model_len=MAX_MODEL_LEN)

    def close(self) -> None:
        """Free everything."""
        self._base.close()

    def _engine(self, **settings: object) -> LLM:
        return LLM(
            (self._base.model_config, self._base.params),
            tokenizer=self._base.get_tokenizer(),
            **{"max_model_len": MAX_MODEL_LEN, **settings},
        )

    def _compare_all(self, verdict: Verdict, outputs: Sequence[RequestOutput]) -> None:
        for case, output in zip(self._cases, outputs, strict=True):
            compare(verdict, case, output)

    def alone(self, verdict: Verdict) -> None:
        """Run one prompt after the other, each from an empty cache."""
        for case, prompt in zip(self._cases, self._prompts, strict=True):
            self._base.reset_prefix_cache()
            (output,) = self._base.generate(prompt, self._params, use_tqdm=False)
            compare(verdict, case, output)
        verdict.evidence = "one running sequence"

    def batched(self, verdict: Verdict) -> None:
        """Run all prompts at once."""
        self._base.reset_prefix_cache()
        before = self._base.metrics.num_steps
        outputs = self._base.generate(self._prompts, self._params, use_tqdm=False)
        self._compare_all(verdict, outputs)
        steps = self._base.metrics.num_steps - before
        verdict.evidence = f"{steps} steps for {verdict.num_cases * self._params.max_tokens} tokens"

    def chunked(self, verdict: Verdict) -> None:
        """Run with so small a budget per step that prompts are cut."""
        budget = 16
        with self._engine(max_num_batched_tokens=budget, max_num_seqs=4) as llm:
            self._compare_all(verdict, llm.generate(self._prompts, self._params, use_tqdm=False))
        cut = sum(len(prompt) > budget for prompt in self._prompts)
        verdict.evidence = f"{cut} prompts longer than the {budget} tokens of a step"
        if not cut:
            verdict.fail("no prompt was cut")

    def prefix_hit(self, verdict: Verdict) -> None:
        """Run twice; the second time, prefixes come from the cache."""
        with self._engine(block_size=4) as llm:
            llm.generate(self._prompts, self._params.replace(max_tokens=1), use_tqdm=False)
            outputs = llm.generate(self._prompts, self._params, use_tqdm=False)
        self._compare_all(verdict, outputs)
        cached = [output.num_cached_tokens for output in outputs]
        verdict.evidence = f"{sum(cached)} of {sum(map(len, self._prompts))} prompt tokens cached"
        if not min(cached):
            verdict.fail(f"a prompt was computed again: cached tokens {cached}")

    def preempted(self, verdict: Verdict) -> None:
        """Run with so few pages that sequences lose theirs and are recomputed."""
        with self._engine(num_gpu_blocks_override=24) as llm:
            outputs = llm.generate(self._prompts, self._params, use_tqdm=False)
            count = llm.metrics.num_preemptions
        self._compare_all(verdict, outputs)
        verdict.evidence = f"{count} preemptions with 24 pages"
        if not count:
            verdict.fail("nothing was preempted")

    def scored(self, verdict: Verdict) -> None:
        """Score prompt and golden tokens as one prompt, near ties included."""
        self._base.reset_prefix_cache()
        texts = [[*case["prompt_ids"], *case["greedy_ids"]] for case in self._cases]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        outputs = self._base.generate(texts, params, use_tqdm=False)
        for case, text, output in zip(self._cases, texts, outputs, strict=True):
            verdict.num_cases += 1
            expected = [*case["prompt_logprobs"], *case["greedy_logprobs"]]
            entries = output.prompt_logprobs or []
            if len(entries) != len(expected):
                verdict.fail(f"{case['id']}: {len(entries)} scores, expected {len(expected)}")
            for index, (token, entry, value) in enumerate(
                zip(text, entries, expected, strict=False)
            ):
                if entry is not None and value is not None:
                    verdict.close(case["id"], f"score {index}", entry[token].logprob, value)
        verdict.evidence = "golden tokens as prompts"

    def tokenized(self, verdict: Verdict) -> None:
        """Tokenize the texts; chats through the template."""
        tokenizer = self._base.get_tokenizer()
        for case in self._cases:
            verdict.num_cases += 1
            is_chat = case["kind"] == "chat"
            found = (
                tokenizer.encode_chat(case["prompt"])
                if is_chat
                else tokenizer.encode(case["prompt"])
            )
            if is_chat and tokenizer.render_chat(case["prompt"]) != case["rendered"]:
                verdict.fail(f"{case['id']}: the rendered chat differs")
            if found != case["prompt_ids"]:
                verdict.fail(f"{case['id']}: ids {found[:8]}..., expected {case['prompt_ids'][:8]}")
            verdict.num_ids += len(found)
        verdict.evidence = "texts, and chats through the template"

    def all(self) -> Iterator[tuple[str, Callable[[Verdict], None]]]:
        """Yield every way with its name."""
        yield "tokenized", self.tokenized
        yield "alone", self.alone
        yield "batched", self.batched
        yield "chunked prefill", self.chunked
        yield "prefix-cache hit", self.prefix_hit
        yield "preempted, resumed", self.preempted
        yield "scored", self.scored


def run(model: str, cases: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Run every way and compare."""
    modes = Modes(model, cases)
    verdicts: list[Verdict] = []
    try:
        for name, go in modes.all():
            verdict = Verdict(mode=name)
            started = time.monotonic()
            go(verdict)
            verdict.seconds = time.monotonic() - started
            verdicts.append(verdict)
            print(f"{name}: {(verdict.failures or ['pass'])[0]}", flush=True)
    finally:
        modes.close()
    return verdicts


def main() -> None:
    """Run every way and print a table; exit with 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="file of golden cases")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    if not args.golden.exists():
        parser.error(f"{args.golden.name} is not there; name it with --golden")
    cases = json.loads(args.golden.read_text())["cases"]
    verdicts = run(args.model, cases)
    rows = [
        [
            verdict.mode,
            str(verdict.num_cases),
            str(verdict.num_ids),
            str(verdict.num_tied),
            f"{verdict.max_diff:.1e}",
            "FAIL" if verdict.failures else "pass",
            verdict.evidence,
        ]
        for verdict in verdicts
    ]
    header = ["float32", "cases", "equal ids", "near ties", "max |dlogprob|", "verdict", "evidence"]
    print("\n" + table(header, rows))
    recorder = Recorder("golden", out=args.out)
    failures = [f"{v.mode}: {text}" for v in verdicts for text in v.failures or []]
    for v in verdicts:
        recorder.write(
            v.mode, dtype="float32", cases=v.num_cases, equal_ids=v.num_ids, near_ties=v.num_tied,
            max_logprob_difference=v.max_diff, evidence=v.evidence, seconds=round(v.seconds, 1),
            failures=v.failures or [],
        )  # fmt: skip
    for text in failures[:20]:
        print(text)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
