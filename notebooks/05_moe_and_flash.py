# %% [markdown]
# # Experts on many GPUs, and an all-to-all in stages
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# * **You will see** how unevenly tokens ask for experts, and what that does to the links between
#   servers; the stages of a plan, in a diagram; tokens sent to experts on eight devices and back,
#   in three ways with the same bits; and what copies of busy experts and sending a token once save.
# * **It needs** a CPU. The eight devices are eight threads of it: times here are those of a model
#   of links, and say nothing about a network.
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
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxserve.sharding.eplb import Layout, place
from jaxserve.sharding.flash import CostModel, choose, lower_bound, plan, simulate
from jaxserve.sharding.flash.copies import slot_table
from jaxserve.sharding.flash.errors import RowsError
from jaxserve.sharding.flash.moe import moe_combine, moe_dispatch

SERVERS, GPUS, EXPERTS, TOP_K, TOKENS, HIDDEN = 4, 2, 32, 4, 64, 32
rng = np.random.default_rng(0)

# %% [markdown]
# ## Tokens ask for experts
#
# Each GPU has as many tokens, and an expert is the more popular the smaller its rank: Zipf's law.
# Experts lie in a random order, four on each GPU. Counting tokens by the server that has them and
# the server that they must go to gives the matrix that an all-to-all has to carry.

# %%
popular = rng.permutation(np.arange(1, EXPERTS + 1) ** -0.8)
count = SERVERS * GPUS * TOKENS
scores = np.log(popular) + rng.gumbel(size=(count, EXPERTS))
experts = np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int32)


def rows_between(slots, *, dedup, per_server):
    """Rows of pairs of GPUs' servers: of each token once, or once for each of its experts."""
    home = slots // per_server
    own = np.arange(count) // (GPUS * TOKENS)
    found = np.zeros((SERVERS, SERVERS), np.int64)
    for j in range(SERVERS):
        there = (home == j).any(axis=1) if dedup else (home == j).sum(axis=1)
        np.add.at(found[:, j], own, there)
    return found


loads = np.bincount(experts.reshape(-1), minlength=EXPERTS)
traffic = rows_between(experts, dedup=False, per_server=EXPERTS // SERVERS)
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].bar(np.arange(EXPERTS), loads, color=plt.cm.tab10(np.arange(EXPERTS) // 8))
axes[0].set(xlabel="expert (a colour is a server)", ylabel="tokens that ask for it")
picture = axes[1].imshow(traffic, cmap="viridis")
axes[1].set(xlabel="to server", ylabel="from server", title="rows")
figure.colorbar(picture)
print("busiest expert over the mean:", round(loads.max() / loads.mean(), 2))
assert traffic.sum() == experts.size
assert (traffic.sum(axis=1) == GPUS * TOKENS * TOP_K).all()  # rows are even, columns are not
assert traffic.sum(axis=0).max() > 1.2 * traffic.sum(axis=0).min()

# %% [markdown]
# ## Stages
#
# Where rows *and* columns are skewed, as in this matrix of Zipf's law over pairs of GPUs, a plan
# pays most. In each stage a server sends to one other and receives from one other, so no port is
# shared, and the fullest server is never idle: all stages together take what it alone must send or
# receive, which no schedule beats.

# %%
weights = rng.permutation(np.arange(1, (SERVERS * GPUS) ** 2 + 1) ** -1.0)
pairs = np.rint(weights / weights.sum() * 2**28).astype(np.int64)
pairs = pairs.reshape(SERVERS, GPUS, SERVERS, GPUS)
cost = CostModel(gpus=GPUS, up_rate=448e9, out_rate=12.5e9, incast=0.1)
schedule = plan(pairs, cost)
between = pairs.sum(axis=(1, 3))
np.fill_diagonal(between, 0)
assert (schedule.to_matrix() == between).all()
assert schedule.bottleneck == max(between.sum(axis=0).max(), between.sum(axis=1).max())

colors = plt.cm.tab10(np.arange(SERVERS))
figure, axis = plt.subplots(figsize=(10, 2.6))
start = 0.0
to_ms = 1e3 / (GPUS * cost.out_rate)
for perm, rows in zip(schedule.perms, schedule.rows):
    for server, (target, size) in enumerate(zip(perm, rows)):
        if size:
            axis.barh(server, size * to_ms, left=start, color=colors[target], edgecolor="white")
            if size * to_ms > 0.4:
                axis.text(
                    start + size * to_ms / 2, server, f"to {target}", ha="center", va="center"
                )
    start += rows.max() * to_ms
    axis.axvline(start, color="gray", linewidth=0.6)
axis.axvline(lower_bound(pairs, cost) * 1e3, color="black", linestyle="--", label="lower bound")
axis.set(
    xlabel="milliseconds",
    ylabel="server that sends",
    yticks=range(SERVERS),
    title="stages of a plan",
)
axis.invert_yaxis()
axis.legend(loc="lower right")
# At each time a receiver occurs once: a stage is a permutation.
assert all(len(set(perm)) == SERVERS for perm in schedule.perms)

# %% [markdown]
# The same traffic in other ways, in the model of links: all at once, on the rail of who sends, and
# on balanced rails without an order. Most of the gain is the balance; what the order adds depends
# on what many senders to one port cost. What is chosen is within 3 % of the best.

# %%
names = ("direct", "source_rail", "balanced", "flash")
times = {name: simulate(pairs, cost, name).seconds * 1e3 for name in names}
chosen = choose(pairs, cost)
plt.figure(figsize=(6, 2.5))
plt.barh(list(times), list(times.values()))
plt.axvline(lower_bound(pairs, cost) * 1e3, color="black", linestyle="--")
plt.xlabel("milliseconds")
print("chosen:", chosen.algorithm)
assert times["flash"] < times["direct"] / 1.3
assert chosen.seconds * 1e3 <= 1.03 * min(times.values())

# %% [markdown]
# ## There and back
#
# `moe_dispatch` sends each token once to every server that has one of its experts; inside, each GPU
# takes the rows that its experts are asked for, sorted by expert. `moe_combine` weighs and adds on
# the way: one row per token and server goes home, by the same stages transposed. Here an expert is
# one matrix.

# %%
mesh = Mesh(np.array(jax.devices()).reshape(SERVERS, GPUS), ("server", "gpu"))
over = PartitionSpec(("server", "gpu"))
x = rng.normal(size=(count, HIDDEN)).astype(np.float32)
gates = rng.random((count, TOP_K)).astype(np.float32)
kernels = rng.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN**0.5


@functools.partial(jax.jit, static_argnames=("backend", "dedup", "num_slots", "capacity_factor"))
def layer(x, experts, gates, kernels, placement=None, num_slots=EXPERTS, **options):
    state = moe_dispatch(
        x,
        experts,
        gates,
        mesh=mesh,
        num_experts=EXPERTS,
        num_slots=num_slots,
        placement=placement,
        quantum=16,
        **options,
    )
    product = jax.shard_map(
        lambda rows, sizes, kernels: jax.lax.ragged_dot(rows, kernels, sizes[0]),
        mesh=mesh,
        in_specs=(over, over, over),
        out_specs=over,
    )
    return moe_combine(product(state.rows, state.group_sizes, kernels), state), state


exact = np.einsum("tk,th,tkhd->td", gates, x, kernels[experts], dtype=np.float64, optimize=True)
results = {}
for backend in ("dense", "rotation", "ppermute"):
    results[backend], state = layer(x, experts, gates, kernels, backend=backend)
    error = np.abs(results[backend] - exact).max()
    print(f"{backend:9} largest error {error:.1e}, overflow: {bool(state.overflow)}")
    assert error < 1e-5
same = [np.asarray(found).view(np.uint32) for found in results.values()]
assert all(np.array_equal(bits, same[0]) for bits in same)
assert np.array_equal(
    state.wire_rows, rows_between(experts, dedup=True, per_server=EXPERTS // SERVERS)
)

# %% [markdown]
# ## Once per server, and copies of busy experts
#
# Two remedies, separately and together. Sending a token once to a server lessens what crosses;
# eight spare slots for copies of the busiest experts (EPLB) level what GPUs have to compute, and a
# token goes to a copy on a server that it visits anyway.

# %%
layout = Layout(
    num_experts=EXPERTS, num_devices=SERVERS * GPUS, num_slots=EXPERTS + 8, num_servers=SERVERS
)
placement = place(loads.astype(float), layout)
table = []
for dedup in (False, True):
    for is_placed in (False, True):
        settings = {"num_slots": layout.num_slots} if is_placed else {}
        out, state = layer(
            x,
            experts,
            gates,
            kernels[placement.expert] if is_placed else kernels,
            slot_table(placement) if is_placed else None,
            backend="ppermute",
            dedup=dedup,
            **settings,
        )
        assert np.abs(out - exact).max() < 1e-5
        crossing = np.asarray(state.wire_rows) * (1 - np.eye(SERVERS, dtype=int))
        per_gpu = np.asarray(state.group_sizes).sum(axis=1)
        table.append((dedup, is_placed, crossing.sum(), per_gpu.max() / per_gpu.mean()))
        print(
            f"once per server: {dedup!s:5}  copies: {is_placed!s:5}  rows that cross: "
            f"{crossing.sum():4}  busiest GPU over the mean: {per_gpu.max() / per_gpu.mean():.2f}"
        )
plain, copied, once, both = table
assert once[2] < 0.75 * plain[2]
assert copied[3] < plain[3]
assert both[2] <= once[2]

# %% [markdown]
# ## Too little room
#
# Sizes of arrays are fixed when a program is compiled. With `capacity_factor=None`, as above, there
# is room for the worst case; with less, a flag says whether rows had to be left out, and the caller
# repeats the layer with room for all.

# %%
tight = functools.partial(layer, x, experts, gates, kernels, backend="ppermute")
_, state = tight(capacity_factor=1.0)
assert state.overflow
try:
    state.check()
    raise AssertionError("missing rows must be told")
except RowsError as missing:
    print(missing)
out, state = tight()
assert not state.overflow
assert np.abs(out - exact).max() < 1e-5
