# %% [markdown]
# # Attention of your own
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** a new kind of attention in five lines: a soft cap, ALiBi and a window; every
#   backend of this machine checked against float64; batches of other lengths that compile nothing;
#   and the same five lines in a serving engine.
# * **It needs** a CPU (on an NVIDIA GPU the same lines run in its kernels); nothing is downloaded.
# * **It takes** less than a minute on two cores.
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
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from jaxserve import LLM, CustomAttention, SamplingParams
from jaxserve.core.errors import UnsupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.backends import BACKENDS
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.variant import (
    AttentionVariant,
    alibi,
    alibi_slopes,
    compose,
    soft_cap,
    window,
)

print("JAX", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## Five lines
#
# Scores are bent to stay between -20 and 20 (Gemma 2), lowered by distance, for each head at a rate
# of its own (ALiBi), and a token sees 24 keys, itself included. The functions see whole tiles and
# stay elementwise; `ctx["slopes"]` reads an array that is passed along.


# %%
def score_mod(s, ctx, q_pos, k_pos, head):
    return 20.0 * jnp.tanh(s / 20.0) + ctx["slopes"] * (k_pos - q_pos)


def mask_mod(ctx, q_pos, k_pos, head):
    return k_pos > q_pos - 24


mine = AttentionVariant(score_mod=score_mod, mask_mod=mask_mod, extras={"slopes": "head"})

# %% [markdown]
# ## A batch
#
# Three requests in one step: the last 5 tokens of a prompt of 70 that is computed in pieces, one
# token of a sequence of 33, and a whole prompt of 9. Keys and values lie in pages of 8 tokens, in
# any order; page 0 is a dummy. The plan is made on the host, from lengths alone.

# %%
Q_HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 32, 8, 40
rng = np.random.default_rng(0)
q_len, kv_len = np.array([5, 1, 9]), np.array([70, 33, 9])
spec = PlanSpec(
    q_heads=Q_HEADS,
    kv_heads=KV_HEADS,
    head_dim=DIM,
    page_size=PAGE,
    q_dtype="float32",
    kv_dtype="float32",
    max_requests=4,
    max_tokens=16,
    max_pages=32,
    variant=mine,
)


def paged(kv_len):
    """Give each request pages, in random order."""
    counts = -(-kv_len // PAGE)
    order = 1 + rng.permutation(PAGES - 1)[: counts.sum()].astype(np.int32)
    return PageTable(
        indptr=np.r_[0, counts.cumsum()].astype(np.int32), indices=order, kv_len=kv_len
    )


table = paged(kv_len)
plan = make_plan(spec, q_len, table)
q = rng.standard_normal((spec.max_tokens, Q_HEADS, DIM)).astype(np.float32) * 3
k, v = rng.standard_normal((2, PAGES, KV_HEADS, PAGE, DIM)).astype(np.float32)
slopes = alibi_slopes(Q_HEADS)
extra = {"slopes": jnp.asarray(slopes)}
print("slopes", slopes)

# %% [markdown]
# ## Checked against float64
#
# The oracle is numpy in double precision, one request and head after the other, with formulas
# written anew. Every backend that serves this case here must agree with it; the others say why they
# do not.


# %%
def oracle(q, q_len, kv_len, table, *, plain=False):
    """Return outputs, and the weights of the first request's last token."""
    out, token, shown = np.zeros(q.shape), 0, []
    for request, (count, keys) in enumerate(zip(q_len, kv_len)):
        pages = table.indices[table.indptr[request] : table.indptr[request + 1]]
        own_k, own_v = (x[pages].swapaxes(0, 1).reshape(KV_HEADS, -1, DIM) for x in (k, v))
        for position in range(keys - count, keys):
            distance = position - np.arange(keys)
            for head in range(Q_HEADS):
                group = head // (Q_HEADS // KV_HEADS)
                s = own_k[group, :keys].astype(np.float64) @ q[token, head] / np.sqrt(DIM)
                seen = distance >= 0
                if not plain:
                    s = 20 * np.tanh(s / 20) - slopes[head] * distance
                    seen &= distance < 24
                weights = np.where(seen, np.exp(s - s[seen].max()), 0)
                weights /= weights.sum()
                out[token, head] = weights @ own_v[group, :keys]
                if request == 0 and position == keys - 1:
                    shown.append(weights)
            token += 1
    return out, np.array(shown)


want, weights = oracle(q, q_len, kv_len, table)
kv = PagedKV(k=jnp.asarray(k), v=jnp.asarray(v))
served = []
for backend in BACKENDS:
    try:
        got = attention(jnp.asarray(q), kv, plan, extra=extra, backend=backend)
    except UnsupportedError as error:
        print(f"{backend:10} {str(error).split('. ')[0]}")
        continue
    worst = np.abs(np.asarray(got, np.float64) - want).max()
    print(f"{backend:10} largest difference {worst:.1e}")
    assert worst < (2e-5 if jax.default_backend() == "cpu" else 5e-3)
    served.append(backend)
assert "xla" in served

# %%
plain_weights = oracle(q, q_len, kv_len, table, plain=True)[1]
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True)
for axis, shown, title in zip(axes, (plain_weights, weights), ("plain", "ours")):
    axis.imshow(np.log10(np.maximum(shown, 1e-6)), aspect="auto", vmin=-4, vmax=0)
    axis.set_xlabel("key")
    axis.set_title(f"log weights, {title}")
axes[0].set_ylabel("head")
plt.show()
assert (weights[:, : 70 - 24] == 0).all()
assert (plain_weights > 0).all()

# %% [markdown]
# ## From parts
#
# What is well known is there already, and parts can be put together. `window` also tells the plan
# which blocks of keys need not be visited, so the plan has to know it.

# %%
parts = compose(soft_cap(20.0), alibi(), window(24))
shorter = make_plan(dataclasses.replace(spec, variant=parts), q_len, table)
got = attention(jnp.asarray(q), kv, shorter, extra=extra)
print(f"{plan.num_items} items of work became {shorter.num_items}")
assert np.abs(np.asarray(got, np.float64) - want).max() < 5e-3

# %% [markdown]
# ## Other lengths compile nothing
#
# The compiled program depends on the spec alone. The function below notes each time that it is
# traced.

# %%
traced = []


@jax.jit
def step(q, plan):
    traced.append(q.shape)
    return attention(q, kv, plan, extra=extra)


for _ in range(20):
    q_len = rng.integers(1, 6, 3)
    kv_len = q_len + rng.integers(0, 60, 3)
    table = paged(kv_len)
    got = step(jnp.asarray(q), make_plan(spec, q_len, table))
    want, _ = oracle(q, q_len, kv_len, table)
    assert np.abs(np.asarray(got, np.float64) - want).max() < 5e-3
print("traced", len(traced), "time for 20 batches")
assert len(traced) == 1

# %% [markdown]
# ## In an engine
#
# An engine takes the same variant: it runs in prefill, in chunks, in decoding and over cached
# prefixes. Its weights are drawn at random here; what matters is who sees whom. With two layers and
# windows of 24, a token knows of the 46 tokens before it. So what differs further back must
# change nothing, unless attention is the model's own.

# %%
config = ModelConfig(
    model_type="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=Q_HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position=512,
    tie_word_embeddings=True,
    eos_token_ids=(),
)
model = Llama(config, rngs=nnx.Rngs(0))
settings = {"max_model_len": 256, "max_num_seqs": 2, "max_num_batched_tokens": 256}
greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
first = rng.integers(0, 256, 120).tolist()
second = [*rng.integers(0, 256, 40).tolist(), *first[40:]]


def answers(**how):
    """Return tokens and log-probabilities after both prompts."""
    with LLM(model, enable_prefix_caching=False, **settings, **how) as llm:
        outputs = llm.generate([first, second], greedy, use_tqdm=False)
    ones = [output.outputs[0] for output in outputs]
    logprobs = [[step[t].logprob for t, step in zip(o.token_ids, o.logprobs)] for o in ones]
    return [list(one.token_ids) for one in ones], np.array(logprobs)


custom = CustomAttention(variant=mine, extra={"slopes": slopes})
own_tokens, own = answers()
tokens, ours = answers(attention=custom, attention_backend="pallas")
known_tokens, known = answers(attention=custom, attention_backend="pallas-reference")

print(f"first log-probabilities, own attention: {own[:, 0]}")
print(f"first log-probabilities, ours:          {ours[:, 0]}")
assert abs(own[0, 0] - own[1, 0]) > 1e-3  # the model's own attention sees what differs
assert tokens[0] == tokens[1]
np.testing.assert_allclose(ours[0], ours[1], atol=1e-4)  # ours does not
assert abs(ours[0, 0] - own[0, 0]) > 1e-3
assert tokens == known_tokens
np.testing.assert_allclose(ours, known, atol=1e-3)
