"""transformers as a peer: the GGUF dequantised, one padded batch of equal lengths, bare steps.

The figures flatter it: no scheduler, no detokenizing, no server; a loop of forward passes with
the key-value cache, the logits of the last position only, and an argmax.
"""

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers import protocol


class TransformersPeer:
    """Decode loop over `model.forward` in inference mode."""

    def load(
        self,
        *,
        gguf: str,
        dtype: str,
        threads: int = 2,
        cache: str = "dynamic",
        attention: str | None = None,
    ) -> dict[str, Any]:
        """Load and dequantise a GGUF file.

        Args:
            gguf: Path of the file.
            dtype: "float32" or "bfloat16".
            threads: Threads of torch.
            cache: "dynamic" or "static".
            attention: "sdpa" or "eager"; None: the faster of the two.
        """
        if attention is None:
            attention = "sdpa" if dtype == "float32" else "eager"  # measured: README.md
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = Path(gguf)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=attention
        )
        self._model = model.to(getattr(torch, dtype)).eval()
        self._cache_kind = cache
        return {
            "name": "transformers",
            "versions": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "settings": {
                "dtype": dtype,
                "threads": threads,
                "cache": cache,
                "attention": attention,
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
            },
        }

    def _new_cache(self, max_len: int) -> transformers.Cache:
        if self._cache_kind == "static":
            return transformers.StaticCache(config=self._model.config, max_cache_len=max_len)
        return transformers.DynamicCache(config=self._model.config)

    def _step(self, ids: torch.Tensor, cache: transformers.Cache) -> torch.Tensor:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Time one prompt from its ids to its first token."""
        started = time.perf_counter()
        ids = torch.tensor([prompt])
        token = self._step(ids, self._new_cache(len(prompt) + 1)).item()
        return {"seconds": time.perf_counter() - started, "token": token}

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Time decode steps after an untimed prefill."""
        cache = self._new_cache(len(prompts[0]) + steps + 2)
        ids = self._step(torch.tensor(prompts), cache)
        ids = self._step(ids, cache)
        seconds, first = [], []
        for _ in range(steps):
            started = time.perf_counter()
            ids = self._step(ids, cache)
            first.append(int(ids[0, 0]))
            seconds.append(time.perf_counter() - started)
        return {**protocol.decode_result(seconds, len(prompts)), "tokens": first[:8]}

    @torch.inference_mode()
    def burst(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Serve all prompts as one batch from start to end."""
        started = time.perf_counter()
        cache = self._new_cache(len(prompts[0]) + steps + 1)
        ids = self._step(torch.tensor(prompts), cache)
        ids.tolist()
        first = time.perf_counter()
        for _ in range(steps - 1):
            ids = self._step(ids, cache)
            ids.tolist()
        return protocol.burst_result(started, first, time.perf_counter(), len(prompts), steps)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(TransformersPeer())
