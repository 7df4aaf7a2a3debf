"""Sparse attention in an engine: settings for one model, and what fills the index."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.attention.tactic.config import ClusterConfig, EstimatorConfig, TacticConfig
from jaxserve.attention.tactic.rows import (
    LayerClusters,
    SparseRows,
    no_clusters,
    plan_rows,
    set_entry,
)
from jaxserve.cache.buffers import KvLayer
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.sparse import SparseConfig
from jaxserve.engine.kernel_choice import PAGED_BACKENDS
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.models.config import ModelConfig

Clusters = tuple[LayerClusters | None, ...]
"""Entries of each layer; None for a layer that reads everything; empty where all do."""

Reading = tuple[tuple[jax.Array, jax.Array], ...]
"""What each layer counted; see `attention.tactic.rows.attend_rows`."""

_BACKENDS = ("xla", "llvm", *PAGED_BACKENDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSpec:
    """What is fixed for the life of an engine.

    Attributes:
        config: Settings.
        layers: Whether each layer may leave something unread.
        num_entries: Segments whose clusters are kept.
        num_segments: Most segments of a sequence.
        pages_per_segment: Pages of a segment.
        measure_every: Steps from one measurement of the mass to the next; 0 measures never.
    """

    config: TacticConfig
    layers: tuple[bool, ...]
    num_entries: int
    num_segments: int
    pages_per_segment: int
    measure_every: int

    @property
    def segment_len(self) -> int:
        """Tokens of a segment."""
        return self.config.clusters.segment_len


def tactic_config(settings: SparseConfig) -> TacticConfig:
    """Say the settings in the words of the room."""
    return TacticConfig(
        p=settings.p,
        sinks=settings.sinks,
        window=settings.window,
        tail=settings.tail,
        max_share=settings.max_share,
        min_context=settings.min_context,
        dense_layers=settings.dense_layers,
        clusters=ClusterConfig(cluster_size=settings.cluster_size, segment_len=settings.segment),
        estimator=EstimatorConfig(name=settings.estimator, failure_rate=settings.failure_rate),
    )


def index_bytes(config: EngineConfig, shape: ModelConfig) -> float:
    """Bytes of index per token of the cache; 0 if there is none."""
    settings = config.sparse.sparse
    if settings is None:
        return 0.0
    num_layers = sum(sparse_layers(tactic_config(settings), shape))
    # Mean keys and values; the number of tokens, the first place and the variance.
    item = jnp.dtype(tactic_config(settings).clusters.dtype).itemsize
    per_cluster = 2 * item * shape.head_dim + 3 * 4
    return num_layers * shape.num_kv_heads * (4 + per_cluster / settings.cluster_size)


def sparse_layers(config: TacticConfig, shape: ModelConfig) -> tuple[bool, ...]:
    """Say which layers may leave something unread: behind the first, those that see everything."""
    return tuple(
        index >= config.dense_layers and kind.window is None and shape.attention_soft_cap is None
        for index, kind in enumerate(shape.kinds)
    )


def check_sparse(config: EngineConfig, mesh: jax.sharding.Mesh, *, has_own: bool = False) -> None:
    """Check that an engine's other settings go with sparse attention.

    Args:
        config: Settings.
        mesh: Where the model is.
        has_own: Whether attention is the caller's own.

    Raises:
        ConfigError: If they do not.
    """
    settings, wanted = config.sparse.sparse, config.runner.attention_backend
    if settings is None:
        return
    if wanted not in ("auto", *_BACKENDS):
        raise ConfigError(
            f"sparse_attention works with attention_backend {' or '.join(_BACKENDS)}, got "
            f"{wanted!r}; use 'auto'."
        )
    if has_own:
        raise ConfigError(
            "sparse_attention knows no attention but the model's own; leave one of them out."
        )
    if mesh.devices.size != 1:
        raise ConfigError(
            f"sparse_attention works on one device, found {mesh.devices.size}; leave out "
            "tensor_parallel_size, or sparse_attention."
        )
    if config.runner.batch_invariant:
        raise ConfigError(
            "batch_invariant cannot be kept with sparse_attention: when tokens join the index "
            "depends on other requests. Leave one of them out."
        )
    page = config.cache.block_size
    if settings.segment % page:
        raise ConfigError(
            f"sparse_attention: segment must be a multiple of block_size ({page}), got "
            f"{settings.segment}; use {-(-settings.segment // page) * page}."
        )


def sparse_spec(
    config: EngineConfig, shape: ModelConfig, *, num_pages: int, max_model_len: int
) -> SparseSpec | None:
    """Settle what depends on the model and its cache; None if everything is read.

    Raises:
        ConfigError: If no layer could leave anything unread.
    """
    settings = config.sparse.sparse
    if settings is None:
        return None
    room = tactic_config(settings)
    layers = sparse_layers(room, shape)
    if not any(layers):
        raise ConfigError(
            f"sparse_attention finds no layer to work on: of the model's {len(layers)}, the first "
            f"{settings.dense_layers} are read whole, and so are those with windows or soft caps. "
            "Lower dense_layers, or leave sparse_attention out."
        )
    pages = settings.segment // config.cache.block_size
    return SparseSpec(
        config=room,
        layers=layers,
        num_entries=max(1, num_pages // pages),
        num_segments=max(1, max_model_len // settings.segment),
        pages_per_segment=pages,
        measure_every=settings.measure_every,
    )


def allocate_clusters(
    spec: SparseSpec | None, shape: ModelConfig, sharding: jax.sharding.Sharding
) -> Clusters:
    """Allocate empty entries, number 0 besides."""
    if spec is None:
        return ()
    make = _program(spec.num_entries + 1, shape.num_kv_heads, shape.head_dim, spec.config, sharding)
    return tuple(make() if is_sparse else None for is_sparse in spec.layers)


@functools.lru_cache(maxsize=4)
def _program(  # noqa: ANN202  a jitted function
    entries: int, heads: int, dim: int, config: TacticConfig, sharding: jax.sharding.Sharding
):
    """Return one program, so that allocating anew compiles nothing."""
    make = functools.partial(no_clusters, entries, heads, dim, config=config)
    return jax.jit(make, out_shardings=sharding)


def cluster_layer(
    spec: SparseSpec,
    page_size: int,
    layer: LayerClusters,
    cache: KvLayer,
    where: jax.Array,
    number: jax.Array,
    entry: jax.Array,
) -> LayerClusters:
    """Cluster one segment in one layer. Donates `layer`.

    Args:
        spec: Settings.
        page_size: Tokens per page.
        layer: Entries.
        cache: Keys and values, in slots or pages.
        where: The sequence's row, or the pages of the segment.
        number: Which segment of its sequence.
        entry: Where its clusters go.
    """
    length = spec.segment_len

    def cut(buffer: jax.Array) -> jax.Array:
        if where.ndim:
            pages = jnp.moveaxis(buffer[where], 1, 0)
            return pages.reshape(pages.shape[0], where.shape[0] * page_size, -1)
        size = (1, buffer.shape[1], length, buffer.shape[3])
        return lax.dynamic_slice(buffer, (where, 0, number * length, 0), size)[0]

    keys, values = (cut(buffer) for buffer in cache[:2])
    return set_entry(layer, keys, values, number, entry, config=spec.config)


def sparse_rows(
    spec: SparseSpec | None, part: dict[str, jax.Array], clusters: Sequence[LayerClusters | None]
) -> SparseRows | None:
    """Say which decode rows of a step leave something unread.

    Args:
        spec: Settings.
        part: The step's packed buffer, taken apart.
        clusters: Entries of each layer; empty for a model without.
    """
    if spec is None or not clusters:
        return None
    p = part["attention_mass"]
    length = part["token_position"][: p.shape[0]] + 1
    return plan_rows(
        p,
        jnp.where(part["token_row"][: p.shape[0]] >= 0, length, 0),
        part["num_segments"],
        part["segment_entry"],
        tuple(clusters),
        config=spec.config,
        is_measured=part["is_measured"] > 0 if spec.measure_every else None,
    )


def record_reading(reading: Reading, metrics: EngineMetrics) -> None:
    """Count what a step has read; waits for it."""
    if not reading:
        return
    # Counts of many layers together may exceed 32 bits.
    counts = np.sum([np.asarray(layer[0], np.int64) for layer in reading], axis=0)
    sums = np.sum([np.asarray(layer[1], np.float64) for layer in reading], axis=0)
    read, there, heads, measured, missed = (int(count) for count in counts)
    if heads:
        metrics.attended(
            num_read=read, num_there=there, num_heads=heads, estimated_mass=float(sums[0])
        )
    if measured:
        metrics.mass_measured(num_heads=measured, num_missed=missed, mass=float(sums[1]))
