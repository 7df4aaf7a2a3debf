"""Prefill attention for Hopper, and everything else that has many query rows per work item.

Two warpgroups compute 64 rows each, a third one copies pages. While one of the two takes
exponentials the other one multiplies; a barrier between them keeps it that way. Weights stay in
registers as the left operand of the second product, whose accumulator stays in registers as well.

Rows are tokens times heads of one group, so a short prefill, a decode step and a prefix shared by
many requests are all the same to this kernel: tiles of rows against runs of keys.

Source: FlashAttention-3 (arXiv 2407.08608) for the warpgroups and the schedule barrier; work items
from FlashInfer (arXiv 2501.01005, section 3.3).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
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
from jaxserve.pallas_kernels.attention.mosaic_pages import Pages
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

WARPGROUP_ROWS = 64
"""Rows that one warpgroup computes: those of the matrix unit."""
HEAD_DIMS = (64, 128)
"""With 256, accumulators of 64 rows leave too few registers."""
PAGE_SIZES = (8, 16, 32, 64, 128)
Q_DTYPES = ("bfloat16", "float16")
KV_DTYPES = ("bfloat16", "float16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """Sizes of the prefill kernel.

    Attributes:
        tile_kv: Keys per tile.
        stages: Tiles of keys, and as many of values, in flight.
        o_columns: Columns of the output that are written at a time.
        part_columns: Columns of a partial state that are written at a time.
        schedule_barrier: Whether the two computing warpgroups take turns.
        portable: Whether weights go through shared memory and products are added in registers.
            Slower, and what the interpreter can do.
    """

    tile_kv: int = 128
    stages: int = 2
    o_columns: int = 64
    part_columns: int = 32
    schedule_barrier: bool = True
    portable: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        if self.tile_kv not in (64, 128):
            raise ValueError(f"tile_kv must be 64 or 128, got {self.tile_kv}.")
        if self.stages < 2:
            raise ValueError(f"stages must be 2 or more to overlap copies, got {self.stages}.")
        for name in ("o_columns", "part_columns"):
            if getattr(self, name) not in (16, 32, 64):
                raise ValueError(f"{name} must be 16, 32 or 64, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class TuningKey:
    """What a configuration is chosen by.

    Attributes:
        dim: The larger one of the dimensions of keys and of values.
        itemsize: Bytes per stored number.
        warpgroups: Computing warpgroups, 1 or 2.
        tile_kv: Most keys per tile, 64 or 128: what the plan's tables have room for.
        changes_keys: Whether the variant has a `k_mod`.
    """

    dim: int
    itemsize: int
    warpgroups: int
    tile_kv: int
    changes_keys: bool

    @classmethod
    def of(cls, spec: PlanSpec, variant: AttentionVariant) -> "TuningKey":
        """Return the key of a spec that `why_not` lets pass."""
        return cls(
            max(spec.head_dim, spec.v_dim),
            jnp.dtype(spec.kv_dtype).itemsize,
            Sizes(spec).warpgroups,
            128 if spec.tile_kv % 128 == 0 else 64,
            variant.k_mod is not None,
        )

    def shared_memory(self, config: TuningConfig) -> int:
        """Return an upper bound of the bytes of shared memory that a CTA takes."""
        keys, dim, rows = config.tile_kv, self.dim, WARPGROUP_ROWS
        wide = (2 if self.itemsize == 1 else 0) + (self.changes_keys and self.itemsize > 1)
        each = self.warpgroups
        parts = (
            2 * config.stages * keys * dim * self.itemsize,
            each * rows * dim * 2,
            each * wide * keys * dim * 2,
            each * rows * keys * 2 * config.portable,
            each * rows * config.o_columns * 2,
            each * rows * config.part_columns * 4,
            each * rows * 4,
        )
        return sum(-(-part // 1024) * 1024 for part in parts) + 3072


@functools.cache
def tuning_table() -> dict[TuningKey, tuple[TuningConfig, ...]]:
    """Return every configuration that may be chosen, what is taken without a measurement first.

    That has tiles as wide, and rows written at once as many, as registers hold without spills,
    which compiling for Hopper shows; then as many stages as fit. Two warpgroups have 240 registers
    per thread, one has 255. The others have narrower tiles, fewer stages, or warpgroups that take
    no turns.
    """
    table: dict[TuningKey, tuple[TuningConfig, ...]] = {}
    for dim, itemsize, warpgroups, most, changes in itertools.product(
        HEAD_DIMS, (1, 2), (1, 2), (64, 128), (False, True)
    ):
        key = TuningKey(dim, itemsize, warpgroups, most, changes)
        if changes and (warpgroups == 2 or (dim == 128 and itemsize == 1)):
            continue  # spills with the smallest tiles, too
        wide = most == 128 and warpgroups == 1 and itemsize == 2 and not changes
        tries = [(128, 3), (128, 2)] if wide else []
        tries += [(64, 4), (64, 3), (64, 2)]
        found: list[TuningConfig] = []
        for (keys, stages), columns, turns in itertools.product(
            tries, (32, 16), (True, False) if warpgroups == 2 else (False,)
        ):
            if columns == 32 and (warpgroups == 2 or (keys == 128 and dim == 128)):
                continue  # spills
            config = TuningConfig(
                tile_kv=keys,
                stages=stages,
                o_columns=2 * columns,
                part_columns=columns,
                schedule_barrier=turns,
            )
            if key.shared_memory(config) <= mosaic_tile.SHARED_MEMORY_LIMIT:
                found.append(config)
        if found:
            table[key] = _different(found)
    return table


def _different(configs: list[TuningConfig]) -> tuple[TuningConfig, ...]:
    """Keep the first of each width of tiles and kind of turns, and the one with fewest stages."""
    kept: dict[tuple[int, bool], list[TuningConfig]] = {}
    for config in configs:
        kept.setdefault((config.tile_kv, config.schedule_barrier), []).append(config)
    fewest = [min(alike, key=lambda config: config.stages) for alike in kept.values()]
    return tuple(dict.fromkeys([alike[0] for alike in kept.values()] + fewest))


def choose(spec: PlanSpec, variant: AttentionVariant) -> TuningConfig:
    """Choose the configuration for a spec that `why_not` lets pass."""
    key = TuningKey.of(spec, variant)
    return tuning.choose("prefill", key, tuning_table()[key], tuning.device_name())


# ----------------------------------------------------------------------------------- arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that follow from a spec.

    Attributes:
        spec: The plan's spec.
    """

    spec: PlanSpec

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens that one warpgroup computes: a token's heads stay together."""
        return WARPGROUP_ROWS // self.spec.heads_per_tile

    @property
    def warpgroups(self) -> int:
        """Computing warpgroups."""
        return -(-self.spec.tile_tokens // self.warpgroup_tokens)

    @property
    def narrow(self) -> bool:
        """Whether keys and values have 8 bits and are widened before products."""
        return jnp.dtype(self.spec.kv_dtype).itemsize == 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the products' operands; e4m3 has an instruction to float16 only."""
        return jnp.dtype("float16" if self.narrow else self.spec.kv_dtype)


def tile_q(heads_per_tile: int, *, warpgroups: int = 2) -> int:
    """Return the `PlanSpec.tile_q` that fills so many warpgroups."""
    return warpgroups * (WARPGROUP_ROWS // heads_per_tile) * heads_per_tile


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
    if spec.heads_per_tile > WARPGROUP_ROWS:
        return f"tiles have {spec.heads_per_tile} heads, more than {WARPGROUP_ROWS}; lower tile_q"
    if sizes.warpgroups > 2:
        return (
            f"tile_q must be {tile_q(spec.heads_per_tile)} or less for tiles of "
            f"{spec.heads_per_tile} heads, got {spec.tile_q}"
        )
    key = TuningKey.of(spec, variant)
    if key.changes_keys and key.dim == 128 and key.itemsize == 1:
        return "changing 8-bit keys of head_dim 128 exceeds registers; keep them as bfloat16"
    if key not in tuning_table():
        return _too_many(spec, "that change keys")
    if spec.page_size < 16 and key.dim == 128 and key.warpgroups == 2:
        return _too_many(spec, f"with pages of {spec.page_size} and head_dim 128")
    return mosaic_tile.why_not(variant)


def why_no_page_scales(spec: PlanSpec) -> str | None:
    """Return why the kernel cannot serve a plan if each page has scales of its own; or None."""
    if Sizes(spec).warpgroups == 2 and max(spec.head_dim, spec.v_dim) == 128:
        return _too_many(spec, "with scales per page and head_dim 128")
    return None


def _too_many(spec: PlanSpec, what: str) -> str:
    most = tile_q(spec.heads_per_tile, warpgroups=1)
    return f"two warpgroups {what} exceed registers; set tile_q to {most} or less"


# ---------------------------------------------------------------------------------------- body


@dataclasses.dataclass(frozen=True)
class _Refs(Refs):
    """References of the kernel: operands, results, and what lies in shared memory.

    What begins with `my_` has one part per computing warpgroup.
    """

    my_q: Ref
    my_k: Ref
    my_v: Ref
    my_p: Ref
    my_o: Ref
    my_part: Ref
    my_lse: Ref
    turn: Ref
    cleaned: Ref


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Static settings of one compiled kernel."""

    spec: PlanSpec
    variant: AttentionVariant
    config: TuningConfig
    sm_scale: float
    return_lse: bool
    k_scale: mosaic_tile.ScaleKind
    v_scale: mosaic_tile.ScaleKind

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.spec)

    @property
    def pages(self) -> Pages:
        return Pages(self.spec, self.config.tile_kv, self.config.stages)

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

    def __call__(self, refs: _Refs) -> None:
        """Run one CTA."""
        work = PlanRef(refs.plan, self.spec)
        cta = lax.axis_index("cta")
        first, last = work.read("work_indptr", cta), work.read("work_indptr", cta + 1)
        warpgroup = lax.axis_index("warpgroup")
        readers = self.sizes.warpgroups

        @pl.when(warpgroup < readers)
        def _compute() -> None:
            if readers == 2:
                plgpu.set_max_registers(240, action="increase")
            self.compute(refs, work, first, last, warpgroup)

        @pl.when(warpgroup == readers)
        def _copy() -> None:
            if readers == 2:
                plgpu.set_max_registers(24, action="decrease")
            self.pages.copy(work, first, last, (refs.keys, refs.values), lambda _: None)

    def compute(
        self, refs: _Refs, work: PlanRef, first: Array, last: Array, warpgroup: Array
    ) -> None:
        """Work the items off."""

        def one_item(item: Array, step: Array) -> Array:
            self.load_queries(refs, work, item, warpgroup)
            step, result, log = self.attend(refs, work, item, warpgroup, step)
            self.write(refs, work, item, warpgroup, result, log)
            return step

        # One of the two begins half a step later.
        pl.when(warpgroup == 1)(functools.partial(self.take_turn, refs))
        lax.fori_loop(first, last, one_item, jnp.int32(0))
        pl.when(warpgroup == 0)(functools.partial(self.take_turn, refs))
        plgpu.wait_smem_to_gmem(0)

    def take_turn(self, refs: _Refs) -> None:
        """Wait until the other warpgroup has come as far."""
        if self.config.schedule_barrier:
            plgpu.barrier_arrive(refs.turn)
            plgpu.barrier_wait(refs.turn)

    def load_queries(self, refs: _Refs, work: PlanRef, item: Array, warpgroup: Array) -> None:
        """Bring this warpgroup's queries to shared memory.

        Through registers: rows begin anywhere, and a copy into tiles would have to begin at a
        multiple of eight.
        """
        heads = self.spec.heads_per_tile
        block = lax.div(work.field(item, Item.HEAD), jnp.int32(heads))
        start = work.field(item, Item.Q_START) + warpgroup * self.sizes.warpgroup_tokens
        for column in range(0, self.spec.head_dim, self.columns):
            columns = pl.ds(column, self.columns)
            source = refs.q.at[block, pl.ds(start * heads, WARPGROUP_ROWS), columns]
            loaded = plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)
            refs.my_q[warpgroup, :, columns] = loaded
        plgpu.commit_smem()

    def attend(
        self, refs: _Refs, work: PlanRef, item: Array, warpgroup: Array, step: Array
    ) -> tuple[Array, Array, Array]:
        """Return the steps so far, and the rows' outputs and logarithms of mass."""
        keys = self.config.tile_kv
        tile = Orientation((WARPGROUP_ROWS, keys), key_axis=1)
        scores = Scores(
            work=work,
            item=item,
            small=refs.small,
            variant=self.variant,
            tile=tile,
            rows_per_token=self.spec.heads_per_tile,
            first_row=warpgroup * (self.sizes.warpgroup_tokens * self.spec.heads_per_tile),
            sm_scale=self.sm_scale,
        )
        begin, end = work.field(item, Item.KV_BEGIN), work.field(item, Item.KV_END)
        count = self.pages.num_tiles(work, item)
        one_tile = functools.partial(self.one_tile, refs, scores, warpgroup, begin, end)
        carry = (
            tile.per_row(mosaic_tile.LOWEST),
            tile.per_row(0.0),
            mosaic_tile.zeros((WARPGROUP_ROWS, self.spec.v_dim)),
            step,
        )
        # Of what the variant hides, the plan knows nothing without a block mask.
        hides = self.variant.mask_mod is not None or self.variant.packed_mask != "none"
        if not hides or self.variant.block_mask is not None:
            full_begin = work.field(item, Item.FULL_BEGIN) - begin + (keys - 1)
            low = jnp.clip(lax.div(full_begin, jnp.int32(keys)), 0, count)
            full_end = work.field(item, Item.FULL_END) - begin
            high = jnp.clip(lax.div(full_end, jnp.int32(keys)), low, count)
            if self.spec.window is None and self.variant.block_mask is None:
                low = jnp.int32(0)
            else:
                carry = lax.fori_loop(0, low, functools.partial(one_tile, masks=True), carry)
            carry = lax.fori_loop(low, high, functools.partial(one_tile, masks=False), carry)
        else:
            high = jnp.int32(0)
        top, mass, acc, step = lax.fori_loop(
            high, count, functools.partial(one_tile, masks=True), carry
        )
        head = work.field(item, Item.KV_HEAD)
        v_scale = refs.small["v_scale"][head] if self.v_scale == "head" else 1.0
        if not self.variant.use_softmax:
            return step, acc * v_scale, mass
        some = jnp.where(mass == 0.0, 1.0, mass)
        log = jnp.where(mass == 0.0, -jnp.inf, top + jnp.log2(some))
        return step, acc * tile.spread(v_scale / some, (WARPGROUP_ROWS, self.spec.v_dim)), log

    def one_tile(
        self,
        refs: _Refs,
        scores: Scores,
        warpgroup: Array,
        begin: Array,
        end: Array,
        index: Array,
        carry: tuple[Array, ...],
        *,
        masks: bool,
    ) -> tuple[Array, ...]:
        """Attend to one tile of keys."""
        top, mass, acc, step = carry
        keys, tile = self.config.tile_kv, scores.tile
        wide = (WARPGROUP_ROWS, self.spec.v_dim)
        stage = wrap(step, self.config.stages)
        at = begin + index * keys
        head = scores.field(Item.KV_HEAD)
        ctx = scores.context()
        paged = "page" in (self.k_scale, self.v_scale)
        pages = self.pages.of_tile(scores.work, scores.item, at) if paged else []
        plgpu.barrier_wait(refs.keys.full.at[stage])
        tile_of_keys = self.prepare_keys(refs, ctx, warpgroup, stage, at)

        def multiply(acc_ref: Ref) -> Array:
            plgpu.wgmma(acc_ref, refs.my_q.at[warpgroup], tile_of_keys.transpose((1, 0)))
            self.take_turn(refs)
            return acc_ref[...]

        s = pl.run_scoped(multiply, plgpu.ACC(tile.shape, jnp.float32))  # type: ignore[attr-defined]
        plgpu.barrier_arrive(refs.keys.empty.at[stage])
        if self.k_scale == "page":
            s = s * self.per_page(refs.small["k_scale"], pages, head, tile)
        scale = self.sm_scale * (refs.small["k_scale"][head] if self.k_scale == "head" else 1.0)
        s, seen = scores.masked(s, at, ctx=ctx, scale=scale, masks=masks)
        if self.variant.use_softmax:
            s = s * LOG2_E
            s = s if seen is None else jnp.where(seen, s, mosaic_tile.LOWEST)
            new_top = jnp.maximum(top, s.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            base = new_top if seen is None else mosaic_tile.exponent_base(new_top)
            weights = jnp.exp2(s - tile.spread(base))
            mass = mass * shrink + weights.sum(axis=1)
            acc = acc * tile.spread(shrink, wide)
            top = new_top
        else:
            weights = s if seen is None else jnp.where(seen, s, 0.0)
        if self.v_scale == "page":
            weights = weights * self.per_page(refs.small["v_scale"], pages, head, tile)
        weights = weights.astype(self.sizes.dtype)
        if self.config.schedule_barrier:
            plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.values.full.at[stage])
        values = self.prepare_values(refs, warpgroup, stage, at, end, masks=masks)
        if self.config.schedule_barrier:
            plgpu.barrier_wait(refs.turn)
        acc = self.add_product(refs, warpgroup, acc, weights, values)
        plgpu.barrier_arrive(refs.values.empty.at[stage])
        return top, mass, acc, step + 1

    def add_product(
        self, refs: _Refs, warpgroup: Array, acc: Array, weights: Array, values: Ref
    ) -> Array:
        """Return the accumulator with one more product added."""
        if self.config.portable:
            refs.my_p[warpgroup] = weights
            plgpu.commit_smem()
            return acc + product(acc.shape, refs.my_p.at[warpgroup], values)

        def multiply(acc_ref: Ref) -> None:
            plgpu.wgmma(acc_ref, weights, values)

        return pl.run_state(multiply)(plgpu.ACC.init(acc))  # type: ignore[attr-defined,return-value]

    def per_page(self, ref: Ref, pages: list[Array], head: Array, tile: Orientation) -> Array:
        """Return a score tile of each key's scale."""
        scale = jnp.full(tile.shape, ref[pages[0], head], jnp.float32)
        for i, page in enumerate(pages[1:], start=1):
            scale = jnp.where(tile.keys() < i * self.pages.rows, scale, ref[page, head])
        return scale

    def prepare_keys(
        self,
        refs: _Refs,
        ctx: mosaic_tile.KernelContext,
        warpgroup: Array,
        stage: Array,
        begin: Array,
    ) -> Ref:
        """Return a tile of keys that the matrix unit takes, changed by the variant."""
        source = refs.keys.tiles.at[stage]
        if not self.widens_keys:
            return source
        mine = refs.my_k.at[warpgroup]
        mosaic_tile.widen_keys(
            source, mine, self.variant, ctx, begin, columns=self.columns, dtype=self.sizes.dtype
        )
        return mine

    def prepare_values(
        self,
        refs: _Refs,
        warpgroup: Array,
        stage: Array,
        begin: Array,
        end: Array,
        *,
        masks: bool,
    ) -> Ref:
        """Return a tile of values that the matrix unit takes, with zeros behind the last key.

        What lies there may be NaN, and no weight makes that harmless.
        """
        source = refs.values.tiles.at[stage]
        if self.sizes.narrow:
            mine = refs.my_v.at[warpgroup]
            mosaic_tile.clean_values(source, mine, begin, end, dtype=self.sizes.dtype)
            plgpu.commit_smem()
            return mine
        if not masks:
            return source

        @pl.when(begin + self.config.tile_kv > end)
        def _last_tile() -> None:
            @pl.when(warpgroup == 0)
            def _clean() -> None:
                mosaic_tile.clean_values(source, source, begin, end, dtype=self.sizes.dtype)
                plgpu.commit_smem()
                if refs.cleaned is not None:
                    plgpu.barrier_arrive(refs.cleaned.at[stage])

            if refs.cleaned is not None:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(refs.cleaned.at[stage]))

        return source

    def write(
        self, refs: _Refs, work: PlanRef, item: Array, warpgroup: Array, result: Array, log: Array
    ) -> None:
        """Write rows to the output or to partial states."""
        heads, most = self.spec.heads_per_tile, self.sizes.warpgroup_tokens
        before = warpgroup * most
        count = jnp.clip(work.field(item, Item.Q_LEN) - before, 0, most)
        slot = work.field(item, Item.OUT_SLOT)
        start, head = work.field(item, Item.Q_START) + before, work.field(item, Item.HEAD)
        refs.my_lse[warpgroup] = log

        @pl.when(slot < 0)
        def _write_through() -> None:
            block = lax.div(head, jnp.int32(heads))

            def target(rows: Any, columns: Any) -> Ref:  # noqa: ANN401
                return refs.o.at[block, rows, columns]

            self.write_rows(refs.my_o.at[warpgroup], result, count, start, target)
            if self.return_lse:
                self.write_lse(refs, warpgroup, count, refs.lse, start, head)

        @pl.when(slot >= 0)
        def _keep_partial() -> None:
            def target(rows: Any, columns: Any) -> Ref:  # noqa: ANN401
                return refs.part.at[rows, columns]

            self.write_rows(refs.my_part.at[warpgroup], result, count, slot + before, target)
            self.write_lse(refs, warpgroup, count, refs.part_lse, slot + before, 0)

    def write_rows(
        self,
        rows: Ref,
        value: Array,
        count: Array,
        first: Array,
        target: Callable[[Any, Any], Ref],
    ) -> None:
        """Write rows of some tokens, a few columns at a time.

        Copies have fixed sizes, so the tokens are cut into powers of two, the largest one first: a
        part begins at a multiple of twice its size, and with it at a multiple of 128 bytes, as
        copies want it, whatever the number of heads.

        Args:
            rows: Shared memory for some columns of all rows.
            value: The rows.
            count: How many tokens they are of.
            first: Where the first token goes.
            target: (rows, columns) -> where these go in global memory.
        """
        width, heads = rows.shape[-1], self.spec.heads_per_tile
        for column in range(0, self.spec.v_dim, width):
            columns = pl.ds(column, width)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            piece = lax.slice(value, (0, column), (WARPGROUP_ROWS, column + width))
            mosaic_tile.store_plainly(rows, piece.astype(rows.dtype))
            plgpu.commit_smem()
            done, size = jnp.int32(0), 1 << (self.sizes.warpgroup_tokens.bit_length() - 1)
            while size:

                @pl.when((count & size) != 0)
                def _some(done: Array = done, size: int = size, columns: Any = columns) -> None:  # noqa: ANN401
                    source = rows.at[pl.ds(done * heads, size * heads)]
                    there = pl.ds((first + done) * heads, size * heads)
                    plgpu.copy_smem_to_gmem(source, target(there, columns))

                done, size = done + (count & size), size // 2

    def write_lse(
        self,
        refs: _Refs,
        warpgroup: Array,
        count: Array,
        target: Ref,
        first: Array,
        head: Any,  # noqa: ANN401
    ) -> None:
        """Write the logarithms of some tokens' mass, number by number: they lie anywhere."""
        heads = self.spec.heads_per_tile

        @pl.loop(0, count)
        def _token(token: Array) -> None:
            for i in range(heads):
                target[first + token, head + i] = refs.my_lse[warpgroup, token * heads + i]


# -------------------------------------------------------------------------------------- launch


def prefill(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    sm_scale: float,
    return_lse: bool = True,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "tokens q_heads v_dim"], Float[Array, "tokens q_heads"]]:
    """Attend with any number of query tokens per request.

    Sinks and output changes of the variant are left to the caller, as they come after merging, and
    so are changes of queries.

    Args:
        q: Queries, in the plan's order.
        kv: Keys and values.
        plan: The step's plan.
        variant: What is different.
        extra: Arrays that the variant reads.
        sm_scale: What products are multiplied with.
        return_lse: Whether the second result is wanted; otherwise it holds anything.
        config: Sizes; None chooses from the table.

    Returns:
        Outputs and logarithms of mass in base 2. Rows of no request hold anything.

    Raises:
        UnsupportedError: If the kernel cannot serve the plan.
    """
    spec = plan.spec
    reason = why_not(spec, variant)
    if reason is not None:
        raise UnsupportedError(f"mosaic prefill: {reason}; or use backend='xla'.")
    kernel = _Kernel(
        spec=spec,
        variant=variant,
        config=config or choose(spec, variant),
        sm_scale=sm_scale,
        return_lse=return_lse,
        k_scale=mosaic_tile.scale_kind(kv.k_scale),
        v_scale=mosaic_tile.scale_kind(kv.v_scale),
    )
    heads = spec.heads_per_tile
    # Rows of a block of heads side by side, like the outputs. Tiles may reach behind the last row.
    rows = q.astype(kernel.sizes.dtype).reshape(q.shape[0], -1, heads, spec.head_dim)
    rows = jnp.swapaxes(rows, 0, 1).reshape(-1, q.shape[0] * heads, spec.head_dim)
    rows = jnp.pad(rows, ((0, 0), (0, 2 * WARPGROUP_ROWS), (0, 0)))
    small = mosaic_tile.operands(
        kv, plan, variant, extra, rows_per_token=heads, rows=2 * WARPGROUP_ROWS
    )
    o, lse, part, part_lse = _launch(kernel, plan, rows, kv, small)
    o = jnp.swapaxes(o.reshape(-1, spec.max_tokens, heads, spec.v_dim), 0, 1)
    o, part = o.reshape(-1, spec.q_heads, spec.v_dim), part.reshape(-1, heads, spec.v_dim)
    if spec.split_mode == "none" and not spec.cascade_levels:
        return o, lse
    return mosaic_tile.merge_partials(plan, o, lse, part, part_lse, use_softmax=variant.use_softmax)


def _launch(
    kernel: _Kernel, plan: Plan, q: Array, kv: PagedKV, small: dict[str, Array]
) -> tuple[Array, Array, Array, Array]:
    spec = kernel.spec
    heads = spec.heads_per_tile
    _, units = spec.bounds
    results = (
        jax.ShapeDtypeStruct(
            (spec.q_heads // heads, spec.max_tokens * heads, spec.v_dim), jnp.dtype(spec.q_dtype)
        ),
        jax.ShapeDtypeStruct((spec.max_tokens, spec.q_heads), jnp.float32),
        jax.ShapeDtypeStruct((max(units, 1) * heads, spec.v_dim), jnp.float32),
        jax.ShapeDtypeStruct((max(units, 1), heads), jnp.float32),
    )
    return launch(
        kernel,
        _Refs,
        (plan, q, kv, small),
        results=results,
        scratch=_scratch(kernel),
        warpgroups=kernel.sizes.warpgroups + 1,
    )


def _scratch(kernel: _Kernel) -> dict[str, Any]:
    spec, sizes, pages, config = kernel.spec, kernel.sizes, kernel.pages, kernel.config
    each, rows, keys = sizes.warpgroups, WARPGROUP_ROWS, config.tile_kv
    dim, v_dim = spec.head_dim, spec.v_dim

    def swizzled(shape: tuple[int, ...], columns: int) -> Any:  # noqa: ANN401
        return plgpu.SMEM(shape, sizes.dtype, transforms=mosaic_tile.swizzled(columns, sizes.dtype))

    o_shape = (each, rows, min(config.o_columns, v_dim))
    part_shape = (each, rows, min(config.part_columns, v_dim))
    return {
        "k_ring": pages.scratch(dim, kernel.key_columns, readers=each),
        "v_ring": pages.scratch(v_dim, v_dim, readers=each),
        "my_q": swizzled((each, rows, dim), kernel.columns),
        "my_k": swizzled((each, keys, dim), kernel.columns) if kernel.widens_keys else None,
        "my_v": swizzled((each, keys, v_dim), v_dim) if sizes.narrow else None,
        "my_p": swizzled((each, rows, keys), keys) if config.portable else None,
        "my_o": plgpu.SMEM(o_shape, jnp.dtype(spec.q_dtype)),
        "my_part": plgpu.SMEM(part_shape, jnp.float32),
        "my_lse": plgpu.SMEM((each, rows), jnp.float32),
        "turn": plgpu.Barrier(num_arrivals=2) if config.schedule_barrier else None,
        # One for each stage: without turns, one warpgroup may be as far ahead as the ring is long.
        "cleaned": plgpu.Barrier(num_barriers=config.stages) if each == 2 else None,
    }
