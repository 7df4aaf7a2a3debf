"""Live weights: right tokens, seconds, memory and compilations of `update_params`.

    python -m benchmarks.update_params

One engine is loaded with the model, another with changed weights. Then the first gets the changed
weights while it runs: from there on it must say exactly what the second says, greedy and drawn.
Every way of bringing weights in is timed, idle and under load, with the memory that it takes.
"""

import argparse
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import psutil
from flax import nnx

from benchmarks.record import Recorder, summary, table
from benchmarks.steady import CompileCounter
from jaxserve import LLM, SamplingParams
from jaxserve.models.hub import resolve_model

PROMPTS = ("The sky is", "Once upon a time", "def add(a, b):", "One, two, three,")
SETTINGS: dict[str, Any] = {
    "max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 128, "warmup": "full",
    "kv_cache_memory_bytes": 512 << 20,
}  # fmt: skip
MIB = 2**20


class Memory:
    """Watches the memory of this process from the beginning of a block to its end."""

    def __init__(self) -> None:
        """Look at nothing yet."""
        self.peak = self.kept = 0
        self._process = psutil.Process()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> Self:
        """Start watching."""
        gc.collect()
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching; `peak` and `kept` are bytes above the beginning from now on."""
        self._is_over.set()
        self._thread.join()
        gc.collect()
        after = self._process.memory_info().rss
        self.peak = max(0, max(self.peak, after) - self._before)
        self.kept = max(0, after - self._before)


@dataclass(slots=True)
class Way:
    """One way of bringing weights in.

    Attributes:
        seconds: From call to swap, per repetition.
        peak: Most bytes above the beginning.
        shared: Arrays that became the served ones, of all.
        cast: Arrays whose dtype was changed.
        compiled: Programs compiled by the engine and by JAX, first repetition not counted.
    """

    seconds: list[float] = field(default_factory=list[float])
    peak: int = 0
    shared: int = 0
    cast: int = 0
    compiled: int = 0


def say(llm: LLM) -> list[tuple[int, ...]]:
    """Return tokens for every prompt, greedy and drawn."""
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    drawn = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=32, ignore_eos=True)
    tokens: list[tuple[int, ...]] = []
    for prompt in PROMPTS:
        outputs = llm.generate([prompt, prompt], [greedy, drawn], use_tqdm=False)
        tokens += [tuple(output.outputs[0].token_ids) for output in outputs]
    return tokens


def changed(state: nnx.State, seed: int) -> nnx.State:
    """Return other weights: each one differs by about two per cent."""
    random = np.random.default_rng(seed)

    def change(array: jax.Array) -> jax.Array:
        noise = 1 + 0.02 * random.standard_normal(array.shape, np.float32)
        return jax.device_put((np.asarray(array, np.float32) * noise).astype(array.dtype))

    return jax.tree.map(change, state)


def measure(
    llm: LLM, counter: CompileCounter, make: Callable[[int], Callable[[], Any]], repeats: int
) -> Way:
    """Bring weights in several times.

    Args:
        llm: The engine.
        counter: Counts what JAX compiles.
        make: Given the number of the repetition, prepares weights and returns what brings them in.
        repeats: How often.
    """
    way = Way()
    for index in range(repeats):
        bring = make(index)
        before = llm.metrics.num_compilations + counter.count
        with Memory() as memory:
            done = bring()
        way.seconds.append(done.seconds)
        way.peak = max(way.peak, memory.peak)
        way.shared, way.cast = done.num_shared, done.num_cast
        if index:
            way.compiled += llm.metrics.num_compilations + counter.count - before
        say(llm)
    return way


def under_load(llm: LLM, update: Callable[[], Any]) -> Callable[[], Any]:
    """Return an update that happens while four completions are under way."""

    def bring() -> Any:  # noqa: ANN401
        params = SamplingParams(max_tokens=48, ignore_eos=True)
        start = llm.metrics.generation_tokens
        thread = threading.Thread(
            target=llm.generate, args=(list(PROMPTS), params), kwargs={"use_tqdm": False}
        )
        thread.start()
        while llm.metrics.generation_tokens < start + 16:
            threading.Event().wait(0.001)
        done = update()
        thread.join()
        return done

    return bring


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    return parser.parse_args()


def compare(llm: LLM, new: nnx.State) -> list[str]:
    """Compare an updated engine with a freshly loaded one; return what is wrong."""
    with LLM((llm.model_config, new), tokenizer=llm.get_tokenizer(), **SETTINGS) as fresh:
        expected = say(fresh)
    before = say(llm)
    wrong: list[str] = []
    if before == expected:
        wrong.append("the changed weights change nothing, so the comparison shows nothing")
    llm.update_params(new)
    after = say(llm)
    differing = sum(a != b for a, b in zip(after, expected, strict=True))
    if differing:
        wrong.append(f"{differing} of {len(expected)} continuations differ from a fresh engine's")
    return wrong


def main() -> None:
    """Compare, measure, print; exit with 1 if anything is wrong."""
    args = parse_args()
    llm = LLM(args.model, dtype=args.dtype, **SETTINGS)
    counter = CompileCounter()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
    wrong = compare(llm, changed(llm.params, seed=0))
    dtype = llm.config.model.dtype
    other = "bfloat16" if dtype == "float32" else "float32"

    def arrays(index: int) -> nnx.State:
        return changed(llm.params, seed=index)

    def direct(index: int) -> Callable[[], Any]:
        params = arrays(index)
        return lambda: llm.update_params(params)

    def loaded(index: int) -> Callable[[], Any]:
        return under_load(llm, direct(index))

    def cast(index: int) -> Callable[[], Any]:
        params = jax.tree.map(lambda leaf: leaf.astype(other), arrays(index))
        return lambda: llm.update_params(params)

    def host(index: int) -> Callable[[], Any]:
        params = jax.tree.map(np.array, arrays(index))
        return lambda: llm.update_params(params)

    def disk(_index: int) -> Callable[[], Any]:
        place = resolve_model(args.model)
        return lambda: llm.update_weights_from_disk(place)

    makers: dict[str, Callable[[int], Callable[[], Any]]] = {
        "same dtype and sharding": direct,
        "the same, 4 completions running": loaded,
        f"cast from {other}": cast,
        "numpy arrays": host,
        "checkpoint on disk": disk,
    }
    ways = {name: measure(llm, counter, make, args.repeats) for name, make in makers.items()}
    llm.close()
    for name in list(makers)[:2]:
        if ways[name].compiled:
            wrong.append(f"{name}: {ways[name].compiled} compilations, expected none")
    rows = [
        [
            name, f"{1000 * summary(way.seconds)['median']:.2f}", f"{way.peak / MIB:.0f}",
            str(way.shared), str(way.cast), str(way.compiled),
        ]
        for name, way in ways.items()
    ]  # fmt: skip
    header = ["", "median ms", "peak MiB more", "shared", "cast", "compiled"]
    print(f"{args.model}, {dtype}, {total / MIB:.0f} MiB of weights")
    print(table(header, rows))
    print(f"continuations compared with a freshly loaded engine: {2 * len(PROMPTS)}")
    recorder = Recorder("update_params", out=args.out)
    for name, way in ways.items():
        recorder.write(
            name, dtype=dtype, weight_bytes=total, seconds=summary(way.seconds),
            peak_bytes=way.peak, shared=way.shared, cast=way.cast, compiled=way.compiled,
            wrong=wrong,
        )  # fmt: skip
    for text in wrong:
        print(f"WRONG: {text}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
