"""jaxserve as a measured process that embeds, through the public `LLM`."""

import time
from typing import Any

from benchmarks.peers import protocol
from benchmarks.record import versions
from jaxserve import LLM


class EmbeddingWorker:
    """Tokenizing, batching and the encoder, as a caller of `LLM.embed` gets them."""

    def load(self, *, path: str, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
        """Load the model and compile its batches.

        Args:
            path: Name or path of the model.
            **settings: Further settings of `LLM`.
        """
        self._llm = LLM(path, warmup="full", **settings)
        return {"name": "jaxserve", "versions": versions(), "settings": settings}

    def embed(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts; answer with `seconds`, the first vector and the number of tokens."""
        before = self._llm.metrics.num_compilations
        started = time.perf_counter()
        outputs = self._llm.embed(texts, use_tqdm=False, truncate_prompt_tokens=-1)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "first": outputs[0].outputs.embedding,
            "compilations": self._llm.metrics.num_compilations - before,
        }


if __name__ == "__main__":
    protocol.serve(EmbeddingWorker())
