"""Cases of attention to try on every backend: a spec, a variant, and the same for the oracle.

A case fixes what is static; lengths and contents are drawn, so that one compiled program serves
many examples.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from jaxserve.pallas_kernels import variant
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.prefixes import SharedPrefix
from jaxserve.pallas_kernels.variant import AttentionVariant
from tests.kernels import request_oracle
from tests.kernels.plans import lengths, page_table
from tests.kernels.request_oracle import Options

MAX_REQUESTS, MAX_TOKENS, LONGEST = 5, 72, 260

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""By dtype of queries: rounding of the output, and of weights before they meet the values."""


PLAIN = Options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is static, and what it means.

    Attributes:
        heads: Query heads and key-value heads.
        page_size: Tokens per page.
        settings: Settings of the spec.
        kind: The variant.
        options: The same for the oracle.
        extras: Names of extras that are drawn, one value per head.
        masks: "none", "shared" or "per_head".
        scales: "none", "tensor", "head" or "page".
        share: Whether requests may share prefixes.
    """

    heads: tuple[int, int] = (4, 2)
    page_size: int = 16
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: AttentionVariant = variant.PLAIN
    options: Options = PLAIN
    extras: tuple[str, ...] = ()
    masks: str = "none"
    scales: str = "none"
    share: bool = False

    def spec(self) -> PlanSpec:
        """Return the spec."""
        pages = MAX_REQUESTS * -(-LONGEST // self.page_size)
        heads = {"q_heads": self.heads[0], "kv_heads": self.heads[1], "head_dim": 16}
        room = {"max_requests": MAX_REQUESTS, "max_tokens": MAX_TOKENS, "max_pages": pages}
        tiles = {"tile_kv": max(32, min(self.page_size, 128)), "tile_q": 16, "num_ctas": 6}
        few = {"q_dtype": "float32", "kv_dtype": "float32", "page_size": self.page_size}
        return PlanSpec(
            **{**heads, **room, **tiles, **few, "item_cost": 32, **self.settings},
            causal=self.options.causal,
            window=None if self.kind.mask_mod else self.options.window,
            variant=self.kind,
        )


ALIBI = variant.compose(variant.soft_cap(5.0), variant.alibi(), variant.window(40))

CASES = {
    "plain": Case(),
    "one head each": Case(heads=(3, 3), page_size=1),
    "group of 5": Case(heads=(5, 1), page_size=8),
    "group of 7": Case(heads=(14, 2), page_size=64),
    "wide group": Case(heads=(32, 1), page_size=128, settings={"v_head_dim": 24}),
    "both directions": Case(options=Options(causal=False), page_size=2),
    "window": Case(options=Options(window=33), settings={"fixed_split_size": 64}),
    "window of one": Case(options=Options(window=1), settings={"disable_split": True}),
    "soft cap": Case(kind=variant.soft_cap(3.0), options=Options(soft_cap=3.0, scale=1.3)),
    "alibi": Case(kind=variant.alibi(), extras=("slopes",), heads=(5, 1)),
    "sinks": Case(kind=variant.sinks(), extras=("sinks",)),
    "sigmoid": Case(kind=variant.sigmoid(-1.0), options=Options(sigmoid_bias=-1.0)),
    "rope": Case(kind=variant.rope(100.0), options=Options(theta=100.0), page_size=8),
    "first and window": Case(kind=variant.window(20, first=3), options=Options(window=20, first=3)),
    "cap, alibi, window": Case(
        kind=ALIBI, options=Options(soft_cap=5.0, window=40), extras=("slopes",)
    ),
    "mask": Case(kind=variant.packed_mask(), masks="shared", options=Options(causal=False)),
    "mask per head": Case(kind=variant.packed_mask(per_head=True), masks="per_head"),
    "bfloat16": Case(settings={"q_dtype": "bfloat16", "kv_dtype": "bfloat16"}),
    "float16": Case(settings={"q_dtype": "float16", "kv_dtype": "float16"}, heads=(7, 1)),
    "int8 per page": Case(settings={"kv_dtype": "int8"}, scales="page"),
    "float8 per head": Case(
        settings={"q_dtype": "bfloat16", "kv_dtype": "float8_e4m3fn"}, scales="head"
    ),
    "float8 per tensor": Case(settings={"kv_dtype": "float8_e5m2"}, scales="tensor"),
    "shared prefixes": Case(settings={"cascade_levels": 2}, share=True, heads=(8, 2)),
    "shared prefixes, window": Case(
        settings={"cascade_levels": 2}, share=True, options=Options(window=50)
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A case with lengths and contents.

    Attributes:
        q: Queries, padded to the room of the spec.
        kv: Keys and values; whatever no request owns is NaN, if the dtype has it.
        table: Pages.
        q_len: Query tokens.
        shared: Shared prefixes.
        extra: Extras of the variant.
        options: What the oracle is told.
        spec: The spec.
    """

    q: np.ndarray
    kv: PagedKV
    table: PageTable
    q_len: list[int]
    shared: list[SharedPrefix]
    extra: dict[str, np.ndarray]
    options: Options
    spec: PlanSpec

    @property
    def scale(self) -> float | None:
        """What products are multiplied with."""
        return self.options.scale

    def plan(self) -> Plan:
        """Return the plan."""
        return make_plan(self.spec, np.array(self.q_len), self.table, shared=self.shared)

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what the oracle says."""
        pools = (np.asarray(part).astype(np.float64) for part in (self.kv.k, self.kv.v))
        return request_oracle.attend(
            self.q.astype(np.float64), *pools, self.table, self.q_len, self.options
        )


@st.composite
def problems(draw, case: Case):
    q_len, kv_len = draw(
        lengths(most=MAX_REQUESTS, longest=LONGEST, page_size=case.page_size, most_q=30)
    )
    while sum(q_len) > MAX_TOKENS:
        q_len[q_len.index(max(q_len))] //= 2
    shared: list[SharedPrefix] = []
    if case.share:
        able = [r for r in range(len(q_len)) if kv_len[r] - q_len[r] >= case.page_size]
        members = draw(st.lists(st.sampled_from(able), unique=True)) if able else []
        if len(members) >= 2:
            most = min(kv_len[r] - q_len[r] for r in members) // case.page_size
            end = draw(st.integers(1, most)) * case.page_size
            shared.append(SharedPrefix(requests=tuple(members), begin=0, end=end))
    return problem(case, q_len, kv_len, shared=shared, seed=draw(st.integers(0, 99)))


def problem(
    case: Case,
    q_len: Sequence[int],
    kv_len: Sequence[int],
    *,
    shared: Sequence[SharedPrefix] = (),
    seed: int = 0,
) -> Problem:
    """Fill a case with contents."""
    spec, rng = case.spec(), np.random.default_rng(seed)
    num_pages = 1 + spec.max_pages
    table, used = page_table(kv_len, case.page_size, shared=list(shared), seed=seed)
    assert used <= num_pages
    dims = {"k": spec.head_dim, "v": spec.v_dim}
    pools = {
        name: rng.normal(size=(num_pages, spec.kv_heads, spec.page_size, dim))
        for name, dim in dims.items()
    }
    scales, kept = {}, {}
    for name, pool in pools.items():
        if case.scales != "none":
            shape = {"tensor": (), "head": (spec.kv_heads,), "page": (num_pages, spec.kv_heads)}
            scales[name] = rng.uniform(0.01, 0.03, shape[case.scales]).astype(np.float32)
            spread = scales[name].shape + (1,) * 2 * bool(scales[name].shape)
            pools[name] = pool / scales[name].reshape(spread)
        kept[name] = _stored(pools[name], spec.kv_dtype, _owned(table, spec, num_pages))
    kv = PagedKV(
        k=jnp.asarray(kept["k"]),
        v=jnp.asarray(kept["v"]),
        k_scale=None if not scales else jnp.asarray(scales["k"]),
        v_scale=None if not scales else jnp.asarray(scales["v"]),
    )
    dtype = np.dtype(jnp.dtype(spec.q_dtype))
    q = rng.normal(size=(spec.max_tokens, spec.q_heads, spec.head_dim)).astype(dtype)
    extra = {name: rng.uniform(0, 1, spec.q_heads).astype(np.float32) for name in case.extras}
    options = dataclasses.replace(
        case.options,
        k_scale=scales.get("k"),
        v_scale=scales.get("v"),
        slopes=extra.get("slopes"),
        sinks=extra.get("sinks"),
    )
    if case.masks != "none":
        heads = (spec.q_heads,) if case.masks == "per_head" else ()
        masks = [rng.random((*heads, n, int(k))) < 0.6 for n, k in zip(q_len, kv_len, strict=True)]
        words = variant.pack_mask(masks)
        most = spec.max_tokens * -(-LONGEST // 32)
        extra["mask"] = np.pad(words, [(0, 0)] * len(heads) + [(0, most - words.shape[-1])])
        options = dataclasses.replace(options, masks=masks)
    return Problem(
        q=q,
        kv=kv,
        table=table,
        q_len=list(q_len),
        shared=list(shared),
        extra=extra,
        options=options,
        spec=spec,
    )


def _owned(table: PageTable, spec: PlanSpec, num_pages: int) -> np.ndarray:
    """Tell which slots hold some request's keys, `[pages, page_size]`."""
    owned = np.zeros((num_pages, spec.page_size), np.bool_)
    for r, kv_len in enumerate(table.kv_len):
        pages = table.indices[table.indptr[r] : table.indptr[r + 1]]
        position = np.arange(pages.size * spec.page_size).reshape(-1, spec.page_size)
        owned[pages] |= position < kv_len
    return owned


def _stored(pool: np.ndarray, dtype: str, owned: np.ndarray) -> np.ndarray:
    if dtype == "int8":
        return np.clip(np.rint(pool), -127, 127).astype(np.int8)
    kind: Callable[..., Any] = getattr(ml_dtypes, dtype, None) or np.dtype(dtype).type
    if dtype == "float8_e4m3fn":
        pool = np.clip(pool, -448, 448)
    return np.where(owned[:, None, :, None], pool, np.nan).astype(kind)
