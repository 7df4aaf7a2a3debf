"""What functions of variants are given where tiles are plain arrays: the reference and XLA."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.variant import AttentionVariant, ExtraKind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayContext:
    """The `TileContext` of tiles `[..., rows, ..., keys]`.

    Attributes:
        spec: The plan's.
        sm_scale: What products were multiplied with.
        kinds: Kinds of the extras.
        extra: The extras.
        request: Request of each row or key; -1 is taken for 0.
        head: Query head of each row.
        q_lens: Query tokens by request.
        kv_lens: Keys by request.
    """

    spec: PlanSpec
    sm_scale: float
    kinds: Mapping[str, ExtraKind]
    extra: Mapping[str, Array]
    request: Array
    head: Array
    q_lens: Array
    kv_lens: Array

    @property
    def q_heads(self) -> int:
        """Heads of queries."""
        return self.spec.q_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.spec.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimension of queries and keys."""
        return self.spec.head_dim

    @property
    def q_len(self) -> Array:
        """Query tokens of the request."""
        return self.q_lens[self.request]

    @property
    def kv_len(self) -> Array:
        """Keys of the request."""
        return self.kv_lens[self.request]

    def expanded(self) -> "ArrayContext":
        """Return the context of tiles with one more axis behind."""
        request, head = self.request[..., None], self.head[..., None]
        return dataclasses.replace(self, request=request, head=head)

    def __getitem__(self, name: str) -> Array:
        """Read an extra; it broadcasts against the tile."""
        kind, value = self.kinds[name], jnp.asarray(self.extra[name])
        if kind == "head":
            return value[self.head]
        return value[self.request] if kind == "request" else value

    def take(self, name: str, *index: Array) -> Array:
        """Look up an extra, element by element; indices beyond its ends are clipped."""
        value = jnp.asarray(self.extra[name])
        clipped = (jnp.clip(i, 0, n - 1) for i, n in zip(index, value.shape, strict=True))
        return value[tuple(clipped)]


def context(
    plan: Plan,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    sm_scale: float,
    *,
    request: Array,
    head: Array,
) -> ArrayContext:
    """Return the context of some rows or keys, given their requests and heads."""
    return ArrayContext(
        spec=plan.spec,
        sm_scale=sm_scale,
        kinds=variant.extras,
        extra=extra,
        request=jnp.maximum(request, 0),
        head=head,
        q_lens=plan.q_len,
        kv_lens=plan.kv_len,
    )


def is_seen(
    plan: Plan,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    ctx: ArrayContext,
    q_pos: Int[Array, "..."],
    k_pos: Int[Array, "..."],
) -> Bool[Array, "..."]:
    """Tell which query sees which key, all masks taken together."""
    spec, kv_len = plan.spec, ctx.kv_len
    seen = (k_pos >= 0) & (k_pos < kv_len)
    if spec.causal:
        seen &= k_pos <= q_pos
    if spec.window is not None:
        seen &= k_pos > q_pos - spec.window
    if variant.packed_mask != "none":
        # Positions of queries begin at kv_len - q_len; rows of the mask at whole words.
        row = q_pos - (kv_len - ctx.q_len)
        key = jnp.clip(k_pos, 0, jnp.maximum(kv_len - 1, 0))
        word = plan.mask_indptr[ctx.request] + row * ((kv_len + 31) // 32) + key // 32
        mask = extra["mask"]
        word = jnp.clip(word, 0, mask.shape[-1] - 1)
        words = mask[word] if variant.packed_mask == "shared" else mask[ctx.head, word]
        seen &= ((words >> (key % 32).astype(jnp.uint32)) & 1) != 0
    if variant.mask_mod is not None:
        seen &= variant.mask_mod(ctx, q_pos, k_pos, ctx.head)
    return seen


def modified(
    x: Array,
    variant: AttentionVariant,
    ctx: ArrayContext,
    position: Int[Array, "..."],
    *,
    is_key: bool,
) -> Array:
    """Apply `q_mod` or `k_mod` to float32 operands `[..., head_dim]`.

    Args:
        x: Queries or keys.
        variant: Whose functions are applied.
        ctx: Their context.
        position: Their positions; broadcasts against `x`.
        is_key: Which of the two functions to apply.
    """
    mod = variant.k_mod if is_key else variant.q_mod
    if mod is None:
        return x
    half = x.shape[-1] // 2
    column = jnp.arange(half, dtype=jnp.int32)
    low, high = mod(x[..., :half], x[..., half:], ctx, position, column)
    return jnp.concatenate([low, high], axis=-1)
