"""Attention to lists of tokens for Hopper: rows are gathered one by one, products are dense.

All lists are cut into tiles of 64 tokens, and the running count of tiles is cut into as many equal
runs as there are CTAs. So a CTA finds its lists by two binary searches, no list is too long or too
short for the balance, and the host knows nothing but shapes. A list that lies within one run is
written through; of all others a CTA keeps two partial states at most, which are merged afterwards.

One warpgroup gathers: each of its warps looks up the pages of 16 tokens and copies their keys and
values, each a row of the cache, into a ring. Such rows cannot be operands of the matrix unit, whose
tiles are swizzled eight rows at a time. So the other warpgroup moves a tile from the ring to a
swizzled one, through registers, in a layout without bank conflicts on either side, and frees its
place in the ring before it computes. Products are those of the decode kernel: tokens lie on the
matrix unit's M axis.

Source: ours; equal runs of tiles from stream-K (arXiv 2301.03598), the online softmax of
FlashAttention (arXiv 2205.14135).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.attention import mosaic_tile, tuning
from jaxserve.pallas_kernels.attention.mosaic_pages import Ring, drain
from jaxserve.pallas_kernels.attention.mosaic_tile import (
    Orientation,
    Ref,
    exponent_base,
    product,
    wrap,
)
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.state import LOG2_E, AttentionState
from jaxserve.pallas_kernels.token_attention.lists import TokenLists
from jaxserve.pallas_kernels.variant import AttentionVariant

# ------------------------------------------------------------------------------------- tuning

TILE = 64
"""Tokens of a tile: the matrix unit's rows."""
ROWS = 8
"""Query rows of a tile: the matrix unit's narrowest N; smaller groups are filled up to it."""
Q_STAGES = 2
"""Lists whose queries are in flight."""
WARPS = 4
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """Sizes of the kernel.

    Attributes:
        stages: Tiles of keys, and as many of values, in flight.
        ctas: CTAs per multiprocessor that the work is shared among.
    """

    stages: int = 2
    ctas: int = 2

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        if self.stages < 2:
            raise ValueError(f"stages must be 2 or more to overlap copies, got {self.stages}.")
        if self.ctas not in (1, 2):
            raise ValueError(f"ctas must be 1 or 2, got {self.ctas}.")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class TuningKey:
    """What a configuration is chosen by.

    Attributes:
        dim: Dimension of heads.
    """

    dim: int

    def shared_memory(self, config: TuningConfig) -> int:
        """Return an upper bound of the bytes of shared memory that a CTA takes."""
        tile = TILE * self.dim * 2
        parts = (
            Q_STAGES * ROWS * self.dim * 2,
            2 * config.stages * tile,
            2 * tile,
            ROWS * TILE * 2,
            ROWS * self.dim * 2,
            ROWS * self.dim * 4,
            ROWS * 4,
        )
        # Every part begins at a multiple of 1 KiB; reductions and barriers have the rest.
        return sum(-(-part // 1024) * 1024 for part in parts) + 3072


@functools.cache
def tuning_table() -> dict[TuningKey, tuple[TuningConfig, ...]]:
    """Return every configuration that may be chosen, what is taken without a measurement first.

    That is two CTAs per multiprocessor where two stages then fit: looking up pages is a chain of
    loads, which one CTA waits for while the other one copies. Else, or if measured to be faster,
    one CTA with as many stages as fit, eight at most.
    """
    table: dict[TuningKey, tuple[TuningConfig, ...]] = {}
    half = mosaic_tile.MULTIPROCESSOR_SHARED_MEMORY // 2 - 1024
    for dim in HEAD_DIMS:
        key = TuningKey(dim)
        found: list[TuningConfig] = []
        for ctas, limit, most in ((2, half, 4), (1, mosaic_tile.SHARED_MEMORY_LIMIT, 8)):
            configs = (TuningConfig(stages=n, ctas=ctas) for n in range(most, 1, -1))
            found += [config for config in configs if key.shared_memory(config) <= limit][:1]
        table[key] = tuple(found)
    return table


def choose(head_dim: int) -> TuningConfig:
    """Choose the configuration for heads that `why_not` lets pass."""
    key = TuningKey(head_dim)
    return tuning.choose("token_lists", key, tuning_table()[key], tuning.device_name())


# ----------------------------------------------------------------------------------- arguments


def why_not(
    q: Array | jax.ShapeDtypeStruct, cache: PagedKV, variant: AttentionVariant
) -> str | None:
    """Return why the kernel cannot serve arguments, with the nearest that it can; or None."""
    dtype = cache.k.dtype.name
    checks = {
        "head_dim": (cache.k.shape[3], HEAD_DIMS),
        "v_head_dim": (cache.v.shape[3], (cache.k.shape[3],)),
        "page_size": (cache.page_size, PAGE_SIZES),
        "the cache's dtype": (dtype, DTYPES),
        "q's dtype": (q.dtype.name, (dtype,)),
    }
    for name, (got, allowed) in checks.items():
        if got not in allowed:
            some = "one of " if len(allowed) > 1 else ""
            return f"{name} must be {some}{', '.join(map(str, allowed))}, got {got}"
    if q.shape[1] > ROWS * cache.kv_heads:
        group = q.shape[1] // cache.kv_heads
        return f"a group must have {ROWS} query heads or fewer, got {group}"
    if cache.k_scale is not None or cache.v_scale is not None:
        return "it multiplies with no scales of keys or values; store them unscaled"
    changes = [
        name
        for name in ("score_mod", "mask_mod", "q_mod", "k_mod")
        if getattr(variant, name) is not None
    ]
    if not variant.use_softmax:
        changes.append("use_softmax=False")
    if changes:
        return f"it computes plain softmax attention, and the variant has {', '.join(changes)}"
    return None


# ---------------------------------------------------------------------------------------- body


@dataclasses.dataclass(frozen=True)
class _Refs:
    """References of the kernel: operands, results, and what lies in shared memory."""

    q: Ref
    tile_end: Ref
    list_indptr: Ref
    positions: Ref
    table_indptr: Ref
    table: Ref
    keys: Ring
    values: Ring
    o: Ref
    lse: Ref
    part: Ref
    part_lse: Ref
    q_tile: Ref
    k_tile: Ref
    v_tile: Ref
    p_tile: Ref
    o_tile: Ref
    part_tile: Ref
    lse_tile: Ref
    q_full: Ref
    q_empty: Ref


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What one CTA attends to of one list.

    Attributes:
        row: The list.
        number: Pieces of the CTA before this one.
        tokens: First token of the list, and one past its last.
        list_tiles: First tile of the list, and one past its last.
        tiles: Those of the piece.
        first: First tile of the CTA.
    """

    row: Array
    number: Array
    tokens: tuple[Array, Array]
    list_tiles: tuple[Array, Array]
    tiles: tuple[Array, Array]
    first: Array

    def token(self, tile: Array) -> Array:
        """Return the first token of a tile."""
        return self.tokens[0] + (tile - self.list_tiles[0]) * TILE


def share(total: Array, cta: Array, num_ctas: int) -> tuple[Array, Array]:
    """Return the first tile of a CTA and one past its last; shares differ by one tile at most."""
    each, more = lax.div(total, jnp.int32(num_ctas)), lax.rem(total, jnp.int32(num_ctas))
    first = cta * each + jnp.minimum(cta, more)
    return first, first + each + (cta < more).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Static settings of one compiled kernel.

    Attributes:
        config: Sizes.
        num_ctas: CTAs of the launch.
        rows: Lists.
        kv_heads: Heads of keys; list `request * kv_heads + head` is one head's.
        group: Query heads of each.
        head_dim: Their dimension.
        page_size: Tokens per page.
        sm_scale: What products are multiplied with.
        dtype: Of queries, keys, values and outputs.
    """

    config: TuningConfig
    num_ctas: int
    rows: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    sm_scale: float
    dtype: jnp.dtype

    def __call__(self, refs: _Refs) -> None:
        """Run one CTA."""
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(functools.partial(self.compute, refs))
        pl.when(warpgroup == 1)(functools.partial(self.gather, refs))

    # Both warpgroups walk the same pieces.

    def row_of(self, refs: _Refs, tile: Array) -> Array:
        """Search for the list of a tile: the first one that ends behind it."""

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            is_before = refs.tile_end[middle] <= tile
            return jnp.where(is_before, middle + 1, low), jnp.where(is_before, high, middle)

        everything = jnp.int32(0), jnp.int32(self.rows - 1)
        return lax.fori_loop(0, (self.rows - 1).bit_length(), halve, everything)[0]

    def each_piece(self, refs: _Refs, body: Callable[[_Piece], None]) -> tuple[Array, Array]:
        """Call a function with every piece of the CTA; return how many tiles and pieces it has."""
        total = refs.tile_end[self.rows - 1]
        first, last = share(total, lax.axis_index("cta"), self.num_ctas)

        def one_row(row: Array, number: Array) -> Array:
            begin = jnp.where(row == 0, 0, refs.tile_end[jnp.maximum(row - 1, 0)])
            end = refs.tile_end[row]
            tiles = jnp.maximum(begin, first), jnp.minimum(end, last)
            # Between two lists there may be empty ones.
            is_there = tiles[0] < tiles[1]

            @pl.when(is_there)
            def _piece() -> None:
                body(
                    _Piece(
                        row=row,
                        number=number,
                        tokens=(refs.list_indptr[row], refs.list_indptr[row + 1]),
                        list_tiles=(begin, end),
                        tiles=tiles,
                        first=first,
                    )
                )

            return number + is_there.astype(jnp.int32)

        low, high = self.row_of(refs, first), self.row_of(refs, last - 1)
        behind = jnp.where(first < last, high + 1, low)
        return last - first, lax.fori_loop(low, behind, one_row, jnp.int32(0))

    # The warpgroup that gathers.

    def gather(self, refs: _Refs) -> None:
        """Keep the rings of tiles full, and that of queries."""

        def one_piece(piece: _Piece) -> None:
            slot = wrap(piece.number, Q_STAGES)
            pl.when(piece.number >= Q_STAGES)(lambda: plgpu.barrier_wait(refs.q_empty.at[slot]))
            plgpu.copy_gmem_to_smem(
                refs.q.at[piece.row], refs.q_tile.at[slot], refs.q_full.at[slot]
            )
            table = refs.table_indptr[lax.div(piece.row, jnp.int32(self.kv_heads))]

            def one_tile(tile: Array, _: None) -> None:
                self.gather_tile(refs, piece, tile, table)

            lax.fori_loop(*piece.tiles, one_tile, None)

        tiles, pieces = self.each_piece(refs, one_piece)
        for ring in (refs.keys, refs.values):
            drain(ring.empty, tiles, self.config.stages)
        drain(refs.q_empty, pieces, Q_STAGES)

    def gather_tile(self, refs: _Refs, piece: _Piece, tile: Array, table: Array) -> None:
        """Copy the keys and values of a tile's tokens, a quarter of them by each warp."""
        step = tile - piece.first
        stage = wrap(step, self.config.stages)
        head = lax.rem(piece.row, jnp.int32(self.kv_heads))
        begin, last = piece.token(tile), piece.tokens[1] - 1
        for ring in (refs.keys, refs.values):
            pl.when(step >= self.config.stages)(functools.partial(_wait_empty, ring, stage))

        @plgpu.warp_map
        def _quarter(warp: Array) -> None:
            places = [warp * (TILE // WARPS) + i for i in range(TILE // WARPS)]
            # All loads first, so that they wait for memory together. The last tile of a list is
            # filled up with its last token, which is as good to multiply as any.
            positions = [refs.positions[jnp.minimum(begin + place, last)] for place in places]
            pages = [
                refs.table[
                    table + lax.shift_right_logical(position, self.page_size.bit_length() - 1)
                ]
                for position in positions
            ]
            for ring in (refs.keys, refs.values):
                for place, page, position in zip(places, pages, positions, strict=True):
                    # In bounds, it needs no descriptor.
                    plgpu.copy_gmem_to_smem(
                        ring.source.at[page, head, pl.ds(position & (self.page_size - 1), 1)],
                        ring.tiles.at[stage, pl.ds(place, 1)],
                        ring.full.at[stage],
                        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                    )

    # The warpgroup that computes.

    def compute(self, refs: _Refs) -> None:
        """Attend to all pieces."""

        def one_piece(piece: _Piece) -> None:
            slot = wrap(piece.number, Q_STAGES)
            plgpu.barrier_wait(refs.q_full.at[slot])
            result, log = self.attend(refs, piece, slot)
            self.write(refs, piece, result, log)

        self.each_piece(refs, one_piece)
        plgpu.wait_smem_to_gmem(0)

    def attend(self, refs: _Refs, piece: _Piece, slot: Array) -> tuple[Array, Array]:
        """Return a piece's output and logarithm of mass."""
        shape, wide = Orientation((TILE, ROWS), key_axis=0), (self.head_dim, ROWS)

        def one_tile(tile: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, mass, acc = carry
            stage = wrap(tile - piece.first, self.config.stages)
            # Warps need not finish products together. Keys may be replaced, since all warps have
            # met for the last tile's maxima; values, since they have met for this tile's keys.
            self.take(refs.keys, stage, refs.k_tile)
            self.take(refs.values, stage, refs.v_tile)
            s = product((TILE, ROWS), refs.k_tile, refs.q_tile.at[slot].transpose((1, 0)))
            is_listed = shape.keys() + piece.token(tile) < piece.tokens[1]
            s = jnp.where(is_listed, s * (self.sm_scale * LOG2_E), mosaic_tile.LOWEST)
            new_top = jnp.maximum(top, s.max(axis=0))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(s - shape.spread(exponent_base(new_top)))
            # Summed over tokens once per piece: that sum needs all four warps.
            mass = mass * shape.spread(shrink) + weights
            acc = acc * shape.spread(shrink, wide)
            refs.p_tile.transpose((1, 0))[...] = weights.astype(self.dtype)
            plgpu.commit_smem()
            more = product(wide, refs.v_tile.transpose((1, 0)), refs.p_tile.transpose((1, 0)))
            return new_top, mass, acc + more

        top, mass, acc = lax.fori_loop(
            *piece.tiles,
            one_tile,
            (
                shape.per_row(mosaic_tile.LOWEST),
                mosaic_tile.zeros((TILE, ROWS)),
                mosaic_tile.zeros(wide),
            ),
        )
        plgpu.barrier_arrive(refs.q_empty.at[slot])
        total = mass.sum(axis=0)
        some = jnp.where(total == 0.0, 1.0, total)
        log = jnp.where(total == 0.0, -jnp.inf, top + jnp.log2(some))
        return acc * shape.spread(1.0 / some, wide), log

    def take(self, ring: Ring, stage: Array, tile: Ref) -> None:
        """Move a tile out of the ring to where the matrix unit can read it."""
        swizzle = min(128, self.head_dim * self.dtype.itemsize)
        layout = plgpu.Layout.SMEM_GMEM_COPY((TILE, self.head_dim), self.dtype, swizzle)
        plgpu.barrier_wait(ring.full.at[stage])
        tile[...] = plgpu.load(ring.tiles.at[stage], layout=layout, optimized=False)
        # Copies, as the matrix unit, come after plain accesses by a fence only, not by a barrier:
        # without it the ring may be refilled while it is still read.
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.empty.at[stage])

    def write(self, refs: _Refs, piece: _Piece, result: Array, log: Array) -> None:
        """Write a piece to the output if it is a whole list, else to a partial state."""
        is_first = piece.tiles[0] == piece.list_tiles[0]
        is_whole = is_first & (piece.tiles[1] == piece.list_tiles[1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.lse_tile[...] = log

        @pl.when(is_whole)
        def _write_through() -> None:
            mosaic_tile.store_plainly(refs.o_tile.transpose((1, 0)), result.astype(self.dtype))
            self.copy_out(refs, refs.o_tile, (refs.o, refs.lse), piece.row)

        @pl.when(~is_whole)
        def _keep_partial() -> None:
            mosaic_tile.store_plainly(
                refs.part_tile.transpose((1, 0)),
                plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED),
            )
            slot = 2 * lax.axis_index("cta") + is_first.astype(jnp.int32)
            self.copy_out(refs, refs.part_tile, (refs.part, refs.part_lse), slot)

    def copy_out(self, refs: _Refs, tile: Ref, target: tuple[Ref, Ref], at: Array) -> None:
        """Copy the group's rows of a tile, and of the logarithms, to one place of the results."""
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, self.group)], target[0].at[at])
        for i in range(self.group):
            target[1][at, i] = refs.lse_tile[i]


def _wait_empty(ring: Ring, stage: Array) -> None:
    plgpu.barrier_wait(ring.empty.at[stage])


# -------------------------------------------------------------------------------------- launch


def token_attention(
    q: Float[Array, "requests q_heads head_dim"],
    cache: PagedKV,
    kv_indptr: Int[Array, " requests_and_one"],
    kv_indices: Int[Array, " pages"],
    tokens: TokenLists,
    *,
    sm_scale: float,
    variant: AttentionVariant,
    config: TuningConfig | None = None,
    multiprocessors: int | None = None,
) -> AttentionState:
    """Attend to lists.

    Args:
        q: Queries, one token per request.
        cache: Keys and values.
        kv_indptr: Where each request's pages begin in `kv_indices`.
        kv_indices: Pages of all requests.
        tokens: What each key-value head of each request reads.
        sm_scale: What products are multiplied with.
        variant: Plain, but for sinks and changes of the output, which are the caller's business.
        config: Sizes; None chooses from the table.
        multiprocessors: Of the device; None asks it.

    Raises:
        UnsupportedError: If the kernel cannot serve the arguments.
    """
    reason = why_not(q, cache, variant)
    if reason is not None:
        raise UnsupportedError(f"mosaic token lists: {reason}; or use backend='triton' or 'xla'.")
    requests, q_heads, dim = q.shape
    rows, group = requests * cache.kv_heads, q_heads // cache.kv_heads
    if rows == 0 or tokens.positions.shape[0] == 0:
        return AttentionState.empty((requests, q_heads, dim), q.dtype)
    config = config or choose(dim)
    kernel = _Kernel(
        config=config,
        num_ctas=config.ctas * (multiprocessors or tuning.multiprocessors()),
        rows=rows,
        kv_heads=cache.kv_heads,
        group=group,
        head_dim=dim,
        page_size=cache.page_size,
        sm_scale=sm_scale,
        dtype=jnp.dtype(cache.k.dtype),
    )
    indptr = tokens.indptr.astype(jnp.int32)
    tile_end = jnp.cumsum(-(-jnp.diff(indptr) // TILE), dtype=jnp.int32)
    heads = jnp.pad(q.reshape(rows, group, dim), ((0, 0), (0, ROWS - group), (0, 0)))
    operands = (tile_end, indptr, tokens.positions, kv_indptr, kv_indices)
    o, lse, *partial = _launch(
        kernel, heads, cache, tuple(array.astype(jnp.int32) for array in operands)
    )
    o, lse = _merge(kernel, tile_end, o, lse, *partial)
    return AttentionState(o=o.reshape(q.shape), lse=lse.reshape(requests, q_heads))


def _launch(
    kernel: _Kernel, q: Array, cache: PagedKV, operands: tuple[Array, ...]
) -> tuple[Array, Array, Array, Array]:
    rows, group, dim = kernel.rows, kernel.group, kernel.head_dim

    def body(*refs: Ref, k_ring: dict[str, Ref], v_ring: dict[str, Ref], **scratch: Ref) -> None:
        q, k, v, tile_end, list_indptr, positions, table_indptr, table, *results = refs
        o, lse, part, part_lse = results
        kernel(
            _Refs(
                q=q,
                tile_end=tile_end,
                list_indptr=list_indptr,
                positions=positions,
                table_indptr=table_indptr,
                table=table,
                keys=Ring(k, **k_ring),
                values=Ring(v, **v_ring),
                o=o,
                lse=lse,
                part=part,
                part_lse=part_lse,
                **scratch,
            )
        )

    slots = 2 * kernel.num_ctas
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, group, dim), kernel.dtype),
            jax.ShapeDtypeStruct((rows, group), jnp.float32),
            jax.ShapeDtypeStruct((slots, group, dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, group), jnp.float32),
        ),
        scratch_types=_scratch(kernel),
        grid=(kernel.num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, cache.k, cache.v, *operands)


def _scratch(kernel: _Kernel) -> dict[str, Any]:
    dim, dtype, stages = kernel.head_dim, kernel.dtype, kernel.config.stages

    # Rows as they are: a tile of one row, which is no other order of numbers than none, keeps the
    # compiler from choosing a swizzle that copies of single rows would have to follow.
    row = plgpu.TilingTransform((1, dim))  # type: ignore[abstract]

    def ring() -> dict[str, Any]:
        return {
            "tiles": plgpu.SMEM((stages, TILE, dim), dtype, transforms=(row,)),
            "full": plgpu.Barrier(num_barriers=stages, num_arrivals=TILE),
            "empty": plgpu.Barrier(num_barriers=stages),
        }

    def swizzled(shape: tuple[int, ...], columns: int) -> Any:  # noqa: ANN401
        return plgpu.SMEM(shape, dtype, transforms=mosaic_tile.swizzled(columns, dtype))

    return {
        "k_ring": ring(),
        "v_ring": ring(),
        "q_tile": swizzled((Q_STAGES, ROWS, dim), dim),
        "k_tile": swizzled((TILE, dim), dim),
        "v_tile": swizzled((TILE, dim), dim),
        "p_tile": swizzled((ROWS, TILE), TILE),
        "o_tile": plgpu.SMEM((ROWS, dim), dtype),
        "part_tile": plgpu.SMEM((ROWS, dim), jnp.float32),
        "lse_tile": plgpu.SMEM((ROWS,), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=Q_STAGES),
        "q_empty": plgpu.Barrier(num_barriers=Q_STAGES),
    }


def _merge(
    kernel: _Kernel, tile_end: Array, o: Array, lse: Array, part: Array, part_lse: Array
) -> tuple[Array, Array]:
    """Merge the partial states of lists that several CTAs share; empty lists become zeros.

    Sums over states are one product with a matrix of zeros and ones, which is the same in every
    run, as sums by scattering would not be.
    """
    cta = jnp.arange(kernel.num_ctas, dtype=jnp.int32)
    first, last = share(tile_end[-1], cta, kernel.num_ctas)
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_end[:-1]])

    def row_of(tile: Array) -> Array:
        before = jnp.sum(tile_end[None, :] <= tile[:, None], axis=1)
        return jnp.minimum(before, kernel.rows - 1)

    old, new = row_of(first), row_of(last - 1)
    is_used = first < last
    goes_on = is_used & (begin[old] < first)
    begins = is_used & (begin[new] >= first) & (tile_end[new] > last)
    row = jnp.stack([old, new], axis=1).reshape(-1)
    # What no CTA wrote holds anything, so it is cut off before any arithmetic.
    is_there = jnp.stack([goes_on, begins], axis=1).reshape(-1)
    is_its = is_there & (row == jnp.arange(kernel.rows)[:, None])
    part_lse = jnp.where(is_there[:, None], part_lse, -jnp.inf)
    part = jnp.where(is_there[:, None, None], part, 0.0)
    top = jnp.max(jnp.where(is_its[..., None], part_lse, -jnp.inf), axis=1)
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp2(part_lse - base[row])
    add = functools.partial(jnp.einsum, precision="highest")
    mass = add("rs,sg->rg", is_its.astype(jnp.float32), weight)
    some = jnp.where(mass > 0, mass, 1.0)
    merged = add("rs,sgd->rgd", is_its.astype(jnp.float32), weight[..., None] * part)
    is_cut = jnp.any(is_its, axis=1)
    is_empty = tile_end == begin
    log = jnp.where(mass > 0, base + jnp.log2(some), -jnp.inf)
    log = jnp.where(is_cut[:, None], log, jnp.where(is_empty[:, None], -jnp.inf, lse))
    merged = (merged / some[..., None]).astype(o.dtype)
    whole = jnp.where(is_empty[:, None, None], jnp.zeros_like(o), o)
    return jnp.where(is_cut[:, None, None], merged, whole), log
