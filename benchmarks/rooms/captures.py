"""Queries, keys and values of a real model over real documents."""

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks.record import ROOT
from jaxserve.core.config import EngineConfig
from jaxserve.engine.setup import load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.hub import resolve_model
from jaxserve.models.layers import CausalLM, project, rope_tables, rotate

DATA = ROOT.parent / "shared" / "data"
_BLOCK, _UNIT = 256, 1024
"""Queries of a block, and what the number of keys that it sees is rounded up to."""

Attend = Callable[[int, Array, Array, Array], Array]
"""From a layer's index, queries, keys and values, each `[tokens, heads, head_dim]`, to outputs."""


def _lines(path: Path, texts: Callable[[dict], str]) -> str:
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rt")
    with opened as file:
        return "\n\n".join(filter(None, (texts(json.loads(line)) for line in file)))


_SOURCES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "answers": (
        "requests/mt_bench_reference_gpt4.jsonl",
        lambda line: "\n\n".join(line["choices"][0]["turns"]),
    ),
    "code": (
        "requests/HumanEval.jsonl.gz",
        lambda line: line["prompt"] + line["canonical_solution"],
    ),
    "encyclopedia": (
        "rag/2wiki_passages.jsonl.xz",
        lambda line: f"{line['title']}\n{line['text']}",
    ),
    "articles": ("rag/xquad_en.jsonl.gz", lambda line: line.get("text", "")),
    "arithmetic": (
        "rl/gsm8k/test.jsonl",
        lambda line: f"{line['question']}\n{line['answer']}",
    ),
    "packages": ("rag/debdesc_passages.jsonl.xz", lambda line: line["text"]),
}


def documents(tokenizer: Tokenizer, num_tokens: int, folder: Path = DATA) -> dict[str, np.ndarray]:
    """Return the first tokens of six collections of real text, by name.

    Args:
        tokenizer: Makes the tokens.
        num_tokens: Tokens of each.
        folder: Where the texts are.

    Raises:
        FileNotFoundError: If the data is not beside the repository.
    """
    found = {}
    for name, (path, texts) in _SOURCES.items():
        # No tokenizer needs more than a dozen characters per token of such texts.
        text = _lines(folder / path, texts)[: 12 * num_tokens]
        found[name] = np.asarray(tokenizer.encode(text)[:num_tokens], np.int32)
        if len(found[name]) < num_tokens:
            raise ValueError(f"{path} has {len(found[name])} tokens, {num_tokens} were asked for.")
    return found


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


def load(name: str) -> tuple[CausalLM, Tokenizer]:
    """Load a model in float32, and its tokenizer."""
    loaded = load_model(name, EngineConfig.from_settings({"dtype": "float32"}))
    return nnx.merge(loaded.graph, loaded.state), Tokenizer.from_path(resolve_model(name))


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
) -> tuple[Array, list[Capture]]:
    """Run the layers over one text, with attention of the caller's.

    Args:
        model: The model.
        ids: Tokens.
        attend: Gives the outputs of a layer; None is causal attention.
        first: Position of the first token.

    Returns:
        Final states, normed, and what attention of each layer worked on.
    """
    x = model.embed_tokens(jnp.asarray(ids))
    if model.config.embedding_scale is not None:
        x *= model.config.embedding_scale
    ropes = rope_tables(first + jnp.arange(len(ids)), model.config)
    captures = []
    for index, layer in enumerate(model.layers):
        graph, state = nnx.split(layer)
        q, k, v = _project(graph, state, x, ropes[layer.kind.rope])
        captures.append(Capture(q, k, v, layer.self_attn.scale))
        out = attend(index, captures[-1]) if attend else causal(q, k, v, captures[-1].scale)
        x = _finish(graph, state, x, out)
    return model.norm(x), captures


def log_likelihood(model: CausalLM, hidden: Array, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each token after the first, given the states before it."""
    targets = jnp.asarray(ids)[1:]
    logits = model.logits(hidden[:-1])
    return np.asarray(
        jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    )
