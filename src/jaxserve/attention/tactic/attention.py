"""Decode attention to what was selected, and to nothing else.

Three parts, each a state of the running softmax, are merged: what is always read, what was
selected, and, if the settings say so, a stand-in for the rest: the mean value of each cluster with
its estimated mass. Work depends on the number of tokens that are read, which only the device knows;
all shapes are static and nothing comes back to the host.

Source: Tactic, arXiv 2502.12216; the merge is that of FlashAttention's split keys. The stand-in for
the rest is ours.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve import cpu_kernels
from jaxserve.attention.softmax import MASKED, State
from jaxserve.attention.tactic.clustering import ClusterIndex
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.counting import Samples
from jaxserve.attention.tactic.ranking import Keys, axes_of, slots_of, take
from jaxserve.attention.tactic.select import Selection, select
from jaxserve.core.errors import UnsupportedError

_TILE = 256
"""Tokens that are gathered at a time."""

Kept = tuple[Array, Array, Array]
"""Runs that are always read: first places, sizes `[rows, kv_heads, runs]`, and tokens of all."""

SpanBackend = Literal["xla", "llvm"]
"""`xla` gathers tiles of tokens; `llvm` reads runs where they lie, on a CPU."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseStats:
    """What a step read.

    Attributes:
        tokens: Tokens read by each head, sinks and recent tokens included.
        mass: Estimated share of the mass that lies on them, for the query head with the least.
    """

    tokens: Int[Array, "rows kv_heads"]
    mass: Float[Array, "rows kv_heads"]


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
    states, stats = decode_states(
        q, keys, values, length, index, p, scale=scale, config=config, backend=backend
    )
    out, _, mass = merge(states)
    out = out / jnp.maximum(mass, 1e-30)[..., None]
    return out.reshape(*q.shape[:2], values.shape[-1]), stats


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

    Returns:
        States of what is always read, of what was selected, and of the stand-in for the rest if
        there is one, each of queries `[rows, kv_heads, group]`; and what was read.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = index.sizes.shape[1]
    grouped = q.astype(jnp.float32).reshape(rows, kv_heads, q_heads // kv_heads, head_dim) * scale
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
            backend=backend,
            order=order,
            samples=samples,
        )
    with jax.named_scope("selected"):
        states = [kept, attend(chosen.begin, chosen.size, chosen.num_tokens)]
    if config.tail == "mean":
        with jax.named_scope("tail"):
            states.append(tail_state(chosen, index))
    stats = SparseStats(
        tokens=chosen.num_tokens + spans[2], mass=jnp.min(chosen.estimated, axis=-1)
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


def tail_state(chosen: Selection, index: ClusterIndex) -> State:
    """Let the mean value of each cluster stand in for its tokens that are not read."""
    out = jnp.einsum("rkgc,rkcd->rkgd", chosen.tail_mass, index.value_means)
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
