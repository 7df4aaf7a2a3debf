"""Structured output: are all outputs valid, and what does a grammar cost per token.

    python -m benchmarks.structured

Validity: every function of the Berkeley function-calling file is asked for its arguments, greedily,
under its own JSON schema; each output must be JSON that an independent validator accepts. The file
writes Python's names for types and leaves lengths open; the schemas used here say JSON's names and
bound strings, lists and numbers, so that a small model cannot go on for ever.

Cost: the same number of tokens with and without a grammar, in turn, at batch 1 and 16; the ratio of
neighbouring runs counts, as the speed of a shared machine drifts. Grammars are compiled beforehand.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from benchmarks.record import ROOT, Recorder, summary, table
from jaxserve import LLM, SamplingParams, StructuredOutputsParams

FUNCTIONS = ROOT.parent / "shared" / "data" / "requests" / "bfcl_v4_simple_python.json"
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
PARTS = ["cost", "validity"]
MAX_TEXT, MAX_ITEMS, MAX_NUMBER = 60, 4, 10**6
LONG = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "kind": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


def plain_schema(schema: Any) -> Any:  # noqa: ANN401  a JSON value
    """Turn a parameter description of the file into a bounded JSON schema."""
    if not isinstance(schema, dict):
        return schema
    kept = ("type", "properties", "required", "items", "enum")
    made: dict[str, Any] = {key: schema[key] for key in kept if key in schema}
    kind = TYPES.get(made.get("type", ""), made.get("type"))
    if kind is None:
        return {"type": "string", "maxLength": MAX_TEXT}
    made["type"] = kind
    if kind == "object":
        properties = made.get("properties", {})
        made["properties"] = {name: plain_schema(value) for name, value in properties.items()}
        made["required"] = [name for name in made.get("required", []) if name in properties]
        made["additionalProperties"] = False
    elif kind == "array":
        made["items"] = plain_schema(made.get("items", {"type": "string"}))
        made["maxItems"] = MAX_ITEMS
    elif kind == "string" and "enum" not in made:
        made["maxLength"] = MAX_TEXT
    elif kind in ("integer", "number") and "enum" not in made:
        made |= {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
    if "enum" in made:
        return {"enum": made["enum"]}
    return made


def read_functions(path: Path, count: int | None) -> list[tuple[str, dict[str, Any]]]:
    """Return questions with the schema of the answer."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        case = json.loads(line)
        function = case["function"][0]
        question = case["question"][0][-1]["content"]
        text = f"{question}\nGive the arguments of {function['name']} as JSON."
        cases.append((text, plain_schema(function["parameters"])))
    return cases


def check_validity(
    llm: LLM, cases: Sequence[tuple[str, dict[str, Any]]], max_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """Ask for all arguments at once; count the valid ones."""
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for _, schema in cases
    ]
    start = time.perf_counter()
    messages = [[{"role": "user", "content": text}] for text, _ in cases]
    outputs = llm.chat(messages, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    wrong: list[str] = []
    for (_, schema), output in zip(cases, outputs, strict=True):
        one = output.outputs[0]
        try:
            jsonschema.validate(json.loads(one.text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{one.finish_reason}: {one.text[:200]!r}: {str(error)[:100]}")
    grammar = llm.metrics.grammar_time
    facts = {
        "schemas": len(cases),
        "valid": len(cases) - len(wrong),
        "valid rate": round(1 - len(wrong) / len(cases), 4),
        "tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
        "grammars compiled": grammar.count,
        "compile time per grammar, mean ms": round(1000 * grammar.mean, 2),
        "seconds": round(seconds, 1),
    }
    return facts, wrong


class _Clock:
    """Adds up the time of one method."""

    def __init__(self, owner: Any, name: str) -> None:  # noqa: ANN401  any object
        """Wrap the method."""
        self.seconds: list[float] = []
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - start)

        setattr(owner, name, timed)


def measure_cost(llm: LLM, batch: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Time the same number of tokens with and without a grammar, in turn."""
    prompts = [f"Write a list of things, number {i}." for i in range(batch)]
    free = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    bound = free.replace(structured_outputs=StructuredOutputsParams(json=LONG))
    clock = _Clock(llm.host.engine.constraints._writer, "write")  # noqa: SLF001
    times: dict[str, list[float]] = {"free": [], "bound": []}
    for repeat in range(repeats + 1):
        for name, params in (("free", free), ("bound", bound)):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            if any(len(o.outputs[0].token_ids) != num_tokens for o in outputs):
                raise AssertionError("every completion must have the same length")
            if repeat:  # the first pair compiles and warms up
                times[name].append(1000 * seconds / num_tokens)
            else:
                clock.seconds.clear()
    ratios = [b / f for f, b in zip(times["free"], times["bound"], strict=True)]
    masks = 1000 * np.asarray(clock.seconds)
    return {
        "batch": batch,
        "tokens": num_tokens,
        "free ms per step": summary(times["free"]),
        "bound ms per step": summary(times["bound"]),
        "ratio": summary(ratios),
        "masks, median ms per step": round(float(np.median(masks)), 3),
        "masks, p99 ms per step": round(float(np.percentile(masks, 99)), 3),
    }


def report_cost(llm: LLM, recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record the cost of a grammar."""
    rows: list[list[str]] = []
    for batch in args.batches:
        cost = measure_cost(llm, batch, args.num_tokens, args.repeats)
        recorder.write("cost", dtype=llm.config.model.dtype, **cost)
        cells = [
            cost["free ms per step"]["median"],
            cost["bound ms per step"]["median"],
            cost["ratio"]["median"],
            cost["masks, median ms per step"],
            cost["masks, p99 ms per step"],
        ]
        rows.append([str(batch), *(f"{cell:.3f}" for cell in cells)])
    header = ["batch", "free ms/step", "bound ms/step", "ratio", "masks ms", "masks p99 ms"]
    print(table(header, rows))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--functions", type=Path, default=FUNCTIONS, help="file of functions")
    parser.add_argument("--num-functions", type=int, help="only the first ones")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    return parser.parse_args()


def main() -> None:
    """Check and measure; exit with 1 if an output is invalid."""
    args = parse_args()
    llm = LLM(args.model, dtype=args.dtype, max_model_len=1024, warmup="full")
    recorder = Recorder("structured", out=args.out)
    dtype = llm.config.model.dtype
    if "cost" in args.parts:
        report_cost(llm, recorder, args)
    wrong: list[str] = []
    if "validity" in args.parts:
        cases = read_functions(args.functions, args.num_functions)
        facts, wrong = check_validity(llm, cases, args.max_tokens)
        print(table([f"validity, {dtype}", "value"], [[k, str(v)] for k, v in facts.items()]))
        recorder.write("validity", dtype=dtype, **facts, wrong=wrong[:20])
    llm.close()
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
