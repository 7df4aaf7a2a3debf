"""jaxserve as a measured process, through the public `LLM`; see `benchmarks.peers.protocol`."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers import protocol
from benchmarks.record import versions
from jaxserve import LLM, SamplingParams


def best_seconds(program: Callable[..., jax.Array], *inputs: jax.Array) -> float:
    """Time a program: the best of five bursts of ten launches."""
    program(*inputs).block_until_ready()
    bursts = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            result = program(*inputs)
        result.block_until_ready()
        bursts.append((time.perf_counter() - started) / 10)
    return min(bursts)


def greedy(num_tokens: int) -> SamplingParams:
    """Return parameters that generate exactly so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


class JaxserveWorker:
    """The whole engine: scheduling, sampling, detokenizing and events are in every figure."""

    def ceilings(self, gib: float, size: int) -> dict[str, Any]:
        """Measure what the device can do at most; called before `load`, frees its memory.

        Args:
            gib: Size of the array that is read and copied.
            size: Rows and columns of the bfloat16 matrices that are multiplied.
        """
        x = jnp.ones((int(gib * 2**20), 512), jnp.bfloat16)
        read = best_seconds(jax.jit(lambda v: jnp.max(v, axis=0)), x)
        copy = best_seconds(jax.jit(lambda v: -v), x)
        a, b = (
            jax.random.normal(jax.random.key(i), (size, size)).astype(jnp.bfloat16) for i in (0, 1)
        )
        product = best_seconds(jax.jit(jnp.matmul), a, b)
        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.platform,
            "read_gb_s": x.nbytes / read / 1e9,
            "copy_gb_s": 2 * x.nbytes / copy / 1e9,
            "matmul_tflop_s": 2 * size**3 / product / 1e12,
        }

    def load(
        self,
        *,
        model: str,
        dtype: str,
        warmup: str = "full",
        **settings: Any,  # noqa: ANN401  whatever LLM takes
    ) -> dict[str, Any]:
        """Load the model and compile its steps.

        Args:
            model: Name or path.
            dtype: Precision.
            warmup: When steps are compiled.
            **settings: Further settings of `LLM`.
        """
        self._llm = LLM(model, dtype=dtype, warmup=warmup, **settings)
        return {
            "name": "jaxserve",
            "versions": versions(),
            "settings": {"dtype": dtype, "warmup": warmup, **settings},
            "compilations": self._llm.metrics.num_compilations,
            "compile_s": self._llm.metrics.compile_seconds,
        }

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Time one prompt, new to the prefix cache, from arrival to its first token."""
        (output,) = self._llm.generate(prompt, greedy(1), use_tqdm=False)
        if output.num_cached_tokens:
            raise RuntimeError(f"{output.num_cached_tokens} tokens of the prompt were cached")
        times = output.metrics
        return {
            "seconds": times.first_token_time - times.arrival_time,
            "token": output.outputs[0].token_ids[0],
        }

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Time the decode phase of prompts whose prefixes are cached, so that all start together.

        Tokens after each first one, over the time from the earliest first token to the last token.
        """
        self._llm.generate(prompts, greedy(1), use_tqdm=False)
        outputs = self._llm.generate(prompts, greedy(steps + 1), use_tqdm=False)
        begin = min(output.metrics.first_token_time for output in outputs)
        end = max(output.metrics.last_token_time for output in outputs)
        count = sum(len(output.outputs[0].token_ids) - 1 for output in outputs)
        return {
            "tokens_per_s": count / (end - begin),
            "steps": steps,
            "tokens": outputs[0].outputs[0].token_ids[2:10],
        }

    def burst(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Serve all prompts from start to end, without HTTP."""
        outputs = self._llm.generate(prompts, greedy(steps), use_tqdm=False)
        times = [output.metrics for output in outputs]
        begin = min(t.arrival_time for t in times)
        seconds = max(t.last_token_time for t in times) - begin
        return {
            "seconds": seconds,
            "ttft_s": [t.first_token_time - t.arrival_time for t in times],
            "tpot_s": [(t.last_token_time - t.first_token_time) / (steps - 1) for t in times],
            "tokens_per_s": len(prompts) * steps / seconds,
        }


if __name__ == "__main__":
    protocol.serve(JaxserveWorker())
