# %% [markdown]
# # First tokens
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** a real model that completes, chats and streams; how sure it was of each token;
#   tokens per second by batch size; what the prefix cache saves.
# * **It needs** a CPU (speeds on a GPU differ); 98 MB are downloaded once.
# * **It takes** about one minute on two cores, and two more at the first time, to compile.
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
import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxserve import LLM, SamplingParams

print("JAX", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## Load and complete
#
# The name stands for SmolLM2-135M-Instruct, a model that is small enough for any machine. It is
# fetched at the first use. A context of 1024 tokens keeps the cache small, and steps of at most 128
# tokens keep down how many step shapes are compiled.

# %%
llm = LLM("smollm2-135m-instruct", max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=128)
greedy = SamplingParams(temperature=0, max_tokens=12)
(output,) = llm.generate("The capital of France is", greedy, use_tqdm=False)
print(output.prompt + output.outputs[0].text)
assert "Paris" in output.outputs[0].text

# %% [markdown]
# ## Chat
#
# `chat` applies the model's own template, as the server does.

# %%
messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What do bees make?"},
]
(reply,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
print(reply.outputs[0].text)
assert "honey" in reply.outputs[0].text.lower()

# %% [markdown]
# ## Stream
#
# A plain iterator: it works in a notebook, where an event loop runs already. Leaving the loop early
# ends the request.

# %%
pieces = []
for event in llm.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=40)):
    pieces.append(event.text)
    print(event.text, end="", flush=True)
(whole,) = llm.generate(
    "Once upon a time", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False
)
assert "".join(pieces) == whole.outputs[0].text

# %% [markdown]
# ## Many at once
#
# Prompts are batched by the engine. A request with a seed draws the same tokens whoever else is in
# the batch.

# %%
starts = ["The sea is", "My cat is", "On Mondays I", "The best soup has"]
warm = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=16)
together = llm.generate(starts, warm, use_tqdm=False)
for output in together:
    print(repr(output.prompt), "→", repr(output.outputs[0].text))

several = llm.generate("The sea is", warm.replace(n=3), use_tqdm=False)[0]
assert len({completion.text for completion in several.outputs}) > 1

# %% [markdown]
# ## How sure was it?
#
# With `logprobs=5` each token comes with its log-probability and the five most likely candidates.

# %%
(output,) = llm.generate(
    "Roses are red, violets are", greedy.replace(logprobs=5, max_tokens=10), use_tqdm=False
)
completion = output.outputs[0]
chosen = [entry[i] for entry, i in zip(completion.logprobs, completion.token_ids, strict=True)]
runners_up = [
    max((c for c in entry.values() if c.rank != 1), key=lambda c: c.logprob)
    for entry in completion.logprobs
]
position = np.arange(len(chosen))
plt.figure(figsize=(8, 3))
plt.bar(position - 0.2, np.exp([c.logprob for c in chosen]), 0.4, label="chosen")
plt.bar(position + 0.2, np.exp([c.logprob for c in runners_up]), 0.4, label="second")
plt.xticks(position, [repr(c.decoded_token) for c in chosen], rotation=45)
plt.ylabel("probability")
plt.ylim(0, 1)
plt.legend()
plt.title(output.prompt + " ...")
plt.show()

for entry in completion.logprobs[:3]:
    print([(c.decoded_token, round(float(np.exp(c.logprob)), 3)) for c in entry.values()])
assert all(c.rank == 1 for c in chosen)  # greedy takes the most likely token
assert abs(completion.cumulative_logprob - sum(c.logprob for c in chosen)) < 1e-4

# %% [markdown]
# ## Tokens per second
#
# A step costs nearly the same for one sequence as for several, so tokens per second grow with the
# batch. Each size runs once to compile what it needs; of two more runs the better one counts. The
# prompts differ, so that the prefix cache does not help.

# %%
NUM_TOKENS = 24
sizes = [1, 2, 4, 8]
timed = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def decode_rate(size: int, attempt: int) -> float:
    """Return tokens after the first ones per second."""
    batch = [[100 * attempt + 10 * size + i, *range(200, 216)] for i in range(size)]
    outputs = llm.generate(batch, timed, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == NUM_TOKENS for output in outputs)
    start = min(output.metrics.first_token_time for output in outputs)
    end = max(output.metrics.last_token_time for output in outputs)
    return size * (NUM_TOKENS - 1) / (end - start)


rates = []
for size in sizes:
    decode_rate(size, 0)
    rates.append(max(decode_rate(size, attempt) for attempt in (1, 2)))
    print(f"{size} at once: {rates[-1]:.0f} tokens per second")

plt.figure(figsize=(5, 3))
plt.plot(sizes, rates, marker="o")
plt.xscale("log", base=2)
plt.xticks(sizes, sizes)
plt.xlabel("sequences at once")
plt.ylabel("tokens per second")
plt.ylim(bottom=0)
plt.title(f"decoding on {jax.default_backend()}")
plt.show()
assert rates[-1] > rates[0]

# %% [markdown]
# ## What the prefix cache saves
#
# Prompts that begin alike share pages of the key-value cache. The second question about the same
# long text computes only what is new, and gives the same answer as without the cache.

# %%
text = " ".join(
    f"Shelf {i} holds {i * 7 % 10} red books and {i * 3 % 10} blue ones." for i in range(40)
)
asked = SamplingParams(temperature=0, max_tokens=8)


def time_to_first_token(prompt: str):
    (output,) = llm.generate(prompt, asked, use_tqdm=False)
    times = output.metrics
    return output, times.first_token_time - times.arrival_time


def with_and_without(first: str, second: str):
    llm.reset_prefix_cache()
    time_to_first_token(first)
    found = time_to_first_token(second)
    llm.reset_prefix_cache()
    return found, time_to_first_token(second)


first, second = f"{text}\nThe first shelf", f"{text}\nThe last shelf"
with_and_without(first, second)  # compiles what it needs
(found, after), (computed, before) = with_and_without(first, second)

total = len(found.prompt_token_ids)
print(f"{found.num_cached_tokens} of {total} prompt tokens came from the cache")
assert computed.num_cached_tokens == 0
assert found.num_cached_tokens > 0.9 * total
assert found.outputs[0].token_ids == computed.outputs[0].token_ids

plt.figure(figsize=(5, 2))
plt.barh(["without", "with"], [before * 1e3, after * 1e3])
plt.xlabel("milliseconds to the first token")
plt.title(f"prefix cache, prompt of {total} tokens")
plt.show()
assert after < before

# %%
llm.close()
