"""torch's scaled_dot_product_attention on dense, padded keys and values.

The group of query heads that share a head of keys goes into the axis of queries, so that nothing is
repeated; that was faster here than `enable_gqa`.
"""

import argparse
import platform
import time
from typing import Any

import numpy as np
import torch

from benchmarks.peers import protocol
from benchmarks.peers.attention_inputs import dense_inputs


class SdpaPeer:
    """Attention of padded batches; the last query of a request stands at its last key."""

    def load(self, *, threads: int) -> dict[str, Any]:
        """Set the number of threads."""
        torch.set_num_threads(threads)
        return {
            "name": "torch SDPA",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "settings": {"threads": threads, "form": "group in the axis of queries"},
        }

    def prepare(
        self,
        q_len: list[int],
        kv_len: list[int],
        heads: list[int],
        dim: int,
        dtype: str,
        seed: int,
    ) -> dict[str, Any]:
        """Draw and pad the inputs."""
        q, k, v = dense_inputs(q_len, kv_len, (heads[0], heads[1]), dim, seed)
        batch, most_q, most_k = len(q_len), max(q_len), max(kv_len)
        group = heads[0] // heads[1]
        queries = np.zeros((batch, heads[1], most_q, group, dim), np.float32)
        keys, values = (np.zeros((batch, heads[1], most_k, dim), np.float32) for _ in range(2))
        seen = np.zeros((batch, 1, most_q, group, most_k), np.bool_)
        for i, (n, m) in enumerate(zip(q_len, kv_len, strict=True)):
            queries[i, :, :n] = q[i].reshape(n, heads[1], group, dim).swapaxes(0, 1)
            keys[i, :, :m], values[i, :, :m] = k[i].swapaxes(0, 1), v[i].swapaxes(0, 1)
            position = m - n + np.arange(most_q)
            seen[i, 0] = (np.arange(most_k)[None, :] <= position[:, None])[:, None, :]
            seen[i, ..., m:] = False
            seen[i, 0, n:, :, 0] = True
        kind = getattr(torch, dtype)
        rows = most_q * group
        self._q = torch.from_numpy(queries.reshape(batch, heads[1], rows, dim)).to(kind)
        self._k, self._v = (torch.from_numpy(x).to(kind) for x in (keys, values))
        # Without anything to hide a mask would only cost.
        mask = torch.from_numpy(seen.reshape(batch, 1, rows, most_k))
        self._mask = None if bool(mask.all()) else mask
        self._last = [(n - 1) * group for n in q_len]
        return {}

    @torch.inference_mode()
    def run(self, repeats: int) -> dict[str, Any]:
        """Attend; answer with `seconds` of each call, and what each request's last query got."""
        seconds: list[float] = []
        for _ in range(repeats):
            start = time.perf_counter()
            out = torch.nn.functional.scaled_dot_product_attention(
                self._q, self._k, self._v, attn_mask=self._mask
            )
            seconds.append(time.perf_counter() - start)
        last = [out[i, 0, row, :4].float().tolist() for i, row in enumerate(self._last)]
        return {"seconds": seconds, "last": last}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(SdpaPeer())
