"""DeepSeek-V2: compressed keys and values, experts in groups, and shared ones."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.latent_attention import LatentAttention
from jaxserve.models.layers import CausalLM, DecoderLayer, SelfAttention
from jaxserve.models.moe import MoeLayer
from jaxserve.models.positions import LayerKind


class DeepseekLayer(MoeLayer):
    """A layer with latent attention; the first few have no experts."""

    def make_attention(
        self, config: ModelConfig, kind: LayerKind, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> SelfAttention:
        """Make latent attention."""
        if config.latent is None:
            return super().make_attention(config, kind, dtype=dtype, rngs=rngs)
        return LatentAttention(config, config.latent, dtype=dtype, rngs=rngs)


class DeepseekV2(CausalLM):
    """DeepSeek-V2: compressed keys and values, experts in groups, and shared ones.

    Which experts it has and how they are chosen is said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DeepseekLayer
