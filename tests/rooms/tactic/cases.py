"""Random contexts of small shapes, and what is asked of them in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.clustering import ClusterIndex, build_index
from jaxserve.attention.tactic.config import ClusterConfig, EstimatorConfig, TacticConfig

HEADS, GROUP, DIM, CAPACITY = 2, 3, 16, 1024
SCALE = DIM**-0.5

SMALL = TacticConfig(
    window=16,
    min_context=0,
    max_share=1.0,
    clusters=ClusterConfig(cluster_size=16, segment_len=256),
    estimator=EstimatorConfig(head_len=32, num_strata=6, samples_per_stratum=8),
)
"""Settings that make many clusters and segments of few tokens."""


def config(**changes: object) -> TacticConfig:
    """Return the small settings with other ones; those of the estimator go by their own names."""
    own = {field.name for field in dataclasses.fields(TacticConfig)}
    estimator = {name: value for name, value in changes.items() if name not in own}
    rest = {name: value for name, value in changes.items() if name in own}
    changed = dataclasses.replace(SMALL.estimator, **estimator)
    return dataclasses.replace(SMALL, estimator=changed, **rest)


@dataclasses.dataclass
class Context:
    """Queries, keys and values of some rows, by position."""

    q: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    length: np.ndarray

    def build(self, settings: TacticConfig) -> tuple[ClusterIndex, jnp.ndarray, jnp.ndarray]:
        """Cluster all rows."""
        return build_index(
            jnp.asarray(self.keys), jnp.asarray(self.values), jnp.asarray(self.length),
            config=settings,
        )  # fmt: skip

    def dense(self) -> np.ndarray:
        """Attend to everything, in float64."""
        return self.attend(np.ones(self.keys.shape[:3], bool))

    def attend(self, read: np.ndarray) -> np.ndarray:
        """Attend to what is read, in float64."""
        out = np.zeros(self.q.shape)
        for row, length in enumerate(self.length):
            for head in range(self.q.shape[1] if length else 0):
                kv = head // GROUP
                seen = read[row, kv] & (np.arange(read.shape[2]) < length)
                out[row, head] = reference.attend(
                    self.q[row, head], self.keys[row, kv], self.values[row, kv], seen, SCALE
                )
        return out

    def mass(self, read: np.ndarray) -> np.ndarray:
        """Return the true mass on what is read, `[rows, kv_heads, group]`; by position."""
        rows, q_heads, _ = self.q.shape
        found = np.zeros((rows, q_heads))
        for row, length in enumerate(self.length):
            for head in range(q_heads):
                kv = head // GROUP
                keys = self.keys[row, kv, :length]
                found[row, head] = reference.mass(
                    self.q[row, head], keys, read[row, kv, :length], SCALE
                )
        return found.reshape(rows, -1, GROUP)


def by_position(read: np.ndarray, index: ClusterIndex) -> np.ndarray:
    """Turn a mask over places into one over positions."""
    found = np.zeros_like(read)
    np.put_along_axis(found, np.asarray(index.permutation), read, axis=2)
    return found


def random_context(
    seed: int, lengths: tuple[int, ...] = (700, 1000), *, clumps: int = 24, sharpness: float = 3.0
) -> Context:
    """Draw keys and values in clumps, as real ones lie, and queries near some of them."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    centres = rng.standard_normal((rows, HEADS, clumps, DIM))
    member = rng.integers(clumps, size=(rows, HEADS, CAPACITY))
    keys = np.take_along_axis(centres, member[..., None], axis=2)
    keys = keys + 0.4 * rng.standard_normal(keys.shape)
    # Tokens with like keys have like values, more or less.
    shared = rng.standard_normal((rows, HEADS, clumps, DIM))
    values = np.take_along_axis(shared, member[..., None], axis=2)
    values = values + 0.3 * rng.standard_normal(keys.shape)
    near = centres[:, :, rng.integers(clumps, size=GROUP)]
    q = sharpness * (near + 0.5 * rng.standard_normal(near.shape))
    return Context(
        q=q.reshape(rows, HEADS * GROUP, DIM).astype(np.float32),
        keys=keys.astype(np.float32),
        values=values.astype(np.float32),
        length=np.asarray(lengths, np.int32),
    )
