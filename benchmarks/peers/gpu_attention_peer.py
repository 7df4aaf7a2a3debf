"""FlashInfer over pages, and torch's scaled_dot_product_attention over dense keys, on a GPU.

Each is measured where it can be imported. Steps are described by numbers only, so that this runs
without JAX; values are random and its own, and only times are compared.
"""

import argparse
import platform
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import protocol

CHAIN = 10
"""Calls per sample; times are of the device."""


class GpuAttentionPeer:
    """Peers of our kernels; see `benchmarks.gpu_cases.Step` for the words."""

    def load(self, *, device: str = "cuda") -> dict[str, Any]:
        """Choose the device, and say what can be imported."""
        self._device = torch.device(device)
        found = {"torch": torch.__version__, "python": platform.python_version()}
        try:
            import flashinfer

            self._flashinfer = flashinfer if device == "cuda" else None
            found["flashinfer"] = flashinfer.__version__
        except ImportError:
            self._flashinfer = None
        return {"name": "torch", "versions": found, "settings": {"chain": CHAIN}}

    @torch.inference_mode()
    def attention(
        self,
        q_len: list[int],
        kv_len: list[int],
        page_size: int,
        heads: list[int],
        dim: int,
        repeats: int,
    ) -> dict[str, Any]:
        """Time one step in bfloat16; answers with `seconds` and `refusals` by implementation."""
        seconds: dict[str, list[float]] = {}
        refusals: dict[str, str] = {}
        makers = {
            "torch sdpa": lambda: self._sdpa(q_len, kv_len, heads, dim),
            "flashinfer": lambda: self._over_pages(q_len, kv_len, page_size, heads, dim),
        }
        for name, make in makers.items():
            try:
                seconds[name] = self._time(make(), repeats)
            except Exception as error:  # noqa: BLE001  the other one must still run
                refusals[name] = f"{type(error).__name__}: {str(error)[:300]}"
        return {"seconds": seconds, "refusals": refusals}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self._device)

    def _sdpa(
        self, q_len: list[int], kv_len: list[int], heads: list[int], dim: int
    ) -> Callable[[], Any]:
        if len(set(q_len)) > 1 or len(set(kv_len)) > 1 or q_len[0] not in (1, kv_len[0]):
            raise ValueError("requests of different sizes, or chunks")
        q = self._random(len(q_len), heads[0], q_len[0], dim)
        k, v = (self._random(len(q_len), heads[1], kv_len[0], dim) for _ in range(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=q_len[0] > 1, enable_gqa=True)

    def _over_pages(
        self, q_len: list[int], kv_len: list[int], page_size: int, heads: list[int], dim: int
    ) -> Callable[[], Any]:
        if self._flashinfer is None:
            raise ValueError("it cannot be imported, or there is no GPU")
        used = [-(-n // page_size) for n in kv_len]

        def summed(counts: list[int]) -> torch.Tensor:
            total = torch.tensor([0, *counts]).cumsum(0)
            return total.to(torch.int32).to(self._device)

        indices = torch.randperm(sum(used)).to(torch.int32).to(self._device)
        last = torch.tensor([(n - 1) % page_size + 1 for n in kv_len], dtype=torch.int32)
        shape = (sum(used), heads[1], page_size, dim)
        cache = (self._random(*shape), self._random(*shape))
        space = torch.zeros(256 << 20, dtype=torch.uint8, device=self._device)
        q = self._random(sum(q_len), heads[0], dim)
        pages = (summed(used), indices, last.to(self._device))
        if max(q_len) == 1:
            wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_tensor_cores=True
            )
            wrapper.plan(
                *pages, heads[0], heads[1], dim, page_size,
                q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            )  # fmt: skip
        else:
            wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
            wrapper.plan(
                summed(q_len), *pages, heads[0], heads[1], dim, page_size,
                causal=True, q_data_type=torch.bfloat16,
            )  # fmt: skip
        return lambda: wrapper.run(q, cache)

    def _time(self, call: Callable[[], Any], repeats: int) -> list[float]:
        call()
        call()
        if self._device.type != "cuda":
            import time

            started = time.perf_counter()
            call()
            return [time.perf_counter() - started]
        torch.cuda.synchronize()
        found = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CHAIN):
                call()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / CHAIN)
        return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(GpuAttentionPeer())
