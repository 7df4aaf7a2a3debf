"""The shape of a model: `ModelConfig`.

One record describes every supported family; the families differ in which biases, norms, windows
and scales exist.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.parts import ExpertsConfig, LatentConfig
from jaxserve.models.positions import LayerKind, RopeScaling, rope_frequencies

HiddenAct = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the mathematics of a model; hashable, so it can be a static argument.

    Attributes:
        model_type: Family, as `models.registry` knows it.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of one head; even.
        rms_norm_eps: Added to the mean square in every norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How these are stretched; None leaves them as they are.
        max_position: Most tokens of context that the checkpoint claims to handle.
        tie_word_embeddings: Whether the embedding is also the output projection.
        qkv_bias: Whether query, key and value projections have biases.
        o_bias: Whether the attention output projection has one.
        mlp_bias: Whether the three MLP projections have them.
        qk_norm: Whether queries and keys are normed before rotation.
        qk_norm_per_head: Whether that is done head by head, not over all heads together.
        qkv_clip: Bound of queries, keys and values before rotation; None has none.
        attention_sinks: Whether every head has a learnt score that takes a share of the attention
            and gives no value.
        hidden_act: Activation of the MLP gate.
        layer_kinds: What each layer makes of positions, and which layers have experts; empty if
            all see the whole context, rotate alike and have none.
        local_rope_theta: Base of the rotary frequencies of layers whose kind says "local".
        rotary_dim: How many numbers of each head are rotated, from the first; None is all.
        attention_scale: Multiplies the products of queries and keys; None is head_dim ** -0.5.
        attention_soft_cap: Bound of attention scores; None has none.
        final_soft_cap: Bound of the logits; None has none.
        embedding_scale: Multiplies the embeddings, rounded to the precision of the weights.
        norm_plus_one: Whether norms multiply by one plus their weight, before they round.
        experts: The feed-forward of layers that have experts.
        latent: How keys and values are compressed; `num_kv_heads` is 1 then, and `head_dim` the
            width of what is cached.
        eos_token_ids: Tokens that end a completion.
        bos_token_id: Token that begins a text, if there is one.
        torch_dtype: Name of the checkpoint's own precision, if it says.

    Raises:
        ConfigError: If the numbers cannot belong together.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    qkv_clip: float | None = None
    attention_sinks: bool = False
    hidden_act: HiddenAct = "silu"
    layer_kinds: tuple[LayerKind, ...] = ()
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float | None = None
    norm_plus_one: bool = False
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    torch_dtype: str | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit together."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}."
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ConfigError(
                f"layer_kinds must name each of the {self.num_layers} layers, got "
                f"{len(self.layer_kinds)}."
            )
        self._check_numbers()
        self._check_parts()
        self._check_rope()

    def _check_numbers(self) -> None:
        for name in (
            "rms_norm_eps",
            "rope_theta",
            "local_rope_theta",
            "attention_scale",
            "attention_soft_cap",
            "final_soft_cap",
            "embedding_scale",
            "qkv_clip",
        ):
            value = getattr(self, name)
            if value is not None and (not value > 0 or not math.isfinite(value)):
                raise ConfigError(f"{name} must be positive, got {value}.")

    def _check_parts(self) -> None:
        if any(kind.has_experts for kind in self.layer_kinds) and self.experts is None:
            raise ConfigError("layer_kinds names layers with experts, got no experts.")
        latent = self.latent
        if latent is None:
            return
        found = self.num_kv_heads, self.head_dim, self.rotary_dim
        if found != (1, latent.cached_dim, latent.rotary_dim):
            raise ConfigError(
                "num_kv_heads, head_dim and rotary_dim of latent attention must be (1, "
                f"{latent.cached_dim}, {latent.rotary_dim}), got {found}."
            )

    def _check_rope(self) -> None:
        rotary = self.rotary_dim or self.head_dim
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.rotary_dim is not None and (rotary % 2 or not 2 <= rotary <= self.head_dim):
            raise ConfigError(
                f"rotary_dim must be even and between 2 and head_dim {self.head_dim}, got "
                f"{self.rotary_dim}."
            )
        for theta in (self.rope_theta, self.local_rope_theta):
            if theta is not None and theta <= 1:
                raise ConfigError(f"rope_theta must be greater than 1, got {theta}.")
        scaling = self.rope_scaling
        is_listed = scaling is not None and scaling.kind in {"factors", "longrope"}
        if scaling is not None and is_listed and 2 * len(scaling.factors) != rotary:
            what = "head_dim / 2" if rotary == self.head_dim else "rotary_dim / 2"
            raise ConfigError(
                f"rope factors: found {len(scaling.factors)}, expected {what} = {rotary // 2}."
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, object]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json`, of old or new spelling.

        Args:
            raw: The parsed file.

        Returns:
            The same model in our words.

        Raises:
            UnsupportedError: For a model, or a variation of one, that would not be computed right.
            CheckpointError: For a missing or impossible value; names the key.

        Source: transformers' configuration classes (keys and defaults).
        """
        try:
            return cls(**read_hf_config(raw))
        except CheckpointError:
            raise
        except ConfigError as error:
            raise CheckpointError(f"config.json: {error}") from error

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (LayerKind(),) * self.num_layers

    def for_length(self, max_position: int) -> "ModelConfig":
        """Return the same model for contexts of at most so many tokens.

        Only longrope depends on it, which has other frequencies for short contexts.

        Args:
            max_position: At most `self.max_position`.
        """
        if self.rope_scaling is None or self.rope_scaling.kind != "longrope":
            return self
        return dataclasses.replace(self, max_position=max_position)

    def rope_frequencies(
        self, rope: Literal["global", "local"] = "global"
    ) -> tuple[Float32[np.ndarray, " pairs"], float]:
        """Compute the rotary frequencies of one kind of layers.

        Args:
            rope: Which; see `LayerKind`.

        Returns:
            Angle per position of each of the `rotary_dim / 2` pairs, in radians, and the number
            that cosines and sines are multiplied with.
        """
        dim = self.rotary_dim or self.head_dim
        if rope == "local":
            return rope_frequencies(
                dim, self.local_rope_theta or self.rope_theta, None, self.max_position
            )
        return rope_frequencies(dim, self.rope_theta, self.rope_scaling, self.max_position)
