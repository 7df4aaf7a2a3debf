"""Attention mass that methods reach, and tokens that they read, on captures of a model.

A method turns one layer's queries into the places that each key-value head reads; what is measured
is the true mass there, computed from all keys.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.attention.tactic import baselines
from jaxserve.attention.tactic.attention import tail_state
from jaxserve.attention.tactic.clustering import ClusterIndex, build_index
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.ranking import HeadClusters, predict
from jaxserve.attention.tactic.select import read_mask, select
from jaxserve.attention.xla import State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Queries of one layer, and its keys and values both by position and by place.

    Attributes:
        q: Scaled queries, `[queries, kv_heads, group, head_dim]`; each is a row of its own.
        length: Keys that each may see.
        keys: By position, `[kv_heads, capacity, head_dim]`.
        values: Likewise.
        moved_keys: By place.
        moved_values: Likewise.
        index: Clusters, of one row.
    """

    q: Array
    length: Array
    keys: Array
    values: Array
    moved_keys: Array
    moved_values: Array
    index: ClusterIndex


def make_layer(
    q: Array | np.ndarray, k: Array | np.ndarray, v: Array | np.ndarray, at: Sequence[int],
    scale: float, prompt: int, *, config: TacticConfig,
) -> Layer:  # fmt: skip
    """Cluster a prompt, and take queries behind it.

    Args:
        q: Queries of the last tokens of a text, `[tokens, q_heads, head_dim]`.
        k: Keys of the whole text.
        v: Values.
        at: Which of the queries.
        scale: Of the scores.
        prompt: Tokens that are clustered; those behind it are generated ones.
        config: Settings.
    """
    tokens, kv_heads, dim = k.shape
    group = q.shape[1] // kv_heads
    unit = config.clusters.segment_len
    pad = -tokens % unit
    keys, values = (
        jnp.pad(jnp.asarray(x).swapaxes(0, 1), ((0, 0), (0, pad), (0, 0))) for x in (k, v)
    )
    index, moved_k, moved_v = build_index(
        keys[None], values[None], jnp.asarray([prompt]), config=config
    )
    taken = jnp.asarray(q)[jnp.asarray(at)] * scale
    return Layer(
        q=taken.reshape(len(at), kv_heads, group, dim),
        length=tokens - q.shape[0] + jnp.asarray(at) + 1,
        keys=keys,
        values=values,
        moved_keys=moved_k[0],
        moved_values=moved_v[0],
        index=index,
    )


def _always(layer: Layer, config: TacticConfig) -> Array:
    """Tell which places are read anyway; the same by position and by place."""
    place = jnp.arange(layer.keys.shape[1])
    always = (place < config.sinks) | (place >= layer.index.end[0])
    return always & (place < layer.length[:, None])


def _log_mass(q: Array, keys: Array, mask: Array) -> Array:
    """Return the logarithm of the mass on some places, `[queries, kv_heads, group]`."""
    scores = jnp.einsum("rkgd,ksd->rkgs", q, keys)
    return jax.nn.logsumexp(jnp.where(mask, scores, -jnp.inf), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a method reads.

    Attributes:
        read: Places, or positions, `[queries, kv_heads, capacity]`.
        tail: What stands in for the rest, a state of the running softmax; None for nothing.
        is_moved: Whether `read` is by place.
    """

    read: Array
    tail: State | None = None
    is_moved: bool = dataclasses.field(default=False, metadata={"static": True})


Method = Callable[[Layer, Array, TacticConfig], Reading]
"""From a layer, the method's knob and settings to what is read."""


def rows_of(layer: Layer) -> ClusterIndex:
    """Return the index with a row for each query."""
    rows = layer.q.shape[0]
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), layer.index)


def clustered(layer: Layer, p: Array, config: TacticConfig) -> Reading:
    """Read what the room selects."""
    kept = _log_mass(layer.q, layer.keys, _always(layer, config)[:, None, None])
    rows = layer.q.shape[0]
    index = rows_of(layer)
    keys = jnp.broadcast_to(layer.moved_keys, (rows, *layer.moved_keys.shape))
    chosen = select(layer.q, keys, index, kept, jnp.full((rows,), p), config=config)
    read = read_mask(chosen, index, layer.length, config=config)
    return Reading(read, tail_state(chosen, index), is_moved=True)


def cluster_order(layer: Layer, p: Array, config: TacticConfig) -> Reading:
    """Read along the order of clusters as far as the true masses ask for."""
    index, place = layer.index, jnp.arange(layer.keys.shape[1])

    def head(q: Array, clusters: HeadClusters) -> Array:
        at = jnp.searchsorted(clusters.begin, place, side="right") - 1
        return predict(q, clusters, correction=config.estimator.correction)[:, at]

    clusters = HeadClusters(
        centroids=index.centroids[0],
        spread=index.spread[0],
        sizes=index.sizes[0],
        begin=index.begin[0],
    )
    predicted = jax.vmap(jax.vmap(head), in_axes=(0, None))(layer.q, clusters)

    def read(q: Array, keys: Array, candidates: Array, kept: Array, order_by: Array) -> Array:
        exact = baselines.exact_scores(q, keys)
        return baselines.top_p(exact, candidates, kept, p, order_by=order_by)

    found = _by_head(read, layer, layer.moved_keys, predicted, config, 0)
    return Reading(found, is_moved=True)


def _by_head(
    read: Callable[[Array, Array, Array, Array, Array], Array],
    layer: Layer,
    keys: Array,
    argument: Array,
    config: TacticConfig,
    axis: int | None,
) -> Array:
    """Apply a function of one query group, its keys, candidates, kept mass and an argument."""
    always = _always(layer, config)
    kept = _log_mass(layer.q, layer.keys, always[:, None, None])
    place = jnp.arange(layer.keys.shape[1])
    candidates = (place < layer.index.end[0]) & (place >= config.sinks)
    heads = jax.vmap(read, in_axes=(0, 0, None, 0, axis))
    rows = jax.vmap(heads, in_axes=(0, None, None, 0, axis))
    return rows(layer.q, keys, candidates, kept, argument) | always[:, None]


def _baseline(read: Callable[[Array, Array, Array, Array, Array], Array]) -> Method:
    def method(layer: Layer, knob: Array, config: TacticConfig) -> Reading:
        return Reading(_by_head(read, layer, layer.keys, knob, config, None))

    return method


def _budget(share: Array, candidates: Array) -> Array:
    return jnp.round(share * jnp.sum(candidates)).astype(jnp.int32)


@_baseline
def oracle_top_p(q: Array, keys: Array, candidates: Array, kept: Array, p: Array) -> Array:
    """Read the fewest tokens that do, by true scores."""
    return baselines.top_p(baselines.exact_scores(q, keys), candidates, kept, p)


@_baseline
def int4_top_p(q: Array, keys: Array, candidates: Array, kept: Array, p: Array) -> Array:
    """Read the fewest tokens that do, by scores of keys in four bits."""
    return baselines.top_p(baselines.int4_scores(q, keys), candidates, kept, p)


@_baseline
def pages_top_p(q: Array, keys: Array, candidates: Array, kept: Array, p: Array) -> Array:
    """Read along the order of page bounds as far as the true masses ask for."""
    bounds = baselines.page_bounds(q, keys, candidates)
    exact = baselines.exact_scores(q, keys)
    return baselines.top_p(exact, candidates, kept, p, order_by=bounds)


@_baseline
def pages_top_k(q: Array, keys: Array, candidates: Array, kept: Array, share: Array) -> Array:
    """Read a fixed share of tokens, along the order of page bounds."""
    bounds = baselines.page_bounds(q, keys, candidates)
    return baselines.top_k(bounds, candidates, kept, _budget(share, candidates))


@_baseline
def exact_top_k(q: Array, keys: Array, candidates: Array, kept: Array, share: Array) -> Array:
    """Read a fixed share of tokens, by true scores."""
    exact = baselines.exact_scores(q, keys)
    return baselines.top_k(exact, candidates, kept, _budget(share, candidates))


@_baseline
def sinks_and_window(_q: Array, _k: Array, candidates: Array, _: Array, share: Array) -> Array:
    """Read a fixed share of tokens, the last ones."""
    return baselines.recent(candidates, _budget(share, candidates))


def _errors(layer: Layer, reading: Reading, scores: Array) -> dict[str, Array]:
    """Measure outputs, with and without a stand-in for the rest, relative to dense ones."""
    values = layer.moved_values if reading.is_moved else layer.values
    level = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - level[..., None])
    dense = jnp.einsum("rkgs,ksd->rkgd", weights, values) / weights.sum(-1)[..., None]
    some = weights * reading.read[:, :, None]
    total, mass = jnp.einsum("rkgs,ksd->rkgd", some, values), some.sum(-1)

    def error(out: Array) -> Array:
        return jnp.linalg.norm(out - dense, axis=-1) / jnp.linalg.norm(dense, axis=-1)

    found = {"mass": mass / weights.sum(-1), "error": error(total / mass[..., None])}
    if reading.tail is not None:
        rest, top, rest_mass = reading.tail
        fade = jnp.exp(top - level)
        whole = total + rest * fade[..., None]
        found["tail_error"] = error(whole / (mass + rest_mass * fade)[..., None])
    return found


def _measure(method: Method, layer: Layer, knob: Array, config: TacticConfig) -> dict[str, Array]:
    reading = method(layer, knob, config)
    keys = layer.moved_keys if reading.is_moved else layer.keys
    seen = jnp.arange(keys.shape[1]) < layer.length[:, None]
    scores = jnp.einsum("rkgd,ksd->rkgs", layer.q, keys)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    always = jnp.sum(_always(layer, config), axis=-1)[:, None]
    optional = jnp.maximum(layer.length[:, None] - always, 1)
    return {
        "read": (jnp.sum(reading.read, axis=-1) - always) / optional,
        **_errors(layer, reading, scores),
    }


@partial(jax.jit, static_argnames=("method", "config"))
def measure(
    method: Method, layer: Layer, knobs: Array, *, config: TacticConfig
) -> dict[str, Array]:
    """Measure one method at several settings of its knob.

    Returns:
        Per knob, query, key-value head (and query head of it): `mass`, the true mass that is read;
        `read`, the share of optional tokens that is read; `error` of the output, relative to its
        norm, and `tail_error` with a stand-in for the rest.
    """
    return jax.lax.map(lambda knob: _measure(method, layer, knob, config), knobs)


def with_estimator(config: TacticConfig, **changes: Any) -> TacticConfig:  # noqa: ANN401
    """Return settings with other ones of the estimator."""
    return dataclasses.replace(config, estimator=dataclasses.replace(config.estimator, **changes))
