"""The second level: tokens that do not count although their cluster is read.

Clusters are chosen up to a little more than p. Of those whose keys differ much for a query, the
tokens are then looked at one by one: their keys have been read, so their weights are known, and the
values of those that have next to no weight need not be read. What they weigh together is at most
what clusters were chosen in excess of p, so p is reached as before.

Source: ours; two levels of top-p are those of Twilight (arXiv 2502.02770) and Double-P.
Differs: the second level leaves out values alone, by a bound that no sort is needed for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.ranking import HIGHEST, HeadClusters, Ranking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenCut:
    """Which tokens of chosen runs count.

    Attributes:
        clusters: Number of the cluster of each run.
        by_token: Whether the tokens of a run are looked at one by one.
        least: Weight below which a token of such a run does not count, for every query head; one
            that has as much for any head of the group counts.
        level: Logarithm of what weights are relative to.
    """

    clusters: Int[Array, "*heads clusters"]
    by_token: Bool[Array, "*heads clusters"]
    least: Float[Array, "*heads group"]
    level: Float[Array, "*heads group"]

    def counts(
        self, scores: Float[Array, "group n"], run: Int[Array, " n"]
    ) -> tuple[Bool[Array, " n"], Float[Array, "group n"]]:
        """Tell which tokens of one head count, and what each weighs.

        Args:
            scores: Their scores.
            run: Which run each is in.
        """
        weights = jnp.exp(jnp.minimum(scores - self.level[:, None], HIGHEST))
        is_enough = jnp.any(weights >= self.least[:, None], axis=0)
        return is_enough | ~self.by_token[run], weights


def cluster_share(p: Float[Array, ""], config: TacticConfig) -> Float[Array, ""]:
    """Return the share of the mass that chosen clusters must have, of which tokens may be cut."""
    return p + config.token_level * (1 - p)


def cut_tokens(
    q: Float[Array, "group head_dim"],
    clusters: HeadClusters,
    ranking: Ranking,
    total: Float[Array, " group"],
    p: Float[Array, ""],
    num_tokens: Int[Array, ""],
    *,
    config: TacticConfig,
) -> TokenCut:
    """Say which tokens of one head's chosen clusters need not count.

    Args:
        q: Scaled queries.
        clusters: Its clusters.
        ranking: Their order.
        total: Estimated mass of everything.
        p: Share of the mass.
        num_tokens: Tokens that are chosen.
        config: Settings.
    """
    variance = jnp.sum(jnp.square(q), axis=-1, keepdims=True) * clusters.spread
    spare = config.token_level * (1 - p) * total
    return TokenCut(
        clusters=ranking.clusters,
        by_token=(jnp.max(variance, axis=0) >= config.min_spread)[ranking.clusters],
        least=spare / jnp.maximum(num_tokens, 1),
        level=ranking.level,
    )
