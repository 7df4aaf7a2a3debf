"""Decode attention to what was selected, and to nothing else.

Three parts, each a state of the running softmax, are merged: what is always read, what was
selected, and, if the settings say so, a stand-in for the rest: the mean value of each cluster with
its estimated mass. Work depends on the number of tokens that are read, which only the device knows;
all shapes are static and nothing comes back to the host.

Source: Tactic, arXiv 2502.12216; the merge is that of FlashAttention's split keys. The stand-in for
the rest is ours.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve import cpu_kernels
from jaxserve.attention.softmax import MASKED, State
from jaxserve.attention.tactic.clustering import ClusterIndex
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.counting import Samples, sample_ranks
from jaxserve.attention.tactic.ranking import Keys, axes_of, slots_of, take
from jaxserve.attention.tactic.select import Selection, has_kernel, sampling, select
from jaxserve.attention.tactic.tokens import TokenCut
from jaxserve.core.errors import UnsupportedError

_TILE = 256
"""Tokens that are gathered at a time."""

Kept = tuple[Array, Array, Array]
"""Runs that are always read: first places, sizes `[rows, kv_heads, runs]`, and tokens of all."""

SpanBackend = Literal["xla", "llvm", "mosaic", "triton", "reference"]
"""`xla` gathers tiles of tokens; `llvm` reads runs where they lie, on a CPU.

The others are given lists of tokens in pages, by `attend_rows` alone; see `token_attention`.
"""

Attend = Callable[[Array, Array, Array], State]
"""From runs of places, first places, sizes and tokens of all, to states of the queries."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseStats:
    """What a step read.

    Attributes:
        tokens: Tokens read by each head, sinks and recent tokens included.
        values: Tokens of these whose values were read too; None if all were.
        mass: Estimated share of the mass that lies on them, for the query head with the least.
    """

    tokens: Int[Array, "rows kv_heads"]
    mass: Float[Array, "rows kv_heads"]
    values: Int[Array, "rows kv_heads"] | None = None


@partial(jax.jit, static_argnames=("scale", "config", "backend"))
def sparse_decode(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Float[Array, "rows kv_heads capacity head_dim"],
    values: Float[Array, "rows kv_heads capacity v_head_dim"],
    length: Int[Array, " rows"],
    index: ClusterIndex,
    p: Float[Array, " rows"],
    *,
    scale: float,
    config: TacticConfig,
    backend: SpanBackend = "xla",
) -> tuple[Float[Array, "rows q_heads v_head_dim"], SparseStats]:
    """Attend from one token of each row.

    Args:
        q: Queries, rotated.
        keys: Slots as the index has left them, this step's keys appended.
        values: Likewise.
        length: Tokens of each row, this step's included; 0 for a row that does nothing.
        index: Clusters of the rows.
        p: Share of the mass that each row must read. Rows shorter than `config.min_context` read
            everything, as do those with 1.
        scale: Multiplies the scores.
        config: Settings; its own `p` is not asked.
        backend: What reads keys and values.

    Returns:
        Outputs in float32, zeros for rows without tokens, and what was read.

    Raises:
        UnsupportedError: If the backend cannot read such slots here.
    """
    if backend == "llvm":
        _check_kernels(keys, values)
        if has_kernel(index.sizes.shape[-1], config):
            return _decode_compiled(q, keys, values, length, index, p, scale=scale, config=config)
    states, stats = decode_states(
        q, keys, values, length, index, p, scale=scale, config=config, backend=backend
    )
    out, _, mass = merge(states)
    out = out / jnp.maximum(mass, 1e-30)[..., None]
    return out.reshape(*q.shape[:2], values.shape[-1]), stats


def _decode_compiled(
    q: Array,
    keys: Array,
    values: Array,
    length: Array,
    index: ClusterIndex,
    p: Array,
    *,
    scale: float,
    config: TacticConfig,
) -> tuple[Array, SparseStats]:
    """Attend with the kernel for this machine's CPU: an index is an entry for each row."""
    rows, kv_heads = index.sizes.shape[:2]
    kept = kept_spans(index.end, length, kv_heads, config)
    whole = LayerEntries(
        centroids=index.centroids,
        spread=index.spread,
        value_means=index.value_means,
        sizes=index.sizes,
        begin=index.begin,
        order=None,
    )
    return attend_entries(
        q,
        keys,
        values,
        whole,
        jnp.arange(rows, dtype=jnp.int32)[:, None],
        (index.end > 0).astype(jnp.int32),
        (*kept, jnp.sum(kept[1], axis=-1)),
        sample_ranks(jnp.maximum(index.end - config.sinks, 0), config=config.estimator),
        jnp.where(length < config.min_context, 1.0, p.astype(jnp.float32)),
        scale=scale,
        config=config,
    )[1:]


class LayerEntries(NamedTuple):
    """Clusters in entries that rows name.

    Attributes:
        centroids: Mean key of each cluster.
        spread: Variance of its keys, the mean over dimensions.
        value_means: Mean value.
        sizes: Tokens.
        begin: Place of its first token in the segment; the others follow.
        order: Which token of the segment comes to each place; None if tokens lie where they come.
    """

    centroids: Float[Array, "entries kv_heads clusters head_dim"]
    spread: Float[Array, "entries kv_heads clusters"]
    value_means: Float[Array, "entries kv_heads clusters head_dim"]
    sizes: Int[Array, "entries kv_heads clusters"]
    begin: Int[Array, "entries kv_heads clusters"]
    order: Int[Array, "entries kv_heads segment_len"] | None


def attend_entries(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    layer: LayerEntries,
    entries: Int[Array, "rows segments"],
    num_segments: Int[Array, " rows"],
    kept: Kept,
    samples: Samples,
    p: Float[Array, " rows"],
    *,
    scale: float,
    config: TacticConfig,
) -> tuple[State, Float[Array, "rows q_heads head_dim"], SparseStats]:
    """Attend with one kernel for this machine's CPU, which copies no clusters together.

    Args:
        q: Queries, rotated.
        keys: Slots.
        values: Likewise.
        layer: Clusters; `has_kernel` must say that the kernel can go through them.
        entries: Entries of the segments of each row.
        num_segments: Segments of each row that have entries.
        kept: What is always read.
        samples: Which ranks are looked at.
        p: Share of the mass.
        scale: Multiplies the scores.
        config: Settings.

    Returns:
        The state of what was read, of queries `[rows, kv_heads, group]`; outputs in float32; and
        what was read.
    """
    rows, kv_heads = kept[2].shape
    done = cpu_kernels.attend_clusters(
        q.astype(jnp.float32) * scale,
        keys,
        values,
        entries.astype(jnp.int32),
        num_segments.astype(jnp.int32),
        kept[0].astype(jnp.int32),
        kept[1].astype(jnp.int32),
        layer.centroids,
        layer.spread,
        layer.value_means,
        layer.sizes,
        layer.begin,
        p,
        config.max_share,
        samples[0],
        samples[1],
        layer.order,
        sampling=sampling(config),
        uses_tail=config.tail == "mean",
    )
    out, top, mass = (x.reshape(rows, kv_heads, -1, *x.shape[2:]) for x in done.read)
    share = jnp.min(done.share.reshape(rows, kv_heads, -1), axis=-1)
    stats = SparseStats(tokens=done.num_tokens + kept[2], mass=share)
    return (out, top, mass), done.out, stats


def decode_states(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Keys,
    values: Keys,
    length: Int[Array, " rows"],
    index: ClusterIndex,
    p: Float[Array, " rows"],
    *,
    scale: float,
    config: TacticConfig,
    backend: SpanBackend = "xla",
    order: Int[Array, "rows kv_heads capacity"] | None = None,
    spans: Kept | None = None,
    samples: Samples | None = None,
    attend: Attend | None = None,
) -> tuple[list[State], SparseStats]:
    """Attend from one token of each row, and return the parts before they are merged.

    Args:
        q: Queries, rotated.
        keys: Keys by place.
        values: Values by place.
        length: Tokens of each row.
        index: Clusters of the rows.
        p: Share of the mass.
        scale: Multiplies the scores.
        config: Settings.
        backend: What reads keys and values.
        order: With `llvm`: position of the token of each place, where slots are in order of
            position; None if they are in order of place.
        spans: What is always read, if it is known already.
        samples: Which ranks are looked at, if it is known already.
        attend: Attends to runs, in place of the backend.

    Returns:
        States of what is always read, of what was selected, and of the stand-in for the rest if
        there is one, each of queries `[rows, kv_heads, group]`; and what was read.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = index.sizes.shape[1]
    grouped = q.astype(jnp.float32).reshape(rows, kv_heads, q_heads // kv_heads, head_dim) * scale
    if attend is None:
        attend = partial(_attend_spans, grouped, keys, values, backend=backend, order=order)
    with jax.named_scope("kept"):
        if spans is None:
            begin, size = kept_spans(index.end, length, kv_heads, config)
            spans = begin, size, jnp.sum(size, axis=-1)
        kept = attend(*spans)
    _, top, mass = kept
    kept_log = jnp.where(mass > 0, top + jnp.log(jnp.maximum(mass, 1e-30)), MASKED)
    p = jnp.where(length < config.min_context, 1.0, p.astype(jnp.float32))
    with jax.named_scope("select"):
        chosen = select(
            grouped,
            keys,
            index,
            kept_log,
            p,
            config=config,
            backend="llvm" if backend == "llvm" else "xla",
            order=order,
            samples=samples,
        )
    values_read = None
    with jax.named_scope("selected"):
        runs = chosen.begin, chosen.size, chosen.num_tokens
        if chosen.cut is None:
            states = [kept, attend(*runs)]
        else:
            part, left, values_read = _attend_cut(grouped, keys, values, *runs, chosen.cut)
            states = [kept, part]
            chosen = dataclasses.replace(chosen, tail_mass=chosen.tail_mass + left)
            values_read = values_read + spans[2]
    if config.tail == "mean":
        with jax.named_scope("tail"):
            states.append(tail_state(chosen, index))
    stats = SparseStats(
        tokens=chosen.num_tokens + spans[2],
        mass=jnp.min(chosen.estimated, axis=-1),
        values=values_read,
    )
    return states, stats


def _check_kernels(keys: Array, values: Array) -> None:
    dim, capacity, dtype = keys.shape[3], keys.shape[2], keys.dtype.name
    fits = keys.shape == values.shape and keys.dtype == values.dtype
    if not (fits and cpu_kernels.supports_slots(dim, capacity, dtype)):
        raise UnsupportedError(
            "backend 'llvm' needs llvmlite, and float32 or bfloat16 slots of alike keys and values "
            f"whose heads fill vectors and whose capacity is a multiple of 64; got keys "
            f"{keys.shape} in {dtype} and values {values.shape} in {values.dtype.name}; "
            "use backend='xla'."
        )


def kept_spans(
    end: Int[Array, " rows"], length: Int[Array, " rows"], kv_heads: int, config: TacticConfig
) -> tuple[Array, Array]:
    """Return the two runs that are always read: sinks, and what is not clustered."""
    sinks = jnp.minimum(config.sinks, end)
    recent = jnp.maximum(length - end, 0)
    # Runs without tokens must not come first.
    begin = jnp.stack([end, jnp.zeros_like(end)], axis=-1)
    size = jnp.stack([recent, jnp.where(length > 0, sinks, 0)], axis=-1)
    shape = (end.shape[0], kv_heads, 2)
    begin, size = (x[:, None].astype(jnp.int32) for x in (begin, size))
    return jnp.broadcast_to(begin, shape), jnp.broadcast_to(size, shape)


def _attend_spans(
    q: Float[Array, "rows kv_heads group head_dim"],
    keys: Keys,
    values: Keys,
    begin: Int[Array, "rows kv_heads runs"],
    size: Int[Array, "rows kv_heads runs"],
    num_tokens: Int[Array, "rows kv_heads"],
    *,
    backend: SpanBackend,
    order: Array | None,
) -> State:
    """Attend from each group to the places of its runs."""
    rows, kv_heads, group, dim = q.shape
    v_dim = (values[0] if isinstance(values, tuple) else values).shape[-1]
    if not begin.shape[-1]:
        shape = (rows, kv_heads, group)
        return jnp.zeros((*shape, v_dim)), jnp.full(shape, MASKED), jnp.zeros(shape)
    if backend == "llvm":
        flat = q.reshape(rows, kv_heads * group, dim)
        out, top, mass = cpu_kernels.attend_spans(
            flat, slots_of(keys), slots_of(values), begin, size, num_tokens, order
        )
        heads = (rows, kv_heads, group)
        return out.reshape(*heads, v_dim), top.reshape(heads), mass.reshape(heads)
    axes = (None, None, 0, axes_of(keys), axes_of(values), 0, 0, 0, 0)
    every = jax.vmap(jax.vmap(_attend_head, in_axes=axes), in_axes=axes)
    ends = jnp.cumsum(size, axis=-1)
    tiles = (jnp.max(num_tokens) + _TILE - 1) // _TILE

    def visit(i: Array, state: State) -> State:
        return every(
            i * _TILE, _TILE, q, keys, values, begin - ends + size, ends, num_tokens, state
        )

    shape = (rows, kv_heads, group)
    start = (
        jnp.zeros((*shape, v_dim), jnp.float32),
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    return lax.fori_loop(0, tiles, visit, start)


def _attend_head(
    first: Array,
    count: int,
    q: Array,
    keys: Keys,
    values: Keys,
    shift: Array,
    ends: Array,
    num_tokens: Array,
    state: State,
) -> State:
    """Let one head see the tokens `first` to `first + count` of its runs.

    Args:
        first: Token, counted along the runs.
        count: Tokens.
        q: Scaled queries.
        keys: Keys by place.
        values: Values by place.
        shift: What is added to a token's number along the runs to give its place, for each run.
        ends: Tokens up to the end of each run.
        num_tokens: Tokens that are read.
        state: What the head has seen so far.
    """
    token = first + jnp.arange(count)
    run = jnp.searchsorted(ends, token, side="right", method="scan_unrolled")
    place = token + shift[jnp.minimum(run, ends.shape[0] - 1)]
    seen = token < num_tokens
    place = jnp.where(seen, place, 0)
    scores = jnp.einsum("gd,nd->gn", q, take(keys, place).astype(jnp.float32))
    scores = jnp.where(seen, scores, MASKED)
    out, top, mass = state
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
    fade = jnp.exp(top - new_top)
    part = jnp.einsum("gn,nd->gd", weights, jnp.where(seen[:, None], take(values, place), 0))
    return out * fade[:, None] + part, new_top, mass * fade + jnp.sum(weights, axis=-1)


def _attend_cut(
    q: Float[Array, "rows kv_heads group head_dim"],
    keys: Keys,
    values: Keys,
    begin: Int[Array, "rows kv_heads runs"],
    size: Int[Array, "rows kv_heads runs"],
    num_tokens: Int[Array, "rows kv_heads"],
    cut: TokenCut,
) -> tuple[State, Float[Array, "rows kv_heads group runs"], Int[Array, "rows kv_heads"]]:
    """Attend from each group to the places of its runs that count.

    Returns:
        The state; the mass of what does not count, by number of the cluster; and what counts.
    """
    axes = (None, 0, axes_of(keys), axes_of(values), 0, 0, 0, 0, 0)
    every = jax.vmap(jax.vmap(_attend_head_cut, in_axes=axes), in_axes=axes)
    ends = jnp.cumsum(size, axis=-1)
    tiles = (jnp.max(num_tokens) + _TILE - 1) // _TILE
    heads = q.shape[:3]
    start = (
        jnp.zeros((*heads, (values[0] if isinstance(values, tuple) else values).shape[-1])),
        jnp.full(heads, MASKED, jnp.float32),
        jnp.zeros(heads, jnp.float32),
    )
    begun = (start, jnp.zeros((*heads, size.shape[-1])), jnp.zeros(heads[:2], jnp.int32))

    def visit(i: Array, so_far: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        return every(i * _TILE, q, keys, values, begin - ends + size, ends, num_tokens, cut, so_far)

    return lax.fori_loop(0, tiles, visit, begun)


def _attend_head_cut(
    first: Array,
    q: Array,
    keys: Keys,
    values: Keys,
    shift: Array,
    ends: Array,
    num_tokens: Array,
    cut: TokenCut,
    so_far: tuple[State, Array, Array],
) -> tuple[State, Array, Array]:
    """Let one head see the next tokens of its runs, but for those that do not count."""
    (out, top, mass), left, count = so_far
    token = first + jnp.arange(_TILE)
    run = jnp.searchsorted(ends, token, side="right", method="scan_unrolled")
    run = jnp.minimum(run, ends.shape[0] - 1)
    there = token < num_tokens
    place = jnp.where(there, token + shift[run], 0)
    scores = jnp.einsum("gd,nd->gn", q, take(keys, place).astype(jnp.float32))
    counts, weights = cut.counts(scores, run)
    seen = there & counts
    lost = jnp.where(there & ~counts, weights, 0.0)
    left = left.at[:, cut.clusters[run]].add(lost)
    scores = jnp.where(seen, scores, MASKED)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
    fade = jnp.exp(top - new_top)
    part = jnp.einsum("gn,nd->gd", weights, jnp.where(seen[:, None], take(values, place), 0))
    state = (out * fade[:, None] + part, new_top, mass * fade + jnp.sum(weights, axis=-1))
    return state, left, count + jnp.sum(seen, dtype=jnp.int32)


def tail_state(chosen: Selection, index: ClusterIndex) -> State:
    """Let the mean value of each cluster stand in for its tokens that are not read."""
    out = jnp.einsum("rkgc,rkcd->rkgd", chosen.tail_mass, index.value_means.astype(jnp.float32))
    return out, chosen.level, jnp.sum(chosen.tail_mass, axis=-1)


def read_state(states: list[State]) -> State:
    """Merge the parts of `decode_states` that were read, and no stand-in."""
    return merge(states[:2])


def merge(states: list[State]) -> State:
    """Merge states over disjoint tokens."""
    top = states[0][1]
    for _, other, _ in states[1:]:
        top = jnp.maximum(top, other)
    fades = [jnp.exp(own - top) for _, own, _ in states]
    out = sum(part[0] * fade[..., None] for part, fade in zip(states, fades, strict=True))
    mass = sum(part[2] * fade for part, fade in zip(states, fades, strict=True))
    return jnp.asarray(out), top, jnp.asarray(mass)
