"""What adapters cost: tokens per second of a full batch with none, one and several of them.

    python -m benchmarks.lora

Four sides run in turn, on the same weights: an engine without adapters, and one with slots for
them whose rows use none, all the same one, or one of several each. The ratio of neighbouring runs
counts, as the speed of a shared machine drifts. Prefill (one token per prompt) and decode are told
apart. The adapters are random, of the largest rank, on every projection. Besides: the time to bring
an adapter onto the device.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.record import Recorder, summary, table
from jaxserve import LLM, LoRARequest, SamplingParams
from jaxserve.models.config import ModelConfig
from jaxserve.models.lora import target_sizes

SIDES = ("no adapter engine", "no adapter used", "one adapter", "several adapters")


def random_adapter(config: ModelConfig, number: int, rank: int) -> LoRARequest:
    """Draw an adapter small enough that activations keep their size."""
    random = np.random.default_rng(number)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config.num_layers):
        for name, (in_size, out_size) in target_sizes(config).items():
            stem = f"model.layers.{layer}.{name}.lora_"
            first = random.standard_normal((rank, in_size), np.float32) / in_size**0.5
            second = random.standard_normal((out_size, rank), np.float32) * 0.05 / rank**0.5
            tensors |= {f"{stem}A.weight": first, f"{stem}B.weight": second}
    options = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    return LoRARequest(f"adapter-{number}", number, lora_tensors=tensors, peft_config=options)


def seconds_of(llm: LLM, prompts: list[list[int]], num_tokens: int, loras: Any) -> float:  # noqa: ANN401
    """Time one batch from nothing; every completion has the same length."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    seconds = time.perf_counter() - start
    if any(len(output.outputs[0].token_ids) != num_tokens for output in outputs):
        raise AssertionError("every completion must have the same length")
    return seconds


def upload_ms(llm: LLM, repeats: int) -> list[float]:
    """Time bringing an adapter that has been read onto the device, again and again."""
    host = llm.host
    adapter = host.adapters.get(host.adapters.requests()[0])
    runner = host.engine.runner

    def work() -> float:
        start = time.perf_counter()
        runner.set_adapter(1, adapter.layers)
        jax.block_until_ready(runner._adapters)  # noqa: SLF001
        return 1000 * (time.perf_counter() - start)

    return [host.thread.call(work).result() for _ in range(repeats)]


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """Run all sides in turn; return facts, and milliseconds per side and phase."""
    settings: dict[str, Any] = {
        "max_model_len": args.prompt_len + args.num_tokens + 1,
        "max_num_seqs": args.rows,
        "warmup": "full",
    }
    plain = LLM(args.model, dtype=args.dtype, **settings)
    config = plain.model_config
    if not isinstance(config, ModelConfig):
        raise TypeError("adapters need a decoder")
    adapted = LLM(
        (config, plain.params), enable_lora=True, max_loras=args.adapters,
        max_lora_rank=args.rank, **settings,
    )  # fmt: skip
    loras = [random_adapter(config, 1 + i, args.rank) for i in range(args.adapters)]
    random = np.random.default_rng(0)
    shape = (args.rows, args.prompt_len)
    prompts = random.integers(10, config.vocab_size - 10, shape).tolist()
    sides: dict[str, tuple[LLM, Any]] = {
        SIDES[0]: (plain, None),
        SIDES[1]: (adapted, None),
        SIDES[2]: (adapted, loras[0]),
        SIDES[3]: (adapted, [loras[i % len(loras)] for i in range(args.rows)]),
    }
    times: dict[str, dict[str, list[float]]] = {s: {"prefill": [], "decode": []} for s in sides}
    for repeat in range(args.repeats + 1):
        for side, (llm, chosen) in sides.items():
            prefill = seconds_of(llm, prompts, 1, chosen)
            whole = seconds_of(llm, prompts, args.num_tokens, chosen)
            if repeat:  # the first round reads the adapters and warms up
                times[side]["prefill"].append(1000 * prefill)
                decode = 1000 * (whole - prefill) / (args.num_tokens - 1)
                times[side]["decode"].append(decode)
    facts = {
        "dtype": plain.config.model.dtype,
        "rows": args.rows,
        "prompt tokens": args.prompt_len,
        "output tokens": args.num_tokens,
        "adapters": args.adapters,
        "rank": args.rank,
        "upload ms": summary(upload_ms(adapted, args.repeats)),
    }
    adapted.close()
    plain.close()
    return facts, times


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=33)
    parser.add_argument("--adapters", type=int, default=4, help="slots, and adapters of a batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    return parser.parse_args()


def main() -> None:
    """Measure, print and record."""
    args = parse_args()
    facts, times = measure(args)
    recorder = Recorder("lora", out=args.out)
    base = times[SIDES[0]]
    rows: list[list[str]] = []
    for side, phases in times.items():
        cells: list[str] = []
        found: dict[str, Any] = {}
        for phase, samples in phases.items():
            ratios = [mine / theirs for mine, theirs in zip(samples, base[phase], strict=True)]
            tokens = args.rows * (args.prompt_len if phase == "prefill" else 1)
            rate = summary([1000 * tokens / sample for sample in samples])
            found |= {f"{phase} tok/s": rate, f"{phase} time ratio": summary(ratios)}
            cells += [f"{rate['median']:.0f}", f"{summary(ratios)['median']:.3f}"]
        recorder.write("cost", side=side, **facts, **found)
        rows.append([side, *cells])
    header = ["side", "prefill tok/s", "time ratio", "decode tok/s", "time ratio"]
    print(table(header, rows))
    print(f"bringing an adapter onto the device: {facts['upload ms']['median']:.1f} ms")


if __name__ == "__main__":
    main()
