"""Queries, keys and values of a real model over a text."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve import cpu_kernels
from jaxserve.core.config import EngineConfig
from jaxserve.engine.source import load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.config import ModelConfig
from jaxserve.models.hub import resolve_model
from jaxserve.models.layers import CausalLM, project, rope_tables, rotate
from jaxserve.models.positions import RopeScaling
from jaxserve.models.registry import abstract_model

_BLOCK, _UNIT, _SLOT_UNIT = 256, 1024, 64
"""Queries of a block; what the number of keys that it sees is rounded up to through XLA; and what
slots are rounded up to for the kernel."""

Attend = Callable[[int, Array, Array, Array], Array]
"""From a layer's index, queries, keys and values, each `[tokens, heads, head_dim]`, to outputs."""


@dataclass(frozen=True, slots=True)
class Capture:
    """What attention of one layer works on, rotated.

    Attributes:
        q: Queries, `[tokens, q_heads, head_dim]`.
        k: Keys, `[tokens, kv_heads, head_dim]`.
        v: Values.
        scale: Multiplies the scores.
    """

    q: Array
    k: Array
    v: Array
    scale: float


def load(name: str, *, stretch: float = 1.0) -> tuple[CausalLM, Tokenizer]:
    """Load a model in float32, and its tokenizer.

    Args:
        name: Name or path.
        stretch: By how much positions are interpolated: rotary frequencies are divided by it, so
            that a context so many times longer has the angles of the original one.
    """
    loaded = load_model(name, EngineConfig.from_settings({"dtype": "float32"}))
    graph, _ = abstract_model(stretched(loaded.config, stretch), dtype=jnp.dtype("float32"))
    return nnx.merge(graph, loaded.state), Tokenizer.from_path(resolve_model(name))


def stretched(config: ModelConfig, stretch: float) -> ModelConfig:
    """Return a model's configuration for a context so many times longer."""
    if stretch == 1:
        return config
    return dataclasses.replace(
        config,
        rope_scaling=RopeScaling(kind="linear", factor=stretch),
        max_position=int(config.max_position * stretch),
    )


@partial(jax.jit, static_argnames="scale")
def _attend_block(q: Array, k: Array, v: Array, first: Array, scale: float) -> Array:
    """Attend from some tokens of each group to the keys of their head, `[kv_heads, ...]`."""
    heads, group, count, dim = q.shape
    scores = jnp.einsum("kqd,ksd->kqs", q.reshape(heads, group * count, dim), k) * scale
    seen = jnp.arange(k.shape[1]) <= first + jnp.arange(count)[:, None]
    weights = jax.nn.softmax(jnp.where(jnp.tile(seen, (group, 1)), scores, -jnp.inf), axis=-1)
    return jnp.einsum("kqs,ksd->kqd", weights, v).reshape(q.shape)


def causal(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attend causally, block by block, so that long documents fit into memory."""
    capacity = -(-len(k) // _SLOT_UNIT) * _SLOT_UNIT
    if cpu_kernels.supports_slots(q.shape[-1], capacity, "float32"):
        return _attend_slots(q, k, v, scale=scale, capacity=capacity)
    return _attend_blocks(q, k, v, scale)


@partial(jax.jit, static_argnames=("scale", "capacity"))
def _attend_slots(q: Array, k: Array, v: Array, *, scale: float, capacity: int) -> Array:
    """Attend with the kernel that the engine has for prompts, which is several times as fast."""
    tokens = len(q)
    first = np.arange(0, tokens, _BLOCK)
    count = np.minimum(_BLOCK, tokens - first)
    blocks = np.stack([first, np.zeros_like(first), first, count], axis=-1).astype(np.int32)
    pad = ((0, 0), (0, capacity - tokens), (0, 0))
    slots = [jnp.pad(x.swapaxes(0, 1), pad)[None] for x in (k, v)]
    return cpu_kernels.prefill(q, *slots, jnp.asarray(blocks), q_block=_BLOCK, scale=scale)


def _attend_blocks(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attend through XLA."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    blocks = []
    for first in range(0, tokens, _BLOCK):
        # Few different numbers of keys, so that few programs are compiled.
        seen = min(-(-(first + _BLOCK) // _UNIT) * _UNIT, tokens)
        part = grouped[:, :, first : first + _BLOCK]
        blocks.append(_attend_block(part, k[:, :seen], v[:, :seen], jnp.int32(first), scale))
    return jnp.concatenate(blocks, axis=2).transpose(2, 0, 1, 3).reshape(q.shape)


@partial(jax.jit, static_argnames="graph")
def _project(graph: nnx.GraphDef, state: nnx.State, x: Array, rope: tuple) -> tuple:
    layer = nnx.merge(graph, state)
    own = layer.self_attn
    products = project(layer.input_layernorm(x), (own.q_proj, own.k_proj, own.v_proj), None)
    q, k, v = (part.reshape(len(x), -1, own.dim) for part in products)
    if own.q_norm is not None:
        q, k = own.q_norm(q), own.k_norm(k)
    return rotate(q, rope), rotate(k, rope), v


@partial(jax.jit, static_argnames="graph")
def _finish(graph: nnx.GraphDef, state: nnx.State, x: Array, out: Array) -> Array:
    layer = nnx.merge(graph, state)
    x = x + project(out.reshape(len(x), -1), (layer.self_attn.o_proj,), None)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x))


def run(
    model: CausalLM,
    ids: np.ndarray,
    attend: Callable[[int, Capture], Array] | None = None,
    *,
    first: int = 0,
    num_layers: int | None = None,
) -> tuple[Array, list[Capture]]:
    """Run the layers over one text, with attention of the caller's.

    Args:
        model: The model.
        ids: Tokens.
        attend: Gives the outputs of a layer; None is causal attention.
        first: Position of the first token.
        num_layers: Layers to run; all if absent. States are not final then.

    Returns:
        Final states, normed, and what attention of each layer worked on.
    """
    x = model.embed_tokens(jnp.asarray(ids))
    if model.config.embedding_scale is not None:
        x *= model.config.embedding_scale
    ropes = rope_tables(first + jnp.arange(len(ids)), model.config)
    captures = []
    for index, layer in enumerate(list(model.layers)[:num_layers]):
        graph, state = nnx.split(layer)
        q, k, v = _project(graph, state, x, ropes[layer.kind.rope])
        captures.append(Capture(q, k, v, layer.self_attn.scale))
        out = attend(index, captures[-1]) if attend else causal(q, k, v, captures[-1].scale)
        x = _finish(graph, state, x, out)
    return model.norm(x), captures


def log_likelihood(
    model: CausalLM, hidden: Array, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score each token after the first, given the states before it.

    Returns:
        Log-probabilities, and whether each token is the likeliest one.
    """
    targets = jnp.asarray(ids)[1:, None]
    logits = model.logits(hidden[:-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[:, 0]
    return np.asarray(chosen), np.asarray(jnp.argmax(logits, axis=-1) == targets[:, 0])
