"""jaxserve beside transformers and llama.cpp: one table, equal prompts, interleaved, medians.

    python -m benchmarks.serving --peers transformers,llama.cpp

Columns: prefill of 512 tokens, decode at 1, 8 and 16 concurrent sequences of 128 tokens of
context, and 16 clients with 128 tokens in and 128 out. jaxserve is measured whole, through
`LLM.generate` and over HTTP through its server; the peers are measured as bare batches of equal
lengths, which flatters them. Every process stays loaded while the others are measured, and the
processor time of all of them is watched, so that the table can say whether the machine was quiet.
Only ratios of one run count: figures of a shared machine move by a factor of two within an hour.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.child import (
    PEER_MODULES,
    Child,
    Load,
    LoadMeter,
    PeerError,
    oracle_python,
    random_prompts,
)
from benchmarks.record import Recorder, machine, summary, table
from benchmarks.server import Server

OURS = "jaxserve"
PREFILL_LEN = 512
DECODE_LEN = 128
BATCHES = (1, 8, 16)
CLIENTS, CLIENT_IN, CLIENT_OUT = 16, 128, 128
COLUMNS = {
    "prefill": f"prefill {PREFILL_LEN}",
    **{f"decode{batch}": f"decode x{batch}" for batch in BATCHES},
    "http": f"{CLIENTS} x {CLIENT_IN}/{CLIENT_OUT}",
}
REQUIRED = {
    "transformers": dict.fromkeys(COLUMNS, 1.8),
    "llama.cpp": {"prefill": 1.4, "decode1": 0.55, "decode8": 1.0, "decode16": 1.0},
}
"""Least ratios to each peer that float32 must reach."""
NOISY = 0.15
"""Share of one core used by others from which on a sample counts as disturbed."""
VOCAB = 40_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        rate: Tokens per second.
        load: Who used the processor meanwhile.
    """

    rate: float
    load: Load

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else took a noticeable part of the processor."""
        return self.load.foreign + self.load.idle < NOISY


@dataclass(slots=True)
class Results:
    """Samples of one precision.

    Attributes:
        samples: Rates and who used the processor meanwhile, by (engine, column).
        keys: Last HTTP result per engine, as `vllm bench serve` names it.
        about: What each engine said of itself.
        failed: What went wrong, by engine.
    """

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Comparison:
    """The engines of one precision, loaded side by side and measured in turn.

    Args:
        dtype: Precision.
        peers: Names of `PEER_MODULES`.
        model: What jaxserve serves; the peers read the same GGUF file.
        gguf: That file.
        steps: Decode steps per sample.
        http: Whether the clients' column is measured.
    """

    def __init__(
        self, dtype: str, peers: Sequence[str], model: str, gguf: Path, *, steps: int, http: bool
    ) -> None:
        """Remember the parameters; `open` starts the processes."""
        self.dtype, self.model, self.gguf, self.steps, self.http = dtype, model, gguf, steps, http
        self.results = Results()
        self._peers = list(peers)
        self._children: dict[str, Child] = {}
        self._server: Server | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator["Comparison"]:
        """Start, load and warm up every process; end them all on leaving."""
        with (
            tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as name,
            contextlib.ExitStack() as s,
        ):
            logs = Path(name)
            self._start_ours(logs, s)
            for peer in self._peers:
                self._start_peer(peer, logs, s)
            pids = {name: child.pid for name, child in self._children.items()}
            if self._server is not None:
                pids["server"] = self._server.pid
            self._meter = LoadMeter(pids)
            self._warm_up()
            yield self

    def _start_ours(self, logs: Path, stack: contextlib.ExitStack) -> None:
        settings = {"max_num_seqs": CLIENTS, "max_model_len": 1024}
        say(f"[{self.dtype}] loading jaxserve (the first time, every step is compiled) ...")
        child = Child(sys.executable, "benchmarks.worker", logs / "worker.log")
        stack.callback(child.close)
        self._children[OURS] = child
        self.results.about[OURS] = child.ask("load", model=self.model, dtype=self.dtype, **settings)
        if self.http:
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
            flags.append("--warmup=full")
            self._server = Server(self.model, self.dtype, logs / "server.log", flags)
            stack.callback(self._server.close)
            self._server.wait(timeout_s=400)

    def _start_peer(self, name: str, logs: Path, stack: contextlib.ExitStack) -> None:
        from jaxserve.models.hub import cache_dir

        say(f"[{self.dtype}] loading {name} ...")
        child = Child(oracle_python() or "python", PEER_MODULES[name], logs / f"{name}.log")
        stack.callback(child.close)
        extra = {"cache_dir": str(cache_dir() / "bench")} if name == "llama.cpp" else {}
        threads = machine()["cores"]
        try:
            self.results.about[name] = child.ask(
                "load", gguf=str(self.gguf), dtype=self.dtype, threads=threads, **extra
            )
            self._children[name] = child
        except PeerError as error:
            self.results.failed[name] = str(error)
            say(f"  {name} is left out: {error}")

    # Measuring --------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        say(f"[{self.dtype}] warming up ...")
        for name in list(self._children):
            for column in COLUMNS:
                if name == OURS or column != "http":  # a peer's batch of 16 is warm by then
                    self._take(name, column, seed=10**6, steps=4)
        self.results = Results(about=self.results.about, failed=self.results.failed)

    def round(self, number: int) -> None:
        """Take one sample of every column from every engine; the order turns with the number."""
        names = list(self._children)
        turn = number % len(names)
        for column in COLUMNS:
            for name in names[turn:] + names[:turn]:
                for part in range(3 if column == "prefill" else 1):
                    if name in self._children:
                        self._take(name, column, seed=10 * number + part, steps=self.steps)

    def _take(self, name: str, column: str, *, seed: int, steps: int) -> None:
        if column == "http" and not self.http:
            return
        time.sleep(0.1)  # threads that spin for a while after their work go to sleep
        measured = "server" if column == "http" and name == OURS else name
        self._meter.start()
        try:
            rate = self._sample(name, column, seed, steps)
        except PeerError as error:
            if name == OURS:
                raise
            self.results.failed[name] = str(error)
            self._children.pop(name).close()
            say(f"  {name} is left out: {error}")
            return
        self.results.samples[name, column].append(Sample(rate, self._meter.stop(measured)))

    def _sample(self, name: str, column: str, seed: int, steps: int) -> float:
        child = self._children[name]
        if column == "prefill":
            (prompt,) = random_prompts([seed, 512], 1, PREFILL_LEN, VOCAB)
            return PREFILL_LEN / child.ask("prefill", prompt=prompt)["seconds"]
        if column == "http":
            prompts = random_prompts([seed, 16], CLIENTS, CLIENT_IN, VOCAB)
            out = CLIENT_OUT if steps == self.steps else steps
            keys = self._http(name, prompts, out)
            self.results.keys[name].append(keys)
            return keys["output_throughput"]
        batch = int(column.removeprefix("decode"))
        prompts = random_prompts([seed, batch], batch, DECODE_LEN, VOCAB)
        return child.ask("decode", prompts=prompts, steps=steps)["tokens_per_s"]

    def _http(self, name: str, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        if name != OURS:
            answer = self._children[name].ask("burst", prompts=prompts, steps=num_tokens)
            return burst_keys(name, answer, prompts, num_tokens)
        assert self._server is not None
        model = client.first_model(self._server.url)
        timings = asyncio.run(client.run(self._server.url, model, prompts, num_tokens))
        keys = client.result_keys(timings, model="smollm2-135m-instruct", max_concurrency=CLIENTS)
        if keys["failed"]:
            raise PeerError(f"{keys['failed']} requests failed: {keys['errors'][0]}")
        return keys


def burst_keys(
    name: str, answer: dict[str, Any], prompts: list[list[int]], num_tokens: int
) -> dict[str, Any]:
    """Describe a peer's batch under the keys of the HTTP result."""
    num_in, num_out = sum(map(len, prompts)), len(prompts) * num_tokens
    seconds = answer["seconds"]
    return {
        "backend": f"{name} (engine-level batch, no HTTP)",
        "num_prompts": len(prompts),
        "max_concurrency": len(prompts),
        "duration": seconds,
        "completed": len(prompts),
        "failed": 0,
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(prompts) / seconds,
        "output_throughput": num_out / seconds,
        "total_token_throughput": (num_in + num_out) / seconds,
        **client.spread("ttft", answer["ttft_s"]),
        **client.spread("tpot", answer["tpot_s"]),
        **client.spread("itl", answer["tpot_s"]),
        **client.spread("e2el", [seconds]),
    }


# Reporting ------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell the user what goes on."""
    print(text, file=sys.stderr, flush=True)


def counted(results: Results, name: str, column: str) -> list[float]:
    """Return the rates that count: the undisturbed ones, or all where every one was disturbed."""
    samples = results.samples.get((name, column), [])
    return [s.rate for s in samples if s.is_quiet] or [s.rate for s in samples]


def is_disturbed(results: Results, name: str, column: str) -> bool:
    """Tell whether every sample was disturbed by other work on the machine."""
    return not any(sample.is_quiet for sample in results.samples.get((name, column), []))


def median(results: Results, name: str, column: str) -> float | None:
    """Return the median rate, or None where nothing was measured."""
    rates = counted(results, name, column)
    return statistics.median(rates) if rates else None


def ratios(results: Results, peer: str) -> dict[str, float]:
    """Return our median over the peer's, by column."""
    found: dict[str, float] = {}
    for column in COLUMNS:
        ours, theirs = median(results, OURS, column), median(results, peer, column)
        if ours and theirs:
            found[column] = ours / theirs
    return found


def verdicts(dtype: str, results: Results) -> dict[tuple[str, str], bool]:
    """Return which required ratios are reached, by (peer, column); float32 alone is bound."""
    if dtype != "float32":
        return {}
    return {
        (peer, column): ratio >= REQUIRED[peer][column]
        for peer in REQUIRED
        for column, ratio in ratios(results, peer).items()
        if column in REQUIRED[peer]
    }


def format_table(dtype: str, results: Results) -> str:
    """Set medians in tokens per second, ratios, required ratios and marks in one table."""
    names = [name for name in (OURS, *PEER_MODULES) if (name, "prefill") in results.samples]
    rows: list[list[str]] = []

    def doubt(*engines: str, column: str) -> str:
        return "?" if any(is_disturbed(results, name, column) for name in engines) else ""

    for name in names:
        cells = [f"{name} tok/s"]
        for column in COLUMNS:
            value = median(results, name, column)
            cells.append(f"{value:.1f}{doubt(name, column=column)}" if value else "-")
        rows.append(cells)
    marks = verdicts(dtype, results)
    for peer in names[1:]:
        found = ratios(results, peer)
        cells = [f"{found[c]:.2f}" if c in found else "-" for c in COLUMNS]
        rows.append([f"ratio to {peer}", *cells])
        if dtype == "float32":
            needed = REQUIRED[peer]
            rows.append(
                ["  required"] + [f"{needed[c]:.2f}" if c in needed else "-" for c in COLUMNS]
            )
            cells = ["  reached"]
            for column in COLUMNS:
                mark = {True: "pass", False: "FAIL", None: "-"}[marks.get((peer, column))]
                cells.append(mark + (doubt(OURS, peer, column=column) if mark != "-" else ""))
            rows.append(cells)
    return table([dtype, *COLUMNS.values()], rows)


def format_latencies(results: Results) -> str:
    """Set the times of the clients' column in a table."""
    rows = []
    for name, runs in results.keys.items():
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "output_throughput")
        }
        how = "HTTP, streamed" if name == OURS else "one engine-level batch"
        rows.append([f"{name} ({how})", *(f"{value:.1f}" for value in middle.values())])
    return table(
        [COLUMNS["http"], "mean TTFT ms", "p99 TTFT ms", "mean TPOT ms", "out tok/s"], rows
    )


def describe_load(results: Results) -> str:
    """Say how quiet the machine was."""
    samples = [sample for several in results.samples.values() for sample in several]
    noisy = sum(not sample.is_quiet for sample in samples)
    idle = statistics.median(sample.load.idle for sample in samples)
    foreign = statistics.median(sample.load.foreign for sample in samples)
    text = (
        f"processor while measuring (median): idle engines {idle:.1%} of a core, everything else "
        f"{foreign:.1%}. {noisy} of {len(samples)} samples were disturbed (over {NOISY:.0%}) and "
        "do not count"
    )
    if any(is_disturbed(results, *key) for key in results.samples):
        return f"{text}, except where a '?' says that no other was to be had: run again when quiet."
    return f"{text}."


def write_lines(recorder: Recorder, dtype: str, results: Results) -> None:
    """Write one JSON line per engine and column, and one with the ratios."""
    for (name, column), samples in results.samples.items():
        recorder.write(
            column,
            engine=name,
            dtype=dtype,
            unit="tokens/s",
            **summary(counted(results, name, column)),
            samples=[round(sample.rate, 2) for sample in samples],
            foreign_load=[round(sample.load.foreign, 3) for sample in samples],
            disturbed=is_disturbed(results, name, column),
            about=results.about[name],
        )
    for name, runs in results.keys.items():
        middle = sorted(runs, key=lambda run: run["output_throughput"])[len(runs) // 2]
        recorder.write("clients", engine=name, dtype=dtype, result=middle)
    recorder.write(
        "ratios",
        dtype=dtype,
        ratios={peer: ratios(results, peer) for peer in PEER_MODULES},
        required=REQUIRED if dtype == "float32" else None,
        reached={f"{p} {c}": ok for (p, c), ok in verdicts(dtype, results).items()},
        failed=results.failed,
    )


def chosen_peers(text: str) -> list[str]:
    """Read `--peers`; without an oracle environment there are none.

    Raises:
        SystemExit: If a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEER_MODULES]
    if unknown:
        known = ", ".join(PEER_MODULES)
        raise SystemExit(f"unknown peer {', '.join(unknown)}; known: {known}")
    if names and oracle_python() is None:
        say(
            "No oracle environment: measuring jaxserve alone. `make oracles` makes one "
            "(JAXSERVE_ORACLE_PYTHON names another Python with torch, transformers, gguf and "
            "llama_cpp_python)."
        )
        return []
    return names


def measure(comparison: Comparison, repeats: int, has_time: Callable[[float], bool]) -> Results:
    """Run rounds until there are enough, or until another one would not fit into the time."""
    with comparison.open():
        for number in range(repeats):
            started = time.monotonic()
            comparison.round(number)
            took = time.monotonic() - started
            say(f"[{comparison.dtype}] round {number + 1} of {repeats}: {took:.0f} s")
            if number + 1 < repeats and not has_time(took):
                say(f"[{comparison.dtype}] no time for another round")
                break
    return comparison.results


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="", help=f"comma-separated: {', '.join(PEER_MODULES)}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per precision")
    parser.add_argument("--steps", type=int, default=48, help="decode steps per sample")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or GGUF file")
    parser.add_argument("--no-http", action="store_true", help="leave the clients' column out")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a ratio is missed")
    return parser.parse_args()


def main() -> None:
    """Measure every precision and print one table for each."""
    from jaxserve.models.hub import resolve_model

    args = parse_args()
    started = time.monotonic()
    peers = chosen_peers(args.peers)
    gguf = resolve_model(args.model)
    recorder = Recorder("serving", out=args.out)
    dtypes = ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]
    missed: list[str] = []
    print(f"{machine()['cpu']}, {machine()['cores']} cores; medians of interleaved rounds\n")
    for index, dtype in enumerate(dtypes):
        comparison = Comparison(
            dtype, peers, args.model, gguf, steps=args.steps, http=not args.no_http
        )
        limit = started + args.budget * (index + 1) / len(dtypes)

        def has_time(seconds: float, limit: float = limit) -> bool:
            return time.monotonic() + seconds < limit

        results = measure(comparison, args.repeats, has_time)
        print(format_table(dtype, results))
        if results.keys:
            print("\n" + format_latencies(results))
        print("\n" + describe_load(results))
        for name, reason in results.failed.items():
            print(f"{name} was left out: {reason}")
        print(flush=True)
        write_lines(recorder, dtype, results)
        missed += [
            f"{dtype} {c} to {p}" for (p, c), ok in verdicts(dtype, results).items() if not ok
        ]
    if missed:
        print("required ratios missed: " + ", ".join(missed))
    print(f"result lines: {recorder.path.name}; {time.monotonic() - started:.0f} s in all")
    raise SystemExit(1 if args.strict and missed else 0)


if __name__ == "__main__":
    main()
