"""Decode attention for Hopper: few query rows per request, keys on the long side of the product.

Tokens of the cache lie on the matrix unit's M axis, which has 64 rows whatever happens, and query
rows on its N axis, which may be as narrow as 8. So `S' = K Q'` and `O' = V' P'`, and a group of
four heads wastes a factor of 2 where the usual orientation wastes 16. Weights go through shared
memory transposed, so that every operand has rows of 128 bytes and none needs a narrow swizzle.

One warpgroup copies pages, the other one computes. Both walk the list of work items that the plan
gives their CTA. Accumulators of a few rows are small, so products are added to them in registers.

Source: work items and write-through from FlashInfer (arXiv 2501.01005, section 3.3), the online
softmax of FlashAttention (arXiv 2205.14135); the swapped product and its tiles are ours.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.attention import mosaic_tile, tuning
from jaxserve.pallas_kernels.attention.mosaic_launch import Refs, launch
from jaxserve.pallas_kernels.attention.mosaic_pages import Pages, drain
from jaxserve.pallas_kernels.attention.mosaic_tile import (
    Orientation,
    PlanRef,
    Ref,
    Scores,
    product,
    wrap,
)
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Item, Plan, PlanSpec
from jaxserve.pallas_kernels.state import LOG2_E
from jaxserve.pallas_kernels.variant import AttentionVariant

# ------------------------------------------------------------------------------------- tuning


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """Sizes of the decode kernel.

    Attributes:
        tile_kv: Keys per tile.
        stages: Tiles of keys, and as many of values, in flight.
        ctas: CTAs that a multiprocessor holds at once; `mosaic.tune` plans for so many.
    """

    tile_kv: int = 64
    stages: int = 3
    ctas: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        if self.tile_kv not in (64, 128):
            raise ValueError(
                f"tile_kv must be 64 or 128, the matrix unit's rows, got {self.tile_kv}."
            )
        if self.stages < 2:
            raise ValueError(f"stages must be 2 or more to overlap copies, got {self.stages}.")
        if self.ctas not in (1, 2):
            raise ValueError(f"ctas must be 1 or 2, got {self.ctas}.")


HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)
Q_DTYPES = ("bfloat16", "float16")
KV_DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
ROWS = (8, 16, 32, 64)
"""Rows of work items that have a configuration; others take the next larger one's."""
Q_STAGES = 2
"""Items whose queries are in flight: the copying warpgroup runs ahead by one item."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class TuningKey:
    """What a configuration is chosen by.

    Attributes:
        dim: The larger one of the dimensions of keys and of values.
        itemsize: Bytes per stored number.
        rows: Rows of a work item, one of `ROWS`.
        changes_keys: Whether the variant has a `k_mod`.
    """

    dim: int
    itemsize: int
    rows: int
    changes_keys: bool

    @classmethod
    def of(cls, spec: PlanSpec, variant: AttentionVariant) -> "TuningKey":
        """Return the key of a spec that `why_not` lets pass."""
        return cls(
            max(spec.head_dim, spec.v_dim),
            jnp.dtype(spec.kv_dtype).itemsize,
            next(rows for rows in ROWS if rows >= Sizes(spec).rows),
            variant.k_mod is not None,
        )

    def shared_memory(self, config: TuningConfig) -> int:
        """Return an upper bound of the bytes of shared memory that a CTA takes."""
        keys, dim, rows = config.tile_kv, self.dim, self.rows
        wide = (2 if self.itemsize == 1 else 0) + (self.changes_keys and self.itemsize > 1)
        parts = (
            Q_STAGES * rows * dim * 2,
            2 * config.stages * keys * dim * self.itemsize,
            wide * keys * dim * 2,
            rows * keys * 2,
            rows * dim * 2,
            rows * dim * 4,
            rows * 4,
        )
        # Every part begins at a multiple of 1 KiB; reductions and barriers have the rest.
        return sum(-(-part // 1024) * 1024 for part in parts) + 3072


def most_rows(dim: int, itemsize: int, *, changes_keys: bool) -> int:
    """Return the most rows that registers hold without spills, as compiling for Hopper shows."""
    if dim == 256:
        return 0 if changes_keys else 8 * itemsize
    return 32 if dim == 128 and changes_keys else ROWS[-1]


def fits_twice(key: TuningKey) -> bool:
    """Tell whether registers let two CTAs share a multiprocessor, as compiling for Hopper shows."""
    if key.dim == 64:
        return key.rows <= (16 if key.changes_keys else 32)
    return key.dim == 128 and key.rows == 8 and not key.changes_keys


@functools.cache
def tuning_table() -> dict[TuningKey, tuple[TuningConfig, ...]]:
    """Return every configuration that may be chosen, what is taken without a measurement first.

    That is two CTAs per multiprocessor where three stages then fit, so that one computes while the
    other one waits; else one with as many stages as fit, four at most. The last one has as many as
    fit, eight at most.
    """
    table: dict[TuningKey, tuple[TuningConfig, ...]] = {}
    for dim, itemsize, rows, changes in itertools.product(HEAD_DIMS, (1, 2), ROWS, (False, True)):
        if rows > most_rows(dim, itemsize, changes_keys=changes):
            continue
        key = TuningKey(dim, itemsize, rows, changes)
        half = mosaic_tile.MULTIPROCESSOR_SHARED_MEMORY // 2 - 1024
        whole = mosaic_tile.SHARED_MEMORY_LIMIT
        found: list[TuningConfig] = []
        for ctas, limit, least, most in ((2, half, 3, 6), (1, whole, 2, 4), (1, whole, 2, 8)):
            if ctas == 2 and not fits_twice(key):
                continue
            configs = (TuningConfig(stages=n, ctas=ctas) for n in range(most, least - 1, -1))
            found += [config for config in configs if key.shared_memory(config) <= limit][:1]
        if found:
            table[key] = tuple(dict.fromkeys(found))
    return table


def choose(spec: PlanSpec, variant: AttentionVariant) -> TuningConfig:
    """Choose the configuration for a spec that `why_not` lets pass."""
    key = TuningKey.of(spec, variant)
    return tuning.choose("decode", key, tuning_table()[key], tuning.device_name())


# ----------------------------------------------------------------------------------- arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that follow from a spec.

    Attributes:
        spec: The plan's spec.
    """

    spec: PlanSpec

    @property
    def rows_per_token(self) -> int:
        """Rows of one token: its heads, filled up to a tile's 8 rows."""
        return -(-self.spec.heads_per_tile // 8) * 8

    @property
    def rows(self) -> int:
        """Rows of a work item."""
        return self.rows_per_token * self.spec.tile_tokens

    @property
    def narrow(self) -> bool:
        """Whether keys and values have 8 bits and are widened before products."""
        return jnp.dtype(self.spec.kv_dtype).itemsize == 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the products' operands; e4m3 has an instruction to float16 only."""
        return jnp.dtype("float16" if self.narrow else self.spec.kv_dtype)


def why_not(spec: PlanSpec, variant: AttentionVariant) -> str | None:
    """Return why the kernel cannot serve a plan, with the nearest that it can; or None."""
    sizes = Sizes(spec)
    checks = {
        "head_dim": (spec.head_dim, HEAD_DIMS),
        "v_head_dim": (spec.v_dim, HEAD_DIMS),
        "page_size": (spec.page_size, PAGE_SIZES),
        "q_dtype": (spec.q_dtype, Q_DTYPES),
        "kv_dtype": (spec.kv_dtype, KV_DTYPES),
    }
    for name, (got, allowed) in checks.items():
        if got not in allowed:
            return f"{name} must be one of {', '.join(map(str, allowed))}, got {got}"
    if spec.tile_kv % 64:
        return f"tile_kv must be a multiple of 64, got {spec.tile_kv}"
    if not sizes.narrow and spec.q_dtype != spec.kv_dtype:
        return f"q_dtype must be kv_dtype = {spec.kv_dtype}, got {spec.q_dtype}"
    if sizes.rows > ROWS[-1]:
        return (
            f"an item has {sizes.rows} rows ({spec.tile_tokens} tokens of {sizes.rows_per_token}), "
            f"more than {ROWS[-1]}; set tile_q to {ROWS[-1] // sizes.rows_per_token} tokens"
        )
    if TuningKey.of(spec, variant) not in tuning_table():
        changed = " and changed keys" if variant.k_mod is not None else ""
        return f"head_dim {spec.head_dim} with {sizes.rows} rows{changed} exceeds registers"
    if spec.cascade_levels:
        return "shared prefixes have more rows than a decode tile; the prefill kernel takes them"
    return mosaic_tile.why_not(variant)


# ---------------------------------------------------------------------------------------- body


@dataclasses.dataclass(frozen=True)
class _Refs(Refs):
    """References of the kernel: operands, results, and what lies in shared memory."""

    q_tile: Ref
    k_wide: Ref
    v_wide: Ref
    p_tile: Ref
    o_tile: Ref
    part_tile: Ref
    lse_tile: Ref
    q_full: Ref
    q_empty: Ref


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Static settings of one compiled kernel."""

    spec: PlanSpec
    variant: AttentionVariant
    config: TuningConfig
    sm_scale: float
    tokens: int
    k_scale: mosaic_tile.ScaleKind
    v_scale: mosaic_tile.ScaleKind

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.spec)

    @property
    def widens_keys(self) -> bool:
        return self.sizes.narrow or self.variant.k_mod is not None

    @property
    def key_columns(self) -> int:
        """Columns of stored keys that are read at once."""
        if self.variant.k_mod is None:
            return self.columns
        return min(self.columns, mosaic_tile.CHANGED_COLUMNS)

    @property
    def columns(self) -> int:
        """Columns of keys and queries that are read at once: halves, where they are changed."""
        return self.spec.head_dim // (1 if self.variant.k_mod is None else 2)

    @property
    def pages(self) -> Pages:
        return Pages(self.spec, self.config.tile_kv, self.config.stages)

    def __call__(self, refs: _Refs) -> None:
        """Run one CTA."""
        work = PlanRef(refs.plan, self.spec)
        cta = lax.axis_index("cta")
        first, last = work.read("work_indptr", cta), work.read("work_indptr", cta + 1)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(functools.partial(self.compute, refs, work, first, last))
        pl.when(warpgroup == 1)(functools.partial(self.copy, refs, work, first, last))

    # The warpgroup that copies.

    def copy(self, refs: _Refs, work: PlanRef, first: Array, last: Array) -> None:
        """Keep the rings of tiles full, and those of queries."""

        def before(item: Array) -> None:
            count = item - first
            slot = wrap(count, Q_STAGES)
            pl.when(count >= Q_STAGES)(lambda: plgpu.barrier_wait(refs.q_empty.at[slot]))
            self.copy_queries(refs, work, item, slot)

        self.pages.copy(work, first, last, (refs.keys, refs.values), before)
        drain(refs.q_empty, last - first, Q_STAGES)

    def copy_queries(self, refs: _Refs, work: PlanRef, item: Array, slot: Array) -> None:
        """Copy an item's queries, each token's heads to a tile of their own."""
        rows = self.sizes.rows_per_token
        start = work.field(item, Item.Q_START)
        block = lax.div(work.field(item, Item.HEAD), jnp.int32(self.spec.heads_per_tile))
        for token in range(self.spec.tile_tokens):
            # A short item copies tokens behind its end, which nobody looks at.
            source = jnp.minimum(start + token, self.tokens - 1)
            plgpu.copy_gmem_to_smem(
                refs.q.at[source, block],
                refs.q_tile.at[slot, pl.ds(token * rows, rows)],
                refs.q_full.at[slot],
            )

    # The warpgroup that computes.

    def compute(self, refs: _Refs, work: PlanRef, first: Array, last: Array) -> None:
        """Work the items off."""

        def one_item(item: Array, step: Array) -> Array:
            slot = wrap(item - first, Q_STAGES)
            plgpu.barrier_wait(refs.q_full.at[slot])
            step, result, log = self.attend(refs, work, item, slot, step)
            self.write(refs, work, item, result, log)
            return step

        lax.fori_loop(first, last, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def attend(
        self, refs: _Refs, work: PlanRef, item: Array, slot: Array, step: Array
    ) -> tuple[Array, Array, Array]:
        """Return the steps so far, and the item's output and logarithm of mass."""
        keys, rows = self.config.tile_kv, self.sizes.rows
        tile = Orientation((keys, rows), key_axis=0)
        scores = Scores(
            work=work,
            item=item,
            small=refs.small,
            variant=self.variant,
            tile=tile,
            rows_per_token=self.sizes.rows_per_token,
            first_row=0,
            sm_scale=self.sm_scale,
        )
        ctx = scores.context()
        head = work.field(item, Item.KV_HEAD)
        begin, end = work.field(item, Item.KV_BEGIN), work.field(item, Item.KV_END)
        scale = self.sm_scale * (refs.small["k_scale"][head] if self.k_scale == "head" else 1.0)
        wide = (self.spec.v_dim, rows)

        def one_tile(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, mass, acc, step = carry
            stage = wrap(step, self.config.stages)
            at = begin + index * keys
            pages = (
                self.pages.of_tile(work, item, at) if "page" in (self.k_scale, self.v_scale) else []
            )
            plgpu.barrier_wait(refs.keys.full.at[stage])
            tile_of_keys = refs.keys.tiles.at[stage]
            if self.widens_keys:
                mosaic_tile.widen_keys(
                    tile_of_keys,
                    refs.k_wide,
                    self.variant,
                    ctx,
                    at,
                    columns=self.columns,
                    dtype=self.sizes.dtype,
                )
                tile_of_keys = refs.k_wide
            s = product((keys, rows), tile_of_keys, refs.q_tile.at[slot].transpose((1, 0)))
            plgpu.barrier_arrive(refs.keys.empty.at[stage])
            if self.k_scale == "page":
                s = s * self.per_page(refs.small["k_scale"], pages, head, tile)
            s, seen = scores.masked(s, at, ctx=ctx, scale=scale)
            if seen is None:
                raise AssertionError("a decode tile always has keys that are not the request's")
            if self.variant.use_softmax:
                s = jnp.where(seen, s * LOG2_E, mosaic_tile.LOWEST)
                new_top = jnp.maximum(top, s.max(axis=0))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(s - tile.spread(mosaic_tile.exponent_base(new_top)))
                # Summed over keys once per item: that sum needs all four warps.
                mass = mass * tile.spread(shrink) + weights
                acc = acc * tile.spread(shrink, wide)
                top = new_top
            else:
                weights = jnp.where(seen, s, 0.0)
            factor = 1.0
            if self.v_scale == "page":
                factor = refs.small["v_scale"][pages[0], head]
                ratio = self.per_page(refs.small["v_scale"], pages, head, tile) / factor
                weights = weights * ratio
            refs.p_tile.transpose((1, 0))[...] = weights.astype(self.sizes.dtype)
            plgpu.barrier_wait(refs.values.full.at[stage])
            values = self.clean_values(refs, stage, at, end)
            plgpu.commit_smem()
            more = product(wide, values.transpose((1, 0)), refs.p_tile.transpose((1, 0)))
            plgpu.barrier_arrive(refs.values.empty.at[stage])
            return top, mass, acc + more * factor, step + 1

        top, mass, acc, step = lax.fori_loop(
            0,
            self.pages.num_tiles(work, item),
            one_tile,
            (
                tile.per_row(mosaic_tile.LOWEST),
                mosaic_tile.zeros((keys, rows)),
                mosaic_tile.zeros(wide),
                step,
            ),
        )
        plgpu.barrier_arrive(refs.q_empty.at[slot])
        v_scale = refs.small["v_scale"][head] if self.v_scale == "head" else 1.0
        if not self.variant.use_softmax:
            return step, acc * v_scale, tile.per_row(0.0)
        total = mass.sum(axis=0)
        some = jnp.where(total == 0.0, 1.0, total)
        log = jnp.where(total == 0.0, -jnp.inf, top + jnp.log2(some))
        return step, acc * tile.spread(v_scale / some, wide), log

    def per_page(self, ref: Ref, pages: list[Array], head: Array, tile: Orientation) -> Array:
        """Return a score tile of each key's scale."""
        scale = jnp.full(tile.shape, ref[pages[0], head], jnp.float32)
        for i, page in enumerate(pages[1:], start=1):
            scale = jnp.where(tile.keys() < i * self.pages.rows, scale, ref[page, head])
        return scale

    def clean_values(self, refs: _Refs, stage: Array, begin: Array, end: Array) -> Ref:
        """Return a tile of values that the matrix unit takes, with zeros behind the last key.

        What lies there may be NaN, and no weight makes that harmless.
        """
        source = refs.values.tiles.at[stage]
        clean = functools.partial(
            mosaic_tile.clean_values, source, begin=begin, end=end, dtype=self.sizes.dtype
        )
        if self.sizes.narrow:
            clean(refs.v_wide)
            return refs.v_wide
        pl.when(begin + self.config.tile_kv > end)(functools.partial(clean, source))
        return source

    def write(self, refs: _Refs, work: PlanRef, item: Array, result: Array, log: Array) -> None:
        """Write an item's rows to the output or to its partial state."""
        heads, rows = self.spec.heads_per_tile, self.sizes.rows_per_token
        count, slot = work.field(item, Item.Q_LEN), work.field(item, Item.OUT_SLOT)
        start, head = work.field(item, Item.Q_START), work.field(item, Item.HEAD)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.lse_tile[...] = log

        @pl.when(slot < 0)
        def _write_through() -> None:
            mosaic_tile.store_plainly(
                refs.o_tile.transpose((1, 0)), result.astype(refs.o_tile.dtype)
            )
            plgpu.commit_smem()

            @pl.loop(0, count)
            def _token(token: Array) -> None:
                plgpu.copy_smem_to_gmem(
                    refs.o_tile.at[pl.ds(token * rows, heads)],
                    refs.o.at[start + token, pl.ds(head, heads)],
                )
                for i in range(heads):
                    refs.lse[start + token, head + i] = refs.lse_tile[token * rows + i]

        @pl.when(slot >= 0)
        def _keep_partial() -> None:
            mosaic_tile.store_plainly(
                refs.part_tile.transpose((1, 0)),
                plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED),
            )
            plgpu.commit_smem()

            @pl.loop(0, count)
            def _token(token: Array) -> None:
                plgpu.copy_smem_to_gmem(
                    refs.part_tile.at[pl.ds(token * rows, heads)], refs.part.at[slot + token]
                )
                for i in range(heads):
                    refs.part_lse[slot + token, i] = refs.lse_tile[token * rows + i]


# -------------------------------------------------------------------------------------- launch


def decode(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    sm_scale: float,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "tokens q_heads v_dim"], Float[Array, "tokens q_heads"]]:
    """Attend with few query tokens per request.

    Sinks and output changes of the variant are left to the caller, as they come after merging, and
    so are changes of queries.

    Args:
        q: Queries, in the plan's order.
        kv: Keys and values.
        plan: The step's plan; every item has at most `spec.tile_tokens` tokens.
        variant: What is different.
        extra: Arrays that the variant reads.
        sm_scale: What products are multiplied with.
        config: Sizes; None chooses from the table.

    Returns:
        Outputs and logarithms of mass in base 2. Rows of no request hold anything.

    Raises:
        UnsupportedError: If the kernel cannot serve the plan.
    """
    spec = plan.spec
    reason = why_not(spec, variant)
    if reason is not None:
        raise UnsupportedError(f"mosaic decode: {reason}; or use backend='xla'.")
    kernel = _Kernel(
        spec=spec,
        variant=variant,
        config=config or choose(spec, variant),
        sm_scale=sm_scale,
        tokens=q.shape[0],
        k_scale=mosaic_tile.scale_kind(kv.k_scale),
        v_scale=mosaic_tile.scale_kind(kv.v_scale),
    )
    sizes = kernel.sizes
    heads, rows = spec.heads_per_tile, sizes.rows_per_token
    q = q.astype(sizes.dtype).reshape(q.shape[0], -1, heads, spec.head_dim)
    if rows != heads:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - heads), (0, 0)))
    small = mosaic_tile.operands(kv, plan, variant, extra, rows_per_token=rows, rows=sizes.rows)
    o, lse, part, part_lse = _launch(kernel, plan, q, kv, small)
    if spec.split_mode == "none":
        return o, lse
    return mosaic_tile.merge_partials(plan, o, lse, part, part_lse, use_softmax=variant.use_softmax)


def _launch(
    kernel: _Kernel, plan: Plan, q: Array, kv: PagedKV, small: dict[str, Array]
) -> tuple[Array, Array, Array, Array]:
    spec = kernel.spec
    _, units = spec.bounds
    results = (
        jax.ShapeDtypeStruct((kernel.tokens, spec.q_heads, spec.v_dim), jnp.dtype(spec.q_dtype)),
        jax.ShapeDtypeStruct((kernel.tokens, spec.q_heads), jnp.float32),
        jax.ShapeDtypeStruct((max(units, 1), spec.heads_per_tile, spec.v_dim), jnp.float32),
        jax.ShapeDtypeStruct((max(units, 1), spec.heads_per_tile), jnp.float32),
    )
    return launch(
        kernel,
        _Refs,
        (plan, q, kv, small),
        results=results,
        scratch=_scratch(kernel),
        warpgroups=2,
    )


def _scratch(kernel: _Kernel) -> dict[str, Any]:
    spec, sizes, pages = kernel.spec, kernel.sizes, kernel.pages
    dim, v_dim, keys, rows = spec.head_dim, spec.v_dim, kernel.config.tile_kv, sizes.rows

    def swizzled(shape: tuple[int, ...], columns: int) -> Any:  # noqa: ANN401
        return plgpu.SMEM(shape, sizes.dtype, transforms=mosaic_tile.swizzled(columns, sizes.dtype))

    return {
        "q_tile": swizzled((Q_STAGES, rows, dim), kernel.columns),
        "k_ring": pages.scratch(dim, kernel.key_columns, readers=1),
        "v_ring": pages.scratch(v_dim, v_dim, readers=1),
        "k_wide": swizzled((keys, dim), kernel.columns) if kernel.widens_keys else None,
        "v_wide": swizzled((keys, v_dim), v_dim) if sizes.narrow else None,
        "p_tile": swizzled((rows, keys), keys),
        "o_tile": plgpu.SMEM((rows, v_dim), jnp.dtype(spec.q_dtype)),
        "part_tile": plgpu.SMEM((rows, v_dim), jnp.float32),
        "lse_tile": plgpu.SMEM((rows,), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=Q_STAGES, num_arrivals=spec.tile_tokens),
        "q_empty": plgpu.Barrier(num_barriers=Q_STAGES),
    }
