# %% [markdown]
# # A fleet of latency tiers
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** what a router gains by keeping requests of different pace apart, where its
#   servers go when the mix of requests changes, and how many servers a scaler needs over a day.
#   All of it on a virtual clock, with the router and the scaler that a real fleet has.
# * **It needs** a CPU and numba.
# * **It takes** about a minute on two cores, and two more at the first use, for compiling loops.
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
import matplotlib.pyplot as plt
import numpy as np

from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.sim.bounds import fleet_bound
from jaxserve.sim.fleet import FleetRival, FleetSpec, FleetTrace, simulate_fleet

# %% [markdown]
# ## Twenty servers, four paces
#
# Everybody who decodes on a server gets a token in each of its steps, so the most impatient one
# sets the pace for all: steps must be short, and short steps serve few. Below, a tenth of the
# requests wants a token every 20 ms and four tenths are content with one every 100. Times of steps
# are those of a published model of a 7B on an A100.

# %%
TIERS = (0.02, 0.03, 0.05, 0.1)
cost = PUBLISHED_COSTS["7b-a100"]
servers = FleetSpec(servers=20, cost=cost, capacity=352_000)


def requests(arrival, seed=0, mix=(0.1, 0.2, 0.3, 0.4)):
    rng, count = np.random.default_rng(seed), len(arrival)
    prompt = np.clip(rng.lognormal(6.6, 0.8, count), 20, 6000).astype(int)
    output = np.clip(rng.lognormal(5.0, 0.7, count), 2, 1000).astype(int)
    ttft = np.maximum(rng.choice([0.3, 0.5, 1.0], count), 0.05 + prompt * 1.5e-4)
    tpot = rng.choice(TIERS, count, p=mix)
    return FleetTrace(arrival=arrival, prompt=prompt, output=output, ttft=ttft, tpot=tpot)


def poisson(rate, seconds, seed=0):
    gaps = np.random.default_rng([seed, 1]).exponential(size=int(rate * seconds))
    return requests(np.cumsum(gaps) / rate, seed)


sample = poisson(1000, 4)
assert (sample.ttft > sample.prompt * 1.5e-4).all(), "nobody asks for what no server can do"


# %% [markdown]
# Three routers with the same engines behind them. *Least requests* balances load and mixes
# everybody; *static tiers* keeps paces apart, with servers that were shared out beforehand;
# PolyServe gives servers to tiers as they are needed, and packs them, so that the last ones are
# free for others.

# %%
policies = {
    "least requests": FleetRival(name="least_requests", by_deadline=True, sheds=True),
    "static tiers": FleetRival(
        name="static_tiers", by_deadline=True, sheds=True, split=(4, 5, 5, 6)
    ),
    "PolyServe": PolyServeConfig(tiers=TIERS),
}
optimum = fleet_bound(sample, servers, TIERS) / servers.servers
rates = optimum * np.array([0.5, 0.7, 0.85, 1.0, 1.15, 1.3])
kept = {
    name: [
        simulate_fleet(poisson(20 * rate, 40), servers, policy, tiers=TIERS).attainment(
            warm_up_s=10
        )
        for rate in rates
    ]
    for name, policy in policies.items()
}
assert min(shares[0] for shares in kept.values()) > 0.9, "with little to do, all are in time"
assert kept["PolyServe"][3] > kept["least requests"][3], "mixing paces costs"
assert kept["PolyServe"][-1] < kept["PolyServe"][0], "nobody serves more than there is room for"

# %%
plt.figure(figsize=(7, 4))
for name, shares in kept.items():
    plt.plot(rates, shares, marker="o", label=name)
plt.axhline(0.9, color="gray", lw=0.8, ls="--")
plt.axvline(optimum, color="gray", lw=0.8, ls=":")
plt.xlabel("requests per second and server")
plt.ylabel("share that kept its objectives")
plt.legend()
plt.show()

# %% [markdown]
# The dotted line is G*: the rate of a fleet that can be divided at will, with requests as smooth as
# can be, each served at exactly the pace of its tier. Time per token is read as deadlines here, for
# which early first tokens bank time, so that one can be above it.
#
# ## A day
#
# Load goes up and down twice. Servers are started and turned off as the scaler says; each takes 30
# seconds to start. Who has no work is what the packing leaves over at the end of each tier.

# %%
seconds, peak = 400.0, 16 * optimum
arrival = np.cumsum(np.random.default_rng(3).exponential(size=int(peak * seconds)) / peak)
level = (2 - np.cos(4 * np.pi * arrival / seconds)) / 3
day = requests(arrival[np.random.default_rng(4).random(len(arrival)) < level])
config = PolyServeConfig(tiers=TIERS)
report = simulate_fleet(day, servers, config, elastic=True, initial=8)
fixed = simulate_fleet(day, servers, config)
share = report.server_seconds / fixed.server_seconds
print(f"{report.attainment():.1%} kept with {share:.0%} of the server-seconds of twenty servers,")
print(f"which keep {fixed.attainment():.1%}")
assert share < 1
assert report.attainment() > 0.9
assert fixed.attainment() >= report.attainment() - 0.01

# %%
timeline = np.array(report.timeline)
assert timeline[:, 0].max() >= 0.9 * arrival[-1]
shown = [i for i, name in enumerate(report.columns) if name not in ("time", "waiting", "prompts")]
plt.figure(figsize=(7, 3.5))
plt.stackplot(timeline[:, 0], timeline[:, shown].T, labels=[report.columns[i] for i in shown], lw=0)
plt.xlabel("seconds")
plt.ylabel("servers")
plt.legend(fontsize=7, ncols=4)
plt.show()

# %% [markdown]
# **Where next.** The page on the tier router (docs/systems/polyserve.md) says how it decides and
# what it reaches with a hundred servers and a thousand; `jaxserve serve MODEL --replicas 2 --router
# polyserve` puts it before real engines, and 04_slo_scheduling shows promises within one engine.
