"""A mixed load on a warm engine: nothing is compiled, nothing leaks, the host stays out of the way.

    python -m benchmarks.steady

300 requests with prompts of 1 to 1500 tokens, every sampling option, several completions per
prompt and cancellations at random moments. Afterwards: compilations since warm-up (the engine's
own count and JAX's events), pages that nobody gave back, and the host's time per step.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.record import Recorder, table
from jaxserve import AsyncLLM, FinishReason, SamplingParams

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
LONGEST_PROMPT = 1500
LONGEST_OUTPUT = 256
MAX_MODEL_LEN = 2048
CANCEL_SHARE = 0.15


@dataclass(slots=True)
class Tally:
    """What happened.

    Attributes:
        finished: Completions by finish reason.
        cancelled: Requests that the client left.
        tokens: Tokens received.
        used: Sampling options that some request used.
        failures: What went wrong.
    """

    finished: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0
    tokens: int = 0
    used: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


class CompileCounter:
    """Counts what JAX compiles from its making on."""

    def __init__(self) -> None:
        """Listen to JAX's own events."""
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_: object) -> None:
        self.count += event == COMPILE_EVENT and duration >= 0


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """Draw a length whose logarithm is uniform."""
    return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def draw_sampling(rng: random.Random, vocab: int, max_tokens: int) -> dict[str, Any]:
    """Draw sampling options; each one is used by a good part of the requests."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": rng.choice([0.0, 0.7, 1.3])}
    maybe: dict[str, Any] = {
        "top_k": rng.choice([1, 5, 50]),
        "top_p": rng.uniform(0.5, 0.99),
        "min_p": rng.uniform(0.01, 0.2),
        "repetition_penalty": rng.uniform(0.9, 1.3),
        "presence_penalty": rng.uniform(-1, 1),
        "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": {rng.randrange(vocab): rng.uniform(-5, 5) for _ in range(4)},
        "allowed_token_ids": sorted(rng.sample(range(vocab), 200)),
        "min_tokens": rng.randrange(max_tokens + 1),
        "stop": [rng.choice(["\n\n", ".", "the", "xyzzy"])],
        "stop_token_ids": [rng.randrange(vocab)],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logprobs": rng.randrange(6),
        "prompt_logprobs": rng.randrange(3),
        "seed": rng.randrange(2**31),
        "skip_special_tokens": False,
    }
    options |= {name: value for name, value in maybe.items() if rng.random() < 0.25}
    if options["temperature"] > 0 and rng.random() < 0.2:
        options["n"] = rng.choice([2, 3])
    return options


async def one(
    llm: AsyncLLM, rng: random.Random, tally: Tally, prompt_len: int, max_tokens: int
) -> None:
    """Send one request; read it to its end, or leave it."""
    options = draw_sampling(rng, llm.vocab_size, max_tokens)
    tally.used |= set(options)
    sampling = SamplingParams(**options)
    prompt = [rng.randrange(1000, llm.vocab_size) for _ in range(prompt_len)]
    if rng.random() < 0.3:  # a prefix that others share
        shared = min(prompt_len, 64)
        prompt[:shared] = range(2000, 2000 + shared)
    leave_after = rng.randrange(1, 20) if rng.random() < CANCEL_SHARE else None
    leave_at_s = rng.uniform(0, 0.3) if leave_after and rng.random() < 0.5 else None
    reader = read(llm, prompt, sampling, tally, leave_after)
    try:
        # A wait that is cut short closes the generator of events, as a client that goes away does.
        await asyncio.wait_for(reader, leave_at_s)
    except TimeoutError:
        tally.cancelled += 1


async def read(
    llm: AsyncLLM,
    prompt: list[int],
    sampling: SamplingParams,
    tally: Tally,
    leave_after: int | None,
) -> None:
    """Read the events of one request."""
    request = llm.make_request(prompt, sampling)
    events = llm.events(request)
    ends = 0
    seen = 0
    try:
        async for event in events:
            seen += 1
            tally.tokens += len(event.token_ids)
            if event.finish_reason is not None:
                ends += 1
                reason = event.finish_reason.value
                tally.finished[reason] = tally.finished.get(reason, 0) + 1
                if event.finish_reason is FinishReason.ERROR:
                    tally.failures.append(f"a request ended with an error: {event.error}")
            elif leave_after is not None and seen >= leave_after:
                tally.cancelled += 1
                return
    finally:
        await events.aclose()
    if ends != sampling.n:
        tally.failures.append(f"{ends} completions ended, expected {sampling.n}")


async def load(llm: AsyncLLM, count: int, concurrency: int, seed: int) -> Tally:
    """Keep so many requests under way until all have been sent and have ended."""
    rng = random.Random(seed)
    tally = Tally()
    gate = asyncio.Semaphore(concurrency)
    prompts = [1, LONGEST_PROMPT] + [log_uniform(rng, 1, LONGEST_PROMPT) for _ in range(count - 2)]
    outputs = [LONGEST_OUTPUT, 1] + [log_uniform(rng, 1, LONGEST_OUTPUT) for _ in range(count - 2)]

    async def go(index: int) -> None:
        async with gate:
            own = random.Random(seed * 1000 + index)
            await one(llm, own, tally, prompts[index], outputs[index])

    await asyncio.gather(*(go(index) for index in range(count)))
    if not await llm.drain(60):
        tally.failures.append(f"{llm.num_unfinished} completions never ended")
    return tally


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    return parser.parse_args()


def main() -> None:
    """Run the load and print what it left behind; exit with 1 if anything is wrong."""
    args = parse_args()
    started = time.monotonic()
    llm = AsyncLLM(args.model, dtype=args.dtype, max_model_len=MAX_MODEL_LEN, warmup="full")
    engine = llm.host.engine
    warm_s = time.monotonic() - started
    compiled_before, free_before = llm.metrics.num_compilations, llm.num_free_pages
    counter = CompileCounter()
    engine.host_times.clear()
    started = time.monotonic()
    tally = asyncio.run(load(llm, args.num_requests, args.concurrency, args.seed))
    seconds = time.monotonic() - started
    own = llm.metrics.num_compilations - compiled_before
    leaked = free_before - llm.num_free_pages
    host_ms = 1000 * np.asarray(engine.host_times)
    facts = {
        "requests": args.num_requests,
        "cancelled": tally.cancelled,
        "tokens": tally.tokens,
        "preemptions": llm.metrics.num_preemptions,
        "steps": llm.metrics.num_steps,
        "compilations at warm-up": compiled_before,
        "compilations after warm-up (engine)": own,
        "compilations after warm-up (JAX)": counter.count,
        "leaked pages": leaked,
        "host time per step, median ms": round(float(np.median(host_ms)), 3),
        "host time per step, p99 ms": round(float(np.percentile(host_ms, 99)), 3),
        "warm-up s": round(warm_s, 1),
        "load s": round(seconds, 1),
    }
    dtype = llm.config.model.dtype
    llm.close()
    wrong = list(tally.failures)
    if own or counter.count:
        wrong.append(f"{own} / {counter.count} compilations after warm-up, expected none")
    if leaked:
        wrong.append(f"{leaked} pages leaked, expected none")
    print(table([f"steady load, {dtype}", "value"], [[k, str(v)] for k, v in facts.items()]))
    print("finish reasons: " + ", ".join(f"{k} {v}" for k, v in sorted(tally.finished.items())))
    print("sampling options used: " + ", ".join(sorted(tally.used)))
    Recorder("steady", out=args.out).write(
        "steady", dtype=dtype, **{key.replace(" ", "_"): value for key, value in facts.items()},
        finished=tally.finished, wrong=wrong[:20],
    )  # fmt: skip
    for text in wrong[:20]:
        print(f"WRONG: {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
