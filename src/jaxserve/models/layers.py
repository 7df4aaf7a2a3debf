"""The few layers that all families share. Weights carry logical axis names in their metadata."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve import cpu_kernels
from jaxserve.attention.dense import attend
from jaxserve.attention.metadata import AttentionPlan, CausalPlan
from jaxserve.cache.buffers import KvLayer
from jaxserve.models import lora as adapters
from jaxserve.models.config import HiddenAct, ModelConfig
from jaxserve.models.lora import LayerLora, StepLora
from jaxserve.models.positions import LayerKind

Plan = AttentionPlan | CausalPlan

Rope = tuple[Array, Array]
"""Cosines and sines of the rotary angles, `[*tokens, pairs]`."""

_FLOAT32 = jnp.dtype("float32")


@runtime_checkable
class TokenModel(Protocol):
    """What the engine asks of every family."""

    config: ModelConfig

    def __call__(
        self,
        token_ids: Int[Array, "*tokens"],
        positions: Int[Array, "*tokens"],
        caches: tuple[KvLayer | None, ...],
        plan: Plan,
    ) -> tuple[Float[Array, "*tokens hidden"], tuple[KvLayer | None, ...]]:
        """Return the final hidden states (normed) and the updated caches."""
        ...

    def logits(
        self, hidden: Float[Array, "*tokens hidden"], plan: Plan | None = None
    ) -> Float[Array, "*tokens vocab"]:
        """Project hidden states onto the vocabulary, in float32."""
        ...


def param(value: Array, *axes: str | None) -> nnx.Param:
    """Wrap a weight, naming its logical axes in the metadata field `axes`."""
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32.

    Its weight is a scale, or with `plus_one` an offset: what the scale differs from one by.
    """

    def __init__(
        self,
        size: int,
        *,
        epsilon: float,
        axis: str,
        dtype: jnp.dtype,
        plus_one: bool = False,
    ) -> None:
        """Start as the identity scale."""
        self.scale = None if plus_one else param(jnp.ones((size,), dtype), axis)
        self.offset = param(jnp.zeros((size,), dtype), axis) if plus_one else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*tokens size"]) -> Float[Array, "*tokens size"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.epsilon)
        if self.offset is not None:
            return (normed * (1.0 + self.offset[...].astype(jnp.float32))).astype(x.dtype)
        scaled = normed.astype(x.dtype)
        return scaled if self.scale is None else scaled * self.scale[...]


def make_norm(config: ModelConfig, size: int, *, axis: str, dtype: jnp.dtype) -> RMSNorm:
    """Make a norm of the kind that a model has."""
    return RMSNorm(
        size,
        epsilon=config.rms_norm_eps,
        axis=axis,
        dtype=dtype,
        plus_one=config.norm_plus_one,
    )


class Linear(nnx.Module):
    """A matrix product with an optional bias; the kernel is `[in, out]`."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        axes: tuple[str, str],
        use_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw the kernel from a normal distribution of variance 1 / in_size."""
        scale = 1 / math.sqrt(in_size)
        kernel = jax.random.normal(rngs.params(), (in_size, out_size), dtype) * scale
        self.kernel = param(kernel.astype(dtype), *axes)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias = param(jnp.zeros((out_size,), dtype), axes[1]) if use_bias else None

    def __call__(self, x: Float[Array, "*tokens in_size"]) -> Float[Array, "*tokens out_size"]:
        """Multiply."""
        if self.kernel_scale is None:
            return self.finish(jnp.matmul(x, self.kernel[...]), x.dtype)
        x, kernel = widened(x, self.kernel[...])
        return self.finish(jnp.matmul(x, kernel, preferred_element_type=jnp.float32), x.dtype)

    def finish(
        self, product: Float[Array, "*tokens out_size"], dtype: jnp.dtype
    ) -> Float[Array, "*tokens out_size"]:
        """Turn the product with the kernel into the layer's result."""
        y = scaled(product, self.kernel_scale).astype(dtype)
        return y if self.bias is None else y + self.bias[...]


def project(
    x: Float[Array, "*tokens in_size"], layers: Sequence[Linear], plan: Plan | None
) -> list[Float[Array, "*tokens out_size"]]:
    """Apply linear layers to one input: together, in one kernel, where the plan allows it."""
    kernels = [layer.kernel[...] for layer in layers]
    if len({kernel.dtype for kernel in kernels}) > 1:  # some are quantised, others not
        return [project(x, (layer,), plan)[0] for layer in layers]
    if not _use_cpu_kernels(x, kernels[0], plan):
        return [layer(x) for layer in layers]
    products = cpu_kernels.multiply(x, kernels)
    return [layer.finish(y, x.dtype) for y, layer in zip(products, layers, strict=True)]


def widened(x: Array, weight: Array) -> tuple[Array, Array]:
    """Prepare a quantised weight, without its scales, for a product with `x`; exact.

    XLA for a CPU would else widen the weights of all layers before it begins with the first, into
    memory as large as the model was before. On a GPU the conversion becomes a part of the product.
    """
    x, weight = lax.optimization_barrier((x, weight))
    return x, weight.astype(x.dtype)


def scaled(product: Float[Array, "*tokens out_size"], scale: nnx.Param | None) -> Array:
    """Apply the scales of a quantised weight to a product with it."""
    return product if scale is None else product * scale[...]


def _use_cpu_kernels(
    x: Array, weight: Array, plan: Plan | None, *, is_transposed: bool = False
) -> bool:
    return (
        isinstance(plan, AttentionPlan)
        and plan.backend == "llvm"
        and cpu_kernels.pays(x.shape[0], weight.dtype.name, is_transposed=is_transposed)
    )


class Embedding(nnx.Module):
    """Token embeddings, also used as the output projection of models that tie the two."""

    def __init__(self, vocab_size: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Draw the table from a normal distribution of deviation 0.02."""
        table = jax.random.normal(rngs.params(), (vocab_size, size), dtype) * 0.02
        self.embedding = param(table.astype(dtype), "vocab", "hidden")
        self.embedding_scale: nnx.Param | None = nnx.data(None)
        self.dtype = dtype

    def __call__(self, token_ids: Int[Array, "*tokens"]) -> Float[Array, "*tokens size"]:
        """Look tokens up."""
        found = jnp.take(self.embedding[...], token_ids, axis=0, mode="clip")
        if self.embedding_scale is None:
            return found
        scale = jnp.take(self.embedding_scale[...], token_ids, mode="clip")
        return (found.astype(jnp.float32) * scale[..., None]).astype(self.dtype)

    def attend(
        self, hidden: Float[Array, "*tokens size"], plan: Plan | None = None
    ) -> Float[Array, "*tokens vocab"]:
        """Score every token of the vocabulary."""
        table, scale = self.embedding[...], self.embedding_scale
        if _use_cpu_kernels(hidden, table, plan, is_transposed=True):
            return scaled(cpu_kernels.multiply_transposed(hidden, table), scale)
        if scale is not None:
            hidden, table = widened(hidden, table)
        scores = jnp.einsum("...m,vm->...v", hidden, table, preferred_element_type=jnp.float32)
        return scaled(scores, scale)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: Mapping[HiddenAct, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": _gelu_tanh,
}


class GatedMlp(nnx.Module):
    """The gated feed-forward: SwiGLU, or with a GELU as its gate."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        inner_size: int | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the three projections."""
        hidden, inner = config.hidden_size, inner_size or config.intermediate_size
        bias = config.mlp_bias
        self.hidden_act: HiddenAct = config.hidden_act

        def linear(in_size: int, out_size: int, *axes: str) -> Linear:
            return Linear(
                in_size, out_size, axes=(axes[0], axes[1]), use_bias=bias, dtype=dtype, rngs=rngs
            )

        self.gate_proj = linear(hidden, inner, "hidden", "mlp")
        self.up_proj = linear(hidden, inner, "hidden", "mlp")
        self.down_proj = linear(inner, hidden, "mlp", "hidden")

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        plan: Plan | None = None,
        lora: LayerLora | None = None,
    ) -> Float[Array, "*tokens hidden"]:
        """Apply the feed-forward."""
        products = project(x, (self.gate_proj, self.up_proj), plan)
        gate, up = adapters.adapt(x, products, lora, adapters.GATE_UP)
        inner = _ACTIVATIONS[self.hidden_act](gate) * up
        down = project(inner, (self.down_proj,), plan)
        return adapters.adapt(inner, down, lora, adapters.DOWN)[0]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; per-head norms where the family has them."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the projections."""
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden = config.hidden_size

        def linear(in_size: int, out_size: int, *axes: str, use_bias: bool) -> Linear:
            return Linear(
                in_size,
                out_size,
                axes=(axes[0], axes[1]),
                use_bias=use_bias,
                dtype=dtype,
                rngs=rngs,
            )

        bias = config.qkv_bias
        self.q_proj = linear(hidden, heads * dim, "hidden", "q_heads", use_bias=bias)
        self.k_proj = linear(hidden, kv_heads * dim, "hidden", "kv_heads", use_bias=bias)
        self.v_proj = linear(hidden, kv_heads * dim, "hidden", "kv_heads", use_bias=bias)
        self.o_proj = linear(heads * dim, hidden, "q_heads", "hidden", use_bias=config.o_bias)

        def norm(heads: int, axis: str) -> RMSNorm | None:
            if not config.qk_norm:
                return None
            if config.qk_norm_per_head:
                return make_norm(config, dim, axis="head_dim", dtype=dtype)
            return make_norm(config, heads * dim, axis=axis, dtype=dtype)

        self.q_norm, self.k_norm = norm(heads, "q_heads"), norm(kv_heads, "kv_heads")
        self.norm_per_head, self.clip = config.qk_norm_per_head, config.qkv_clip
        self.sinks: nnx.Param[Array] | None = nnx.data(None)
        if config.attention_sinks:
            self.sinks = nnx.data(param(jnp.zeros((heads,), dtype), "q_heads"))
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.scale = config.attention_scale or dim**-0.5
        self.window, self.soft_cap = kind.window, config.attention_soft_cap

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        rope: Rope | None,
        cache: KvLayer | None,
        plan: Plan,
        lora: LayerLora | None = None,
    ) -> tuple[Float[Array, "*tokens hidden"], KvLayer | None]:
        """Attend, through the one door of `attention.dense`."""
        lead = x.shape[:-1]
        products = project(x, (self.q_proj, self.k_proj, self.v_proj), plan)
        q, k, v = adapters.adapt(x, products, lora, adapters.QKV)
        if not self.norm_per_head:
            q, k = self._norm(q, k)
        if self.clip is not None:
            q, k, v = (jnp.clip(part, -self.clip, self.clip) for part in (q, k, v))
        q = q.reshape(*lead, self.heads, self.dim)
        k = k.reshape(*lead, self.kv_heads, self.dim)
        v = v.reshape(*lead, self.kv_heads, self.dim)
        if self.norm_per_head:
            q, k = self._norm(q, k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        with jax.named_scope("attend"):
            out, cache = attend(
                q,
                k,
                v,
                cache,
                plan,
                scale=self.scale,
                window=self.window,
                soft_cap=self.soft_cap,
                sinks=None if self.sinks is None else self.sinks[...],
            )
        out = out.reshape(*lead, self.heads * self.dim)
        products = project(out, (self.o_proj,), plan)
        return adapters.adapt(out, products, lora, adapters.OUT)[0], cache

    def _norm(self, q: Array, k: Array) -> tuple[Array, Array]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


@runtime_checkable
class SelfAttention(Protocol):
    """What a layer asks of its attention."""

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        rope: Rope | None,
        cache: KvLayer | None,
        plan: Plan,
        lora: LayerLora | None = None,
    ) -> tuple[Float[Array, "*tokens hidden"], KvLayer | None]:
        """Attend, and return the updated cache."""
        ...


@runtime_checkable
class FeedForward(Protocol):
    """What a layer asks of its feed-forward."""

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        plan: Plan | None = None,
        lora: LayerLora | None = None,
    ) -> Float[Array, "*tokens hidden"]:
        """Apply the feed-forward."""
        ...


class DecoderLayer(nnx.Module):
    """Norm, attention, add, norm, feed-forward, add."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the four parts."""
        size = config.hidden_size
        self.kind = kind
        self.input_layernorm = make_norm(config, size, axis="hidden", dtype=dtype)
        self.self_attn = self.make_attention(config, kind, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make_norm(config, size, axis="hidden", dtype=dtype)
        self.mlp = self.make_mlp(config, kind, dtype=dtype, rngs=rngs)

    def make_attention(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> SelfAttention:
        """Make the attention that the family has."""
        return Attention(config, kind, dtype=dtype, rngs=rngs)

    def make_mlp(
        self,
        config: ModelConfig,
        kind: LayerKind,  # noqa: ARG002  asked by families with experts
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> FeedForward:
        """Make the feed-forward that the family has."""
        return GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        rope: Rope | None,
        cache: KvLayer | None,
        plan: Plan,
        lora: LayerLora | None = None,
    ) -> tuple[Float[Array, "*tokens hidden"], KvLayer | None]:
        """Apply the layer."""
        with jax.named_scope("attention"):
            out, cache = self.self_attn(self.input_layernorm(x), rope, cache, plan, lora)
        x = x + out
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x), plan, lora), cache


class CausalLM(nnx.Module):
    """Embeddings, a stack of decoder layers, a norm and the output projection.

    Most families of this package differ only in what `ModelConfig` says (biases, per-head norms,
    tied output, rotary scaling, windows), so each is this stack under its own name.

    Attributes:
        layer_class: What the layers are made of.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype = _FLOAT32, rngs: nnx.Rngs) -> None:
        """Draw random weights; loading replaces them."""
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [self.layer_class(config, kind, dtype=dtype, rngs=rngs) for kind in config.kinds]
        )
        self.norm = make_norm(config, config.hidden_size, axis="hidden", dtype=dtype)
        # Assigned once: nnx lets no attribute turn from a plain value into a module.
        self.lm_head: Linear | None = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size,
                config.vocab_size,
                axes=("hidden", "vocab"),
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        token_ids: Int[Array, "*tokens"],
        positions: Int[Array, "*tokens"],
        caches: tuple[KvLayer | None, ...],
        plan: Plan,
        hook: Callable[[str, Array], Array] | None = None,
        lora: StepLora | None = None,
    ) -> tuple[Float[Array, "*tokens hidden"], tuple[KvLayer | None, ...]]:
        """Compute the final hidden states.

        Args:
            token_ids: Tokens, packed `[tokens]` with an `AttentionPlan`, `[batch, time]` with a
                `CausalPlan`.
            positions: Position of each token in its sequence.
            caches: One cache per layer; one None per layer with a `CausalPlan`. Donate them.
            plan: What each token sees.
            hook: Called with the name and value of the embeddings (`embed_tokens`), of every
                layer's output (`layers.i`) and of the final states (`norm`); its answer takes the
                value's place. Traced.
            lora: Adapters, and which of them each token uses; None for none.

        Returns:
            Hidden states after the last norm, and the updated caches.
        """
        with jax.named_scope("embed"):
            x = self.embed_tokens(token_ids)
            if self.config.embedding_scale is not None:
                x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        visit = hook or _keep
        x = visit("embed_tokens", x)
        ropes = rope_tables(positions, self.config)
        new_caches: list[KvLayer | None] = []
        loras = [None] * len(caches) if lora is None else lora.by_layer()
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            graph, state = nnx.split(layer)
            rope = ropes.get(layer.kind.rope)
            own = plan.of_layer(index) if isinstance(plan, AttentionPlan) else plan
            x, new_cache = _run_layer(graph, state, x, rope, cache, own, loras[index])
            x = visit(f"layers.{index}", x)
            new_caches.append(new_cache)
        return visit("norm", self.norm(x)), tuple(new_caches)

    def logits(
        self, hidden: Float[Array, "*tokens hidden"], plan: Plan | None = None
    ) -> Float[Array, "*tokens vocab"]:
        """Project hidden states onto the vocabulary, in float32.

        Args:
            hidden: Final hidden states, packed `[tokens]` if a plan is given.
            plan: May allow kernels that are no part of XLA.
        """
        with jax.named_scope("lm_head"):
            if self.lm_head is None:
                scores = self.embed_tokens.attend(hidden, plan)
            else:
                scores = _score(hidden, self.lm_head, plan)
            cap = self.config.final_soft_cap
            return scores if cap is None else cap * jnp.tanh(scores / cap)


def _score(hidden: Array, head: Linear, plan: Plan | None) -> Array:
    kernel, scale = head.kernel[...], head.kernel_scale
    if _use_cpu_kernels(hidden, kernel, plan):
        return scaled(cpu_kernels.multiply(hidden, [kernel])[0], scale)
    if scale is not None:
        hidden, kernel = widened(hidden, kernel)
    return scaled(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), scale)


def _keep(name: str, value: Array) -> Array:  # noqa: ARG001  the form of a hook
    return value


def _apply_layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: Array,
    rope: Rope | None,
    cache: KvLayer | None,
    plan: Plan,
    lora: LayerLora | None,
) -> tuple[Array, KvLayer | None]:
    return nnx.merge(graph, state)(x, rope, cache, plan, lora)


# Layers of one kind have one structure, so jit traces the layer once per kind and every further
# layer is a cache hit: tracing a 30-layer step takes 0.05 s instead of 1 s.
_run_layer = jax.jit(_apply_layer, static_argnums=0)


def rope_tables(positions: Int[Array, "*tokens"], config: ModelConfig) -> dict[str, Rope]:
    """Return cosines and sines of the rotary angles, in float32, for each kind of rotation.

    Positions stay whole numbers until they meet float32 frequencies; bfloat16 angles are wrong
    past a few hundred tokens.
    """
    tables: dict[str, Rope] = {}
    used = {kind.rope for kind in config.kinds}
    for rope in ("global", "local"):
        if rope in used:
            frequency, magnitude = config.rope_frequencies(rope)
            angle = positions.astype(jnp.float32)[..., None] * frequency
            tables[rope] = jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
    # Without the barrier XLA recomputes the tables inside every layer's fusions.
    return lax.optimization_barrier(tables)


def rotate(
    x: Float[Array, "*tokens heads head_dim"], rope: Rope
) -> Float[Array, "*tokens heads head_dim"]:
    """Rotate the two halves of every head (half-split convention).

    Tables for less than a head leave the end of each head as it is.
    """
    cos, sin = rope[0][..., None, :], rope[1][..., None, :]
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    parts = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
    return rotated.astype(x.dtype)
