"""Which tokens each key-value head reads in a step: a prefix of its order, as long as p asks."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve import cpu_kernels
from jaxserve.attention.tactic import counting
from jaxserve.attention.tactic.clustering import ClusterIndex
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.ranking import (
    BUCKET_SHIFT,
    HIGHEST_BUCKET,
    NUM_BUCKETS,
    HeadClusters,
    Keys,
    Ranking,
    axes_of,
    rank_clusters,
    scattered,
    slots_of,
)
from jaxserve.attention.tactic.tokens import TokenCut, cluster_share, cut_tokens

if TYPE_CHECKING:
    from jaxserve.cpu_kernels.cluster_tables import Sampling

_LANES = 16
"""Most lanes of a vector: what the kernel's number of clusters is a multiple of."""

SelectBackend = Literal["xla", "llvm"]
"""`llvm` has a kernel for the estimator `sampled`; everything else is chosen through XLA."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Runs of places that each head reads, beside sinks and recent tokens.

    Attributes:
        begin: First place of each run, in any order.
        size: Places of each run; runs of size 0 follow those that are read.
        num_tokens: Tokens that are read.
        tail_mass: Estimated mass of the part of each cluster that is not read, relative to the
            level of its query head; by number of the cluster.
        level: Logarithm of what masses are relative to.
        estimated: Estimated share of the mass that is read.
        cut: Which tokens of the runs count after all; None if all of them do.
    """

    begin: Int[Array, "*heads clusters"]
    size: Int[Array, "*heads clusters"]
    num_tokens: Int[Array, "*heads"]
    tail_mass: Float[Array, "*heads group clusters"]
    level: Float[Array, "*heads group"]
    estimated: Float[Array, "*heads group"]
    cut: TokenCut | None = None


@partial(jax.jit, static_argnames=("config", "backend"))
def select(
    q: Float[Array, "rows kv_heads group head_dim"],
    keys: Keys,
    index: ClusterIndex,
    kept: Float[Array, "rows kv_heads group"],
    p: Float[Array, " rows"],
    *,
    config: TacticConfig,
    backend: SelectBackend = "xla",
    order: Int[Array, "rows kv_heads capacity"] | None = None,
    samples: counting.Samples | None = None,
) -> Selection:
    """Choose the tokens of one step.

    Args:
        q: Queries, multiplied by the scale of the scores.
        keys: Slots as the index has left them.
        index: Their clusters.
        kept: Logarithm of the mass of the tokens that are always read.
        p: Share of the mass that each row must read; 1 reads everything.
        config: Settings; its own `p` is not asked.
        backend: What chooses.
        order: With slots: position of the token of each place, where slots are in order of
            position; None if they are in order of place.
        samples: With `llvm`: which ranks are looked at, if it is known already.
    """
    q = q.astype(jnp.float32)
    if backend == "llvm" and order is None and has_kernel(index.sizes.shape[-1], config):
        if samples is None:
            samples = counting.sample_ranks(
                jnp.sum(index.sizes[:, 0], axis=-1), config=config.estimator
            )
        return _select_compiled(q, slots_of(keys), index, kept, p, samples, config=config)
    if order is not None:
        keys = scattered(slots_of(keys), order)
    one_head, axes = partial(_select_head, config=config), axes_of(keys)
    heads = jax.vmap(one_head, in_axes=(0, axes, 0, 0, None))
    clusters = HeadClusters(
        centroids=index.centroids, spread=index.spread, sizes=index.sizes, begin=index.begin
    )
    return jax.vmap(heads, in_axes=(0, axes, 0, 0, 0))(q, keys, clusters, kept, p)


def has_kernel(clusters: int, config: TacticConfig) -> bool:
    """Tell whether kernels of the CPU know the settings, and can go through so many clusters."""
    is_known = config.estimator.name == "sampled" and not config.token_level
    return is_known and clusters > 0 and clusters % _LANES == 0


def sampling(config: TacticConfig) -> "Sampling":
    """Say the settings in the words of the kernels."""
    from jaxserve.cpu_kernels.cluster_tables import Sampling  # noqa: PLC0415  llvmlite is optional

    estimator = config.estimator
    return Sampling(
        head_len=estimator.head_len,
        num_strata=estimator.num_strata,
        drawn=estimator.samples_per_stratum,
        z=counting.deviations(estimator),
        uses_spread=estimator.correction == "spread",
        uses_ratio=estimator.control_variate,
        most=2 * config.clusters.cluster_size,
        num_buckets=NUM_BUCKETS,
        bucket_shift=BUCKET_SHIFT,
        highest_bucket=HIGHEST_BUCKET,
    )


def _select_compiled(
    q: Array,
    keys: Array,
    index: ClusterIndex,
    kept: Array,
    p: Array,
    samples: counting.Samples,
    *,
    config: TacticConfig,
) -> Selection:
    """Choose with the kernel for this machine's CPU."""
    rows, kv_heads, group, dim = q.shape
    edges, ranks = samples
    chosen = cpu_kernels.choose_clusters(
        q.reshape(rows, kv_heads * group, dim),
        keys,
        index.centroids,
        index.spread,
        index.sizes,
        index.begin,
        kept.reshape(rows, kv_heads * group),
        p,
        config.max_share,
        edges,
        ranks,
        sampling=sampling(config),
    )
    tail = chosen.tail_mass.reshape(rows, kv_heads, group, -1)
    level = chosen.level.reshape(rows, kv_heads, group)
    total = jnp.exp(kept - level) + chosen.mass.reshape(rows, kv_heads, group)
    return Selection(
        begin=chosen.begin,
        size=chosen.size,
        num_tokens=chosen.num_tokens,
        tail_mass=tail,
        level=level,
        estimated=1 - jnp.sum(tail, axis=-1) / total,
    )


def count(
    ranking: Ranking,
    q: Float[Array, "group head_dim"],
    keys: Keys,
    p: Float[Array, ""],
    *,
    config: TacticConfig,
) -> counting.Count:
    """Estimate how many tokens one head needs, with the estimator of the settings."""
    estimator = config.estimator
    if estimator.name == "centroid":
        return counting.count_by_centroids(ranking, p)
    if estimator.name == "hyperbola":
        return counting.count_by_hyperbola(ranking, q, keys, p, config=estimator)
    return counting.count_by_samples(ranking, q, keys, p, config=estimator)


def _select_head(
    q: Array, keys: Keys, clusters: HeadClusters, kept: Array, p: Array, *, config: TacticConfig
) -> Selection:
    ranking = rank_clusters(q, clusters, kept, correction=config.estimator.correction)
    found = count(ranking, q, keys, cluster_share(p, config), config=config)
    n = ranking.num_tokens
    wanted = _whole_clusters(ranking, jnp.max(found.needed), 2 * config.clusters.cluster_size)
    is_diffuse = (wanted > config.max_share * n) | (p >= 1)
    wanted = jnp.where(is_diffuse, n, wanted)
    size = jnp.clip(wanted - ranking.rank_begin, 0, ranking.sizes)
    unread = (ranking.sizes - size) / jnp.maximum(ranking.sizes, 1)
    tail = found.mass * unread
    total = ranking.kept + jnp.sum(found.mass, axis=-1)
    cut = None
    if config.token_level:
        cut = cut_tokens(q, clusters, ranking, total, p, wanted, config=config)
    return Selection(
        begin=ranking.begin,
        size=size,
        num_tokens=wanted,
        tail_mass=jnp.zeros_like(tail).at[:, ranking.clusters].set(tail),
        level=ranking.level,
        estimated=1 - jnp.sum(tail, axis=-1) / total,
        cut=cut,
    )


def _whole_clusters(ranking: Ranking, wanted: Array, most: int) -> Array:
    """Finish the last cluster, or as much of a large one: its tokens are in no order."""
    last = ranking.cluster_at(jnp.maximum(wanted - 1, 0)[None])[0]
    begin = ranking.rank_begin[last]
    taken = jnp.minimum(-(-(wanted - begin) // most) * most, ranking.sizes[last])
    return jnp.where(wanted > 0, begin + taken, 0)


def read_mask(
    selection: Selection, index: ClusterIndex, length: Int[Array, " rows"], *, config: TacticConfig
) -> Bool[Array, "rows kv_heads capacity"]:
    """Tell which places are read, sinks and recent tokens included; for tests and measurements."""
    capacity = index.permutation.shape[-1]
    place = jnp.arange(capacity)

    def head(begin: Array, size: Array, end: Array, length: Array) -> Array:
        change = jnp.zeros((capacity + 1,), jnp.int32)
        change = change.at[begin].add(jnp.where(size > 0, 1, 0))
        change = change.at[begin + size].add(jnp.where(size > 0, -1, 0))
        chosen = jnp.cumsum(change)[:capacity] > 0
        always = (place < config.sinks) | (place >= end)
        return (chosen | always) & (place < length)

    heads = jax.vmap(head, in_axes=(0, 0, None, None))
    return jax.vmap(heads)(selection.begin, selection.size, index.end, length)
