"""Quantised weights: what they cost in quality, and what they gain in speed and memory.

    python -m benchmarks.quantization

Quality, per scheme: perplexity of a fixed text (reference answers of MT-bench, in windows of 512
tokens), the share of the golden prompts' 64 teacher-forced tokens that are the most likely ones,
and the share of the 64 greedy tokens before the first that differs.

Speed: all engines in one process, decoding and prefilling in turn, with ratios of neighbouring
runs to float32; and bare products of all weights of the model, likewise in turn. The text's digest
is recorded, as perplexities of different texts cannot be compared.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.child import random_prompts
from benchmarks.golden import GOLDEN
from benchmarks.record import ROOT, Recorder, summary, table
from jaxserve import LLM, SamplingParams
from jaxserve.attention.metadata import AttentionPlan
from jaxserve.models.layers import project
from jaxserve.models.registry import flatten_params

TEXT = ROOT.parent / "shared" / "data" / "requests" / "mt_bench_reference_gpt4.jsonl"
WINDOW = 512
PARTS = ["quality", "speed"]


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One form of the weights.

    Attributes:
        name: What the tables call it.
        settings: Settings of the engine.
    """

    name: str
    settings: Mapping[str, Any]


def forms() -> list[Form]:
    """List what is compared; the first one is the reference."""
    plain = [Form(dtype, {"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    narrow = [
        Form(f"{scheme}, {dtype}", {"dtype": dtype, "quantization": scheme})
        for scheme in ("int8", "fp8")
        for dtype in ("float32", "bfloat16")
    ]
    kept = [
        Form(
            f"{scheme} without lm_head, float32",
            {
                "dtype": "float32",
                "quantization": scheme,
                "quantization_config": {"ignore": ["lm_head"]},
            },
        )
        for scheme in ("int8", "fp8")
    ]
    return [*plain, *narrow, *kept]


def read_text(path: Path) -> str:
    """Join the answers of a file of conversations, or return any other file as it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    lines = [json.loads(line) for line in text.splitlines()]
    return "\n\n".join(turn for line in lines for turn in line["choices"][0]["turns"])


# Quality ----------------------------------------------------------------------------------------


def perplexity(llm: LLM, ids: Sequence[int]) -> float:
    """Return e to the mean negative log-probability over windows; their first tokens are given."""
    score = jax.jit(lambda params, tokens: llm.logprobs(params, tokens)[:, 1:].sum())
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    total = sum(float(score(llm.params, jnp.asarray([window]))) for window in windows)
    return math.exp(-total / (len(windows) * (WINDOW - 1)))


def agreement(llm: LLM, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compare with the golden continuations of the float32 model."""
    forced = same = greedy = 0
    total = sum(len(case["greedy_ids"]) for case in cases)
    texts = [[*case["prompt_ids"], *case["greedy_ids"]] for case in cases]
    longest = max(map(len, texts))
    choose = jax.jit(lambda params, ids: llm.forward(ids, params=params).logits.argmax(-1))
    for case, text in zip(cases, texts, strict=True):
        padded = jnp.asarray([text + [0] * (longest - len(text))])
        choice = np.asarray(choose(llm.params, padded))[0]
        begin = len(case["prompt_ids"])
        forced += int((choice[begin - 1 : len(text) - 1] == np.asarray(text[begin:])).sum())
    params = SamplingParams(temperature=0, max_tokens=len(cases[0]["greedy_ids"]), ignore_eos=True)
    outputs = llm.generate([case["prompt_ids"] for case in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        equal = np.asarray(output.outputs[0].token_ids) == np.asarray(case["greedy_ids"])
        same += int(equal.all())
        greedy += len(equal) if equal.all() else int(equal.argmin())
    return {
        "teacher-forced": round(forced / total, 4),
        "greedy tokens": round(greedy / total, 4),
        "equal continuations": same,
        "continuations": len(cases),
    }


def weight_bytes(llm: LLM) -> int:
    """Return the bytes of all weights and scales."""
    return sum(array.nbytes for array in flatten_params(llm.params).values())


def load(form: Form, args: argparse.Namespace) -> LLM:
    """Load one form of the model into an engine of its own."""
    settings = {
        "max_model_len": 640,
        "enable_prefix_caching": False,
        "attention_backend": args.attention_backend,
    }
    return LLM(args.model, **settings, **form.settings)


def report_quality(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record quality and size."""
    text = read_text(args.text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    cases = json.loads(args.golden.read_text())["cases"]
    rows: list[list[str]] = []
    for form in forms():
        with load(form, args) as llm:
            ids = llm.get_tokenizer().encode(text)[: args.text_tokens]
            found = {
                "perplexity": round(perplexity(llm, ids), 4),
                **agreement(llm, cases),
                "weight bytes": weight_bytes(llm),
            }
        recorder.write("quality", form=form.name, **found, text_tokens=len(ids), text_sha256=digest)
        rows.append(
            [
                form.name,
                f"{found['perplexity']:.3f}",
                f"{found['teacher-forced']:.1%}",
                f"{found['greedy tokens']:.1%}",
                f"{found['equal continuations']}/{found['continuations']}",
                f"{found['weight bytes'] / 1e6:.0f}",
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    header = ["weights", "perplexity", "teacher-forced", "greedy tokens", "equal", "MB"]
    print("\n" + table(header, rows))


# Speed ------------------------------------------------------------------------------------------


class Products:
    """The products with all weights of a model and nothing else, the output projection included.

    Args:
        llm: The engine that holds the weights.
        rows: Rows that are multiplied.
    """

    def __init__(self, llm: LLM, rows: int) -> None:
        """Compile."""
        spec = llm.host.engine.runner.spec
        self._params = llm.params
        graph, plan = llm.host.graph_for(self._params), _plan(rows, spec.backend)
        draw = np.random.default_rng(0).standard_normal((rows, spec.config.hidden_size))
        self._x = jnp.asarray(draw, spec.dtype)

        def apply(params: nnx.State, x: jax.Array) -> jax.Array:
            model = nnx.merge(graph, params)
            for layer in model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                q, k, v = project(x, (attention.q_proj, attention.k_proj, attention.v_proj), plan)
                x = project(q, (attention.o_proj,), plan)[0]
                gate, up = project(x, (mlp.gate_proj, mlp.up_proj), plan)
                x = project(gate * up, (mlp.down_proj,), plan)[0]
                # Every product is used, and none grows out of range.
                rest = 1e-9 * (k.sum() + v.sum())
                x = (x / (1 + jnp.abs(x).max()) + rest).astype(self._x.dtype)
            return model.logits(x, plan).max(-1)

        with jax.default_matmul_precision(spec.matmul_precision):
            self._program = jax.jit(apply).lower(self._params, self._x).compile()

    def measure(self) -> float:
        """Return the milliseconds of the fastest of three runs."""
        times: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            self._program(self._params, self._x).block_until_ready()
            times.append(1000 * (time.perf_counter() - start))
        return min(times)


def _plan(rows: int, backend: Any) -> AttentionPlan:  # noqa: ANN401  a literal
    """Return a plan of decoding rows; products ask for nothing but the backend."""
    none = jnp.zeros((0,), jnp.int32)
    number = jnp.zeros((), jnp.int32)
    return AttentionPlan(
        token_row=jnp.zeros((rows,), jnp.int32),
        token_position=jnp.zeros((rows,), jnp.int32),
        num_blocks=number,
        block_start=none,
        block_row=none,
        block_position=none,
        block_len=none,
        block_context=none,
        num_context_blocks=number,
        page_table=None,
        rows=rows,
        kv_tile=256,
        q_block=128,
        backend=backend,
        upcast=True,
        batch_invariant=False,
    )


def decode_ms(llm: LLM, batch: int, num_tokens: int, seed: int) -> float:
    """Return milliseconds per step of `batch` sequences that decode together."""
    prompts = random_prompts([seed, batch], batch, 16, llm.model_config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    begin = max(m.first_token_time or 0.0 for m in metrics)
    end = max(m.last_token_time or 0.0 for m in metrics)
    return 1000 * (end - begin) / (num_tokens - 1)


def prefill_ms(llm: LLM, length: int, seed: int) -> float:
    """Return milliseconds to the only token of a prompt."""
    (prompt,) = random_prompts([seed, length], 1, length, llm.model_config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    llm.generate([prompt], params, use_tqdm=False)
    return 1000 * (time.perf_counter() - start)


def measurements(llm: LLM, args: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """List what is measured on one engine: name -> milliseconds, given the number of the round."""
    found: dict[str, Callable[[int], float]] = {}
    for rows in args.batches:
        products = Products(llm, rows)
        found[f"products x{rows}"] = lambda _, products=products: products.measure()
    for batch in args.batches:
        found[f"decode x{batch}"] = lambda seed, batch=batch: decode_ms(
            llm, batch, args.num_tokens, seed
        )
    found[f"prefill {args.prompt}"] = lambda seed: prefill_ms(llm, args.prompt, seed)
    return found


def report_speed(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure in turn, print and record speed."""
    chosen = [form for form in forms() if "quantization_config" not in form.settings]
    llms = {form.name: load(form, args) for form in chosen}
    calls = {name: measurements(llm, args) for name, llm in llms.items()}
    whats = list(calls[chosen[0].name])
    times: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.repeats + 1):
        for what in whats:
            for name in llms:
                found = calls[name][what](seed)
                if seed:  # the first round compiles
                    times.setdefault((name, what), []).append(found)
    rows: list[list[str]] = []
    for name in llms:
        cells = [name]
        for what in whats:
            base, own = times[chosen[0].name, what], times[name, what]
            ratio = summary([b / o for b, o in zip(base, own, strict=True)])
            recorder.write(
                "speed", form=name, measured=what, ms=summary(own), **{"speed-up": ratio}
            )
            cells.append(f"{summary(own)['median']:.1f} ({ratio['median']:.2f})")
        rows.append(cells)
    for llm in llms.values():
        llm.close()
    print("\nms (speed-up over float32 in the same round)")
    print(table(["weights", *whats], rows))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--attention-backend", default="auto", help="xla: without own kernels")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--text", type=Path, default=TEXT, help="text of the perplexity")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens of it")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="file of golden cases")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    for path in (args.text, args.golden) if "quality" in args.parts else ():
        if not path.exists():
            parser.error(f"{path.name} is not there; name it with --text or --golden")
    return args


def main() -> None:
    """Measure."""
    args = parse_args()
    recorder = Recorder("quantization", out=args.out)
    if "quality" in args.parts:
        report_quality(recorder, args)
    if "speed" in args.parts:
        report_speed(recorder, args)


if __name__ == "__main__":
    main()
