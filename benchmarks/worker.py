"""jaxserve as a measured process, through the public `LLM`; see `benchmarks.peers.protocol`."""

from typing import Any

from benchmarks.peers import protocol
from benchmarks.record import versions
from jaxserve import LLM, SamplingParams


def greedy(num_tokens: int) -> SamplingParams:
    """Return parameters that generate exactly so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


class JaxserveWorker:
    """The whole engine: scheduling, sampling, detokenizing and events are in every figure."""

    def load(self, *, model: str, dtype: str, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
        """Load the model and compile every step.

        Args:
            model: Name or path.
            dtype: Precision.
            **settings: Further settings of `LLM`.
        """
        self._llm = LLM(model, dtype=dtype, warmup="full", **settings)
        return {
            "name": "jaxserve",
            "versions": versions(),
            "settings": {"dtype": dtype, **settings},
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
