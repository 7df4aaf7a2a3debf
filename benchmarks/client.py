"""A load generator for `/v1/completions`: streams, times every token, prints the field's keys.

    python -m benchmarks.client --base-url http://127.0.0.1:8000 --num-prompts 16 --input-len 128

Bare asyncio sockets, because on a small machine the client takes its time from the server.

Source: names of flags, result keys and their definitions from `vllm bench serve`.
"""

import argparse
import asyncio
import json
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from benchmarks.child import random_prompts


class ClientError(RuntimeError):
    """The server refused a request or broke off."""


@dataclass(slots=True)
class Timing:
    """What one request saw; instants of one monotonic clock in seconds.

    Attributes:
        start: When it was sent.
        arrivals: When each piece came, those without text (half a character) included.
        end: When the stream ended.
        num_prompt: Tokens of the prompt.
        num_output: Tokens of the output, as the server counted them.
        error: What went wrong, if anything did.
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    num_prompt: int = 0
    num_output: int = 0
    error: str | None = None


async def stream(
    host: str, port: int, path: str, body: dict[str, Any], headers: dict[str, str]
) -> AsyncIterator[dict[str, Any]]:
    """Post `body` and yield the JSON of each server-sent event.

    Raises:
        ClientError: If the status is not 200.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        data = json.dumps(body).encode()
        fields = {
            "Host": f"{host}:{port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Connection": "close",
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        await writer.drain()
        status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
        if b" 200 " not in status + b" ":
            raise ClientError(f"{status.decode()}: {(await reader.read(500)).decode()}")
        async for line in lines_of(reader):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])
    finally:
        writer.close()


async def lines_of(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Undo the chunked transfer coding and split into lines."""
    rest = b""
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        chunk = await reader.readexactly(size + 2)
        *lines, rest = (rest + chunk[:-2]).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


async def _one(host: str, port: int, body: dict[str, Any], headers: dict[str, str]) -> Timing:
    timing = Timing(start=time.perf_counter(), num_prompt=len(body["prompt"]))
    try:
        async for event in stream(host, port, "/v1/completions", body, headers):
            if "error" in event:
                timing.error = str(event["error"])
                break
            if event.get("usage"):
                timing.num_output = event["usage"]["completion_tokens"]
            if event["choices"]:
                timing.arrivals.append(time.perf_counter())
    except (ClientError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.end = time.perf_counter()
    return timing


async def run(
    base_url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    *,
    max_concurrency: int | None = None,
    api_key: str | None = None,
) -> list[Timing]:
    """Send every prompt at once, at most so many at a time; greedy, end-of-sequence ignored."""
    place = urllib.parse.urlsplit(base_url)
    gate = asyncio.Semaphore(max_concurrency or len(prompts))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def go(prompt: Sequence[int]) -> Timing:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with gate:
            return await _one(place.hostname or "127.0.0.1", place.port or 80, body, headers)

    return await asyncio.gather(*map(go, prompts))


def result_keys(
    timings: Sequence[Timing], *, model: str, max_concurrency: int | None
) -> dict[str, Any]:
    """Describe a run under the names that `vllm bench serve` prints, plus SGLang's doubles.

    Times are milliseconds; tpot is (latency - ttft) / (output tokens - 1) of each request, itl
    every gap between two pieces.
    """
    good = [timing for timing in timings if timing.error is None and timing.arrivals]
    duration = max((t.end for t in timings), default=0.0) - min(
        (t.start for t in timings), default=0.0
    )
    ttft = [t.arrivals[0] - t.start for t in good]
    e2el = [t.end - t.start for t in good]
    tpot = [(t.end - t.arrivals[0]) / (t.num_output - 1) for t in good if t.num_output > 1]
    itl = [b - a for t in good for a, b in zip(t.arrivals, t.arrivals[1:], strict=False)]
    num_in, num_out = sum(t.num_prompt for t in good), sum(t.num_output for t in good)
    keys: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "model_id": model,
        "num_prompts": len(timings),
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(timings) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        "total_throughput": (num_in + num_out) / duration,
        "max_output_tokens_per_s": _peak_rate(good),
        "max_concurrent_requests": _peak_concurrency(timings),
    }
    for name, values in {"ttft": ttft, "tpot": tpot, "itl": itl, "e2el": e2el}.items():
        keys |= spread(name, values)
    keys["mean_e2e_latency_ms"] = keys["mean_e2el_ms"]
    keys["errors"] = [t.error for t in timings if t.error is not None]
    return keys


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, median, deviation and 99th percentile in milliseconds, with vLLM's key names."""
    ms = sorted(1000 * value for value in seconds) or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(ms),
        f"median_{name}_ms": statistics.median(ms),
        f"std_{name}_ms": statistics.pstdev(ms),
        f"p99_{name}_ms": ms[min(len(ms) - 1, round(0.99 * (len(ms) - 1)))],
    }


def _peak_rate(timings: Sequence[Timing]) -> float:
    seconds = [int(at) for timing in timings for at in timing.arrivals]
    return float(max((seconds.count(second) for second in set(seconds)), default=0))


def _peak_concurrency(timings: Sequence[Timing]) -> int:
    return max((sum(o.start <= t.start < o.end for o in timings) for t in timings), default=0)


LABELS = {
    "completed": "Successful requests",
    "failed": "Failed requests",
    "duration": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "request_throughput": "Request throughput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "max_concurrent_requests": "Peak concurrent requests",
    "total_token_throughput": "Total token throughput (tok/s)",
    **{
        f"{kind}_{name}_ms": f"{kind.capitalize()} {name.upper()} (ms)"
        for name in ("ttft", "tpot", "itl")
        for kind in ("mean", "median", "p99")
    },
}


def report(keys: dict[str, Any]) -> str:
    """Set a result in lines, with the labels that `vllm bench serve` prints."""
    title = " Serving Benchmark Result ".center(50, "=")
    lines = [
        f"{label + ':':<40}{keys[name]:<10.2f}"
        if isinstance(keys[name], float)
        else f"{label + ':':<40}{keys[name]:<10}"
        for name, label in LABELS.items()
    ]
    return "\n".join([title, *lines, "=" * 50])


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first model that the server names")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args()
    model = args.model or first_model(args.base_url, args.api_key)
    prompts = random_prompts([args.seed], args.num_prompts, args.input_len, args.vocab_size)
    timings = asyncio.run(
        run(
            args.base_url,
            model,
            prompts,
            args.output_len,
            max_concurrency=args.max_concurrency,
            api_key=args.api_key,
        )
    )
    keys = result_keys(timings, model=model, max_concurrency=args.max_concurrency)
    print(json.dumps(keys) if args.json else report(keys))
    for error in keys["errors"][:3]:
        print(error)


def first_model(base_url: str, api_key: str | None = None) -> str:
    """Ask a server which model it serves."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{base_url}/v1/models", headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  the user's own URL
        return json.load(answer)["data"][0]["id"]


if __name__ == "__main__":
    main()
