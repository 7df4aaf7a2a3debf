"""What one step's attention will do, decided on the host and shared by all layers.

A plan cuts the step's attention into work items: some query rows of one key-value head against a
run of keys. Each CTA of a persistent kernel takes a run of items. Rows whose keys were cut into
several items get partial states, which are merged afterwards; all others are written straight to
the output. Every array has a fixed size that the `PlanSpec` gives, so that one compiled program
serves every mix of lengths.

Source: FlashInfer (arXiv 2501.01005), section 3.3.
"""

import dataclasses
import enum
import functools
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

PAD_PAGE = 0
"""Page that tables are padded with."""


class Item(enum.IntEnum):
    """Fields of one work item: columns of `Plan.items`.

    The item's query rows are `Q_LEN` tokens from `Q_START` on, each with `spec.heads_per_tile`
    heads from `HEAD` on, tokens outermost: row r is token `Q_START + r // heads_per_tile`, head
    `HEAD + r % heads_per_tile`.
    """

    REQUEST = 0
    """Request whose pages are read; with `SHARED`, the first of those that share them."""
    KV_HEAD = 1
    HEAD = 2
    """First query head."""
    Q_START = 3
    """First query token, an index into the packed tokens."""
    Q_LEN = 4
    """Query tokens; at most `spec.tile_tokens`."""
    Q_POS = 5
    """Position of the first query token in its request; with `SHARED` see `token_position`."""
    KV_BEGIN = 6
    """First key, a position in the request; a multiple of `tile_kv`."""
    KV_END = 7
    """One past the last key."""
    FULL_BEGIN = 8
    """Keys from here to `FULL_END` are seen by all rows, as far as causality and windows go."""
    FULL_END = 9
    TABLE_BASE = 10
    """Page of key position p is `kv_indices[TABLE_BASE + p // page_size]`."""
    OUT_SLOT = 11
    """First unit of partial state; -1 writes through to the output.

    A unit is the state of one token and `spec.heads_per_tile` heads; an item with n tokens fills n
    units in a row.
    """
    KV_LEN = 12
    """Keys of the request."""
    REQUEST_Q_LEN = 13
    """Query tokens of the request in this step."""
    MASK_BASE = 14
    """First word of the packed mask of the item's first token; its rows are
    `ceil(KV_LEN / 32)` words apart."""
    FLAGS = 15
    """Bits of `ItemFlag`."""


class ItemFlag(enum.IntFlag):
    """What kind of item it is."""

    DECODE = 1
    """The request has at most `spec.decode_tokens` query tokens: use the narrow tile form."""
    SHARED = 2
    """The rows belong to several requests that share these keys; all of them see all keys, save
    for windows and masks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """All that is static about a plan; one compiled program per spec and variant.

    Attributes:
        q_heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Dimension of queries and keys.
        v_head_dim: Dimension of values and outputs; None is `head_dim`.
        page_size: Tokens per page.
        q_dtype: Dtype of queries and outputs.
        kv_dtype: Dtype of keys and values.
        max_requests: Most requests of a step.
        max_tokens: Most query tokens of a step.
        max_pages: Most pages of all requests together.
        causal: Whether a token sees no key behind its own position, the last token of a request
            being at its last key.
        window: Keys that a token sees back from itself, itself included; None sees all.
        variant: What else is different; also the default of `attention`.
        tile_q: Query rows per tile: tokens times heads.
        tile_kv: Keys per tile; a multiple or a divisor of the page size.
        decode_tokens: Most query tokens of requests that are planned as decoding.
        num_ctas: CTAs of the persistent kernel.
        fixed_split_size: Keys per item whatever the batch, so that a request's result does not
            depend on its neighbours; None balances the work instead.
        disable_split: One item per tile of rows, for the same purpose.
        cascade: Whether the plan may share prefixes; then tokens are reordered.
        item_cost: Cost of an item besides its keys, in keys.
        row_cost: Cost of a query row, in keys.
        max_items: Most work items; None computes a bound.
        max_units: Most units of partial state; None computes a bound.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    page_size: int
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    max_requests: int
    max_tokens: int
    max_pages: int
    causal: bool = True
    window: int | None = None
    variant: AttentionVariant = PLAIN
    tile_q: int = 64
    tile_kv: int = 64
    decode_tokens: int = 16
    num_ctas: int = 132
    fixed_split_size: int | None = None
    disable_split: bool = False
    cascade: bool = False
    item_cost: int = 128
    row_cost: int = 2
    max_items: int | None = None
    max_units: int | None = None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def v_dim(self) -> int:
        """Dimension of values and outputs."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def heads_per_tile(self) -> int:
        """Query heads of one tile: the group, or a divisor of it where it is too large."""
        return next(h for h in range(min(self.group, self.tile_q), 0, -1) if self.group % h == 0)

    @property
    def tile_tokens(self) -> int:
        """Most query tokens of one tile."""
        return max(1, self.tile_q // self.heads_per_tile)

    @property
    def split_mode(self) -> Literal["balanced", "fixed", "none"]:
        """How keys are cut into items."""
        if self.disable_split:
            return "none"
        return "balanced" if self.fixed_split_size is None else "fixed"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step's plan: one int32 buffer, so that one transfer moves it, and its static layout.

    The properties are views while the buffer is in numpy, and slices under tracing; a kernel may
    as well take the whole buffer and find parts by `layout`.

    Attributes:
        buffer: Everything, int32.
        spec: What is static.
    """

    buffer: Int[Array, " words"] | Int[np.ndarray, " words"]
    spec: PlanSpec = dataclasses.field(metadata={"static": True})

    def part(self, name: str) -> Array:
        """Return one part of the buffer by its name in `plan_layout`."""
        start, shape = plan_layout(self.spec)[0][name]
        size = int(np.prod(shape, dtype=np.int64))
        return self.buffer[start : start + size].reshape(shape)

    @property
    def num_requests(self) -> Array:
        """Requests that are there, the others being padding."""
        return self.part("counts")[0]

    @property
    def num_tokens(self) -> Array:
        """Query tokens that are there."""
        return self.part("counts")[1]

    @property
    def num_items(self) -> Array:
        """Work items."""
        return self.part("counts")[2]

    @property
    def num_units(self) -> Array:
        """Units of partial state in use."""
        return self.part("counts")[3]

    @property
    def num_merges(self) -> Array:
        """Units of the output that are merged from partial states."""
        return self.part("counts")[4]

    @property
    def max_splits(self) -> Array:
        """Most partial states that merge into one."""
        return self.part("counts")[5]

    @property
    def qo_indptr(self) -> Array:
        """Where each request's tokens begin, `[max_requests + 1]`."""
        return self.part("qo_indptr")

    @property
    def kv_len(self) -> Array:
        """Keys of each request, `[max_requests]`; 0 for padding."""
        return self.part("kv_len")

    @property
    def kv_indptr(self) -> Array:
        """Where each request's pages begin in `kv_indices`, `[max_requests + 1]`."""
        return self.part("kv_indptr")

    @property
    def kv_indices(self) -> Array:
        """Pages, `[max_pages + one tile]`; padded with the dummy page."""
        return self.part("kv_indices")

    @property
    def token_request(self) -> Array:
        """Request of each token, `[max_tokens]`; -1 for padding."""
        return self.part("token_request")

    @property
    def token_position(self) -> Array:
        """Position of each token in its request, `[max_tokens]`."""
        return self.part("token_position")

    @property
    def token_order(self) -> Array:
        """With `spec.cascade`: which token of the caller stands in each place of the plan."""
        return self.part("token_order")

    @property
    def token_place(self) -> Array:
        """With `spec.cascade`: the place of each of the caller's tokens; undoes `token_order`."""
        return self.part("token_place")

    @property
    def mask_indptr(self) -> Array:
        """First word of each request's packed mask, `[max_requests + 1]`."""
        return self.part("mask_indptr")

    @property
    def work_indptr(self) -> Array:
        """First item of each CTA, `[num_ctas + 1]`."""
        return self.part("work_indptr")

    @property
    def items(self) -> Array:
        """Work items, `[max_items, len(Item)]`; see `Item`."""
        return self.part("items")

    @property
    def merge_indptr(self) -> Array:
        """Where the partial units of each merge begin in `merge_units`, `[max_merges + 1]`."""
        return self.part("merge_indptr")

    @property
    def merge_target(self) -> Array:
        """Which unit of the output each merge writes, `[max_merges]`.

        With `o` viewed as `[tokens * q_heads / heads_per_tile, heads_per_tile, v_dim]`; padding
        points behind its end.
        """
        return self.part("merge_target")

    @property
    def merge_units(self) -> Array:
        """Partial units in the order of merging, `[max_units]`."""
        return self.part("merge_units")


@functools.lru_cache(maxsize=256)
def plan_layout(spec: PlanSpec) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Return where each part of a plan's buffer begins, its shape, and the buffer's length."""
    requests, tokens = spec.max_requests, spec.max_tokens
    items, units = plan_bounds(spec)
    merges = max(1, units // 2)
    tail = max(1, spec.tile_kv // spec.page_size)
    shapes: dict[str, tuple[int, ...]] = {
        # A multiple of 16 words, so that every item is one aligned line of 64 bytes.
        "items": (items, len(Item)),
        "counts": (16,),
        "work_indptr": (spec.num_ctas + 1,),
        "qo_indptr": (requests + 1,),
        "kv_len": (requests,),
        "kv_indptr": (requests + 1,),
        "mask_indptr": (requests + 1,),
        "token_request": (tokens,),
        "token_position": (tokens,),
        "merge_indptr": (merges + 1,),
        "merge_target": (merges,),
        "merge_units": (units,),
        # A tile may reach over the end of the last request.
        "kv_indices": (spec.max_pages + tail,),
    }
    if spec.cascade:
        shapes |= {"token_order": (tokens,), "token_place": (tokens,)}
    layout: dict[str, tuple[int, tuple[int, ...]]] = {}
    start = 0
    for name, shape in shapes.items():
        layout[name] = (start, shape)
        start += -(-int(np.prod(shape, dtype=np.int64)) // 16) * 16
    return layout, start


@functools.lru_cache(maxsize=256)
def plan_bounds(spec: PlanSpec) -> tuple[int, int]:
    """Return the most work items and the most units of partial state of any plan."""
    blocks = spec.q_heads // spec.heads_per_tile
    # A request's last tile may be short, so each request can add one.
    tiles = min(spec.max_tokens, spec.max_tokens // spec.tile_tokens + spec.max_requests) * blocks
    keys = spec.max_pages * spec.page_size
    if spec.split_mode == "none":
        items, units = tiles, 0
    elif spec.split_mode == "fixed":
        per_tile = -(-keys // (spec.fixed_split_size or keys))
        items = tiles + min(tiles, spec.max_tokens * blocks) * (per_tile - 1)
        units = items * spec.tile_tokens
    else:
        # Each border between CTAs cuts one item in two.
        items, units = tiles + spec.num_ctas, 2 * spec.num_ctas * spec.tile_tokens
    if spec.cascade:
        items, units = 2 * items, units + 2 * spec.max_tokens * blocks
    return spec.max_items or max(1, items), spec.max_units or max(2, units)
