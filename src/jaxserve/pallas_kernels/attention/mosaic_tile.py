"""What the Mosaic GPU attention kernels share: work items, operands, and variants on tiles.

The kernels take a plan's whole buffer as one operand and find its parts by static offsets. Score
tiles come in two orientations: keys along axis 0 and rows along axis 1 in the decode kernel, the
other way round in the prefill kernel; `Orientation` hides which.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.attention.mosaic_math import with_fast_math
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Item, Plan, PlanSpec
from jaxserve.pallas_kernels.variant import AttentionVariant

Ref = Any
"""A reference inside a kernel body; JAX leaves its type open."""

LOWEST = -1e30
"""Where running maxima begin: finite, so that the difference of two of them is never NaN."""

SHARED_MEMORY_LIMIT = 232_448
"""Bytes of shared memory that a CTA may have on Hopper."""

MULTIPROCESSOR_SHARED_MEMORY = 233_472
"""Bytes that all CTAs of a Hopper multiprocessor share, each with 1 KiB besides its own."""

ScaleKind = Literal["none", "head", "page"]
"""What stored keys or values are multiplied with; one number for all counts as one per head."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlanRef:
    """A plan's buffer inside a kernel.

    Attributes:
        ref: The buffer.
        spec: Its static layout.
    """

    ref: Ref
    spec: PlanSpec

    def read(self, name: str, index: Array | int) -> Array:
        """Read one number of a part that has one axis."""
        return self.ref[self.spec.layout[name][0] + index]

    def field(self, item: Array, field: Item) -> Array:
        """Read one field of a work item."""
        return self.ref[self.spec.layout["items"][0] + item * len(Item) + int(field)]


@dataclasses.dataclass(frozen=True, slots=True)
class Orientation:
    """A score tile and its axes.

    Attributes:
        shape: Shape of the tile.
        key_axis: Axis of keys; the other one is that of rows.
    """

    shape: tuple[int, int]
    key_axis: int

    @property
    def row_axis(self) -> int:
        """Axis of query rows."""
        return 1 - self.key_axis

    def keys(self) -> Array:
        """Count keys."""
        return self._iota(self.key_axis)

    def rows(self) -> Array:
        """Count rows."""
        return self._iota(self.row_axis)

    def _iota(self, axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=plgpu.Layout.WGMMA)

    def per_row(self, value: float) -> Array:
        """Return a vector with one number per row."""
        size = self.shape[self.row_axis]
        layout = plgpu.Layout.WGMMA.reduce(self.key_axis)
        return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), layout)

    def spread(self, vector: Array, shape: tuple[int, int] | None = None) -> Array:
        """Broadcast a vector over rows to a tile, this one or one with other keys."""
        return lax.broadcast_in_dim(vector, shape or self.shape, [self.row_axis])

    def load_rows(self, ref: Ref) -> Array:
        """Load one number per row from global memory, and broadcast it."""
        layout = plgpu.Layout.WGMMA.reduce(self.key_axis)
        return self.spread(plgpu.load(ref, layout=layout, optimized=False))


def exponent_base(top: Array) -> Array:
    """Return what to subtract from scores before exponentials, given maxima.

    A maximum, unless nothing was seen yet: hidden scores, which are `LOWEST`, then weigh 0 and not
    1. So nobody has to remember which keys were hidden, which takes a register per score.
    """
    return jnp.where(top == LOWEST, 0.0, top)


def wrap(count: Array, size: int) -> Array:
    """Return the place in a ring of the given size."""
    return lax.rem(count, jnp.int32(size))


def product(shape: tuple[int, ...], a: Ref, b: Ref) -> Array:
    """Multiply two operands of the matrix unit and wait for the result."""

    def run(acc: Ref) -> Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))  # type: ignore[attr-defined]


def zeros(shape: tuple[int, int]) -> Array:
    """Return a tile of zeros in the accumulator's layout."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


CHANGED_COLUMNS = 64
"""Columns of each half of the keys that a variant changes at once; tiles are no wider."""


def swizzled(columns: int, dtype: jnp.dtype) -> tuple[Any, ...]:
    """Return the transforms of a tile that the matrix unit reads, for rows of so many columns."""
    swizzle = min(128, columns * dtype.itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # type: ignore[abstract]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]


def store_plainly(ref: Ref, value: Array) -> None:
    """Store to shared memory that is neither tiled nor swizzled, bank conflicts or not.

    Its rows can then be copied out one by one, which tiles of eight rows forbid.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11 finds this out by itself
        ref[...] = value


@dataclasses.dataclass(frozen=True)
class KernelContext:
    """What a variant's functions may ask inside a kernel; see `variant.TileContext`.

    Attributes:
        sm_scale: What products were multiplied with.
        q_heads: Heads of queries.
        kv_heads: Heads of keys.
        head_dim: Dimension of queries and keys.
        request: Request of the tile.
        q_len: Its query tokens.
        kv_len: Its keys.
        extras: Extra arrays by name, already as broad as the tile.
    """

    sm_scale: float
    q_heads: int
    kv_heads: int
    head_dim: int
    request: Array
    q_len: Array
    kv_len: Array
    extras: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        """Return an extra."""
        return self.extras[name]

    def take(self, name: str, *index: Array) -> Array:
        """Refuse: registers cannot be indexed by tiles."""
        raise UnsupportedError(
            f"the mosaic backend has no lookup, and the variant takes {name!r} at {len(index)} "
            "indices; use backend='xla'."
        )


def why_not(variant: AttentionVariant) -> str | None:
    """Return why no Mosaic kernel can run a variant, or None."""
    arrays = [name for name, kind in variant.extras.items() if kind == "array"]
    if arrays:
        return f"the variant looks up {', '.join(arrays)}, and registers cannot be indexed"
    return None


def scale_kind(scale: Array | None) -> ScaleKind:
    """Return how the scales of keys or values are indexed."""
    if scale is None:
        return "none"
    return "page" if jnp.ndim(scale) == 2 else "head"


def operands(
    kv: PagedKV,
    plan: Plan,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    *,
    rows_per_token: int,
    rows: int,
) -> dict[str, Array]:
    """Return the kernel's small operands in the forms that tiles can load.

    Args:
        kv: Keys and values, for their scales.
        plan: The step's plan.
        variant: What is read.
        extra: The caller's arrays.
        rows_per_token: Rows of a token, those included that only fill up tiles.
        rows: Rows of a tile.
    """
    spec = plan.spec
    found: dict[str, Array] = {}
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        kind = scale_kind(scale)
        if kind == "head":
            found[name] = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (spec.kv_heads,))
        elif kind == "page":
            found[name] = jnp.asarray(scale, jnp.float32)
    for name, kind in variant.extras.items():
        value = jnp.asarray(extra[name])
        value = value.astype(
            jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) else jnp.int32
        )
        if kind == "head":
            value = value.reshape(-1, spec.heads_per_tile)
            value = jnp.pad(value, ((0, 0), (0, rows_per_token - spec.heads_per_tile)))
            value = jnp.tile(value, (1, -(-rows // rows_per_token)))[:, :rows]
        if kind == "request" and spec.cascade_levels:
            value = _per_row(value[jnp.maximum(plan.token_request, 0)], rows_per_token, rows)
        found[f"extra_{name}"] = value.reshape(1) if kind == "scalar" else value
    if spec.cascade_levels:
        found["positions"] = _per_row(plan.token_position, rows_per_token, rows)
    if variant.packed_mask != "none":
        found["mask"] = _mask_rows(plan, variant, extra["mask"], rows_per_token, rows)
    return found


def _per_row(per_token: Array, rows_per_token: int, rows: int) -> Array:
    """Repeat numbers of tokens for each row; a tile's vector may reach behind the last one."""
    return jnp.pad(jnp.repeat(per_token, rows_per_token), (0, rows))


def _mask_rows(
    plan: Plan, variant: AttentionVariant, mask: Array, rows_per_token: int, rows: int
) -> Array:
    """Turn a packed mask so that the words of neighbouring rows lie side by side.

    Word w of row r of a request's n rows is then at `rows_per_token * (first word of the request)
    + n * w + r`, and a tile loads its rows with one vector. With masks per head there is one line
    per block of heads.
    """
    spec = plan.spec
    heads = mask.reshape(-1, mask.shape[-1])
    first = plan.mask_indptr
    words = jnp.arange(mask.shape[-1] * rows_per_token)
    request = jnp.searchsorted(first * rows_per_token, words, side="right", method="sort") - 1
    request = jnp.clip(request, 0, spec.max_requests - 1)
    tokens = plan.q_len[request]
    within = words - first[request] * rows_per_token
    word, row = jnp.divmod(within, jnp.maximum(tokens * rows_per_token, 1))
    token, head = jnp.divmod(row, rows_per_token)
    source = first[request] + token * ((plan.kv_len[request] + 31) // 32) + word
    source = jnp.clip(source, 0, mask.shape[-1] - 1)
    if variant.packed_mask == "per_head":
        block = jnp.arange(spec.q_heads // spec.heads_per_tile)[:, None]
        line = jnp.minimum(block * spec.heads_per_tile + head, spec.q_heads - 1)
        turned = heads[line, source[None, :]]
    else:
        turned = heads[:1, source]
    # A tile's vector may reach behind the last row.
    return jnp.pad(lax.bitcast_convert_type(turned, jnp.int32), ((0, 0), (0, rows)))


@dataclasses.dataclass(frozen=True)
class Scores:
    """From products of queries and keys to what is weighed, for the tiles of one work item.

    Attributes:
        work: The plan.
        item: The work item.
        small: References to the results of `operands`.
        variant: What is different.
        tile: Orientation of score tiles.
        rows_per_token: Rows of a token.
        first_row: First of the item's rows that this warpgroup computes.
        sm_scale: What products are multiplied with.
    """

    work: PlanRef
    item: Array
    small: Mapping[str, Ref]
    variant: AttentionVariant
    tile: Orientation
    rows_per_token: int
    first_row: Array | int
    sm_scale: float

    def field(self, field: Item) -> Array:
        """Read a field of the item."""
        return self.work.field(self.item, field)

    def context(self) -> KernelContext:
        """Return what the variant's functions may ask."""
        spec = self.work.spec
        request = self.field(Item.REQUEST)
        extras: dict[str, Array] = {}
        for name, kind in self.variant.extras.items():
            ref = self.small[f"extra_{name}"]
            if kind == "head":
                block = lax.div(self.field(Item.HEAD), jnp.int32(spec.heads_per_tile))
                size = self.tile.shape[self.tile.row_axis]
                extras[name] = self.tile.load_rows(ref.at[block, pl.ds(self.first_row, size)])
            elif kind == "request" and spec.cascade_levels:
                start = self.field(Item.Q_START) * self.rows_per_token + self.first_row
                size = self.tile.shape[self.tile.row_axis]
                extras[name] = self.tile.load_rows(ref.at[pl.ds(start, size)])
            else:
                extras[name] = ref[request if kind == "request" else 0]
        return KernelContext(
            sm_scale=self.sm_scale,
            q_heads=spec.q_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            request=request,
            q_len=self.field(Item.REQUEST_Q_LEN),
            kv_len=self.field(Item.KV_LEN),
            extras=extras,
        )

    def row_positions(self) -> Array:
        """Return the position of each row's token."""
        if self.work.spec.cascade_levels:  # rows of several requests
            start = self.field(Item.Q_START) * self.rows_per_token + self.first_row
            size = self.tile.shape[self.tile.row_axis]
            return self.tile.load_rows(self.small["positions"].at[pl.ds(start, size)])
        token = lax.div(self.tile.rows() + self.first_row, jnp.int32(self.rows_per_token))
        return token + self.field(Item.Q_POS)

    def masked(
        self,
        s: Array,
        begin: Array,
        *,
        ctx: KernelContext,
        scale: Array | float,
        masks: bool = True,
    ) -> tuple[Array, Array | None]:
        """Scale, change and mask scores.

        Args:
            s: Products of one tile.
            begin: Position of its first key.
            ctx: From `context`.
            scale: What products are multiplied with, scales of keys included.
            masks: Whether some row may not see some key.

        Returns:
            Natural scores, and which keys each row sees; None if all.
        """
        spec, variant = self.work.spec, self.variant
        k_pos = self.tile.keys() + begin
        s = s * scale
        causal = masks and spec.causal and spec.tile_tokens > 1
        window = masks and spec.window is not None
        q_pos = head = jnp.int32(0)
        asks = variant.score_mod is not None or variant.mask_mod is not None
        if causal or window or asks:
            q_pos = self.row_positions()
        if asks:
            head = lax.rem(self.tile.rows() + self.first_row, jnp.int32(self.rows_per_token))
            head = head + self.field(Item.HEAD)
        if variant.score_mod is not None:
            s = with_fast_math(variant.score_mod)(s, ctx, q_pos, k_pos, head)
        if not masks:
            return s, None
        seen = k_pos < self.field(Item.KV_END)
        if causal:
            seen &= k_pos <= q_pos
        if window and spec.window is not None:
            seen &= k_pos > q_pos - spec.window
        if variant.mask_mod is not None:
            seen &= with_fast_math(variant.mask_mod)(ctx, q_pos, k_pos, head)
        if variant.packed_mask != "none":
            seen &= self._bits(begin)
        return s, seen

    def _bits(self, begin: Array) -> Array:
        """Read the tile's part of the packed mask."""
        size = self.tile.shape[self.tile.row_axis]
        keys = self.tile.shape[self.tile.key_axis]
        rows = self.field(Item.REQUEST_Q_LEN) * self.rows_per_token
        before = self.field(Item.Q_POS) - self.field(Item.KV_LEN) + self.field(Item.REQUEST_Q_LEN)
        per_row = lax.div(self.field(Item.KV_LEN) + 31, jnp.int32(32))
        start = self.field(Item.MASK_BASE) - before * per_row
        start = (start + before) * self.rows_per_token + self.first_row
        line = 0
        if self.variant.packed_mask == "per_head":
            line = lax.div(self.field(Item.HEAD), jnp.int32(self.work.spec.heads_per_tile))
        first = lax.div(begin, jnp.int32(32))

        def words(i: int) -> Array:
            # Behind the last word there is another request's; those keys are hidden anyhow.
            at = start + jnp.minimum(first + i, per_row - 1) * rows
            return self.tile.load_rows(self.small["mask"].at[line, pl.ds(at, size)])

        # Tiles begin at pages, which may be shorter than a word.
        k_pos = self.tile.keys() + begin
        word = words(0)
        for i in range(1, keys // 32 + (self.work.spec.page_size < 32)):
            word = jnp.where(k_pos < 32 * (first + i), word, words(i))
        return (lax.shift_right_logical(word, k_pos & 31) & 1) != 0


def load_tile(ref: Ref, dtype: jnp.dtype) -> Array:
    """Load a tile of keys or values into registers as operands of the matrix unit."""
    if ref.dtype == dtype:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    # Four bytes per thread: the layout in which widening to 16 bits needs no shuffles.
    loaded = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(loaded.astype(dtype), plgpu.Layout.WGMMA)


def widen_keys(
    source: Ref,
    target: Ref,
    variant: AttentionVariant,
    ctx: KernelContext,
    begin: Array,
    *,
    columns: int,
    dtype: jnp.dtype,
) -> None:
    """Write keys as operands of the matrix unit, changed by the variant.

    Args:
        source: Tile of stored keys.
        target: Where to.
        variant: Says how keys change.
        ctx: What it may ask.
        begin: Position of the first key.
        columns: Half of the columns if the variant changes keys, otherwise all.
        dtype: Dtype of the target.
    """
    if variant.k_mod is None:
        target[...] = load_tile(source, dtype)
    else:
        change = with_fast_math(variant.k_mod)
        # Piece by piece, as angles and both halves in float32 fill many registers.
        width = min(columns, CHANGED_COLUMNS)
        at = Orientation((source.shape[0], width), key_axis=0)
        for column in range(0, columns, width):
            halves = [pl.ds(start + column, width) for start in (0, columns)]
            low, high = (
                load_tile(source.at[:, half], dtype).astype(jnp.float32) for half in halves
            )
            changed = change(low, high, ctx, at.keys() + begin, at.rows() + column)
            for half, value in zip(halves, changed, strict=True):
                target[:, half] = value.astype(dtype)
    plgpu.commit_smem()


def clean_values(source: Ref, target: Ref, begin: Array, end: Array, *, dtype: jnp.dtype) -> None:
    """Write values as operands of the matrix unit, with zeros behind the last key."""
    at = Orientation(source.shape, key_axis=0)
    values = load_tile(source, dtype)
    target[...] = jnp.where(at.keys() + begin < end, values, jnp.zeros_like(values))


def merge_partials(
    plan: Plan, o: Array, lse: Array, part: Array, part_lse: Array, *, use_softmax: bool
) -> tuple[Array, Array]:
    """Merge partial states into the rows whose keys were cut, in the order that the plan gives.

    Args:
        plan: The step's plan.
        o: Outputs that were written through, `[tokens, q_heads, v_dim]`.
        lse: Their logarithms of mass, `[tokens, q_heads]`.
        part: Partial outputs, `[units, heads_per_tile, v_dim]`.
        part_lse: Theirs, `[units, heads_per_tile]`.
        use_softmax: Whether states merge as softmaxes do, or are sums.
    """
    spec = plan.spec
    heads = spec.heads_per_tile
    first, count = plan.merge_indptr[:-1], jnp.diff(plan.merge_indptr)
    last = part.shape[0] - 1

    def gather(i: Array) -> tuple[Array, Array]:
        unit = plan.merge_units[jnp.minimum(first + i, last)]
        here = (i < count)[:, None]
        state, log = part[unit], part_lse[unit]
        if not use_softmax:
            return jnp.where(here[..., None], state, 0.0), log
        # Unused units hold anything, so they are cut off before any arithmetic.
        return jnp.where(here[..., None], state, 0.0), jnp.where(here, log, -jnp.inf)

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, mass, acc = carry
        state, log = gather(i)
        if not use_softmax:
            return top, mass, acc + state
        new = jnp.maximum(top, log)
        base = jnp.where(jnp.isneginf(new), 0.0, new)
        old, more = jnp.exp2(top - base), jnp.exp2(log - base)
        return new, mass * old + more, acc * old[..., None] + state * more[..., None]

    shape = (first.shape[0], heads)
    begin = (
        jnp.full(shape, -jnp.inf),
        jnp.zeros(shape),
        jnp.zeros((*shape, spec.v_dim)),
    )
    top, mass, acc = lax.fori_loop(0, plan.max_splits, add, begin)
    if use_softmax:
        some = jnp.where(mass > 0, mass, 1.0)
        acc = acc / some[..., None]
        top = jnp.where(mass > 0, top + jnp.log2(some), -jnp.inf)
    units = (o.shape[0] * spec.q_heads // heads, heads)
    target = plan.merge_target
    merged = o.reshape(*units, spec.v_dim).at[target].set(acc.astype(o.dtype), mode="drop")
    logs = lse.reshape(units).at[target].set(top, mode="drop")
    return merged.reshape(o.shape), logs.reshape(lse.shape)
