# %% [markdown]
# # Your own parameters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** an `nnx` module that you train; the engine serving those very arrays;
#   log-probabilities that agree with training; hidden states, a gradient, and a few rounds of
#   reinforcement learning.
# * **It needs** a CPU; no weights are downloaded.
# * **It takes** about a minute on two cores.
#
# The badge opens Colab's list of notebooks on GitHub: give it the address of this repository and
# choose this file.

# %%
# On Colab and other fresh machines; skipped where jaxserve is there already.
import importlib.util

if importlib.util.find_spec("jaxserve") is None:
    # %pip install --quiet jaxserve optax matplotlib
    print("Installed. If an import below fails, restart the kernel.")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxserve import LLM, SamplingParams
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama

print("JAX", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## A module of your own
#
# Any module of `jaxserve.models` will do, whatever its weights come from. Here it is a Llama with
# three small layers and a vocabulary of thirteen characters, enough for sums such as `7+8=15.`.

# %%
CHARACTERS = "0123456789+=."
config = ModelConfig(
    model_type="llama",
    vocab_size=len(CHARACTERS),
    hidden_size=64,
    intermediate_size=192,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position=32,
    tie_word_embeddings=True,
    eos_token_ids=(CHARACTERS.index("."),),
)
model = Llama(config, rngs=nnx.Rngs(0))


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids)


sums = [(a, b) for a in range(10) for b in range(10)]
prompts = [encode(f"{a}+{b}=") for a, b in sums]
answers = [f"{a + b:02d}." for a, b in sums]
settings = {"max_num_seqs": 100, "max_num_batched_tokens": 512}
llm = LLM(model, **settings)

# %% [markdown]
# The engine does not copy: what it serves are the buffers of the module.

# %%
ours, theirs = jax.tree.leaves(nnx.state(model)), jax.tree.leaves(llm.params)
same = [a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(ours, theirs)]
assert all(same)
print(f"{len(same)} arrays, {sum(a.size for a in ours):,} parameters, all of them shared")

# %% [markdown]
# ## Training
#
# `llm.logprobs(params, tokens)` is a pure function, so it is all that a loss needs. The teacher is
# unreliable on purpose: only six of ten of its answers are right.

# %%
NUM_STEPS, BATCH = 250, 128
random = np.random.default_rng(0)


def lessons() -> jax.Array:
    """Return `[BATCH, 7]` tokens of sums, four in ten with a random answer."""
    a, b = random.integers(0, 10, (2, BATCH))
    said = np.where(random.random(BATCH) < 0.6, a + b, random.integers(0, 19, BATCH))
    return jnp.array([encode(f"{x}+{y}={z:02d}.") for x, y, z in zip(a, b, said)])


teacher = optax.adamw(optax.cosine_decay_schedule(6e-3, NUM_STEPS))


@jax.jit
def learn(params, state, tokens):
    def loss(params):
        return -llm.logprobs(params, tokens)[:, 4:].mean()  # the answer, not the question

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = teacher.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


params, state, losses = llm.params, teacher.init(llm.params), []
for _ in range(NUM_STEPS):
    params, state, value = learn(params, state, lessons())
    losses.append(float(value))

plt.figure(figsize=(6, 3))
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("loss (nats per token)")
plt.title("learning sums from an unreliable teacher")
plt.show()
assert np.mean(losses[-20:]) < 0.5 * losses[0]

# %% [markdown]
# ## Tokens out
#
# `update_params` hands the trained weights to the running engine: between two steps, without a copy
# and without compiling anything. The engine takes all hundred prompts in one batch.

# %%
llm.update_params(params, version="taught")
assert jax.tree.leaves(llm.params)[0] is jax.tree.leaves(params)[0]
nnx.update(model, params)  # the module, too


def accuracy(outputs) -> float:
    right = [
        decode(completion.token_ids) == answer
        for output, answer in zip(outputs, answers)
        for completion in output.outputs
    ]
    return float(np.mean(right))


greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
sampling = SamplingParams(temperature=1.0, max_tokens=3, n=16, logprobs=0)
sampled = llm.generate(prompts, sampling, use_tqdm=False)
print(f"greedy: {accuracy(greedy):.0%} right; sampled: {accuracy(sampled):.0%} right")
for output in greedy[37:80:14]:
    print(decode(output.prompt_token_ids) + decode(output.outputs[0].token_ids))
assert accuracy(greedy) > accuracy(sampled) > 0.2

# %% [markdown]
# ## Log-probabilities that agree
#
# The engine decoded token by token, in batches, from a paged cache. `llm.logprobs` reads each whole
# sequence at once, without a cache. A policy gradient is only right if both give the same numbers.

# %%


def rows_of(outputs):
    """Return tokens `[n, 7]`, which of them were generated, and the engine's log-probabilities."""
    tokens, mask, scores = [], [], []
    for output in outputs:
        for completion in output.outputs:
            ids = completion.token_ids
            pad = [0] * (3 - len(ids))
            tokens.append([*output.prompt_token_ids, *ids, *pad])
            mask.append([False] * 4 + [True] * len(ids) + [False] * len(pad))
            found = [entry[i].logprob for entry, i in zip(completion.logprobs, ids)]
            scores.append([0.0] * 4 + found + [0.0] * len(pad))
    return jnp.array(tokens), jnp.array(mask), np.array(scores)


tokens, mask, from_engine = rows_of(sampled)
from_model = np.asarray(llm.logprobs(llm.params, tokens, mask))
worst = np.abs(from_engine - from_model).max()

plt.figure(figsize=(4, 4))
plt.scatter(from_model[mask], from_engine[mask], s=6)
plt.plot([from_model.min(), 0], [from_model.min(), 0], linewidth=0.8, color="gray")
plt.xlabel("llm.logprobs")
plt.ylabel("reported by the engine")
plt.title(f"{int(mask.sum())} sampled tokens, largest difference {worst:.1e}")
plt.show()
assert worst < 1e-4

# %% [markdown]
# ## Hidden states out
#
# `llm.forward` returns the state after each layer. Reading every one of them with the last norm and
# the output projection (a "logit lens") shows where in the network the answer appears.

# %%
names = ["embed_tokens", *(f"layers.{i}" for i in range(config.num_layers))]
question = jnp.array([encode("7+8=15.")])
output = llm.forward(question, return_hidden=names)
lens = jnp.stack(
    [jax.nn.softmax(model.logits(model.norm(output.hidden[name])))[0] for name in names]
)
# Position 3 (the equals sign) predicts the first digit, position 4 the second.
shown = [lens[:, 3, encode("1")[0]], lens[:, 4, encode("5")[0]], lens[:, 5, encode(".")[0]]]

plt.figure(figsize=(5, 3))
plt.imshow(jnp.stack(shown), vmin=0, vmax=1, aspect="auto", cmap="viridis")
plt.xticks(range(len(names)), names)
plt.yticks(range(3), ["7+8= → 1", "7+8=1 → 5", "7+8=15 → ."])
plt.colorbar(label="probability")
plt.title("where the answer appears")
plt.show()
np.testing.assert_allclose(lens[-1], jax.nn.softmax(output.logits)[0], atol=1e-5)

# %% [markdown]
# ## A gradient out
#
# How much does each character of `7+8=` matter for the answer `15.`? Add a small change to the
# embeddings through a hook, and differentiate the log-probability with respect to it.

# %%


@jax.jit
def answer_logprob(change):
    output = llm.forward(question, hooks={"embed_tokens": lambda state: state + change})
    scores = jax.nn.log_softmax(output.logits[0, 3:6])
    return jnp.take_along_axis(scores, question[0, 4:, None], axis=1).sum()


nothing = jnp.zeros((1, 7, config.hidden_size))
slope = jax.grad(answer_logprob)(nothing)

# Against the definition: a small step either way along the gradient.
direction = slope / jnp.linalg.norm(slope)
step = 1e-2
measured = (answer_logprob(step * direction) - answer_logprob(-step * direction)) / (2 * step)
np.testing.assert_allclose(measured, jnp.linalg.norm(slope), rtol=2e-2)
np.testing.assert_allclose(
    answer_logprob(nothing), llm.logprobs(llm.params, question)[0, 4:].sum(), atol=1e-4
)

plt.figure(figsize=(5, 3))
plt.bar(range(6), jnp.linalg.norm(slope[0, :6], axis=-1))
plt.xticks(range(6), "7+8=15")
plt.ylabel("size of the gradient")
plt.title("which characters the answer depends on")
plt.show()

# %% [markdown]
# ## Reinforcement
#
# The model imitates its teacher, mistakes included. Now reward right answers: sample sixteen per
# question with the engine, compare each with the mean of its question, take one step along the
# gradient of `llm.logprobs`, and serve the outcome. Nobody shows the model a right answer any more.

# %%
optimizer = optax.adam(1.5e-3)


@jax.jit
def improve(params, state, tokens, mask, advantage):
    def loss(params):
        return -(llm.logprobs(params, tokens, mask).sum(axis=1) * advantage).mean()

    gradient = jax.grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def rewards_of(outputs) -> np.ndarray:
    """Return `[questions, samples]`: 1 for a right answer."""
    return np.array(
        [
            [float(decode(completion.token_ids) == answer) for completion in output.outputs]
            for output, answer in zip(outputs, answers)
        ]
    )


state = optimizer.init(params)
history, drift = [], []
for round_number in range(10):
    llm.update_params(params, version=f"round {round_number}")
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    rewards = rewards_of(outputs)
    advantage = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
    tokens, mask, from_engine = rows_of(outputs)
    drift.append(np.abs(llm.logprobs(params, tokens, mask) - from_engine).max())
    params, state = improve(params, state, tokens, mask, jnp.array(advantage))
    history.append(rewards.mean())
    print(f"round {round_number}: {history[-1]:.0%} right")

plt.figure(figsize=(5, 3))
plt.plot(history, marker="o")
plt.xlabel("round")
plt.ylabel("right answers among samples")
plt.ylim(0, 1)
plt.title("reinforcement with the engine's own samples")
plt.show()
print(f"from {history[0]:.0%} to {history[-1]:.0%}; on policy within {max(drift):.1e}")
assert history[-1] > history[0] + 0.1
assert max(drift) < 1e-4

# %%
llm.close()
