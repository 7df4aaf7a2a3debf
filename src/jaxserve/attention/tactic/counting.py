"""How many tokens, from the front of a head's order, reach a share p of its mass.

The mass of a head is that of the tokens that are always read, its kept mass, and that of all
clustered tokens, which nobody knows without reading them. Each function here estimates, for every
query head, the fewest leading tokens K with kept + mass(K) >= p (kept + mass(n)).

All work on one key-value head of one row, with static shapes and without leaving the device.
"""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.attention.tactic.config import EstimatorConfig
from jaxserve.attention.tactic.ranking import Keys, Ranking, num_places

_HEAD_SHARE, _NEAR, _FAR = 0.02, 0.1, 0.6
"""Share of tokens that `hyperbola` computes, and where its two windows lie, as shares of ranks."""
_BISECTIONS = 24


Samples = tuple[Array, Array]
"""Where ranges of ranks begin, and which ranks are looked at; see `sample_ranks`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What an estimator found.

    Attributes:
        needed: Tokens that each query head needs.
        mass: Mass of each cluster, in the order, relative to the level: the estimator's best guess.
    """

    needed: Int[Array, "*heads group"]
    mass: Float[Array, "*heads group clusters"]


def count_by_centroids(ranking: Ranking, p: Float[Array, ""]) -> Count:
    """Believe the predicted masses.

    Source: Double-P (size-weighted centroids), which predicts without counting spreads.
    """
    mass = ranking.predicted_mass
    needed = _needed(ranking, jnp.cumsum(mass, axis=-1), mass, _target(ranking, mass.sum(-1), p))
    return Count(needed=needed, mass=mass)


def count_by_hyperbola(
    ranking: Ranking,
    q: Float[Array, "group head_dim"],
    keys: Keys,
    p: Float[Array, ""],
    *,
    config: EstimatorConfig,
) -> Count:
    """Compute the head of the order, fit a / x + b through two windows, and sum in closed form.

    Source: Tactic, arXiv 2502.12216, section 3.3: exact head of 2 %, windows at 10 % and 60 %.
    """
    n = ranking.num_tokens
    most = max(1, int(_HEAD_SHARE * num_places(keys)) + 1)
    head_len = jnp.minimum(jnp.ceil(_HEAD_SHARE * n).astype(jnp.int32), most)
    rank = jnp.arange(most)
    exact, _ = ranking.weights_at(q, keys, rank)
    head = jnp.cumsum(jnp.where(rank < head_len, exact, 0.0), axis=-1)

    def window(share: float) -> tuple[Array, Array]:
        centre = jnp.maximum((share * n).astype(jnp.int32), 1)
        at = centre - config.fit_window // 2 + jnp.arange(config.fit_window)
        weights, _ = ranking.weights_at(q, keys, jnp.clip(at, 0, jnp.maximum(n - 1, 0)))
        return centre.astype(jnp.float32), jnp.mean(weights, axis=-1)

    (x1, y1), (x2, y2) = window(_NEAR), window(_FAR)
    falls = (y1 > y2) & (x2 > x1)
    a = jnp.where(falls, (y1 - y2) / jnp.maximum(1 / x1 - 1 / x2, 1e-9), 0.0)
    b = jnp.where(falls, y1 - a / x1, 0.5 * (y1 + y2))
    # Below zero the curve counts as zero: nothing is added behind the place where it gets there.
    last = jnp.where(b < 0, a / jnp.maximum(-b, 1e-30), jnp.inf)
    low = jnp.maximum(head_len, 1).astype(jnp.float32)

    def behind(x: Array) -> Array:
        x = jnp.clip(x, low, jnp.maximum(last, low))
        return a * (jnp.log(x) - jnp.log(low)) + b * (x - low)

    total = head[:, -1] + behind(n.astype(jnp.float32))
    target = _target(ranking, total, p)
    few = jnp.sum(head < target[:, None], axis=-1) + 1

    def bisect(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = ends
        middle = 0.5 * (lower + upper)
        enough = head[:, -1] + behind(middle) >= target
        return jnp.where(enough, lower, middle), jnp.where(enough, middle, upper)

    span = (jnp.broadcast_to(low, a.shape), jnp.broadcast_to(jnp.maximum(n, low), a.shape))
    _, many = jax.lax.fori_loop(0, _BISECTIONS, bisect, span)
    needed = jnp.where(head[:, -1] >= target, few, jnp.ceil(many).astype(jnp.int32))
    needed = jnp.where(target <= 0, 0, jnp.minimum(needed, n))
    return Count(needed=needed.astype(jnp.int32), mass=ranking.predicted_mass)


def sample_ranks(
    num_tokens: Int[Array, "*heads"], *, config: EstimatorConfig
) -> tuple[Int[Array, "*heads edges"], Int[Array, "*heads samples"]]:
    """Return which tokens of the order are looked at.

    Behind an exact head, ranges of ranks are in geometric progression, for weights fall about as
    1 / x. Samples lie evenly in their range: the same tokens each time, and no two alike.

    Returns:
        Where ranges begin, the head first, and where the last one ends; and ranks, ascending.
    """
    n = num_tokens[..., None]
    head = jnp.minimum(config.head_len, n)
    growth = jnp.maximum(n / jnp.maximum(head, 1), 1.0)
    step = jnp.arange(config.num_strata + 1) / config.num_strata
    edges = jnp.minimum(jnp.round(head * growth**step), n).astype(jnp.int32)
    drawn = (jnp.arange(config.samples_per_stratum) + 0.5) / config.samples_per_stratum
    width = (edges[..., 1:] - edges[..., :-1])[..., None]
    inside = edges[..., :-1, None] + jnp.floor(drawn * width).astype(jnp.int32)
    first = jnp.broadcast_to(jnp.arange(config.head_len), (*n.shape[:-1], config.head_len))
    ranks = jnp.concatenate([first, inside.reshape(*n.shape[:-1], -1)], axis=-1)
    edges = jnp.concatenate([jnp.zeros_like(n), edges], axis=-1)
    return edges, jnp.clip(ranks, 0, jnp.maximum(n - 1, 0))


def deviations(config: EstimatorConfig) -> float:
    """Return how many standard deviations of safety a failure rate asks for."""
    return max(-NormalDist().inv_cdf(config.failure_rate), 0.0)


def count_by_samples(
    ranking: Ranking,
    q: Float[Array, "group head_dim"],
    keys: Keys,
    p: Float[Array, ""],
    *,
    config: EstimatorConfig,
) -> Count:
    """Measure with samples from each range of ranks how wrong predicted masses are there.

    The ratio of true to predicted weights corrects the masses of all clusters whose middle lies in
    the range; without `control_variate` all weights are predicted alike, and the ratio is the mean
    weight. What samples differ from that gives each range's variance, and K is taken where the
    one-sided normal bound on kept + mass(K) - p (kept + mass(n)) passes zero.

    Source: ours; ratio estimator of stratified samples (Cochran, Sampling Techniques, 6.11).
    """
    strata, drawn = config.num_strata, config.samples_per_stratum
    n = ranking.num_tokens
    edges, ranks = sample_ranks(n, config=config)
    weights, at = ranking.weights_at(q, keys, ranks)
    model = ranking.predicted if config.control_variate else jnp.ones_like(ranking.predicted)
    # A context shorter than the head is its own head, each token once.
    once = jnp.arange(ranks.shape[0]) < jnp.where(n < config.head_len, n, ranks.shape[0])
    weights, expected = weights * once, model[:, at] * once

    def totals(x: Array) -> Array:
        rest = x[:, config.head_len :].reshape(-1, strata, drawn).sum(-1)
        return jnp.concatenate([x[:, : config.head_len].sum(-1, keepdims=True), rest], axis=-1)

    ratio = totals(weights) / jnp.maximum(totals(expected), 1e-30)
    middle = ranking.rank_begin + ranking.sizes // 2
    stratum = jnp.sum(middle[:, None] >= edges[None, 1:-1], axis=-1)
    # Clusters that the exact head looks into have ratios of their own.
    own, known = (
        jnp.zeros_like(model).at[:, at[: config.head_len]].add(x[:, : config.head_len])
        for x in (weights, expected)
    )
    is_head = known > 0
    modelled = model * ranking.sizes
    mass = modelled * jnp.where(is_head, own / jnp.maximum(known, 1e-30), ratio[:, stratum])
    reached = jnp.cumsum(mass, axis=-1)
    target = _target(ranking, reached[:, -1], p)
    z = deviations(config)
    if z > 0:
        of = np.repeat(np.arange(strata + 1), [config.head_len, *[drawn] * strata])
        squares = totals(jnp.square(weights - ratio[:, of] * expected))
        width = edges[1:] - edges[:-1]
        unread = jnp.maximum(1 - drawn / jnp.maximum(width, 1), 0.0).at[0].set(0.0)
        variance = jnp.square(width) / drawn * unread * squares / (drawn - 1)
        modelled = jnp.where(is_head, 0.0, modelled)
        whole = modelled @ (stratum[:, None] == jnp.arange(strata + 1)).astype(jnp.float32)
        noise = modelled * (variance / jnp.maximum(whole, 1e-30))[:, stratum]
        below = jnp.cumsum(noise, axis=-1)
        above = below[:, -1:] - below
        # Target and reached mass share the error of what lies below.
        error = z * jnp.sqrt(jnp.square(1 - p) * below + jnp.square(p) * above)
        return Count(needed=_needed(ranking, reached - error, mass, target), mass=mass)
    return Count(needed=_needed(ranking, reached, mass, target), mass=mass)


def _target(ranking: Ranking, clustered: Float[Array, " group"], p: Array) -> Array:
    """Return the mass that clustered tokens must bring."""
    return p * (ranking.kept + clustered) - ranking.kept


def _needed(ranking: Ranking, reached: Array, mass: Array, target: Array) -> Array:
    """Count tokens up to a mass, a cluster's tokens taken to weigh alike.

    Args:
        ranking: The order.
        reached: Mass that is reached, safely, at the end of each cluster.
        mass: Mass of each cluster.
        target: Mass to be reached.
    """
    enough = reached >= target[:, None]
    at = jnp.where(jnp.any(enough, -1), jnp.argmax(enough, -1), enough.shape[-1] - 1)
    take = jnp.arange(at.shape[0])
    missing = reached[take, at] - target
    share = 1 - jnp.clip(missing / jnp.maximum(mass[take, at], 1e-30), 0.0, 1.0)
    count = ranking.rank_begin[at] + jnp.ceil(share * ranking.sizes[at]).astype(jnp.int32)
    return jnp.where(target <= 0, 0, jnp.where(jnp.any(enough, -1), count, ranking.num_tokens))
