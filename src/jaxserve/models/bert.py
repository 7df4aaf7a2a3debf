"""BERT encoders, with or without a classification head on the first token."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.attention.dense import attend
from jaxserve.attention.metadata import PaddedPlan
from jaxserve.models.bert_config import Activation, BertConfig
from jaxserve.models.layers import Linear, param

_FLOAT32 = jnp.dtype("float32")


def _gelu(x: Array) -> Array:
    # jax.nn.gelu goes through erfc, which takes twice as long on a CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


_ACTIVATE: dict[Activation, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class LayerNorm(nnx.Module):
    """Norm to zero mean and unit variance, computed in float32, with scale and bias."""

    def __init__(self, size: int, *, epsilon: float, dtype: jnp.dtype) -> None:
        """Start as the identity scale."""
        self.scale = param(jnp.ones((size,), dtype), "hidden")
        self.bias = param(jnp.zeros((size,), dtype), "hidden")
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*tokens size"]) -> Float[Array, "*tokens size"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
        return normed * self.scale[...] + self.bias[...]


class Table(nnx.Module):
    """Learnt vectors by number: tokens, positions or segments."""

    def __init__(
        self, count: int, size: int, *, axis: str, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Draw the table from a normal distribution of deviation 0.02."""
        table = jax.random.normal(rngs.params(), (count, size), dtype) * 0.02
        self.embedding = param(table.astype(dtype), axis, "hidden")

    def __call__(self, numbers: Int[Array, "*tokens"]) -> Float[Array, "*tokens size"]:
        """Look numbers up."""
        return jnp.take(self.embedding[...], numbers, axis=0, mode="clip")


class BertLayer(nnx.Module):
    """Attention, add, norm, feed-forward, add, norm."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Make the parts."""
        hidden, inner = config.hidden_size, config.intermediate_size

        def linear(in_size: int, out_size: int, *axes: str) -> Linear:
            return Linear(
                in_size, out_size, axes=(axes[0], axes[1]), use_bias=True, dtype=dtype, rngs=rngs
            )

        def norm() -> LayerNorm:
            return LayerNorm(hidden, epsilon=config.layer_norm_eps, dtype=dtype)

        self.q_proj = linear(hidden, hidden, "hidden", "q_heads")
        self.k_proj = linear(hidden, hidden, "hidden", "kv_heads")
        self.v_proj = linear(hidden, hidden, "hidden", "kv_heads")
        self.o_proj = linear(hidden, hidden, "q_heads", "hidden")
        self.attention_norm = norm()
        self.up_proj = linear(hidden, inner, "hidden", "mlp")
        self.down_proj = linear(inner, hidden, "mlp", "hidden")
        self.norm = norm()
        self.heads, self.dim = config.num_heads, config.head_dim
        self.act: Activation = config.hidden_act

    def __call__(
        self, x: Float[Array, "batch time hidden"], plan: PaddedPlan
    ) -> Float[Array, "batch time hidden"]:
        """Apply the layer."""
        heads = (*x.shape[:-1], self.heads, self.dim)
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        with jax.named_scope("attend"):
            out, _ = attend(q, k, v, None, plan, scale=self.dim**-0.5)
        x = self.attention_norm(x + self.o_proj(out.reshape(x.shape)))
        with jax.named_scope("mlp"):
            inner = _ACTIVATE[self.act](self.up_proj(x))
            return self.norm(x + self.down_proj(inner))


class Bert(nnx.Module):
    """Embeddings of tokens, positions and segments, a norm, and a stack of encoder layers."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype = _FLOAT32, rngs: nnx.Rngs) -> None:
        """Draw random weights; loading replaces them."""
        self.config = config
        size = config.hidden_size
        table = functools.partial(Table, size=size, dtype=dtype, rngs=rngs)
        self.embed_tokens = table(config.vocab_size, axis="vocab")
        self.embed_positions = table(config.max_position, axis="position")
        self.embed_segments = table(config.type_vocab_size, axis="segment")
        self.embed_norm = LayerNorm(size, epsilon=config.layer_norm_eps, dtype=dtype)
        self.layers = nnx.List(
            [BertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        linear = functools.partial(Linear, size, use_bias=True, dtype=dtype, rngs=rngs)
        # Assigned once: nnx lets no attribute turn from a plain value into a module.
        self.pooler: Linear | None = (
            linear(size, axes=("hidden", "hidden")) if config.num_labels else None
        )
        self.classifier: Linear | None = (
            linear(config.num_labels, axes=("hidden", "label")) if config.num_labels else None
        )

    def __call__(
        self,
        token_ids: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"],
        plan: PaddedPlan,
    ) -> Float[Array, "batch time hidden"]:
        """Compute the final hidden states.

        Args:
            token_ids: Texts, padded on the right.
            segment_ids: Which of the texts of a pair each token belongs to.
            plan: How long each text is.

        Returns:
            Hidden states; those of padding are arbitrary but finite.
        """
        with jax.named_scope("embed"):
            positions = jnp.arange(token_ids.shape[1])[None]
            x = self.embed_tokens(token_ids) + self.embed_positions(positions)
            x = self.embed_norm(x + self.embed_segments(segment_ids))
        for layer in self.layers:
            graph, state = nnx.split(layer)
            x = _run_layer(graph, state, x, plan)
        return x

    def classify(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch labels"]:
        """Apply the classification head to the first tokens; float32.

        Raises:
            ValueError: If there is no head.
        """
        if self.pooler is None or self.classifier is None:
            raise ValueError("this encoder has no classification head.")
        pooled = jnp.tanh(self.pooler(hidden[:, 0]))
        return self.classifier(pooled).astype(jnp.float32)


def _apply_layer(
    graph: nnx.GraphDef[BertLayer], state: nnx.State, x: Array, plan: PaddedPlan
) -> Array:
    return nnx.merge(graph, state)(x, plan)


# Traced once for all layers, as in `layers`.
_run_layer = jax.jit(_apply_layer, static_argnums=0)


def abstract_bert(config: BertConfig, *, dtype: jnp.dtype) -> tuple[nnx.GraphDef[Bert], nnx.State]:
    """Describe an encoder without allocating it: its structure, and shapes for weights."""
    return nnx.split(nnx.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0))))
