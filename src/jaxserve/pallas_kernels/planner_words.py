"""Words that the planner and its compiled loops have in common: columns, numbers, and parts.

Compiled code takes plain integers as constants, so everything is there as such, too.
"""

import enum

from jaxserve.pallas_kernels.plan import Item, ItemFlag


class Tile(enum.IntEnum):
    """Columns of tiles: query rows, and the keys that they visit.

    A tile that visits several stretches of keys appears once for each, side by side.
    """

    REQUEST = 0
    Q_START = 1
    """First token, in the order of the plan."""
    Q_OFFSET = 2
    """Tokens of the request before the tile's."""
    Q_LEN = 3
    Q_POS = 4
    """Lowest position of a query."""
    BEGIN = 5
    END = 6
    FULL_BEGIN = 7
    FULL_END = 8
    FLAGS = 9
    ROWS = 10
    """Equal numbers for equal query rows."""
    IS_PARTIAL = 11
    """1 if the tile is merged with others whatever happens."""


class Number(enum.IntEnum):
    """Numbers of a spec that the loops need."""

    TILE_KV = 0
    TILE_TOKENS = 1
    MAX_TOKENS = 2
    BLOCKS = 3
    HEADS_PER_TILE = 4
    GROUP = 5
    CTAS = 6
    ITEM_COST = 7
    TOKEN_COST = 8
    """Of one token's rows."""
    DECODE_TOKENS = 9
    WINDOW = 10
    """0 without one."""
    IS_CAUSAL = 11
    HAS_MASK = 12
    SPLIT_SIZE = 13
    """Keys per item if that is fixed, 0 if no keys are cut, and -1 if work is balanced."""
    MAX_REQUESTS = 14
    MAX_ITEMS = 15
    MAX_UNITS = 16
    MAX_MERGES = 17


PARTS = (
    "items",
    "counts",
    "work_indptr",
    "q_start",
    "q_len",
    "kv_len",
    "kv_indptr",
    "mask_indptr",
    "token_request",
    "token_position",
    "merge_indptr",
    "merge_target",
    "merge_units",
)
"""Parts of a plan's buffer that the loops write, in the order in which they are told where."""

# Members of the enumerations as plain integers, which are constants of the compiled code.
(
    ITEMS,
    COUNTS,
    WORK_INDPTR,
    REQUEST_START,
    REQUEST_Q,
    REQUEST_KV,
    KV_INDPTR,
    MASK_INDPTR,
    TOKEN_REQUEST,
    TOKEN_POSITION,
    MERGE_INDPTR,
    MERGE_TARGET,
    MERGE_UNITS,
) = range(len(PARTS))
(
    REQUEST,
    Q_START,
    Q_OFFSET,
    Q_LEN,
    Q_POS,
    BEGIN,
    END,
    FULL_BEGIN,
    FULL_END,
    FLAGS,
    ROWS,
    IS_PARTIAL,
) = range(len(Tile))
(
    TILE_KV,
    TILE_TOKENS,
    MAX_TOKENS,
    BLOCKS,
    HEADS_PER_TILE,
    GROUP,
    CTAS,
    ITEM_COST,
    TOKEN_COST,
    DECODE_TOKENS,
    WINDOW,
    IS_CAUSAL,
    HAS_MASK,
    SPLIT_SIZE,
    MAX_REQUESTS,
    MAX_ITEMS,
    MAX_UNITS,
    MAX_MERGES,
) = range(len(Number))
(
    ITEM_REQUEST,
    ITEM_KV_HEAD,
    ITEM_HEAD,
    ITEM_Q_START,
    ITEM_Q_LEN,
    ITEM_Q_POS,
    ITEM_KV_BEGIN,
    ITEM_KV_END,
    ITEM_FULL_BEGIN,
    ITEM_FULL_END,
    ITEM_TABLE_BASE,
    ITEM_OUT_SLOT,
    ITEM_KV_LEN,
    ITEM_REQUEST_Q_LEN,
    ITEM_MASK_BASE,
    ITEM_FLAGS,
) = range(len(Item))
FIELDS = len(Item)
DECODE = int(ItemFlag.DECODE)
BLOCK_BITS = 20
"""Of the number of a piece and its block of heads."""
