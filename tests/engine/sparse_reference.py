"""What a model says when its decodes read a share of the mass: float64, one layer after the other.

All tokens of a known text go through a layer together. Those of the prompt attend to everything;
each of the others chooses for itself, with the clusters that an engine has by then, and attends in
float64 to what it chose.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.rooms.sparse import captures
from jaxserve.attention.tactic.clustering import ClusterIndex, Segment, cluster_segment
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import read_mask, select
from jaxserve.models.layers import CausalLM


def log_likelihoods(
    model: CausalLM,
    prompt: Sequence[int],
    answer: Sequence[int],
    p: float,
    *,
    config: TacticConfig,
    segments: int,
) -> NDArray[np.float32]:
    """Return the log-probability of each token of an answer.

    Args:
        model: The model; all of its layers leave something unread.
        prompt: Tokens that attend to everything.
        answer: Tokens that follow, greedy or not.
        p: Share of the mass that the answer's own tokens read.
        config: Settings.
        segments: Segments that have clusters while the answer is written.
    """
    ids = np.asarray([*prompt, *answer[:-1]], np.int32)

    def attend(_layer: int, capture: captures.Capture) -> jax.Array:
        out = captures.causal(capture.q, capture.k, capture.v, capture.scale)
        own = _decode(capture, len(prompt), p, config, segments)
        return out.at[len(prompt) :].set(own)

    hidden, _ = captures.run(model, ids, attend if len(answer) > 1 else None)
    logits = model.logits(hidden[len(prompt) - 1 :])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(answer)[:, None], axis=1)
    return np.asarray(chosen[:, 0])


def _decode(
    capture: captures.Capture, first: int, p: float, config: TacticConfig, segments: int
) -> NDArray[np.float64]:
    """Attend from the tokens behind the prompt."""
    q, k, v = (np.asarray(x, np.float64) for x in (capture.q, capture.k, capture.v))
    rows, kv_heads, dim = len(q) - first, k.shape[1], k.shape[2]
    length = first + 1 + np.arange(rows)
    grouped = q[first:].reshape(rows, kv_heads, -1, dim) * capture.scale
    index, keys = _index(capture, config, segments, rows)
    place = np.arange(len(k))
    kept = (place < config.sinks) | (place >= segments * config.clusters.segment_len)
    kept = kept & (place < length[:, None])
    scores = np.einsum("rkgd,skd->rkgs", grouped, k)
    always = np.where(kept[:, None, None], scores, -np.inf)
    chosen = select(
        jnp.asarray(grouped, jnp.float32),
        keys,
        index,
        jnp.asarray(np.logaddexp.reduce(always, axis=-1), jnp.float32),
        jnp.full((rows,), p),
        config=config,
    )
    by_place = np.asarray(read_mask(chosen, index, jnp.asarray(length), config=config))
    read = np.zeros_like(by_place)
    np.put_along_axis(read, np.asarray(index.permutation), by_place, axis=2)
    level = np.asarray(chosen.level, np.float64)[..., None]
    powers = np.exp(np.where(read[:, :, None], scores, -np.inf) - level)
    tail = np.asarray(chosen.tail_mass, np.float64) * (config.tail == "mean")
    total = powers.sum(-1) + tail.sum(-1)
    out = np.einsum("rkgs,skd->rkgd", powers, v)
    out += np.einsum("rkgc,rkcd->rkgd", tail, np.asarray(index.value_means, np.float64))
    return (out / total[..., None]).reshape(rows, -1, dim)


def _index(
    capture: captures.Capture, config: TacticConfig, segments: int, rows: int
) -> tuple[ClusterIndex, jax.Array]:
    """Cluster full segments, the same for all rows; return keys by place, too."""
    length, capacity = config.clusters.segment_len, len(capture.k)
    k, v = (x.swapaxes(0, 1) for x in (capture.k, capture.v))
    found, begins, orders = [], [], []
    for number in range(segments):
        part = slice(number * length, (number + 1) * length)
        first = config.sinks if number == 0 else 0
        segment = _segments(k[:, part], v[:, part], first, config)
        found.append(segment)
        begins.append(number * length + first + segment.sizes.cumsum(-1) - segment.sizes)
        orders.append(number * length + segment.order)
    rest = np.tile(np.arange(segments * length, capacity), (len(k), 1))
    permutation = np.concatenate([*orders, rest], axis=-1).astype(np.int32)

    def every(part: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(part, (rows, *part.shape)))

    def joined(name: str) -> jax.Array:
        return every(np.concatenate([getattr(segment, name) for segment in found], axis=1))

    index = ClusterIndex(
        centroids=joined("centroids").astype(config.clusters.dtype),
        spread=joined("spread"),
        value_means=joined("value_means").astype(config.clusters.dtype),
        sizes=joined("sizes"),
        begin=every(np.concatenate(begins, axis=1).astype(np.int32)),
        permutation=every(permutation),
        end=jnp.full((rows,), segments * length, jnp.int32),
    )
    return index, every(np.take_along_axis(np.asarray(k), permutation[..., None], axis=1))


@partial(jax.jit, static_argnames="config")
def _segments(k: jax.Array, v: jax.Array, first: int, config: TacticConfig) -> Segment:
    """Cluster one segment of all heads."""
    last = config.clusters.segment_len
    return jax.vmap(lambda k, v: cluster_segment(k, v, first, last, config=config))(k, v)
