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
import math
import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

PAD_PAGE = 0
"""Page that tables are padded with."""


Words = Any
"""Integers of a plan: numpy while it is made, and what JAX makes of them afterwards."""

CTA_BITS = 12
"""Bits that the number of a CTA has."""
_AT_LEAST_ONE = (
    "q_heads",
    "kv_heads",
    "head_dim",
    "v_head_dim",
    "page_size",
    "max_requests",
    "max_tokens",
    "max_pages",
    "window",
    "tile_q",
    "tile_kv",
    "num_ctas",
    "fixed_split_size",
    "max_items",
    "max_units",
)
_NOT_NEGATIVE = ("decode_tokens", "cascade_levels", "item_cost", "row_cost")


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
    """First key, a position in the request; a multiple of `tile_kv` or of `page_size`, whichever is
    smaller."""
    KV_END = 7
    """One past the last key."""
    FULL_BEGIN = 8
    """Keys from here to `FULL_END` are seen by all rows: hidden neither by causality or windows of
    the spec nor, if its variant has a `block_mask`, by the variant. May reach over the item, and is
    empty where the end is not behind the beginning."""
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


class Prefix(enum.IntEnum):
    """Fields of one shared prefix: columns of `Plan.prefixes`."""

    REQUEST = 0
    """One of the requests that share it."""
    Q_START = 1
    """First query token of all of them, which stand side by side."""
    Q_LEN = 2
    """Query tokens of all of them."""
    BEGIN = 3
    """First key."""
    END = 4
    """One past the last key."""


class ItemFlag(enum.IntFlag):
    """What kind of item it is."""

    DECODE = 1
    """The request has at most `spec.decode_tokens` query tokens: use the narrow tile form."""
    SHARED = 2
    """The rows belong to several requests that share these keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
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
        cascade_levels: How deeply shared prefixes may be nested; 0 shares none. With any, tokens
            are reordered, so that those who share stand side by side.
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
    cascade_levels: int = 0
    item_cost: int = 128
    row_cost: int = 2
    max_items: int | None = None
    max_units: int | None = None

    def __post_init__(self) -> None:
        """Check that the numbers go together.

        Raises:
            ValueError: If they do not.
        """
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.q_heads % self.kv_heads:
            near = round(self.q_heads / self.kv_heads) * self.kv_heads
            raise ValueError(
                f"q_heads must be a multiple of kv_heads, got {self.q_heads} and {self.kv_heads}; "
                f"the nearest is {max(near, self.kv_heads)}."
            )
        small, large = sorted((self.page_size, self.tile_kv))
        if large % small:
            raise ValueError(
                f"tile_kv must be a multiple or a divisor of page_size, got {self.tile_kv} and "
                f"{self.page_size}; the nearest is {-(-large // small) * small}."
            )
        if self.num_ctas >= 1 << CTA_BITS:
            raise ValueError(f"num_ctas must be below {1 << CTA_BITS}, got {self.num_ctas}.")
        self._check_modes()

    def _check_modes(self) -> None:
        size = self.fixed_split_size
        if size is not None and self.disable_split:
            raise ValueError("fixed_split_size and disable_split exclude each other; drop one.")
        if size is not None and size % self.tile_kv:
            raise ValueError(
                f"fixed_split_size must be a multiple of tile_kv = {self.tile_kv}, got {size}; the "
                f"nearest is {-(-size // self.tile_kv) * self.tile_kv}."
            )
        self.check_variant(self.variant)

    def check_variant(self, variant: AttentionVariant) -> None:
        """Check that a variant goes with the numbers of the spec.

        Raises:
            ValueError: If it does not.
        """
        if self.cascade_levels and variant.packed_mask != "none":
            raise ValueError(
                "a packed mask says nothing about rows of several requests; set "
                "cascade_levels to 0."
            )
        if self.head_dim % 2 and (variant.q_mod or variant.k_mod):
            raise ValueError(
                f"q_mod and k_mod see two halves of a head, but head_dim is {self.head_dim}; pad "
                f"it to {self.head_dim + 1}."
            )

    def __hash__(self) -> int:
        """Return what is computed once, as a spec is looked up in every step."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @functools.cached_property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q_heads // self.kv_heads

    @functools.cached_property
    def v_dim(self) -> int:
        """Dimension of values and outputs."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @functools.cached_property
    def heads_per_tile(self) -> int:
        """Query heads of one tile: the group, or a divisor of it where it is too large."""
        return next(h for h in range(min(self.group, self.tile_q), 0, -1) if self.group % h == 0)

    @functools.cached_property
    def num_blocks(self) -> int:
        """Tiles that the heads of one token are spread over."""
        return self.q_heads // self.heads_per_tile

    @functools.cached_property
    def tile_tokens(self) -> int:
        """Most query tokens of one tile."""
        return max(1, self.tile_q // self.heads_per_tile)

    @functools.cached_property
    def split_mode(self) -> Literal["balanced", "fixed", "none"]:
        """How keys are cut into items."""
        if self.disable_split:
            return "none"
        return "balanced" if self.fixed_split_size is None else "fixed"

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """Most work items and most units of partial state of any plan."""
        blocks = self.num_blocks
        # A request's last tile may be short, so each request can add one.
        tiles = min(self.max_tokens, self.max_tokens // self.tile_tokens + self.max_requests)
        tiles *= blocks
        keys = self.max_pages * self.page_size
        if self.split_mode == "none":
            items, units = tiles, 0
        elif self.split_mode == "fixed":
            items = tiles * -(-keys // (self.fixed_split_size or keys))
            units = items * self.tile_tokens
        else:
            # Each border between CTAs cuts one item in two.
            items, units = tiles + self.num_ctas, 2 * self.num_ctas * self.tile_tokens
        parts = self.cascade_levels + (self.variant.block_mask is not None)
        if parts:
            # Each level has tiles of its own; a block mask may cut a tile in two, seldom in more.
            items, units = (parts + 1) * items, units + (parts + 1) * self.max_tokens * blocks
        return self.max_items or max(1, items), self.max_units or max(2, units)

    @functools.cached_property
    def layout(self) -> Mapping[str, tuple[int, int, tuple[int, ...]]]:
        """Where each part of a plan's buffer begins and ends, and its shape."""
        requests, tokens = self.max_requests, self.max_tokens
        items, units = self.bounds
        merges = max(1, units // 2)
        tail = max(1, self.tile_kv // self.page_size)
        shapes: dict[str, tuple[int, ...]] = {
            # First, so that every item is one aligned line of 64 bytes.
            "items": (items, len(Item)),
            "counts": (16,),
            "work_indptr": (self.num_ctas + 1,),
            "q_start": (requests,),
            "q_len": (requests,),
            "kv_len": (requests,),
            "kv_indptr": (requests + 1,),
            "mask_indptr": (requests + 1,),
            "token_request": (tokens,),
            "token_position": (tokens,),
            "merge_indptr": (merges + 1,),
            "merge_target": (merges,),
            "merge_units": (units,),
            # A tile may reach over the end of the last request.
            "kv_indices": (self.max_pages + tail,),
        }
        if self.cascade_levels:
            groups = self.cascade_levels * max(1, requests // 2)
            shapes |= {
                "token_order": (tokens,),
                "token_place": (tokens,),
                "prefixes": (groups, len(Prefix)),
                "shared_len": (requests,),
            }
        layout: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            layout[name] = (start, start + size, shape)
            start += -(-size // 16) * 16
        layout["end"] = (start, start, ())
        return types.MappingProxyType(layout)

    @functools.cached_property
    def slices(self) -> tuple[tuple[str, slice], ...]:
        """The parts of a plan's buffer and where they are."""
        return tuple((name, slice(low, end)) for name, (low, end, _) in self.layout.items())[:-1]

    @property
    def num_words(self) -> int:
        """Length of a plan's buffer."""
        return self.layout["end"][0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step's plan: one int32 buffer, so that one transfer moves it, and a static layout.

    `make_plan` fills the buffer in numpy, of which the properties are views; under tracing they are
    slices. A kernel may as well take the whole buffer and find parts by
    `spec.layout`.

    Attributes:
        buffer: Everything, int32.
        spec: What is static.
    """

    buffer: Array | np.ndarray
    spec: PlanSpec = dataclasses.field(metadata={"static": True})

    def part(self, name: str) -> Words:
        """Return one part of the buffer by its name in `spec.layout`."""
        start, end, shape = self.spec.layout[name]
        part = self.buffer[start:end]
        return part if len(shape) == 1 else part.reshape(shape)

    @property
    def num_requests(self) -> Words:
        """Requests that are there, the others being padding."""
        return self.part("counts")[0]

    @property
    def num_tokens(self) -> Words:
        """Query tokens that are there."""
        return self.part("counts")[1]

    @property
    def num_items(self) -> Words:
        """Work items."""
        return self.part("counts")[2]

    @property
    def num_units(self) -> Words:
        """Units of partial state in use."""
        return self.part("counts")[3]

    @property
    def num_merges(self) -> Words:
        """Units of the output that are merged from partial states."""
        return self.part("counts")[4]

    @property
    def max_splits(self) -> Words:
        """Most partial states that merge into one."""
        return self.part("counts")[5]

    @property
    def q_start(self) -> Words:
        """First query token of each request, `[max_requests]`."""
        return self.part("q_start")

    @property
    def q_len(self) -> Words:
        """Query tokens of each request, `[max_requests]`; 0 for padding."""
        return self.part("q_len")

    @property
    def kv_len(self) -> Words:
        """Keys of each request, `[max_requests]`; 0 for padding."""
        return self.part("kv_len")

    @property
    def kv_indptr(self) -> Words:
        """Where each request's pages begin in `kv_indices`, `[max_requests + 1]`."""
        return self.part("kv_indptr")

    @property
    def kv_indices(self) -> Words:
        """Pages, `[max_pages + one tile]`; padded with the dummy page."""
        return self.part("kv_indices")

    @property
    def token_request(self) -> Words:
        """Request of each token, `[max_tokens]`; -1 for padding."""
        return self.part("token_request")

    @property
    def token_position(self) -> Words:
        """Position of each token in its request, `[max_tokens]`."""
        return self.part("token_position")

    @property
    def token_order(self) -> Words:
        """With cascade levels: which token of the caller stands in each place of the plan."""
        return self.part("token_order")

    @property
    def token_place(self) -> Words:
        """With cascade levels: the place of each of the caller's tokens."""
        return self.part("token_place")

    @property
    def num_prefixes(self) -> Words:
        """Shared prefixes that are there."""
        return self.part("counts")[6]

    @property
    def prefixes(self) -> Words:
        """With cascade levels: shared prefixes, `[..., len(Prefix)]`; see `Prefix`."""
        return self.part("prefixes")

    @property
    def shared_len(self) -> Words:
        """With cascade levels: keys of each request that shared prefixes hold."""
        return self.part("shared_len")

    @property
    def mask_indptr(self) -> Words:
        """First word of each request's packed mask, `[max_requests + 1]`."""
        return self.part("mask_indptr")

    @property
    def work_indptr(self) -> Words:
        """First item of each CTA, `[num_ctas + 1]`."""
        return self.part("work_indptr")

    @property
    def items(self) -> Words:
        """Work items, `[max_items, len(Item)]`; see `Item`."""
        return self.part("items")

    @property
    def merge_indptr(self) -> Words:
        """Where the partial units of each merge begin in `merge_units`, `[max_merges + 1]`."""
        return self.part("merge_indptr")

    @property
    def merge_target(self) -> Words:
        """Which unit of the output each merge writes, `[max_merges]`.

        With `o` viewed as `[tokens * q_heads / heads_per_tile, heads_per_tile, v_dim]`; padding
        points behind its end.
        """
        return self.part("merge_target")

    @property
    def merge_units(self) -> Words:
        """Partial units in the order of merging, `[max_units]`."""
        return self.part("merge_units")
