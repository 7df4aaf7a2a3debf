"""The order of a head's tokens: clusters by the weight that their means promise.

All query heads of a key-value head share one order. Each head's predicted weights are made shares
of its own mass first, so that heads with large scores do not rule the others; a cluster ranks as
high as the head that wants it most.

Everything here is about one key-value head of one row; callers map over heads and rows. Weights are
relative to a level of each query head, natural exponents, float32.

Source: Tactic, arXiv 2502.12216, section 3.2 (order by centroids) and 3.4 (shared lists).
Differs: shares count the tokens that are always read, and a cluster's weight may count the spread
of its keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.attention.tactic.config import Correction

LOWEST = -1e30
"""Logarithm of the weight of what is not there."""
NUM_BUCKETS, BUCKET_SHIFT, HIGHEST_BUCKET = 1024, 19, (127 << 4) + 15
"""Shares below 2 ** -63 are alike; 19 bits of a float32 are not looked at."""
HIGHEST = 60.0
"""Most that a weight may exceed its level, in the exponent, so that sums stay finite."""


Keys = Array | tuple[Array, Array]
"""Keys, or values, by place: in this order, or tokens in any order and the number of each place's.

Of all heads `[rows, kv_heads, places, dim]`, or `[tokens, dim]` and `[rows, kv_heads, places]`; of
one head without the first two axes of what has them.
"""


def scattered(
    slots: Float[Array, "slots kv_heads capacity dim"],
    order: Int[Array, "rows kv_heads capacity"],
) -> Keys:
    """Say where in slots each place's key lies."""
    rows, kv_heads, capacity = order.shape
    head = jnp.arange(rows * kv_heads, dtype=jnp.int32).reshape(rows, kv_heads, 1)
    return slots.reshape(-1, slots.shape[-1]), head * capacity + order


def take(keys: Keys, place: Int[Array, " n"]) -> Array:
    """Read the keys of one head at some places."""
    if isinstance(keys, tuple):
        tokens, number = keys
        return tokens[number[place]]
    return keys[place]


def slots_of(keys: Keys) -> Array:
    """Return keys that lie in slots, for kernels that read nothing else.

    Raises:
        TypeError: If they lie anywhere.
    """
    if isinstance(keys, tuple):
        raise TypeError("kernels of the CPU read slots, got scattered keys; use backend='xla'.")
    return keys


def num_places(keys: Keys) -> int:
    """Count the places of one head."""
    return (keys[1] if isinstance(keys, tuple) else keys).shape[0]


def axes_of(keys: Keys) -> int | tuple[None, int]:
    """Say over which axes of keys to go from head to head."""
    return (None, 0) if isinstance(keys, tuple) else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadClusters:
    """The clusters of one head; see `ClusterIndex`."""

    centroids: Float[Array, "*heads clusters head_dim"]
    spread: Float[Array, "*heads clusters"]
    sizes: Int[Array, "*heads clusters"]
    begin: Int[Array, "*heads clusters"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Clusters in their order, the best first.

    Attributes:
        clusters: Their numbers.
        begin: Place of the first token of each.
        sizes: Tokens of each; those of size 0 come last.
        rank_end: Tokens up to the end of each.
        predicted: Predicted weight of a token of each, for every query head.
        kept: Mass of the tokens that are always read.
        level: What weights and masses are relative to: the logarithm that was taken from theirs.
    """

    clusters: Int[Array, "*heads clusters"]
    begin: Int[Array, "*heads clusters"]
    sizes: Int[Array, "*heads clusters"]
    rank_end: Int[Array, "*heads clusters"]
    predicted: Float[Array, "*heads group clusters"]
    kept: Float[Array, "*heads group"]
    level: Float[Array, "*heads group"]

    @property
    def num_tokens(self) -> Int[Array, ""]:
        """Clustered tokens of the head."""
        return self.rank_end[-1]

    @property
    def rank_begin(self) -> Int[Array, " clusters"]:
        """Tokens before each cluster."""
        return self.rank_end - self.sizes

    @property
    def predicted_mass(self) -> Float[Array, "group clusters"]:
        """Predicted mass of each cluster."""
        return self.predicted * self.sizes

    def cluster_at(self, rank: Int[Array, " ranks"]) -> Int[Array, " ranks"]:
        """Return which cluster of the order holds a token, counted from the front."""
        found = jnp.searchsorted(self.rank_end, rank, side="right", method="scan_unrolled")
        return jnp.minimum(found, self.rank_end.shape[0] - 1)

    def weights_at(
        self,
        q: Float[Array, "group head_dim"],
        keys: Keys,
        rank: Int[Array, " ranks"],
    ) -> tuple[Float[Array, "group ranks"], Int[Array, " ranks"]]:
        """Compute the weights of some tokens, and tell in which cluster of the order each lies.

        Args:
            q: Scaled queries.
            keys: Keys by place.
            rank: Tokens, counted from the front of the order; below `num_tokens`.
        """
        at = self.cluster_at(rank)
        place = self.begin[at] + rank - self.rank_begin[at]
        taken = take(keys, jnp.clip(place, 0, num_places(keys) - 1)).astype(jnp.float32)
        return self.weight(jnp.einsum("gd,nd->gn", q, taken)), at

    def weight(self, score: Float[Array, "group n"]) -> Float[Array, "group n"]:
        """Turn scores into weights."""
        return jnp.exp(jnp.minimum(score - self.level[:, None], HIGHEST))


def predict(
    q: Float[Array, "group head_dim"], clusters: HeadClusters, *, correction: Correction
) -> Float[Array, "group clusters"]:
    """Return the logarithm of the mean weight of each cluster's tokens; lowest where it has none.

    The mean of exp over keys of mean c and variance s in every dimension is about
    exp(q c + q^2 s / 2), exactly so for normal keys; exp(q c) alone is always too low. A variance
    for each dimension would say little more, and cost as much to read as the means.
    """
    score = jnp.einsum("gd,cd->gc", q, clusters.centroids.astype(jnp.float32))
    if correction == "spread":
        score += 0.5 * jnp.sum(jnp.square(q), axis=-1, keepdims=True) * clusters.spread
    return jnp.where(clusters.sizes > 0, score, LOWEST)


def _bucket(share: Float[Array, " clusters"]) -> Int[Array, " clusters"]:
    """Sort shares into buckets, the largest first: as fine as an order of clusters needs to be.

    The upper bits of a float are its logarithm, near enough: 16 buckets per power of two.
    """
    bits = jax.lax.bitcast_convert_type(share, jnp.int32) >> BUCKET_SHIFT
    return jnp.clip(HIGHEST_BUCKET - bits, 0, NUM_BUCKETS - 1)


def rank_clusters(
    q: Float[Array, "group head_dim"],
    clusters: HeadClusters,
    kept: Float[Array, " group"],
    *,
    correction: Correction,
) -> Ranking:
    """Order the clusters of one head.

    Args:
        q: Scaled queries that share the key-value head.
        clusters: Its clusters.
        kept: Logarithm of the mass of the tokens that are always read.
        correction: How weights are predicted.
    """
    log_weight = predict(q, clusters, correction=correction)
    level = jnp.maximum(kept, jnp.max(log_weight, axis=-1))
    weight = jnp.where(clusters.sizes > 0, jnp.exp(log_weight - level[:, None]), 0.0)
    kept_mass = jnp.exp(kept - level)
    total = kept_mass + jnp.sum(weight * clusters.sizes, axis=-1)
    share = jnp.max(weight / total[:, None], axis=0)
    order = jnp.argsort(jnp.where(clusters.sizes > 0, _bucket(share), NUM_BUCKETS), stable=True)
    sizes = clusters.sizes[order]
    return Ranking(
        clusters=order.astype(jnp.int32),
        begin=clusters.begin[order],
        sizes=sizes,
        rank_end=jnp.cumsum(sizes, dtype=jnp.int32),
        predicted=weight[:, order],
        kept=kept_mass,
        level=level,
    )
