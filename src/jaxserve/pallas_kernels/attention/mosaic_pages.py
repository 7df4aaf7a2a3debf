"""The warpgroup of a Mosaic attention kernel that copies keys and values, page by page."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas_kernels.attention.mosaic_tile import PlanRef, Ref, swizzled, wrap
from jaxserve.pallas_kernels.plan import Item, PlanSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Ring:
    """Tiles in flight, and their barriers.

    Attributes:
        source: The pool of pages, `[pages, kv_heads, page_size, dim]`.
        tiles: Shared memory, `[stages, tile_kv, dim]`.
        full: One barrier per tile, passed when its pages have arrived.
        empty: One barrier per tile, passed when all who compute have read it.
    """

    source: Ref
    tiles: Ref
    full: Ref
    empty: Ref


@dataclasses.dataclass(frozen=True, slots=True)
class Pages:
    """How tiles of keys are made of pages.

    Attributes:
        spec: The plan's spec.
        tile_kv: Keys per tile.
        stages: Tiles in flight.
    """

    spec: PlanSpec
    tile_kv: int
    stages: int

    @property
    def per_tile(self) -> int:
        """Pages that a tile touches."""
        return max(1, self.tile_kv // self.spec.page_size)

    @property
    def rows(self) -> int:
        """Keys of a tile that come from one page."""
        return min(self.tile_kv, self.spec.page_size)

    def scratch(self, dim: int, columns: int, readers: int) -> dict[str, Any]:
        """Return what a ring needs of shared memory: its tiles and both kinds of barriers.

        Args:
            dim: Columns of a tile.
            columns: Columns of it that are read at once.
            readers: Warpgroups that read each tile.
        """
        dtype = jnp.dtype(self.spec.kv_dtype)
        shape = (self.stages, self.tile_kv, dim)
        return {
            "tiles": plgpu.SMEM(shape, dtype, transforms=swizzled(columns, dtype)),
            "full": plgpu.Barrier(num_barriers=self.stages, num_arrivals=self.per_tile),
            "empty": plgpu.Barrier(num_barriers=self.stages, num_arrivals=readers),
        }

    def num_tiles(self, work: PlanRef, item: Array) -> Array:
        """Return how many tiles an item reads."""
        keys = work.field(item, Item.KV_END) - work.field(item, Item.KV_BEGIN)
        return lax.div(keys + (self.tile_kv - 1), jnp.int32(self.tile_kv))

    def of_tile(self, work: PlanRef, item: Array, begin: Array) -> list[Array]:
        """Return the pages of the tile that begins at a position."""
        page = work.field(item, Item.TABLE_BASE) + lax.div(begin, jnp.int32(self.spec.page_size))
        return [work.read("kv_indices", page + i) for i in range(self.per_tile)]

    def copy(
        self,
        work: PlanRef,
        first: Array,
        last: Array,
        rings: tuple[Ring, ...],
        before: Callable[[Array], None],
    ) -> None:
        """Keep the rings full for all items of a CTA.

        Args:
            work: The plan.
            first: First item.
            last: One past the last.
            rings: Those of keys and of values, in the order in which they are waited for.
            before: Called with each item before its first tile.
        """

        def one_item(item: Array, step: Array) -> Array:
            before(item)
            begin = work.field(item, Item.KV_BEGIN)

            def one_tile(index: Array, step: Array) -> Array:
                self._copy_tile(work, item, begin + index * self.tile_kv, step, rings)
                return step + 1

            return lax.fori_loop(0, self.num_tiles(work, item), one_tile, step)

        steps = lax.fori_loop(first, last, one_item, jnp.int32(0))
        for ring in rings:
            drain(ring.empty, steps, self.stages)

    def _copy_tile(
        self, work: PlanRef, item: Array, begin: Array, step: Array, rings: tuple[Ring, ...]
    ) -> None:
        stage = wrap(step, self.stages)
        head = work.field(item, Item.KV_HEAD)
        # Before any waiting, so that these loads overlap with it.
        pages = self.of_tile(work, item, begin)
        start: Array | int = 0
        if self.spec.page_size > self.rows:
            start = pl.multiple_of(wrap(begin, self.spec.page_size), self.rows)
        for ring in rings:
            pl.when(step >= self.stages)(
                functools.partial(plgpu.barrier_wait, ring.empty.at[stage])
            )
            for i, page in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    ring.source.at[page, head, pl.ds(start, self.rows)],
                    ring.tiles.at[stage, pl.ds(i * self.rows, self.rows)],
                    ring.full.at[stage],
                )


def drain(barrier: Ref, count: Array, ring: int) -> None:
    """Wait for the phases of a ring's barriers that nobody has waited for yet.

    Whoever waits on a barrier must have seen all of its phases before leaving.
    """

    def wait(at: Array, _: None) -> None:
        plgpu.barrier_wait(barrier.at[wrap(at, ring)])

    lax.fori_loop(jnp.maximum(count - ring, 0), count, wait, None)
