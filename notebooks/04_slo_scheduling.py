# %% [markdown]
# # Promises about latency
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** what becomes of latency objectives when more requests come than a server can
#   take: without promises nearly everybody is late, with them those who were promised are not, and
#   the others know at once. First on a simulated A100, then on a real engine on this machine.
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
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import attainment
from jaxserve.sim.workload import gamma_arrivals, interleave, lognormal_shapes

# %% [markdown]
# ## A server that takes everybody
#
# Half of the requests are chats, which want a token every 60 ms; the others send long documents and
# are content with one every 150 ms. First tokens are due after five times what an idle server would
# take. Times of steps are those of a published model of a 7B on an A100.

# %%
cost = PUBLISHED_COSTS["7b-a100"]
kinds = [
    lognormal_shapes(400, prompt=prompt, output=output, ttft_slowdown=5, tpot_s=tpot_s, name=name)
    for name, prompt, output, tpot_s in (
        ("chat", (500, 0.9), (120, 0.8), 0.06),
        ("document", (3000, 0.5), (200, 0.6), 0.15),
    )
]
workload = interleave("mixed", gamma_arrivals(800), *kinds)
settings = PolicySettings(pace="tpot")


def run(policy, rate, count=250):
    replica = Replica(ReplicaSpec(num_pages=30_000), make_policy(policy, cost, settings), cost)
    return simulate(workload.offer(rate, count, cost, max_output=2048), [replica])


RATES = (2, 3, 4, 5, 6, 8, 10)
LABELS = {"fcfs": "in order of arrival", "edf": "earliest deadline first", "slo": "token planner"}
done = {(policy, rate): run(policy, rate) for policy in LABELS for rate in RATES}
kept = {each: attainment(results, "tpot") for each, results in done.items()}
assert min(kept[policy, 2] for policy in LABELS) > 0.9, "with little to do, everybody is in time"
assert kept["slo", 5] > kept["fcfs", 5] + 0.1

# %%
plt.figure(figsize=(7, 4))
for policy, label in LABELS.items():
    shares = [kept[policy, rate] for rate in RATES]
    plt.plot(RATES, shares, marker="o", label=label)
plt.axhline(0.9, color="gray", lw=0.8, ls="--")
plt.xlabel("requests per second")
plt.ylabel("share that kept its objectives")
plt.ylim(0, 1.03)
plt.legend()
plt.show()

# %% [markdown]
# Deadlines alone do not help: once there is too much to do, whoever is most urgent is late already,
# and makes the next one late as well. The planner serves those that it has promised; the others get
# what is left over, or may be refused.
#
# The same target per token can be read in three ways, and it matters which is meant:

# %%
READINGS = {"tpot": "as deadlines", "tpot_mean": "the mean gap", "tpot_gap": "every gap"}
rate = 5
width = 0.25
plt.figure(figsize=(7, 3.5))
for offset, (policy, label) in enumerate(LABELS.items()):
    shares = [attainment(done[policy, rate], reading) for reading in READINGS]
    plt.bar(np.arange(3) + width * (offset - 1), shares, width, label=label)
    assert shares[0] >= shares[2], "who keeps every gap keeps every deadline"
plt.xticks(np.arange(3), list(READINGS.values()))
plt.ylabel(f"kept at {rate} requests/s")
plt.legend()
plt.show()

# %% [markdown]
# ## A real engine
#
# With `scheduling_policy="slo"` an engine plans the same way. It measures its own steps before it
# starts, so that it knows what it can promise. Twelve requests come at once, for two rows: half of
# them would rather be refused than late.

# %%
llm = LLM(
    "smollm2-135m-instruct",
    scheduling_policy="slo",
    max_num_seqs=2,
    max_model_len=512,
    max_num_batched_tokens=128,
)
PROMPTS = [f"Write one sentence about the number {number}." for number in range(12)]
FAST = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
alone = llm.generate(PROMPTS[0], FAST)[0].metrics
alone_ms = 1000 * (alone.first_token_time - alone.arrival_time)
print(f"alone: first token after {alone_ms:.0f} ms")

# %%
objectives = [
    {
        "ttft_ms": 10 * alone_ms,
        "tpot_ms": 1000,
        "tier": "strict" if number % 2 else "patient",
        "on_decline": "reject" if number % 2 else "best_effort",
    }
    for number in range(len(PROMPTS))
]
outputs = llm.generate(PROMPTS, FAST, slo=objectives)
fates = Counter()
for output, objective in zip(outputs, objectives, strict=True):
    if output.rejection is not None:
        fate = "declined at once"
    elif output.slo.ttft:
        fate = "first token in time"
    else:
        fate = "served late"
    fates[objective["tier"], fate] += 1
for (tier, fate), count in sorted(fates.items()):
    print(f"{tier:8} {fate:20} {count}")
assert fates.total() == len(PROMPTS)
assert fates["patient", "declined at once"] == 0

# %% [markdown]
# What was declined says why:

# %%
print(next((output.rejection.detail for output in outputs if output.rejection), "none was"))

# %% [markdown]
# An objective that not even an idle engine could keep is refused with the figure of an idle one:

# %%
said = ""
try:
    llm.generate(PROMPTS[0], FAST, slo={"ttft_ms": 0.01})
except ValueError as error:
    said = str(error)
print(said)
assert "an idle server needs" in said

# %%
llm.close()

# %% [markdown]
# **Where next.** The page on the token planner (docs/systems/slos_serve.md) says how it decides,
# and that on the tier router (docs/systems/polyserve.md) how a fleet keeps tiers apart. Over HTTP
# the field is `slo`, refusals have status 503, and `--decision-log` keeps every decision for
# `jaxserve sim replay`.
