"""Attention whose keys and values are projected from one small vector per token.

The cache holds that vector and the one rotated key, for all heads together, as a single head of
keys; its values are the same vector, padded with zeros to the width of the keys. What projects it
to each head's keys is applied to the queries instead, and what projects it to values to the output
of attention: `q (c W) = (q W^T) c`, and sums over tokens may be taken before or after `W`.

Source: multi-head latent attention of DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.attention.dense import attend
from jaxserve.cache.buffers import KvLayer
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Linear, Plan, RMSNorm, Rope, project, rotate
from jaxserve.models.lora import LayerLora
from jaxserve.models.parts import LatentConfig


class LatentAttention(nnx.Module):
    """Attention over compressed keys and values."""

    def __init__(
        self, config: ModelConfig, latent: LatentConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Make the projections."""
        heads, hidden, bias = config.num_heads, config.hidden_size, config.qkv_bias

        def linear(in_size: int, out_size: int, *axes: str, use_bias: bool) -> Linear:
            return Linear(
                in_size,
                out_size,
                axes=(axes[0], axes[1]),
                use_bias=use_bias,
                dtype=dtype,
                rngs=rngs,
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, epsilon=latent.norm_eps, axis="latent", dtype=dtype)

        queries, rank = heads * latent.query_dim, latent.query_rank
        # Assigned once each: nnx lets no attribute turn from a plain value into a module.
        self.q_proj = (
            linear(hidden, queries, "hidden", "q_heads", use_bias=False) if rank is None else None
        )
        self.q_a_proj = (
            None if rank is None else linear(hidden, rank, "hidden", "latent", use_bias=bias)
        )
        self.q_a_layernorm = None if rank is None else norm(rank)
        self.q_b_proj = (
            None if rank is None else linear(rank, queries, "latent", "q_heads", use_bias=False)
        )
        self.kv_a_proj_with_mqa = linear(
            hidden, latent.cached_dim, "hidden", "latent", use_bias=bias
        )
        self.kv_a_layernorm = norm(latent.rank)
        self.kv_b_proj = linear(
            latent.rank,
            heads * (latent.plain_dim + latent.value_dim),
            "latent",
            "q_heads",
            use_bias=False,
        )
        self.o_proj = linear(
            heads * latent.value_dim, hidden, "q_heads", "hidden", use_bias=config.o_bias
        )
        self.heads, self.latent = heads, latent
        self.scale = config.attention_scale or latent.query_dim**-0.5

    def __call__(
        self,
        x: Float[Array, "*tokens hidden"],
        rope: Rope | None,
        cache: KvLayer | None,
        plan: Plan,
        lora: LayerLora | None = None,  # noqa: ARG002  adapters are refused for these models
    ) -> tuple[Float[Array, "*tokens hidden"], KvLayer | None]:
        """Attend, through the one door of `attention.dense`."""
        latent, lead = self.latent, x.shape[:-1]
        queries = self._queries(x, plan).reshape(*lead, self.heads, latent.query_dim)
        plain, turning = queries[..., : latent.plain_dim], queries[..., latent.plain_dim :]
        (compressed,) = project(x, (self.kv_a_proj_with_mqa,), plan)
        vector = self.kv_a_layernorm(compressed[..., : latent.rank])[..., None, :]
        key = compressed[..., None, latent.rank :]
        if rope is not None:
            turning, key = self._rotate(turning, rope), self._rotate(key, rope)
        to_keys, to_values = self._projections(x.dtype)
        absorbed = jnp.einsum("...hd,rhd->...hr", plain, to_keys)
        with jax.named_scope("attend"):
            out, cache = attend(
                jnp.concatenate([absorbed, turning], axis=-1),
                jnp.concatenate([vector, key], axis=-1),
                jnp.concatenate([vector, jnp.zeros_like(key)], axis=-1),
                cache,
                plan,
                scale=self.scale,
            )
        values = jnp.einsum("...hr,rhd->...hd", out[..., : latent.rank], to_values)
        return project(values.reshape(*lead, -1), (self.o_proj,), plan)[0], cache

    def _queries(self, x: Array, plan: Plan) -> Array:
        if self.q_proj is not None:
            return project(x, (self.q_proj,), plan)[0]
        if self.q_a_proj is None or self.q_a_layernorm is None or self.q_b_proj is None:
            raise AssertionError("queries are projected in one step or in two")
        (small,) = project(x, (self.q_a_proj,), plan)
        return project(self.q_a_layernorm(small), (self.q_b_proj,), plan)[0]

    def _rotate(self, x: Array, rope: Rope) -> Array:
        if self.latent.is_interleaved:
            # Queries and keys are reordered alike, which changes no product of them.
            x = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return rotate(x, rope)

    def _projections(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return what makes each head's keys and values of the vector, `[rank, heads, dim]`."""
        kernel, scale = self.kv_b_proj.kernel[...], self.kv_b_proj.kernel_scale
        if scale is not None:
            kernel = kernel.astype(jnp.float32) * scale[...]
        by_head = kernel.astype(dtype).reshape(self.latent.rank, self.heads, -1)
        return by_head[..., : self.latent.plain_dim], by_head[..., self.latent.plain_dim :]
