"""Steps of attention at sizes that are served, for kernels and their peers on a GPU."""

import dataclasses
from typing import Any

import numpy as np

from jaxserve.pallas_kernels.attention import mosaic_prefill
from jaxserve.pallas_kernels.attention.card import num_bytes, num_flops
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import SharedPrefix, make_plan

HEADS = (32, 8)
DIM = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        q_len: Query tokens of each request.
        kv_len: Keys of each request.
        page_size: Tokens per page.
        kv_dtype: Dtype of keys and values.
        shared: Keys at the beginning that all requests have in the same pages.
        cascade: Whether shared keys are read once for all.
    """

    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    page_size: int = 16
    kv_dtype: str = "bfloat16"
    shared: int = 0
    cascade: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether every request has one token."""
        return max(self.q_len) == 1

    @property
    def is_even(self) -> bool:
        """Whether all requests are of one size, as dense peers need them."""
        return len(set(zip(self.q_len, self.kv_len, strict=True))) == 1

    @property
    def num_pages(self) -> int:
        """Pages of all requests, each counted for every request that reads it."""
        return sum(-(-n // self.page_size) for n in self.kv_len)

    def spec(self, backend: str) -> PlanSpec:
        """Return the plan's spec, with tiles that suit a backend."""
        group = HEADS[0] // HEADS[1]
        tiles = {}
        if backend == "mosaic" and self.is_decode and not self.cascade:
            tiles = {"tile_q": group}
        elif backend == "mosaic":
            tiles = {"tile_q": mosaic_prefill.tile_q(group), "tile_kv": 128}
        return PlanSpec(
            q_heads=HEADS[0],
            kv_heads=HEADS[1],
            head_dim=DIM,
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            max_requests=len(self.q_len),
            max_tokens=sum(self.q_len),
            max_pages=self.num_pages,
            cascade_levels=int(self.cascade),
            **tiles,
        )

    def table(self) -> PageTable:
        """Return pages in random order; page 0 is nobody's."""
        used = np.array([-(-n // self.page_size) for n in self.kv_len])
        indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
        pages = 1 + np.random.default_rng(0).permutation(self.num_pages).astype(np.int32)
        for first in indptr[:-1]:
            count = self.shared // self.page_size
            pages[first : first + count] = pages[:count]
        return PageTable(indptr=indptr, indices=pages, kv_len=np.array(self.kv_len, np.int32))

    def plan(self, backend: str) -> Plan:
        """Return the plan."""
        shared = []
        if self.cascade:
            everybody = tuple(range(len(self.q_len)))
            shared = [SharedPrefix(requests=everybody, begin=0, end=self.shared)]
        return make_plan(self.spec(backend), np.array(self.q_len), self.table(), shared=shared)

    def shapes(self, backend: str) -> tuple[Any, PagedKV, Plan]:
        """Return what stands for queries, cache and plan while a kernel is compiled."""
        import jax

        spec, array = self.spec(backend), jax.ShapeDtypeStruct
        pool = array((self.num_pages + 1, HEADS[1], self.page_size, DIM), self.kv_dtype)
        scale = None if self.kv_dtype == "bfloat16" else array((HEADS[1],), "float32")
        return (
            array((spec.max_tokens, HEADS[0], DIM), "bfloat16"),
            PagedKV(k=pool, v=pool, k_scale=scale, v_scale=scale),
            Plan(buffer=array((spec.num_words,), "int32"), spec=spec),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: each request's own keys once, shared ones once for all."""
        total = 0
        for index, (q_len, kv_len) in enumerate(zip(self.q_len, self.kv_len, strict=True)):
            keys = kv_len - (self.shared if index else 0)
            sizes = {"requests": 1, "q_len": q_len, "kv_len": keys, "head_dim": DIM}
            total += num_bytes({**sizes, "q_heads": HEADS[0], "kv_heads": 0}, "bfloat16")
            total += num_bytes({**sizes, "q_heads": 0, "kv_heads": HEADS[1]}, self.kv_dtype)
        return total

    @property
    def num_flops(self) -> int:
        """Operations of both products, over the pairs that causality leaves."""
        return sum(
            num_flops(
                {"requests": 1, "q_len": n, "kv_len": m, "q_heads": HEADS[0], "head_dim": DIM}
            )
            for n, m in zip(self.q_len, self.kv_len, strict=True)
        )


STEPS = {
    "decode 64 x 4096": Step(q_len=(1,) * 64, kv_len=(4096,) * 64),
    "decode 64 x 4096, pages of 64": Step(q_len=(1,) * 64, kv_len=(4096,) * 64, page_size=64),
    "decode 64 x 4096, float8": Step(
        q_len=(1,) * 64, kv_len=(4096,) * 64, kv_dtype="float8_e4m3fn"
    ),
    "decode 1 x 32768": Step(q_len=(1,), kv_len=(32768,)),
    "decode 32, one of them long": Step(q_len=(1,) * 32, kv_len=(32768, *(1024,) * 31)),
    "prefill 1 x 16384": Step(q_len=(16384,), kv_len=(16384,), page_size=64),
    "prefill 8 x 2048": Step(q_len=(2048,) * 8, kv_len=(2048,) * 8),
    "chunks 4 x 512 of 4096": Step(q_len=(512,) * 4, kv_len=(4096,) * 4),
    "64 with 8192 shared, flat": Step(q_len=(1,) * 64, kv_len=(8448,) * 64, shared=8192),
    "64 with 8192 shared, cascade": Step(
        q_len=(1,) * 64, kv_len=(8448,) * 64, shared=8192, cascade=True
    ),
}
"""By name. Those of a rehearsal are `TINY_STEPS`."""

TINY_STEPS = {
    "decode 2 x 64": Step(q_len=(1, 1), kv_len=(64, 64)),
    "prefill 1 x 64": Step(q_len=(64,), kv_len=(64,)),
    "2 with 32 shared, cascade": Step(q_len=(1, 1), kv_len=(64, 64), shared=32, cascade=True),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListStep:
    """One decode step that reads a part of its tokens.

    Attributes:
        requests: Requests of it.
        kv_len: Keys of each.
        share: Mean share of them that is on a list.
        spread: Standard deviation of the logarithm of that share over heads: their lists differ by
            orders of magnitude.
        page_size: Tokens per page.
    """

    requests: int
    kv_len: int
    share: float = 0.1
    spread: float = 1.0
    page_size: int = 16

    @property
    def dense(self) -> Step:
        """The step that reads everything."""
        each = (1,) * self.requests, (self.kv_len,) * self.requests
        return Step(q_len=each[0], kv_len=each[1], page_size=self.page_size)

    def counts(self) -> np.ndarray:
        """Return how many tokens are on each list."""
        rng = np.random.default_rng(0)
        drawn = rng.lognormal(sigma=self.spread, size=self.requests * HEADS[1])
        counts = drawn / drawn.mean() * self.share * self.kv_len
        return np.clip(counts.astype(np.int64), 1, self.kv_len)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return where pages begin, pages, where lists begin, and positions in random order."""
        table, rng = self.dense.table(), np.random.default_rng(1)
        counts = self.counts()
        rows = [rng.permutation(self.kv_len)[:count] for count in counts]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return table.indptr, table.indices, indptr, np.concatenate(rows).astype(np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: queries, outputs, positions, and rows of both pools."""
        listed = int(self.counts().sum())
        return listed * (2 * DIM * 2 + 4) + 2 * self.requests * HEADS[0] * DIM * 2

    @property
    def num_flops(self) -> int:
        """Operations of both products."""
        return 4 * int(self.counts().sum()) * HEADS[0] // HEADS[1] * DIM


LIST_STEPS = {
    f"lists {requests} x {kv_len}": ListStep(requests=requests, kv_len=kv_len)
    for kv_len in (32768, 65536, 131072)
    for requests in (1, 8)
}
"""By name; one in ten tokens is read. Those of a rehearsal are `TINY_LIST_STEPS`."""

TINY_LIST_STEPS = {"lists 2 x 64": ListStep(requests=2, kv_len=64)}
