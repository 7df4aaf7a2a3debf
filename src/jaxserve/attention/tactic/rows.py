"""Sparse attention of an engine's decode rows: clusters of whole segments, kept beside the cache.

An entry holds the clusters of one segment of one sequence, for every key-value head. A row of a
step names the entries of its first segments; what lies behind them is recent and read whole. Unlike
`build_index`, nothing moves a token: an entry says in which order the tokens of its segment come,
and keys are read where they lie, in slots or in pages. So rows that share a prefix share entries,
and whoever reads everything finds the cache as it always was.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.attention.softmax import State
from jaxserve.attention.tactic.attention import (
    Attend,
    Kept,
    LayerEntries,
    SpanBackend,
    SparseStats,
    attend_entries,
    decode_states,
    kept_spans,
    merge,
    read_state,
)
from jaxserve.attention.tactic.clustering import ClusterIndex, Segment, cluster_segment
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.counting import Samples, sample_ranks
from jaxserve.attention.tactic.lists import attend_lists, run_lists
from jaxserve.attention.tactic.ranking import Keys, scattered
from jaxserve.attention.tactic.select import has_kernel
from jaxserve.pallas_kernels.paged import PagedKV

LayerClusters = LayerEntries
"""Entries of one layer, all with orders; entry 0 is that of no segment, and stays empty."""

_KEPT_RUNS = 2
"""Runs that are always read; all others lie in segments."""
LIST_BACKENDS = ("mosaic", "triton", "reference")
"""Backends that are given lists of tokens."""
TOLERANCE = 0.02
"""By how much a measured mass may miss its target without being counted as a miss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """What a step's decode rows may leave unread; `plan_rows` makes it, once for all layers.

    Attributes:
        p: Share of the mass that each row reads.
        length: Tokens of each row, this step's included; 0 for a row that is read whole.
        num_segments: Segments of each row that have entries; 0 for a row that is read whole.
        entries: These entries, in the order of segments; 0 where there is none.
        kept: What is always read: first places of two runs, their sizes, and tokens of both.
        samples: Ranks that samples come from, for estimators that draw some.
        is_measured: Whether the mass that is read is compared with all there is; None never.
        layers: Entries of each layer, or of the one that runs; None where all is read.
        config: Settings.
    """

    p: Float[Array, " rows"]
    length: Int[Array, " rows"]
    num_segments: Int[Array, " rows"]
    entries: Int[Array, "rows segments"]
    kept: Kept
    samples: Samples
    is_measured: Bool[Array, ""] | None
    layers: tuple[LayerClusters | None, ...]
    config: TacticConfig = dataclasses.field(metadata={"static": True})

    @property
    def is_sparse(self) -> Bool[Array, " rows"]:
        """Which rows leave something unread."""
        return self.length > 0

    def of_layer(self, index: int) -> "SparseRows | None":
        """Return what one layer needs; None if it reads all."""
        chosen = self.layers[index]
        return None if chosen is None else dataclasses.replace(self, layers=(chosen,))


def plan_rows(
    p: Float[Array, " rows"],
    length: Int[Array, " rows"],
    num_segments: Int[Array, " rows"],
    entries: Int[Array, "rows segments"],
    layers: tuple[LayerClusters | None, ...],
    *,
    config: TacticConfig,
    is_measured: Bool[Array, ""] | None = None,
) -> SparseRows:
    """Work out what all layers of a step have in common.

    Args:
        p: Share of the mass that each row reads; 1 reads everything.
        length: Tokens of each row, this step's included; 0 for a row that does nothing.
        num_segments: Segments of each row that have entries.
        entries: These entries; arbitrary behind them.
        layers: Entries of each layer; None for a layer that reads all.
        config: Settings.
        is_measured: Whether the mass that is read is measured; None never.
    """
    kv_heads = next(layer.sizes.shape[1] for layer in layers if layer is not None)
    is_sparse = (num_segments > 0) & (p < 1) & (length > 0)
    length = jnp.where(is_sparse, length, 0)
    num_segments = jnp.where(is_sparse, num_segments, 0)
    is_used = jnp.arange(entries.shape[1])[None, :] < num_segments[:, None]
    end = num_segments * config.clusters.segment_len
    begin, size = kept_spans(end, length, kv_heads, config)
    # All tokens of a segment are in clusters, but for the sinks.
    clustered = jnp.maximum(end - config.sinks, 0)
    return SparseRows(
        p=p.astype(jnp.float32),
        length=length,
        num_segments=num_segments,
        entries=jnp.where(is_used, entries, 0),
        kept=(begin, size, jnp.sum(size, axis=-1)),
        samples=sample_ranks(clustered, config=config.estimator),
        is_measured=is_measured,
        layers=layers,
        config=config,
    )


def no_clusters(
    entries: int, kv_heads: int, head_dim: int, *, config: TacticConfig
) -> LayerClusters:
    """Return empty entries of one layer."""
    clusters = config.clusters.clusters_per_segment
    means = (entries, kv_heads, clusters, head_dim)
    return LayerClusters(
        centroids=jnp.zeros(means, config.clusters.dtype),
        spread=jnp.zeros(means[:3], jnp.float32),
        value_means=jnp.zeros(means, config.clusters.dtype),
        sizes=jnp.zeros(means[:3], jnp.int32),
        begin=jnp.zeros(means[:3], jnp.int32),
        order=jnp.zeros((entries, kv_heads, config.clusters.segment_len), jnp.int32),
    )


def set_entry(
    layer: LayerClusters,
    keys: Float[Array, "kv_heads segment_len head_dim"],
    values: Float[Array, "kv_heads segment_len head_dim"],
    number: Int[Array, ""],
    entry: Int[Array, ""],
    *,
    config: TacticConfig,
) -> LayerClusters:
    """Cluster one full segment of a sequence and make it an entry.

    Args:
        layer: Entries; donate them.
        keys: The segment's keys, in order of position.
        values: Likewise.
        number: Which segment of its sequence it is; sinks are in no cluster.
        entry: Which entry it becomes.
        config: Settings.
    """
    if layer.order is None:
        raise ValueError("entries that segments become have orders, got entries without.")
    length = config.clusters.segment_len
    first = jnp.where(number == 0, config.sinks, 0)

    def one_head(k: Array, v: Array) -> Segment:
        return cluster_segment(k, v, first, length, config=config)

    found = jax.vmap(one_head)(keys, values)

    def put(buffer: Array, part: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(buffer, part[None].astype(buffer.dtype), entry, 0)

    return LayerClusters(
        centroids=put(layer.centroids, found.centroids),
        spread=put(layer.spread, found.spread),
        value_means=put(layer.value_means, found.value_means),
        sizes=put(layer.sizes, found.sizes),
        begin=put(layer.begin, first + jnp.cumsum(found.sizes, axis=-1) - found.sizes),
        order=put(layer.order, found.order),
    )


def _index(sparse: SparseRows, capacity: int) -> ClusterIndex:
    """Put the entries of each row together; tokens behind them have their own places."""
    (layer,) = sparse.layers
    if layer is None or layer.order is None:
        raise ValueError("a layer without clusters cannot be read sparsely.")
    length, segments = sparse.config.clusters.segment_len, sparse.entries.shape[1]
    start = (jnp.arange(segments, dtype=jnp.int32) * length)[None, :, None, None]

    def gather(buffer: Array, shift: Array | int = 0) -> Array:
        # [rows, segments, kv_heads, n, ...] -> [rows, kv_heads, segments * n, ...]
        taken = jnp.moveaxis(buffer[sparse.entries] + shift, 2, 1)
        return taken.reshape(*taken.shape[:2], -1, *taken.shape[4:])

    end = sparse.num_segments * length
    order = gather(layer.order, start)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, max(0, capacity - segments * length))))
    place = jnp.arange(capacity, dtype=jnp.int32)
    return ClusterIndex(
        centroids=gather(layer.centroids),
        spread=gather(layer.spread),
        value_means=gather(layer.value_means),
        sizes=gather(layer.sizes),
        begin=gather(layer.begin, start),
        permutation=jnp.where(place < end[:, None, None], order[..., :capacity], place),
        end=end,
    )


def attend_rows(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Array,
    values: Array,
    page_table: Int[Array, "rows pages_per_row"] | None,
    sparse: SparseRows,
    whole: Callable[[], State],
    *,
    scale: float,
    backend: SpanBackend = "xla",
) -> tuple[Float[Array, "rows q_heads head_dim"], Int[Array, " 5"], Float[Array, " 2"]]:
    """Attend from the rows that leave something unread.

    Args:
        q: Queries of the decode rows, rotated.
        keys: Slots, or pages, this step's keys appended.
        values: Likewise.
        page_table: Pages of each row; None with slots.
        sparse: What may be left unread.
        whole: Attends from all rows to everything, for measurements: the state of their queries,
            `[rows, kv_heads, group, ...]`.
        scale: Multiplies the scores.
        backend: What reads keys and values; `llvm` needs slots, lists need pages.

    Returns:
        Outputs in float32, arbitrary for other rows. Counts over all rows: tokens read by key-value
        heads, tokens that there are for them, these heads, query heads that were measured, and
        those of them that missed their target. Sums of estimated masses over key-value heads, and
        of measured masses over query heads.
    """
    is_sparse = sparse.is_sparse
    kv_heads = keys.shape[1]

    def attend() -> tuple[Array, Array, Array]:
        part, out, stats = _read(q, keys, values, page_table, sparse, scale=scale, backend=backend)
        read = jnp.sum(jnp.where(is_sparse[:, None], stats.tokens, 0))
        there, heads = kv_heads * jnp.sum(sparse.length), kv_heads * jnp.sum(is_sparse)
        estimated = jnp.sum(jnp.where(is_sparse[:, None], stats.mass, 0.0))

        def measure() -> tuple[Array, Array]:
            found = _share(part, whole())
            counts = jnp.broadcast_to(is_sparse[:, None, None], found.shape)
            missed = counts & (found < sparse.p[:, None, None] - TOLERANCE)
            both = jnp.stack([jnp.sum(counts), jnp.sum(missed)]).astype(jnp.int32)
            return both, jnp.sum(jnp.where(counts, found, 0.0))

        measured, share = jnp.zeros((2,), jnp.int32), jnp.zeros((), jnp.float32)
        if sparse.is_measured is not None:
            measured, share = lax.cond(sparse.is_measured, measure, lambda: (measured, share))
        counts = jnp.concatenate([jnp.stack([read, there, heads]).astype(jnp.int32), measured])
        return out.reshape(q.shape), counts, jnp.stack([estimated, share])

    def rest() -> tuple[Array, Array, Array]:
        shape = (jnp.zeros(q.shape, jnp.float32), jnp.zeros((5,), jnp.int32))
        return (*shape, jnp.zeros((2,), jnp.float32))

    if backend in LIST_BACKENDS or _is_one_kernel(sparse, backend):
        # Rows without lists, or segments, cost next to nothing. Asking would cost more: a device
        # stops for the host in every layer, and XLA:CPU copies the whole cache into the branch.
        return attend()
    return lax.cond(jnp.any(is_sparse), attend, rest)


def _is_one_kernel(sparse: SparseRows, backend: SpanBackend) -> bool:
    """Tell whether one kernel of the CPU chooses and attends."""
    (layer,) = sparse.layers
    return backend == "llvm" and bool(layer) and has_kernel(layer.sizes.shape[-1], sparse.config)


def _read(
    q: Array,
    keys: Array,
    values: Array,
    page_table: Array | None,
    sparse: SparseRows,
    *,
    scale: float,
    backend: SpanBackend,
) -> tuple[State, Array, SparseStats]:
    """Return the state of what is read, outputs, and what was counted."""
    config, (layer,) = sparse.config, sparse.layers
    if layer and _is_one_kernel(sparse, backend):
        return attend_entries(
            q,
            keys,
            values,
            layer,
            sparse.entries,
            sparse.num_segments,
            sparse.kept,
            sparse.samples,
            jnp.where(sparse.length < config.min_context, 1.0, sparse.p),
            scale=scale,
            config=config,
        )
    kv_heads, size = keys.shape[1], keys.shape[2]
    capacity = size if page_table is None else page_table.shape[1] * size
    index = _index(sparse, capacity)
    most = sparse.entries.shape[1] * config.clusters.segment_len
    where = index.permutation
    by_place: tuple[Keys, Keys] = keys, values
    if page_table is not None:
        page = page_table[jnp.arange(len(q))[:, None, None], where // size]
        head = jnp.arange(kv_heads)[None, :, None]
        number = (page * kv_heads + head) * size + where % size
        flat_keys, flat_values = (x.reshape(-1, q.shape[-1]) for x in (keys, values))
        by_place = (flat_keys, number), (flat_values, number)
    elif backend == "xla":
        by_place = scattered(keys, where), scattered(values, where)
    attend: Attend | None = None
    if page_table is not None and backend in LIST_BACKENDS:
        cache, lists_backend = PagedKV(k=keys, v=values), backend
        query = q.astype(keys.dtype)

        def attend_runs(begin: Array, run_size: Array, _total: Array) -> State:
            room = capacity if begin.shape[-1] <= _KEPT_RUNS else most
            lists = run_lists(begin, run_size, where, where.shape[0] * kv_heads * room)
            return attend_lists(
                query, cache, page_table, sparse.length, lists, scale=scale, backend=lists_backend
            )

        attend = attend_runs
    states, stats = decode_states(
        q,
        *by_place,
        sparse.length,
        index,
        sparse.p,
        scale=scale,
        config=config,
        backend=backend,
        order=where if backend == "llvm" else None,
        spans=sparse.kept,
        samples=sparse.samples,
        attend=attend,
    )
    out, _, mass = merge(states)
    return read_state(states), out / jnp.maximum(mass, 1e-30)[..., None], stats


def _share(part: State, whole: State) -> Float[Array, "rows kv_heads group"]:
    """Return the share of the mass of all keys that lies on some."""
    (_, top, mass), (_, whole_top, whole_mass) = part, whole
    log = jnp.log(jnp.maximum(mass, 1e-30)) - jnp.log(jnp.maximum(whole_mass, 1e-30))
    return jnp.exp(jnp.minimum(top - whole_top + log, 0.0))
