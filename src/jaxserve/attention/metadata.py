"""What one step's attention needs to know, as pytrees of device arrays.

A step packs its tokens into one axis: first `rows` decode rows, row i belonging to sequence row i
of the cache, then the tokens of prefill chunks. Nothing about lengths is static, so one compiled
program serves every mix of lengths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.attention.tactic.rows import SparseRows
from jaxserve.pallas_kernels.plan import Plan
from jaxserve.sharding.experts import SlotTable
from jaxserve.sharding.rules import ModelSharding

Backend = Literal["xla", "llvm", "reference", "mosaic", "triton", "pallas-xla", "pallas-reference"]
"""`xla` runs everywhere; `llvm` decodes with kernels compiled for this CPU; `reference` is slow.

The others run planned paged kernels; see `KERNEL_BACKENDS`.
"""

KERNEL_BACKENDS: Mapping[Backend, str] = {
    "mosaic": "mosaic",
    "triton": "triton",
    "pallas-xla": "xla",
    "pallas-reference": "reference",
}
"""What the backends that run planned paged kernels are called in `pallas_kernels.attention`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """How products of queries and keys become scores; fixed for a layer, and static.

    Attributes:
        scale: Multiplies the products, usually head_dim ** -0.5.
        window: Keys that a token sees back from itself, itself included; None sees all.
        soft_cap: Bound that scores approach but never pass, on either side; None has none.

    Source: Gemma 2 (soft cap), Mistral 7B (sliding window).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def scores(self, products: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale and cap; which keys may be seen is another matter."""
        scaled = products * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def in_window(
        self, query: Int[Array, "..."], key: Int[Array, "..."]
    ) -> Bool[Array, "..."] | bool:
        """Tell whether keys are near enough to be seen, by the positions of both."""
        return True if self.window is None else key > query - self.window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CausalPlan:
    """Plain causal attention over `[batch, time]`, without a cache; differentiable."""

    backend: Backend = dataclasses.field(default="xla", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PaddedPlan:
    """Attention in both directions over `[batch, time]`, padded on the right; differentiable.

    Attributes:
        lengths: Tokens of each row; at least 1.
        backend: Which implementation runs.
    """

    lengths: Int[Array, " batch"]
    backend: Backend = dataclasses.field(default="xla", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Attention of one step against the key-value cache.

    A prefill block is a run of at most `q_block` tokens of one sequence; blocks are ordered by
    `block_start`. Blocks of sequences whose cache held something before this step come with that
    number of tokens, their context.

    Where groups of devices have tokens of their own, every array of the step has one more axis, the
    first, which counts the groups; rows, blocks and pages are numbered within each. Tokens of
    models are those of the first group, then of the second, and so on.

    Attributes:
        token_row: Sequence row of each packed token; -1 is padding.
        token_position: Position of each token in its sequence.
        num_blocks: How many of the blocks are used.
        block_start: Where each block begins among the prefill tokens.
        block_row: Sequence row of each block.
        block_position: Position of the block's first token.
        block_len: Tokens of each block.
        block_context: Tokens of its sequence that the cache held before this step.
        num_context_blocks: Blocks up to the last one with a context; 0 if there is none.
        page_table: Pages of each sequence row, 0 where there is none; None with dense slots, and
            of width 0 where kernels have plans, which hold the pages.
        kernel_plans: For backends that run planned kernels: one plan per kind of window that the
            model's layers have, and last, if decodes may leave something unread, one in which
            those that do have no work. Request i of a plan is sequence row i, or with
            drafts requests 2 i and 2 i + 1, its decode and its drafts. Their specs say how
            attention differs from the plain one, soft caps included.
        extra: Arrays that the variant of the plans reads.
        sparse: Which decode rows read a part of their context; None if all read everything.
        slot_table: Where experts lie, of all layers or of one, if that changes while serving; how
            often each is asked for is then counted.
        rows: Number of decode rows.
        kv_tile: Keys per tile; a multiple of the page size that divides the length of a row.
        q_block: Tokens per prefill block.
        backend: Which implementation runs.
        upcast: Whether products are taken in float32 whatever the dtype of the cache.
        batch_invariant: Whether a row's result may not depend on the length of its neighbours,
            not even in the last bit.
        sharding: How the model lies on several devices; None on one.
    """

    token_row: Int[Array, "*groups tokens"]
    token_position: Int[Array, "*groups tokens"]
    num_blocks: Int[Array, "*groups"]
    block_start: Int[Array, "*groups blocks"]
    block_row: Int[Array, "*groups blocks"]
    block_position: Int[Array, "*groups blocks"]
    block_len: Int[Array, "*groups blocks"]
    block_context: Int[Array, "*groups blocks"]
    num_context_blocks: Int[Array, "*groups"]
    page_table: Int[Array, "*groups rows pages_per_row"] | None
    kernel_plans: tuple[Plan, ...] = ()
    extra: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    sparse: SparseRows | None = None
    slot_table: SlotTable | None = None
    rows: int = dataclasses.field(metadata={"static": True})
    kv_tile: int = dataclasses.field(metadata={"static": True})
    q_block: int = dataclasses.field(metadata={"static": True})
    backend: Backend = dataclasses.field(default="xla", metadata={"static": True})
    upcast: bool = dataclasses.field(default=False, metadata={"static": True})
    batch_invariant: bool = dataclasses.field(default=False, metadata={"static": True})
    sharding: ModelSharding | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def is_token(self) -> Bool[Array, " tokens"]:
        """Which tokens of the model, of all groups, are no padding."""
        return self.token_row.reshape(-1) >= 0

    def of_layer(self, index: int) -> "AttentionPlan":
        """Return the plan for one layer of the model."""
        if self.sparse is None and self.slot_table is None:
            return self
        return dataclasses.replace(
            self,
            sparse=None if self.sparse is None else self.sparse.of_layer(index),
            slot_table=None if self.slot_table is None else self.slot_table.of_layer(index),
        )
