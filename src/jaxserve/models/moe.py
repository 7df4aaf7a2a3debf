"""Feed-forwards made of experts: a router chooses a few per token, and their results are added.

Tokens are sorted by expert, so that each expert multiplies the run of rows that is its own. Two
ways through the products follow, of which a step takes one:

* blocks, on a CPU: a loop over runs of a few rows of one expert, each with that expert's weights.
  It visits used experts only, and XLA's own grouped product visits all of them there.
* `lax.ragged_dot`, elsewhere and for gradients: one grouped product for all experts.

Padding belongs to no expert, is sorted behind all tokens and costs nothing in blocks. A token's
result depends on the token alone: weights are added in the order of its own experts.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.attention.metadata import AttentionPlan
from jaxserve.cache.buffers import KvLayer
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import (
    DecoderLayer,
    FeedForward,
    GatedMlp,
    Plan,
    Rope,
    param,
    widened,
)
from jaxserve.models.lora import LayerLora
from jaxserve.models.parts import ExpertsConfig
from jaxserve.models.positions import LayerKind
from jaxserve.models.spread import over_devices
from jaxserve.sharding.experts import SlotTable
from jaxserve.sharding.rules import ModelSharding

_LONGEST_BLOCK = 32
"""Rows of a block at most."""
_TINY = 1e-20
"""Added to sums of weights, as the checkpoints' own code does; only zeros notice."""

Choice = tuple[Int[Array, "tokens top_k"], Float[Array, "tokens top_k"]]
"""Experts of each token, and what their results are multiplied with, float32."""


def route(
    logits: Float[Array, "tokens experts"],
    config: ExpertsConfig,
    correction: Float[Array, " experts"] | None = None,
) -> Choice:
    """Choose the experts of every token.

    Args:
        logits: What the router says, float32.
        config: How experts are chosen.
        correction: Added to the scores while experts are chosen, where the model has it.

    Returns:
        Experts, the best first, and their weights. Of equal scores the first expert's counts more.

    Source: `ExpertsConfig` names the papers.
    """
    softmax = functools.partial(jax.nn.softmax, axis=-1)
    scores = (jax.nn.sigmoid if config.scoring == "sigmoid" else softmax)(logits)
    wanted = scores if correction is None else scores + correction
    if config.num_groups > 1:
        grouped = wanted.reshape(*wanted.shape[:-1], config.num_groups, config.group_size)
        count = 2 if config.group_score == "top2" else 1
        of_group = jnp.sum(lax.top_k(grouped, count)[0], axis=-1)
        best = lax.top_k(of_group, config.top_groups)[1]
        is_open = jnp.any(best[..., None] == jnp.arange(config.num_groups), axis=-2)
        wanted = jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(wanted.shape)
    chosen = lax.top_k(wanted, config.top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalize:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + _TINY
    return chosen.astype(jnp.int32), weights * config.scale


class Router(nnx.Module):
    """Scores every expert for every token, in float32."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Draw the kernel from a normal distribution of variance 1 / hidden_size."""
        shape = (config.hidden_size, experts.num_experts)
        kernel = jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(shape[0])
        self.kernel = param(kernel.astype(dtype), "hidden", None)
        self.bias = param(jnp.zeros(shape[1:], dtype), None) if experts.has_bias else None
        # A correction moves in steps that are smaller than bfloat16 can tell apart.
        self.e_score_correction_bias = (
            param(jnp.zeros(shape[1:], jnp.float32), None) if experts.has_correction else None
        )
        self.experts = experts

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Choice:
        """Choose the experts of every token."""
        wide = self.kernel[...].astype(jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), wide, preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        correction = self.e_score_correction_bias
        return route(logits, self.experts, None if correction is None else correction[...])


class ExpertLinear(nnx.Module):
    """One matrix product of every expert; the kernel is `[experts, in, out]`."""

    def __init__(
        self,
        experts: ExpertsConfig,
        sizes: tuple[int, int],
        *,
        axes: tuple[str, str],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw the kernels from a normal distribution of variance 1 / in_size."""
        shape = (experts.num_experts, *sizes)
        kernel = jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(sizes[0])
        self.kernel = param(kernel.astype(dtype), "expert", *axes)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias: nnx.Param | None = nnx.data(None)
        if experts.has_bias:
            self.bias = nnx.data(param(jnp.zeros(shape[::2], dtype), "expert", axes[1]))

    def grouped(
        self,
        rows: Float[Array, "rows in_size"],
        expert: Int[Array, " rows"],
        sizes: Int[Array, " experts"],
    ) -> Float[Array, "rows out_size"]:
        """Multiply rows that are sorted by expert.

        Args:
            rows: The rows.
            expert: Expert of each row; what is behind the last expert's rows is arbitrary.
            sizes: How many rows each expert has.
        """
        x, kernel = rows, self.kernel[...]
        if self.kernel_scale is not None:
            x, kernel = widened(x, kernel)
        y = lax.ragged_dot(x, kernel, sizes, preferred_element_type=jnp.float32)
        return self._finish(y, jnp.minimum(expert, kernel.shape[0] - 1)).astype(rows.dtype)

    def of_one(
        self, rows: Float[Array, "rows in_size"], expert: Int[Array, ""]
    ) -> Float[Array, "rows out_size"]:
        """Multiply rows of one expert."""
        kernel = lax.dynamic_index_in_dim(self.kernel[...], expert, keepdims=False)
        y = jnp.matmul(rows, kernel.astype(rows.dtype), preferred_element_type=jnp.float32)
        return self._finish(y, expert[None]).astype(rows.dtype)

    def _finish(self, y: Array, expert: Int[Array, " rows"]) -> Array:
        if self.kernel_scale is not None:
            y *= self.kernel_scale[...][expert]
        return y if self.bias is None else y + self.bias[...][expert].astype(y.dtype)


class Experts(nnx.Module):
    """Gated feed-forwards, of which every token passes through a few."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the three projections of all experts."""
        hidden, inner = config.hidden_size, experts.inner_size
        make = functools.partial(ExpertLinear, experts, dtype=dtype, rngs=rngs)
        self.gate_proj = make((hidden, inner), axes=("hidden", "mlp"))
        self.up_proj = make((hidden, inner), axes=("hidden", "mlp"))
        self.down_proj = make((inner, hidden), axes=("mlp", "hidden"))
        self.experts = experts

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        choice: Choice,
        *,
        is_real: Bool[Array, " tokens"] | None = None,
        differentiable: bool = False,
        sharding: ModelSharding | None = None,
        table: SlotTable | None = None,
    ) -> Float[Array, "tokens hidden"]:
        """Pass every token through its experts, and add their results up.

        Args:
            x: The tokens.
            choice: Their experts and weights.
            is_real: Which of them are no padding, whose result is zero; None if all are real.
            differentiable: Whether gradients will be asked for, which blocks do not have.
            sharding: How the model lies on several devices; None leaves that to the compiler.
            table: Where experts lie, if that changes; weights are then those of slots.
        """
        if is_real is not None:
            choice = jnp.where(is_real[:, None], choice[0], self.experts.num_experts), choice[1]
        if sharding is not None:
            return over_devices(self, x, choice, sharding, table).astype(x.dtype)
        return self.of_own(x, choice, differentiable=differentiable).astype(x.dtype)

    def of_own(
        self, x: Float[Array, "tokens hidden"], choice: Choice, *, differentiable: bool = False
    ) -> Float[Array, "tokens hidden"]:
        """Add up the results of the experts that are here, in float32.

        Args:
            x: The tokens.
            choice: Their experts and weights; experts that are not here add nothing.
            differentiable: Whether gradients will be asked for.
        """
        expert, weight = choice
        top_k, num_experts = expert.shape[1], self.gate_proj.kernel.shape[0]
        flat = expert.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
        sizes = jnp.zeros((num_experts,), jnp.int32).at[flat].add(1, mode="drop")
        rows, owner = x[order // top_k], flat[order]
        out = self.of_sorted(rows, owner, sizes, differentiable=differentiable)
        parts = out[place].reshape(*expert.shape, -1).astype(jnp.float32)
        # Rows behind the last expert's are arbitrary, as are weights of what is not real.
        is_here = expert < num_experts
        parts = jnp.where(is_here[..., None], parts, 0.0)
        weight = jnp.where(is_here, weight, 0.0)
        return jnp.asarray(sum(parts[:, i] * weight[:, i, None] for i in range(top_k)))

    def of_sorted(
        self,
        rows: Float[Array, "rows hidden"],
        owner: Int[Array, " rows"],
        sizes: Int[Array, " experts"],
        *,
        differentiable: bool = False,
    ) -> Float[Array, "rows hidden"]:
        """Pass rows that are sorted by expert through it, each through one.

        Args:
            rows: The rows; results of those behind the last expert's are arbitrary.
            owner: Expert of each row.
            sizes: How many rows each expert has.
            differentiable: Whether gradients will be asked for.
        """
        if differentiable:
            return self._by_group(rows, owner, sizes)
        return lax.platform_dependent(
            rows, owner, sizes, cpu=self._by_block, default=self._by_group
        )

    def _by_group(self, rows: Array, owner: Array, sizes: Array) -> Array:
        gate = self.gate_proj.grouped(rows, owner, sizes)
        up = self.up_proj.grouped(rows, owner, sizes)
        return self.down_proj.grouped(self._gated(gate, up), owner, sizes)

    def _by_block(self, rows: Array, owner: Array, sizes: Array) -> Array:  # noqa: ARG002  the form of `_by_group`
        return over_blocks(rows, sizes, self._of_one, block=block_rows(len(rows), len(sizes)))

    def _of_one(self, rows: Array, expert: Int[Array, ""]) -> Array:
        gate = self.gate_proj.of_one(rows, expert)
        up = self.up_proj.of_one(rows, expert)
        return self.down_proj.of_one(self._gated(gate, up), expert)

    def _gated(self, gate: Array, up: Array) -> Array:
        limit = self.experts.swiglu_limit
        if limit is None:
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * (gate * jax.nn.sigmoid(gate * self.experts.swiglu_alpha))


def block_rows(rows: int, num_experts: int) -> int:
    """Choose how many rows a block has: about as many as an expert gets.

    Args:
        rows: Tokens times experts per token.
        num_experts: Experts.

    >>> [block_rows(rows, 64) for rows in (8, 64, 512, 4096)]
    [1, 1, 8, 32]
    """
    return min(_LONGEST_BLOCK, 1 << max(0, (rows // num_experts).bit_length() - 1))


def over_blocks(
    rows: Float[Array, "rows in_size"],
    sizes: Int[Array, " experts"],
    apply: Callable[[Array, Int[Array, ""]], Array],
    *,
    block: int,
) -> Float[Array, "rows in_size"]:
    """Apply every expert to its run of rows, a few rows at a time.

    A block at the end of a run also computes what follows in the next run, and is overwritten
    there: blocks come in the order of their rows.

    Args:
        rows: Rows that are sorted by expert.
        sizes: How many rows each expert has; further rows give zeros.
        apply: Takes `block` rows and the expert that they belong to, and returns as many, as wide.
        block: Rows of a block.
    """
    num_blocks = (sizes + block - 1) // block
    last_block, last_row = jnp.cumsum(num_blocks), jnp.cumsum(sizes)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def step(i: Int[Array, ""], out: Array) -> Array:
        expert = jnp.sum(last_block <= i, dtype=jnp.int32)
        before = last_block[expert] - num_blocks[expert]
        start = last_row[expert] - sizes[expert] + (i - before) * block
        made = apply(lax.dynamic_slice_in_dim(padded, start, block), expert)
        return lax.dynamic_update_slice_in_dim(out, made, start, axis=0)

    out = lax.fori_loop(0, last_block[-1], step, jnp.zeros_like(padded))
    is_owned = jnp.arange(len(rows)) < last_row[-1]
    return jnp.where(is_owned[:, None], out[: len(rows)], 0)


class MoeMlp(nnx.Module):
    """A router, its experts, and where the model has them experts that every token shares."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the parts."""
        self.gate = Router(config, experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, experts, dtype=dtype, rngs=rngs)
        self.shared_experts: GatedMlp | None = (
            GatedMlp(config, inner_size=experts.shared_size, dtype=dtype, rngs=rngs)
            if experts.shared_size
            else None
        )

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        plan: Plan | None = None,
        lora: LayerLora | None = None,  # noqa: ARG002  adapters of experts are refused when read
    ) -> Float[Array, "*tokens hidden"]:
        """Apply the feed-forward."""
        return self.counted(x, plan)[0]

    def counted(
        self, x: Float[Array, "*tokens hidden"], plan: Plan | None = None
    ) -> tuple[Float[Array, "*tokens hidden"], UInt[Array, " experts"] | None]:
        """Apply the feed-forward, and count how many tokens asked for each expert.

        Returns:
            The results, and the counts where the plan has them counted.
        """
        flat = x.reshape(-1, x.shape[-1])
        step = plan if isinstance(plan, AttentionPlan) else None
        is_real = None if step is None else step.is_token
        with jax.named_scope("router"):
            choice = self.gate(flat)
        with jax.named_scope("experts"):
            out = self.experts(
                flat,
                choice,
                is_real=is_real,
                differentiable=step is None,
                sharding=None if step is None else step.sharding,
                table=None if step is None else step.slot_table,
            )
        counts: Array | None = None
        if step is not None and step.slot_table is not None:
            number = self.gate.experts.num_experts
            asked = jnp.where(step.is_token[:, None], choice[0], number).reshape(-1)
            counts = jnp.zeros(number, jnp.uint32).at[asked].add(1, mode="drop")
        if self.shared_experts is not None:
            with jax.named_scope("shared_experts"):
                out += self.shared_experts(flat, plan)
        return out.reshape(x.shape), counts


class MoeLayer(DecoderLayer):
    """A layer whose feed-forward may be made of experts.

    Where experts are counted, the counts follow keys and values in what it returns of the cache.
    """

    def make_mlp(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> FeedForward:
        """Make experts, or the plain feed-forward of a layer without."""
        if not kind.has_experts or config.experts is None:
            return GatedMlp(config, dtype=dtype, rngs=rngs)
        return MoeMlp(config, config.experts, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        rope: Rope | None,
        cache: KvLayer | None,
        plan: Plan,
        lora: LayerLora | None = None,
    ) -> tuple[Float[Array, "*tokens hidden"], KvLayer | None]:
        """Apply the layer."""
        mlp = self.mlp
        if not (
            isinstance(mlp, MoeMlp)
            and isinstance(plan, AttentionPlan)
            and plan.slot_table is not None
        ):
            return super().__call__(x, rope, cache, plan, lora)
        with jax.named_scope("attention"):
            out, cache = self.self_attn(self.input_layernorm(x), rope, cache, plan, lora)
        x = x + out
        with jax.named_scope("mlp"):
            made, counts = mlp.counted(self.post_attention_layernorm(x), plan)
        return x + made, (*(cache or ()), *(() if counts is None else (counts,)))
