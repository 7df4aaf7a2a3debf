"""transformers as an embedding peer: sorted by length, padded batches, mean pooling, norm.

What `SentenceTransformer.encode` does with all-MiniLM-L6-v2, without that package and with the
batch size that was fastest: texts are sorted by length, cut into batches, tokenized with padding to
the longest of the batch, and pooled.
"""

import argparse
import os
import platform
import time
from typing import Any

import torch
import transformers

from benchmarks.peers import protocol


class EmbeddingPeer:
    """`BertModel` in inference mode."""

    def load(
        self,
        *,
        path: str,
        threads: int = 2,
        batch_size: int = 8,  # the fastest: README.md
        max_length: int = 256,
        attention: str = "sdpa",
    ) -> dict[str, Any]:
        """Load a model directory.

        Args:
            path: The directory.
            threads: Threads of torch.
            batch_size: Texts per batch.
            max_length: Longer texts are cut.
            attention: "sdpa" or "eager".
        """
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._model = transformers.AutoModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention
        ).eval()
        self._batch_size, self._max_length = batch_size, max_length
        return {
            "name": "transformers",
            "versions": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "settings": {
                "dtype": "float32",
                "threads": threads,
                "batch_size": batch_size,
                "attention": attention,
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
            },
        }

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts; answer with `seconds`, the first vector and the number of tokens."""
        started = time.perf_counter()
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors: list[Any] = [None] * len(texts)
        num_tokens = 0
        for low in range(0, len(order), self._batch_size):
            places = order[low : low + self._batch_size]
            batch = self._tokenizer(
                [texts[i] for i in places],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            num_tokens += int(mask.sum())
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            pooled = torch.nn.functional.normalize(pooled, dim=1).numpy()
            for place, vector in zip(places, pooled, strict=True):
                vectors[place] = vector
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": num_tokens, "first": vectors[0].tolist()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(EmbeddingPeer())
