# %% [markdown]
# # Sparse attention to a share of the mass
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** how few tokens hold nine tenths of a head's attention, and how much that
#   differs between heads; keys in clusters; an estimate of how far to read, beside the truth; and
#   the error of an output that has read a fraction.
# * **It needs** a CPU; SmolLM2-135M (140 MB) is fetched at the first use.
# * **It takes** about two minutes on two cores.
#
# The badge opens Colab's list of notebooks on GitHub: give it the address of this repository and
# choose this file.

# %%
# On Colab and other fresh machines; skipped where jaxserve is there already.
import importlib.util

if importlib.util.find_spec("jaxserve") is None:
    # %pip install --quiet jaxserve matplotlib
    print("Installed. If an import below fails, restart the kernel.")

# %%
import argparse
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from jaxserve.attention.metadata import CausalPlan
from jaxserve.attention.tactic import TacticConfig, build_index, sparse_decode
from jaxserve.attention.tactic.config import ClusterConfig
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.setup import load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.hub import resolve_model
from jaxserve.models.layers import rope_tables, rotate

# %% [markdown]
# ## Queries and keys of a real model
#
# The text is the source of a module of Python. A hook keeps what enters each layer; its own
# projections make queries, keys and values of it.

# %%
NAME, LENGTH = "smollm2-135m-instruct", 2048
loaded = load_model(NAME, EngineConfig.from_settings({"dtype": "float32"}))
model, tokenizer = nnx.merge(loaded.graph, loaded.state), Tokenizer.from_path(resolve_model(NAME))
ids = jnp.asarray(tokenizer.encode(inspect.getsource(argparse)[: 8 * LENGTH])[:LENGTH])[None]
positions = jnp.arange(LENGTH)[None]
layers = list(model.layers)


# %%
@jax.jit
def states(state, ids):
    kept = []
    nnx.merge(loaded.graph, state)(
        ids, positions, (None,) * len(layers), CausalPlan(), hook=lambda _, x: kept.append(x) or x
    )
    return kept


@jax.jit
def attended(state, x):
    own = nnx.merge(layer_graph, state)
    parts = [own.self_attn.q_proj, own.self_attn.k_proj, own.self_attn.v_proj]
    x = own.input_layernorm(x)
    q, k, v = (part(x)[0].reshape(LENGTH, -1, own.self_attn.dim) for part in parts)
    return *(rotate(part, rope) for part in (q, k)), v


layer_graph = nnx.split(layers[0])[0]
rope = rope_tables(positions[0], model.config)[layers[0].kind.rope]
entering = states(loaded.state, ids)[: len(layers)]
captures = [attended(nnx.split(own)[1], x) for own, x in zip(layers, entering, strict=True)]
heads, kv_heads = model.config.num_heads, model.config.num_kv_heads
group, scale = heads // kv_heads, layers[0].self_attn.scale
print(len(captures), "layers,", heads, "query heads over", kv_heads, "heads of keys")

# %% [markdown]
# ## How many tokens matter?
#
# The weights of the last token over all that came before it, largest first. The same share of the
# mass takes one token in one head, and most of the context in another: a fixed number
# of tokens is too many here, and too few there.


# %%
def weights(q, k):
    grouped = q[-1].reshape(kv_heads, group, -1)
    return jax.nn.softmax(jnp.einsum("kgd,nkd->kgn", grouped, k) * scale, axis=-1)


fewest = np.zeros((len(captures), heads), int)
curves = []
for i, (q, k, _) in enumerate(captures):
    ordered = -np.sort(-np.asarray(weights(q, k)).reshape(heads, LENGTH), axis=-1)
    curves.append(np.cumsum(ordered, axis=-1))
    fewest[i] = (curves[-1] < 0.9).sum(-1) + 1

figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
for i in (1, 8, 15, 22, 29):
    axes[0].semilogx(1 + np.arange(LENGTH), curves[i][0], label=f"layer {i}, head 0")
axes[0].axhline(0.9, color="gray", linewidth=0.8)
axes[0].set(xlabel="tokens, largest weight first", ylabel="share of the mass")
axes[0].legend(fontsize=8)
picture = axes[1].imshow(np.log10(fewest.T), aspect="auto", cmap="viridis")
axes[1].set(xlabel="layer", ylabel="query head", title="log10 of tokens that hold 90 %")
figure.colorbar(picture)
plt.tight_layout()
print("fewest tokens for 90 %: from", fewest.min(), "to", fewest.max())
assert fewest.max() > 20 * fewest.min()

# %% [markdown]
# ## Clusters
#
# Keys of each head are clustered, 32 to a cluster on average, and moved so that a cluster lies in
# one piece. Attention does not notice, as a key carries its position in its rotation.

# %%
config = TacticConfig(
    p=0.9, min_context=0, max_share=1.0, clusters=ClusterConfig(segment_len=LENGTH)
)
length = jnp.asarray([LENGTH])


def by_head(x):
    return x.swapaxes(0, 1)[None]


built = [build_index(by_head(k), by_head(v), length, config=config) for _, k, v in captures]
index, moved_keys, _ = built[15]
sizes = np.asarray(index.sizes[0, 0])
print(
    "clusters:", (sizes > 0).sum(), " largest:", sizes.max(), " smallest:", sizes[sizes > 0].min()
)
assert sizes.sum() == int(index.end[0]) - config.sinks
assert (np.sort(np.asarray(index.permutation[0, 0])) == np.arange(LENGTH)).all()

# %% [markdown]
# ## One step
#
# `sparse_decode` ranks clusters, estimates how far down the list nine tenths of the mass are
# reached, and reads so far. Its answer is compared with dense attention, and the tokens that it
# read with the fewest that would have done for the whole group of query heads.


# %%
def dense(q, k, v):
    return jnp.einsum("kgn,nkd->kgd", weights(q, k), v).reshape(heads, -1)


def step(i, p, config):
    (q, k, v), (index, keys, values) = captures[i], built[i]
    out, stats = sparse_decode(
        q[-1:], keys, values, length, index, jnp.asarray([p]), scale=scale, config=config
    )
    exact = dense(q, k, v)
    error = jnp.linalg.norm(out[0] - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
    return np.asarray(stats.tokens[0]), float(error.mean())


results = [step(i, 0.9, config) for i in range(len(captures))]
read = np.stack([tokens for tokens, _ in results])
best = fewest.reshape(-1, kv_heads, group).max(-1)
print(
    f"read {read.mean() / LENGTH:.1%} of all tokens; error {np.mean([e for _, e in results]):.3f}"
)
assert read.mean() < 0.6 * LENGTH
assert np.mean([error for _, error in results]) < 0.15

plt.figure(figsize=(8, 3))
plt.plot(read.mean(-1), label="read")
plt.plot(best.mean(-1), label="fewest that hold 90 %, without what is read anyway")
plt.axhline(config.window + config.sinks, color="gray", linewidth=0.8, label="read anyway")
plt.xlabel("layer")
plt.ylabel(f"tokens of {LENGTH}")
plt.legend(fontsize=8)

# %% [markdown]
# ## More or less
#
# The share p is the knob, and each row of a batch has its own. What is not read can be dropped, or
# stand in by the mean value of its cluster, which costs next to nothing.

# %%
shares = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]
some = range(3, len(captures), 6)
plt.figure(figsize=(6, 3.5))
errors = {}
for tail in ("drop", "mean"):
    settings = dataclasses.replace(config, tail=tail)
    found = [[step(i, p, settings) for i in some] for p in shares]
    errors[tail] = [np.mean([error for _, error in row]) for row in found]
    tokens = [np.mean([tokens.mean() for tokens, _ in row]) / LENGTH for row in found]
    plt.plot(tokens, errors[tail], "o-", label=f"tail: {tail}")
plt.xlabel("share of tokens read")
plt.ylabel("error of the output")
plt.legend()
assert np.mean(errors["mean"]) < np.mean(errors["drop"])

# %% [markdown]
# All of the mass is dense attention, to the last digits; a share that makes no sense is refused.

# %%
tokens, error = step(15, 1.0, config)
assert (tokens == LENGTH).all()
assert error < 1e-5
try:
    TacticConfig(p=90)
    raise AssertionError("a share above 1 must be refused")
except ConfigError as refused:
    print(refused)
