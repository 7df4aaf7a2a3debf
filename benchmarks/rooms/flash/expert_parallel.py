"""A tiny Qwen3-MoE whose experts are spread over a mesh: its own forward pass, other experts.

Each module of experts is replaced by one that sends tokens to where experts lie and back. All else
of the model is as it is, and computed by each GPU for its own prompts.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.attention.metadata import CausalPlan
from jaxserve.models.config import ModelConfig
from jaxserve.models.moe import Choice, Experts
from jaxserve.models.registry import FAMILIES
from jaxserve.sharding.eplb import Layout, Placement, choose_slots, place
from jaxserve.sharding.flash.copies import SlotTable, slot_table
from jaxserve.sharding.flash.moe import moe_combine, moe_dispatch

EXPERTS: Final = 32
TOP_K: Final = 4
SPARE: Final = 8
"""Further slots, for copies of experts, with EPLB."""
OVER: Final = PartitionSpec(("server", "gpu"))
TINY: Final[dict[str, Any]] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


class SpreadExperts(nnx.Module):
    """Experts that lie on a mesh; called as `Experts` is.

    Args:
        experts: All of them.
        mesh: With axes `server` and `gpu`.
        placement: Where they lie, with copies; None: in their order.
        options: For `moe_dispatch`.
    """

    def __init__(
        self, experts: Experts, mesh: Mesh, placement: Placement | None, options: dict[str, Any]
    ) -> None:
        """Take the kernels in the order of slots."""
        self.experts = experts
        self._mesh, self._options = mesh, tuple(sorted(options.items()))
        self._slots = EXPERTS
        self.table: nnx.Dict | None = nnx.data(None)
        if placement is not None:
            self._slots = placement.layout.num_slots
            for part in (experts.gate_proj, experts.up_proj, experts.down_proj):
                part.kernel = nnx.Param(part.kernel[...][placement.expert])
            table = slot_table(placement)
            self.table = nnx.Dict(
                slots=nnx.Variable(table.slots), copies=nnx.Variable(table.copies)
            )

    def __call__(
        self,
        x: jax.Array,
        choice: Choice,
        *,
        is_real: jax.Array | None = None,
        **_: object,
    ) -> jax.Array:
        """Send tokens to their experts, and add up what comes back."""
        expert, weight = choice
        if is_real is not None:
            expert = jnp.where(is_real[:, None], expert, -1)
        over = NamedSharding(self._mesh, OVER)
        x, expert, weight = (lax.with_sharding_constraint(a, over) for a in (x, expert, weight))
        state = moe_dispatch(
            x,
            expert,
            weight,
            mesh=self._mesh,
            num_experts=EXPERTS,
            num_slots=self._slots,
            placement=None
            if self.table is None
            else SlotTable(self.table["slots"][...], self.table["copies"][...]),
            **dict(self._options),
        )
        graph, kernels = nnx.split(self.experts)

        def apply(kernels: nnx.State, rows: jax.Array, sizes: jax.Array) -> jax.Array:
            ends = jnp.cumsum(sizes[0])
            owner = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
            return nnx.merge(graph, kernels).of_sorted(rows, owner.astype(jnp.int32), sizes[0])

        y = jax.shard_map(
            apply, mesh=self._mesh, in_specs=(OVER, OVER, OVER), out_specs=OVER, check_vma=False
        )(kernels, state.rows, state.group_sizes)
        return moe_combine(y, state)


class _Recorder(nnx.Module):
    """Experts that tell which were chosen."""

    def __init__(self, experts: Experts, found: list[np.ndarray]) -> None:
        self.experts = experts
        self._tell = found.append

    def __call__(self, x: jax.Array, choice: Choice, **settings: Any) -> jax.Array:  # noqa: ANN401
        jax.debug.callback(lambda chosen: self._tell(np.asarray(chosen)), choice[0], ordered=True)
        return self.experts(x, choice, **settings)


def build() -> nnx.Module:
    """Return the model, the same each time."""
    config = ModelConfig.from_hf(TINY)
    return FAMILIES[config.model_type](config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def prompts(gpus: int, sequences: int, length: int, skew: float, seed: int) -> np.ndarray:
    """Return token ids, `[gpus * sequences, length]`: each GPU has its own favourite tokens.

    Tokens follow Zipf's law with exponent `skew`; 0 is even. With few different tokens a few
    experts get most of the work.
    """
    rng = np.random.default_rng(seed)
    vocab = TINY["vocab_size"]
    weights = np.arange(1, vocab + 1, dtype=np.float64) ** -skew
    common = rng.permutation(vocab)
    rows: list[np.ndarray] = []
    for _ in range(gpus):
        own = np.concatenate([common[:4], rng.permutation(common[4:])])
        rows.append(rng.choice(own, (sequences, length), p=weights / weights.sum()))
    return np.concatenate(rows).astype(np.int32)


def forward(graph: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> jax.Array:
    """Return the hidden states of whole prompts."""
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model(ids, positions, (None,) * len(model.layers), CausalPlan())[0]


def choices(ids: np.ndarray) -> list[np.ndarray]:
    """Return the experts that each layer chooses, `[tokens, top_k]`, by the model as it is."""
    model, found = build(), []
    for layer in model.layers:
        layer.mlp.experts = _Recorder(layer.mlp.experts, found)
    graph, state = nnx.split(model)
    jax.block_until_ready(jax.jit(forward, static_argnums=0)(graph, state, jnp.asarray(ids)))
    jax.effects_barrier()
    return found


def placements(chosen: Sequence[np.ndarray], servers: int, gpus: int) -> list[Placement]:
    """Return where EPLB has the experts of each layer lie."""
    layout = Layout(
        num_experts=EXPERTS, num_devices=servers * gpus, num_slots=EXPERTS + SPARE,
        num_servers=servers,
    )  # fmt: skip
    return [
        place(np.bincount(one.reshape(-1), minlength=EXPERTS).astype(float), layout)
        for one in chosen
    ]


def wire_rows(chosen: np.ndarray, servers: int, *, dedup: bool, placed: Placement | None) -> int:
    """Return the rows of a layer that cross between servers, one way.

    Args:
        chosen: `[tokens, top_k]`: experts of tokens, those of each server side by side.
        servers: Servers.
        dedup: Whether a token goes once to a server.
        placed: Where experts lie; None: in their order.
    """
    if placed is None:
        home = chosen // (EXPERTS // servers)
    else:
        home = placed.server_of(choose_slots(placed, chosen, np.arange(len(chosen))))
    own = np.arange(len(chosen)) // (len(chosen) // servers)
    there = (home[:, :, None] == np.arange(servers)) & (own[:, None, None] != np.arange(servers))
    return int((there.any(axis=1) if dedup else there).sum())


def spread(
    mesh: Mesh, placed: Sequence[Placement] | None, options: dict[str, Any]
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the model with experts spread over a mesh, and all else on each of its devices."""
    model = build()
    for index, layer in enumerate(model.layers):
        placement = None if placed is None else placed[index]
        layer.mlp.experts = SpreadExperts(layer.mlp.experts, mesh, placement, options)
    graph, state = nnx.split(model)

    def put(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
        host = np.asarray(value)
        spec = OVER if "experts" in names and "table" not in names else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return graph, jax.tree_util.tree_map_with_path(put, state)
