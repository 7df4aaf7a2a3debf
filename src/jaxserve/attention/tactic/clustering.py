"""The cluster index: k-means over the keys of one key-value head, and an order of its tokens.

A row of the cache is cut into segments of fixed length. Each is clustered by itself, as soon as it
is full or a prompt ends in it, so the cost per token is bounded and a full segment never changes:
whoever shares its tokens may share its clusters. Clustering moves tokens within their segment so
that a cluster lies in one piece, which attention does not notice, as keys carry their positions in
their rotation.

Places of a row: `[0, sinks)` sinks, `[sinks, end)` clustered tokens, `[end, length)` recent ones.

Source: Tactic, arXiv 2502.12216, section 3.2 (k-means over keys, clusters of 32, 10 iterations).
Differs: segments, tokens moved in place, small clusters after few iterations, far keys set apart.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.attention.tactic.config import TacticConfig

_LOWEST = -1e30
_SHARE_ALONE = 16
"""One in so many clusters is left to keys that lie far from all others."""
_FAR = 2.0
"""So many times the usual square distance from the mean of a cluster is far."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterIndex:
    """Clusters of the keys of all heads; clusters of size 0 are not there.

    Attributes:
        centroids: Mean key of each cluster.
        spread: Variance of its keys, the mean over dimensions; float32.
        value_means: Mean value.
        sizes: Tokens.
        begin: Place of its first token; the others follow.
        permutation: Position of the token at each place.
        end: Places from here on are not clustered.
    """

    centroids: Float[Array, "rows kv_heads clusters head_dim"]
    spread: Float[Array, "rows kv_heads clusters"]
    value_means: Float[Array, "rows kv_heads clusters v_head_dim"]
    sizes: Int[Array, "rows kv_heads clusters"]
    begin: Int[Array, "rows kv_heads clusters"]
    permutation: Int[Array, "rows kv_heads capacity"]
    end: Int[Array, " rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Clusters of one segment of one head; see `ClusterIndex`.

    Attributes:
        order: Which token comes to each place of the segment.
        sizes: Tokens of each cluster, which follow each other.
        centroids: Mean keys.
        spread: Variances of keys, means over dimensions.
        value_means: Mean values.
    """

    order: Int[Array, "*heads segment_len"]
    sizes: Int[Array, "*heads clusters"]
    centroids: Float[Array, "*heads clusters head_dim"]
    spread: Float[Array, "*heads clusters"]
    value_means: Float[Array, "*heads clusters v_head_dim"]


def empty_index(
    rows: int, kv_heads: int, capacity: int, head_dim: int, v_head_dim: int, *, config: TacticConfig
) -> ClusterIndex:
    """Return the index of rows of which nothing is clustered yet."""
    clusters = config.clusters.num_segments(capacity) * config.clusters.clusters_per_segment
    heads = (rows, kv_heads)
    place = jnp.arange(capacity, dtype=jnp.int32)
    return ClusterIndex(
        centroids=jnp.zeros((*heads, clusters, head_dim), config.clusters.dtype),
        spread=jnp.zeros((*heads, clusters), jnp.float32),
        value_means=jnp.zeros((*heads, clusters, v_head_dim), config.clusters.dtype),
        sizes=jnp.zeros((*heads, clusters), jnp.int32),
        begin=jnp.zeros((*heads, clusters), jnp.int32),
        permutation=jnp.broadcast_to(place, (*heads, capacity)),
        end=jnp.zeros((rows,), jnp.int32),
    )


def cluster_segment(
    keys: Float[Array, "segment_len head_dim"],
    values: Float[Array, "segment_len v_head_dim"],
    first: Int[Array, ""] | int,
    count: Int[Array, ""] | int,
    *,
    config: TacticConfig,
) -> Segment:
    """Cluster the tokens `first` to `count` of one segment of one head.

    Starts from keys drawn without replacement; ties go to the cluster with the lowest number, so
    that identical keys end up together; a cluster that loses all its tokens keeps its centroid and
    has size 0. In the end, keys that lie far from all others get clusters of their own, so that
    whoever wants one of them finds it.

    Args:
        keys: Rotated keys; what lies outside of `first` to `count` may be anything finite.
        values: Their values.
        first: Tokens before it keep their places.
        count: Tokens from it on keep their places.
        config: Settings.

    Source: Lloyd's algorithm.
    """
    settings = config.clusters
    length, dim = keys.shape
    clusters = settings.clusters_per_segment
    token = jnp.arange(length)
    valid = (token >= first) & (token < count)
    x = jnp.where(valid[:, None], keys.astype(jnp.float32), 0.0)
    used = -(-jnp.maximum(count - first, 0) // settings.cluster_size)
    alone = jnp.where(used > 1, -(-used // _SHARE_ALONE), 0)
    exists = jnp.arange(clusters) < used - alone
    drawn = jax.random.permutation(jax.random.key(settings.seed), length)
    start = drawn[jnp.argsort(~valid[drawn], stable=True)[:clusters]]

    def nearest(centroids: Array) -> Array:
        square = 0.5 * jnp.sum(jnp.square(centroids), axis=-1)
        score = jnp.einsum("nd,cd->nc", x, centroids, preferred_element_type=jnp.float32)
        best = jnp.argmax(jnp.where(exists, score - square, _LOWEST), axis=-1)
        return jnp.where(valid, best, clusters).astype(jnp.int32)

    def means(member: Array, of: Array, otherwise: Array) -> Array:
        belongs = (member[None, :] == jnp.arange(clusters)[:, None]).astype(jnp.float32)
        total = jnp.einsum("cn,nd->cd", belongs, of, preferred_element_type=jnp.float32)
        size = jnp.sum(belongs, axis=-1)[:, None]
        return jnp.where(size > 0, total / jnp.maximum(size, 1.0), otherwise)

    def unsettled(state: tuple[Array, Array, Array, Array]) -> Array:
        step, _, _, changed = state
        return changed & (step < settings.max_iterations)

    def iterate(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        step, centroids, member, _ = state
        centroids = means(member, x, centroids)
        after = nearest(centroids)
        return step + 1, centroids, after, jnp.any(after != member)

    begin = (jnp.int32(0), x[start], nearest(x[start]), jnp.any(valid))
    _, centroids, member, _ = lax.while_loop(unsettled, iterate, begin)
    member = _set_apart(x, member, centroids, used - alone, alone)
    v = jnp.where(valid[:, None], values.astype(jnp.float32), 0.0)
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    whole = jnp.concatenate([x, v, square], axis=-1)
    found = means(member, whole, jnp.zeros((clusters, 1), jnp.float32))
    centroids = found[:, :dim]
    # Tokens that keep their places sort before or behind all clusters.
    rank = jnp.where(token < first, -1, member)
    return Segment(
        order=jnp.argsort(rank, stable=True).astype(jnp.int32),
        sizes=jnp.sum(member[None, :] == jnp.arange(clusters)[:, None], axis=-1, dtype=jnp.int32),
        centroids=centroids,
        spread=jnp.maximum(found[:, -1] - jnp.mean(jnp.square(centroids), axis=-1), 0.0),
        value_means=found[:, dim:-1],
    )


def _set_apart(
    x: Float[Array, "segment_len head_dim"],
    member: Int[Array, " segment_len"],
    centroids: Float[Array, "clusters head_dim"],
    first: Int[Array, ""],
    most: Int[Array, ""],
) -> Int[Array, " segment_len"]:
    """Give keys that lie far from the mean of their cluster clusters of their own.

    Args:
        x: Keys.
        member: The cluster of each; as many as there are clusters for a token that has none.
        centroids: Means of clusters, or nearly so.
        first: The first cluster that nobody has.
        most: How many of them there are.

    Returns:
        The cluster of each key.
    """
    clusters = centroids.shape[0]
    is_member = member < clusters
    off = jnp.sum(jnp.square(x - centroids[jnp.minimum(member, clusters - 1)]), axis=-1)
    off = jnp.where(is_member, off, 0.0)
    rank = jnp.argsort(jnp.argsort(-off, stable=True), stable=True)
    usual = jnp.sum(off) / jnp.maximum(jnp.sum(is_member), 1)
    is_apart = (rank < most) & (off > _FAR * usual) & (off > 1e-6 * jnp.sum(jnp.square(x), axis=-1))
    return jnp.where(is_apart, first + rank, member).astype(jnp.int32)


def cluster_end(
    length: Int[Array, "*rows"], capacity: int, *, config: TacticConfig
) -> Int[Array, "*rows"]:
    """Return up to which place a prompt of some length is clustered: all but the recent window.

    Fewer tokens than a cluster holds are not clustered at all.
    """
    most = config.clusters.num_segments(capacity) * config.clusters.segment_len
    end = jnp.clip(length - config.window, 0, most)
    return jnp.where(end - config.sinks < config.clusters.cluster_size, 0, end).astype(jnp.int32)


@partial(jax.jit, static_argnames="config")
def build_index(
    keys: Float[Array, "rows kv_heads capacity head_dim"],
    values: Float[Array, "rows kv_heads capacity v_head_dim"],
    length: Int[Array, " rows"],
    *,
    config: TacticConfig,
) -> tuple[ClusterIndex, Array, Array]:
    """Cluster whole prompts, one segment after the other.

    Args:
        keys: Slots of the cache, in order of position.
        values: Likewise.
        length: Tokens of each row.
        config: Settings.

    Returns:
        The index, and keys and values with clustered tokens moved.
    """
    rows, kv_heads, capacity, head_dim = keys.shape
    index = empty_index(rows, kv_heads, capacity, head_dim, values.shape[-1], config=config)
    end = cluster_end(length, capacity, config=config)
    segments = config.clusters.num_segments(capacity)

    def add(
        i: Array, state: tuple[ClusterIndex, Array, Array]
    ) -> tuple[ClusterIndex, Array, Array]:
        return _cluster(*state, jnp.full((rows,), i), end, config=config)

    return lax.fori_loop(0, segments, add, (index, keys, values))


@partial(jax.jit, static_argnames="config", donate_argnames=("index", "keys", "values"))
def append_segment(
    index: ClusterIndex,
    keys: Float[Array, "rows kv_heads capacity head_dim"],
    values: Float[Array, "rows kv_heads capacity v_head_dim"],
    end: Int[Array, " rows"],
    *,
    config: TacticConfig,
) -> tuple[ClusterIndex, Array, Array]:
    """Cluster generated tokens: the last segment of each row again, as far as `end`.

    A row whose `end` is not ahead of its index stays as it is. One call never reaches beyond the
    segment that holds the first recent token; call it again for more.

    Args:
        index: The index; donated, as are the next two.
        keys: Slots, as an earlier call has left them.
        values: Likewise.
        end: Up to which place each row is to be clustered.
        config: Settings.

    Returns:
        The index, keys and values. `index.end` says how far each row has come.
    """
    segment = index.end // config.clusters.segment_len
    limit = jnp.minimum(end, (segment + 1) * config.clusters.segment_len)
    return _cluster(index, keys, values, segment, limit, config=config)


def _cluster(
    index: ClusterIndex,
    keys: Array,
    values: Array,
    segment: Int[Array, " rows"],
    end: Int[Array, " rows"],
    *,
    config: TacticConfig,
) -> tuple[ClusterIndex, Array, Array]:
    """Cluster one segment of each row up to a place; rows with nothing new stay as they are."""
    length, clusters = config.clusters.segment_len, config.clusters.clusters_per_segment
    capacity = keys.shape[2]
    if not config.clusters.num_segments(capacity):
        return index, keys, values
    least = config.sinks + config.clusters.cluster_size
    inside = segment < config.clusters.num_segments(capacity)
    is_new = (end > index.end) & (end >= least) & inside & (end > segment * length)
    segment = jnp.where(inside, segment, 0)
    start = segment * length
    count = jnp.clip(end - start, 0, length)
    first = jnp.clip(config.sinks - start, 0, length)

    def cut(buffer: Array, at: Array, size: int) -> Array:
        return jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, size, axis=1))(buffer, at)

    def put(buffer: Array, part: Array, at: Array) -> Array:
        kept = cut(buffer, at, part.shape[2])
        chosen = is_new.reshape(-1, *[1] * (part.ndim - 1))
        part = jnp.where(chosen, part.astype(buffer.dtype), kept)
        return jax.vmap(lambda row, new, i: lax.dynamic_update_slice_in_dim(row, new, i, axis=1))(
            buffer, part, at
        )

    old_keys, old_values = cut(keys, start, length), cut(values, start, length)
    found = jax.vmap(
        lambda k, v, f, c: jax.vmap(
            lambda k, v: cluster_segment(k, v, f, c, config=config), in_axes=(0, 0)
        )(k, v)
    )(old_keys, old_values, first, count)
    moved = jnp.cumsum(found.sizes, axis=-1) - found.sizes
    begin = moved + (start + first)[:, None, None]
    at = segment * clusters

    def reorder(part: Array) -> Array:
        extra = (1,) * (part.ndim - 3)
        order = found.order.reshape(*found.order.shape, *extra)
        return jnp.take_along_axis(part, order, axis=2)

    old_permutation = cut(index.permutation, start, length)
    new = ClusterIndex(
        centroids=put(index.centroids, found.centroids, at),
        spread=put(index.spread, found.spread, at),
        value_means=put(index.value_means, found.value_means, at),
        sizes=put(index.sizes, found.sizes, at),
        begin=put(index.begin, begin, at),
        permutation=put(index.permutation, reorder(old_permutation), start),
        end=jnp.where(is_new, jnp.minimum(end, start + length), index.end),
    )
    return new, put(keys, reorder(old_keys), start), put(values, reorder(old_values), start)
