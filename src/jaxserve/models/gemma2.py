"""Gemma 2: norms before and after each part, soft caps, every other layer with a window."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.cache.buffers import KvLayer
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM, DecoderLayer, Plan, Rope, make_norm
from jaxserve.models.lora import LayerLora
from jaxserve.models.positions import LayerKind


class Gemma2Layer(DecoderLayer):
    """Norm, attention, norm, add, norm, feed-forward, norm, add.

    The norm that other families call `post_attention_layernorm` stands here, as its name says,
    behind the attention.
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the six parts."""
        super().__init__(config, kind, dtype=dtype, rngs=rngs)
        size = config.hidden_size
        self.pre_feedforward_layernorm = make_norm(config, size, axis="hidden", dtype=dtype)
        self.post_feedforward_layernorm = make_norm(config, size, axis="hidden", dtype=dtype)

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
            x = x + self.post_attention_layernorm(out)
        with jax.named_scope("mlp"):
            out = self.mlp(self.pre_feedforward_layernorm(x), plan, lora)
            return x + self.post_feedforward_layernorm(out), cache


class Gemma2(CausalLM):
    """Gemma 2: norms before and after each part, soft caps, every other layer with a window.

    Scales, caps and windows are said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = Gemma2Layer
