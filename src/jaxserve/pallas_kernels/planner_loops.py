"""The planner's loops over requests, tiles and items, compiled by numba.

In numpy each of them takes dozens of calls of a microsecond or two, which a step's plan cannot
afford. What is asked once in a while, shared prefixes and what a variant hides, stays in numpy.
Without numba the loops run as they stand, and a plan takes milliseconds.

Nothing here checks bounds but where a function says so; callers do. Each call from Python costs
some microseconds, so one function lays out all items; its parts are compiled into it, once.
"""

import enum

import numpy as np

from jaxserve.core.compiled import compiled, inlined
from jaxserve.pallas_kernels.plan import CTA_BITS, Item, ItemFlag


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

# Plain integers, which are constants of the compiled code.
(
    _ITEMS,
    _COUNTS,
    _WORK_INDPTR,
    _REQUEST_START,
    _REQUEST_Q,
    _REQUEST_KV,
    _KV_INDPTR,
    _MASK_INDPTR,
    _TOKEN_REQUEST,
    _TOKEN_POSITION,
    _MERGE_INDPTR,
    _MERGE_TARGET,
    _MERGE_UNITS,
) = range(len(PARTS))
(
    _REQUEST,
    _Q_START,
    _Q_OFFSET,
    _Q_LEN,
    _Q_POS,
    _BEGIN,
    _END,
    _FULL_BEGIN,
    _FULL_END,
    _FLAGS,
    _ROWS,
    _IS_PARTIAL,
) = range(len(Tile))
(
    _TILE_KV,
    _TILE_TOKENS,
    _MAX_TOKENS,
    _BLOCKS,
    _HEADS_PER_TILE,
    _GROUP,
    _CTAS,
    _ITEM_COST,
    _TOKEN_COST,
    _DECODE_TOKENS,
    _WINDOW,
    _IS_CAUSAL,
    _HAS_MASK,
    _SPLIT_SIZE,
    _MAX_REQUESTS,
    _MAX_ITEMS,
    _MAX_UNITS,
    _MAX_MERGES,
) = range(len(Number))
(
    _ITEM_REQUEST,
    _ITEM_KV_HEAD,
    _ITEM_HEAD,
    _ITEM_Q_START,
    _ITEM_Q_LEN,
    _ITEM_Q_POS,
    _ITEM_KV_BEGIN,
    _ITEM_KV_END,
    _ITEM_FULL_BEGIN,
    _ITEM_FULL_END,
    _ITEM_TABLE_BASE,
    _ITEM_OUT_SLOT,
    _ITEM_KV_LEN,
    _ITEM_REQUEST_Q_LEN,
    _ITEM_MASK_BASE,
    _ITEM_FLAGS,
) = range(len(Item))
_FIELDS = len(Item)
_DECODE = int(ItemFlag.DECODE)
_CTA_BITS = CTA_BITS
BLOCK_BITS = 20
"""Of the number of a piece and its block of heads."""
_BLOCK_BITS = BLOCK_BITS


@compiled
def measure(
    q_len: np.ndarray,
    kv_len: np.ndarray,
    indptr: np.ndarray,
    starts: np.ndarray,
    is_packed: bool,  # noqa: FBT001  compiled functions have no keywords
    page_size: int,
    tile_tokens: int,
) -> tuple[bool, int, int, int, int]:
    """Count what requests have; all arrays int64 `[requests]`, `indptr` with one more.

    Args:
        q_len: Query tokens.
        kv_len: Keys.
        indptr: Where each request's pages begin.
        starts: First token of each request; written if they are packed.
        is_packed: Whether tokens stand one after another, without gaps.
        page_size: Tokens per page.
        tile_tokens: Most tokens of a tile.

    Returns:
        Whether a number is negative; then the query tokens, one past the last token's place, the
        tiles, and the first request with too few pages or -1.
    """
    total, last, tiles, lacking = 0, 0, 0, -1
    for request in range(q_len.size):
        count, keys = q_len[request], kv_len[request]
        if count < 0 or keys < 0:
            return True, 0, 0, 0, -1
        if is_packed:
            starts[request] = total
        total += count
        last = max(last, starts[request] + count)
        tiles += (count + tile_tokens - 1) // tile_tokens
        if lacking < 0 and (indptr[request + 1] - indptr[request]) * page_size < keys:
            lacking = request
    return False, total, last, tiles, lacking


@compiled
def write_requests(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    q_len: np.ndarray,
    kv_len: np.ndarray,
    indptr: np.ndarray,
    starts: np.ndarray,
    total: int,
    tiles: np.ndarray,
) -> bool:
    """Write what a plan says of requests and tokens, and cut requests into tiles.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        q_len: Query tokens of each request, int64 as all that follows.
        kv_len: Keys.
        indptr: Where each request's pages begin.
        starts: First token of each request, in the order of the plan.
        total: Query tokens of all.
        tiles: Written, `[tiles, len(Tile)]`.

    Returns:
        Whether every token has a place of its own.
    """
    count, room = q_len.size, numbers[_MAX_REQUESTS] + 1
    kv_indptr = buffer[at[_KV_INDPTR] : at[_KV_INDPTR] + room]
    mask_indptr = buffer[at[_MASK_INDPTR] : at[_MASK_INDPTR] + room]
    token_request = buffer[at[_TOKEN_REQUEST] : at[_TOKEN_REQUEST] + numbers[_MAX_TOKENS]]
    token_position = buffer[at[_TOKEN_POSITION] : at[_TOKEN_POSITION] + numbers[_MAX_TOKENS]]
    most, words, tile = numbers[_TILE_TOKENS], 0, 0
    token_request[:] = -1
    kv_indptr[0] = indptr[0]
    for request in range(count):
        length, keys, start = q_len[request], kv_len[request], starts[request]
        buffer[at[_REQUEST_START] + request] = start
        buffer[at[_REQUEST_Q] + request] = length
        buffer[at[_REQUEST_KV] + request] = keys
        kv_indptr[request + 1] = indptr[request + 1]
        if numbers[_HAS_MASK]:
            words += length * ((keys + 31) // 32)
            mask_indptr[request + 1] = words
        for i in range(length):
            if token_request[start + i] >= 0:
                return False
            token_request[start + i] = request
            token_position[start + i] = keys - length + i
        for offset in range(0, length, most):
            _write_tile(numbers, tiles[tile], request, start, offset, length, keys)
            tiles[tile, _ROWS] = tile
            tile += 1
    kv_indptr[count + 1 :] = indptr[count]
    if numbers[_HAS_MASK]:
        mask_indptr[count + 1 :] = words
    buffer[at[_COUNTS]], buffer[at[_COUNTS] + 1] = count, total
    return True


@compiled
def _write_tile(
    numbers: np.ndarray,
    tile: np.ndarray,
    request: int,
    start: int,
    offset: int,
    length: int,
    keys: int,
) -> None:
    low = keys - length + offset
    tile[_REQUEST] = request
    tile[_Q_START] = start + offset
    tile[_Q_OFFSET] = offset
    tile[_Q_LEN] = min(length - offset, numbers[_TILE_TOKENS])
    tile[_Q_POS] = low
    tile[_FLAGS] = _DECODE if length <= numbers[_DECODE_TOKENS] else 0
    tile[_IS_PARTIAL] = 0
    write_bounds(numbers, tile, low + tile[_Q_LEN], keys)


@compiled
def write_bounds(numbers: np.ndarray, tile: np.ndarray, high: int, keys: int) -> None:
    """Write which of the first `keys` keys a tile sees: some query of it, and all of them.

    Queries are at positions from the tile's to `high`, which is excluded. The keys that some query
    sees are within those, the others need not be.
    """
    low, window = tile[_Q_POS], numbers[_WINDOW]
    begin, end, full_begin, full_end = 0, keys, 0, keys
    if numbers[_IS_CAUSAL]:
        end, full_end = max(min(high, keys), 0), low + 1
    if window:
        first = low + 1 - window
        begin = max(first, 0) // numbers[_TILE_KV] * numbers[_TILE_KV]
        begin, end = (begin if begin < end else 0), (end if first < end else 0)
        full_begin = high - window
    tile[_BEGIN], tile[_END] = begin, end
    tile[_FULL_BEGIN], tile[_FULL_END] = full_begin, full_end


@inlined
def cut_evenly(
    numbers: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay tiles on a line, once per block of heads, and cut it into equal parts, one per CTA.

    Blocks come outermost, so that tiles of one request and head, which read the same keys, are
    near each other.

    Returns:
        Of each piece its item on the uncut line, its first key and one past its last; then where
        each CTA but the first begins, those that are missing having nothing to do.
    """
    count, blocks, size = tiles.shape[0], numbers[_BLOCKS], numbers[_TILE_KV]
    length, ends = np.empty(count, np.int64), np.empty(count, np.int64)  # in tiles; in keys
    highest, period = 0, 0
    for tile in range(count):
        overhead = tiles[tile, _Q_LEN] * numbers[_TOKEN_COST] + numbers[_ITEM_COST]
        highest = max(highest, overhead)
        length[tile] = (tiles[tile, _END] - tiles[tile, _BEGIN] + size - 1) // size
        period += length[tile] * size + overhead
        ends[tile] = period
    total = period * blocks
    # Fewer keys than this are not worth an item.
    least = (numbers[_ITEM_COST] + size - 1) // size
    share = (total + numbers[_CTAS] - 1) // numbers[_CTAS]
    share = max(share, 2 * least * size + highest, 1)
    cuts = max(total - 1, 0) // share
    begins = np.empty(cuts, np.int64)
    # Of cuts inside of items.
    cut_item, cut_key = np.empty(cuts, np.int64), np.empty(cuts, np.int64)
    inside, tile, block, last_item, last_key = 0, 0, 0, -1, -1
    for cut in range(cuts):
        point = (cut + 1) * share
        while point // period > block:
            block, tile = block + 1, 0
        point -= block * period
        while ends[tile] <= point:
            tile += 1
        most = length[tile]
        # What is left behind the cut, rounded to tiles; an item is entered behind its overhead.
        key = most - (ends[tile] - point + size // 2) // size
        # Cut at the nearest place that leaves enough on both sides, be it the border of an item:
        # within `room` of the middle, both counted twice, it is not a border.
        room, off = max(most - least, 0), key + key - most
        item = block * count + tile + (1 if off >= room else 0)
        key = min(max(key, least), room) * size
        # Two cuts may meet in one place.
        if abs(off) < room and (item != last_item or key != last_key):
            cut_item[inside], cut_key[inside] = last_item, last_key = item, key
            inside += 1
        begins[cut] = item + inside
    num = count * blocks + inside
    items, first, end = np.empty(num, np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    piece, cut, tile = 0, 0, -1
    for item in range(count * blocks):
        tile = tile + 1 if tile + 1 < count else 0
        start = tiles[tile, _BEGIN]
        while cut < inside and cut_item[cut] == item:
            items[piece], first[piece] = item, start
            start = tiles[tile, _BEGIN] + cut_key[cut]
            end[piece] = start
            piece, cut = piece + 1, cut + 1
        items[piece], first[piece], end[piece] = item, start, tiles[tile, _END]
        piece += 1
    return items, first, end, begins


@inlined
def cut_at_multiples(
    numbers: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut tiles at multiples of the fixed size, if any, counted from the request's first key.

    Every block of heads is cut in the same way, so this is done once for all of them.

    Returns:
        Of each piece its tile, its first key, one past its last, and its cost.
    """
    count, size = tiles.shape[0], numbers[_SPLIT_SIZE]
    num = count
    if size:
        num = 0
        for tile in range(count):
            low = tiles[tile, _BEGIN] // size
            num += max((tiles[tile, _END] + size - 1) // size - low, 1)
    items, first, end = np.empty(num, np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    cost = np.empty(num, np.int64)
    piece = 0
    for tile in range(count):
        begin, stop = tiles[tile, _BEGIN], tiles[tile, _END]
        low = begin // size if size else 0
        chunks = max((stop + size - 1) // size - low, 1) if size else 1
        overhead = tiles[tile, _Q_LEN] * numbers[_TOKEN_COST] + numbers[_ITEM_COST]
        for chunk in range(low, low + chunks):
            items[piece] = tile
            first[piece] = max(begin, chunk * size) if size else begin
            end[piece] = min(stop, (chunk + 1) * size) if size else stop
            keys = end[piece] - first[piece]
            rounded = (keys + numbers[_TILE_KV] - 1) // numbers[_TILE_KV] * numbers[_TILE_KV]
            cost[piece] = rounded + overhead
            piece += 1
    return items, first, end, cost


@inlined
def assign_longest_first(cost: np.ndarray, blocks: int, ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """Give each piece, the longest first, to the CTA that has least to do.

    Ties go to the lower index.

    Args:
        cost: Cost of each piece of one block of heads, int64.
        blocks: How many blocks there are, piece after piece of each.
        ctas: How many CTAs there are.

    Returns:
        The pieces of all blocks, CTA after CTA, each with its block in the low `BLOCK_BITS`; and
        where each CTA but the first begins.
    """
    of_block, num = cost.size, cost.size * blocks
    longest = _longest_first(cost)
    cta = np.empty(num, np.int64)
    # A window of loads in ascending order, which moves on by what is taken from its front; in the
    # low bits stands whose they are, so that no two are equal.
    loads = np.empty(ctas + num, np.int64)
    for i in range(ctas):
        loads[i] = i
    raised, begins = np.empty(num, np.int64), np.zeros(ctas + 1, np.int64)
    first, done, run = 0, 0, 0
    while run < of_block:
        stop = _end_of_run(cost, longest, run)
        step, count = int(cost[longest[run]]) << _CTA_BITS, blocks * (stop - run)
        first = _share_out(loads, first, ctas, step, cta[done : done + count], raised, begins)
        done += count
        run = stop
    for i in range(ctas):
        begins[i + 1] += begins[i]
    order, until = np.empty(num, np.int64), begins.copy()
    done, run = 0, 0
    while run < of_block:
        stop = _end_of_run(cost, longest, run)
        for block in range(blocks):
            for i in range(run, stop):
                owner = np.uint64(cta[done])
                order[until[owner]] = longest[i] << _BLOCK_BITS | block
                until[owner] += 1
                done += 1
        run = stop
    return order, begins[1:ctas]


@compiled
def _end_of_run(cost: np.ndarray, longest: np.ndarray, run: int) -> int:
    """Return where pieces of another cost begin, in the order of `longest`."""
    stop = run + 1
    while stop < longest.size and cost[longest[stop]] == cost[longest[run]]:
        stop += 1
    return stop


@inlined
def _longest_first(cost: np.ndarray) -> np.ndarray:
    """Return the indices that sort costs in descending order; equal ones keep theirs."""
    high = cost.max()
    spread = high - cost.min() + 1
    if spread > 4 * cost.size + 1024:
        return np.argsort(-cost, kind="mergesort")
    # Counting how often each cost occurs takes a fraction of the time.
    begins = np.zeros(spread + 1, np.int64)
    for i in range(cost.size):
        begins[high - cost[i] + 1] += 1
    for i in range(spread):
        begins[i + 1] += begins[i]
    order = np.empty(cost.size, np.int64)
    for i in range(cost.size):
        at = high - cost[i]
        order[begins[at]] = i
        begins[at] += 1
    return order


@inlined
def _share_out(
    loads: np.ndarray,
    first: int,
    ctas: int,
    price: int,
    cta: np.ndarray,
    raised: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Give pieces of one cost away, each to the CTA that has least to do.

    Loads are raised by one number in ascending order, so those that were raised are in order, too,
    and the least one is the first of either row: that takes no heap, which would take most of a
    plan's time.

    Args:
        loads: Loads, in ascending order from `first` on.
        first: Where they begin.
        ctas: How many there are.
        price: What a piece adds.
        cta: Is filled with whose each piece is.
        raised: Room for as many numbers as there are pieces.
        counts: How many pieces each CTA has, one place further on; raised.

    Returns:
        Where loads begin now.
    """
    mask, stop, count, new = (1 << _CTA_BITS) - 1, first + ctas, cta.size, 0
    for i in range(count):
        if first < stop and (new == i or loads[first] < raised[new]):
            least = loads[first]
            first += 1
        else:
            least = raised[new]
            new += 1
        owner = least & mask
        cta[i] = owner
        counts[np.uint64(owner + 1)] += 1
        raised[i] = least + price
    # From the back: what is less than all that were raised stays where it is.
    old, last = stop - 1, count - 1
    to = first + ctas - 1
    while last >= new:
        if old >= first and loads[old] > raised[last]:
            loads[to] = loads[old]
            old -= 1
        else:
            loads[to] = raised[last]
            last -= 1
        to -= 1
    return first


@inlined
def number_units(tiles: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """Number the units of partial state of pieces.

    Args:
        tiles: `[tiles, len(Tile)]`, int64.
        item: The item of each piece on the uncut line, or its tile; ascending.

    Returns:
        The first unit of each piece, -1 if it has none, the units of all, and whether pieces of
        different tiles merge.
    """
    num, count, units, is_any = item.size, tiles.shape[0], 0, False
    is_partial = np.zeros(count, np.bool_)
    for tile in range(count):
        rows = tiles[tile, _ROWS]
        is_again = tile > 0 and tiles[tile - 1, _ROWS] == rows
        is_again |= tile + 1 < count and tiles[tile + 1, _ROWS] == rows
        is_partial[tile] = is_again or tiles[tile, _IS_PARTIAL] != 0
        is_any |= is_partial[tile]
    slot = np.empty(num, np.int64)
    tile, last = 0, 0
    for piece in range(num):
        # Items ascend by one at most; dividing each would take most of the time.
        tile, last = tile + item[piece] - last, item[piece]
        if tile >= count:
            tile -= count
        is_cut = piece > 0 and item[piece - 1] == item[piece]
        is_cut |= piece + 1 < num and item[piece + 1] == item[piece]
        if is_cut or is_partial[tile]:
            slot[piece] = units
            units += tiles[tile, _Q_LEN]
        else:
            slot[piece] = -1
    return slot, units, is_any


@inlined
def describe_tiles(
    buffer: np.ndarray, at: np.ndarray, numbers: np.ndarray, tiles: np.ndarray
) -> np.ndarray:
    """Return what all items of a tile have in common, int32 `[tiles, len(Item)]`.

    Args:
        buffer: The plan's, int32; requests have been written.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        tiles: `[tiles, len(Tile)]`, int64.
    """
    common = np.zeros((tiles.shape[0], _FIELDS), np.int32)
    for tile in range(tiles.shape[0]):
        row, line = tiles[tile], common[tile]
        request = row[_REQUEST]
        keys = buffer[at[_REQUEST_KV] + request]
        line[_ITEM_REQUEST] = request
        line[_ITEM_Q_START] = row[_Q_START]
        line[_ITEM_Q_LEN] = row[_Q_LEN]
        line[_ITEM_Q_POS] = row[_Q_POS]
        line[_ITEM_FULL_BEGIN] = row[_FULL_BEGIN]
        line[_ITEM_FULL_END] = row[_FULL_END]
        line[_ITEM_TABLE_BASE] = buffer[at[_KV_INDPTR] + request]
        line[_ITEM_KV_LEN] = keys
        line[_ITEM_REQUEST_Q_LEN] = buffer[at[_REQUEST_Q] + request]
        if numbers[_HAS_MASK]:
            first = buffer[at[_MASK_INDPTR] + request]
            line[_ITEM_MASK_BASE] = first + row[_Q_OFFSET] * ((keys + 31) // 32)
        line[_ITEM_FLAGS] = row[_FLAGS]
    return common


@inlined
def write_in_line(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    common: np.ndarray,
    item: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    slot: np.ndarray,
) -> None:
    """Write items in the order in which they stand on the line; there is room.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        common: Of `describe_tiles`.
        item: The item of each piece on the uncut line, ascending; int64 as all that follows.
        begin: Its first key.
        end: One past its last key.
        slot: Its first unit of partial state, or -1.
    """
    num, field_pairs = item.size, np.uint64(_FIELDS // 2)
    # Two fields at a time, and unsigned indices, as each signed one is looked at for being
    # negative: together that halves the time of this loop, the longest of a plan.
    wide = buffer[at[_ITEMS] : at[_ITEMS] + num * _FIELDS].view(np.int64)
    lines = buffer[at[_ITEMS] : at[_ITEMS] + num * _FIELDS].reshape(num, _FIELDS)
    pairs = common.reshape(-1).view(np.int64)
    tile, last, head, kv_head = 0, 0, 0, 0
    for piece in range(np.uint64(num)):
        # Items ascend by one at most; dividing each would take most of the time.
        tile, last = tile + item[piece] - last, item[piece]
        if tile >= common.shape[0]:
            tile, head = tile - common.shape[0], head + numbers[_HEADS_PER_TILE]
            kv_head = head // numbers[_GROUP]
        begins = np.uint64(tile) * field_pairs
        for pair in range(field_pairs):
            wide[piece * field_pairs + pair] = pairs[begins + pair]
        lines[piece, _ITEM_KV_HEAD] = kv_head
        lines[piece, _ITEM_HEAD] = head
        lines[piece, _ITEM_KV_BEGIN] = begin[piece]
        lines[piece, _ITEM_KV_END] = end[piece]
        lines[piece, _ITEM_OUT_SLOT] = slot[piece]


@inlined
def write_assigned(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    common: np.ndarray,
    item: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    slot: np.ndarray,
    units: int,
    order: np.ndarray,
) -> None:
    """Write the items of all blocks of heads, CTA after CTA; there is room.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        common: Of `describe_tiles`.
        item: The tile of each piece of one block; int64 as all that follows.
        begin: Its first key.
        end: One past its last key.
        slot: Its first unit of partial state, or -1.
        units: How many units one block has.
        order: Of `assign_longest_first`.
    """
    num, heads, field_pairs = order.size, numbers[_HEADS_PER_TILE], np.uint64(_FIELDS // 2)
    # As in `write_in_line`.
    wide = buffer[at[_ITEMS] : at[_ITEMS] + num * _FIELDS].view(np.int64)
    lines = buffer[at[_ITEMS] : at[_ITEMS] + num * _FIELDS].reshape(num, _FIELDS)
    pairs = common.reshape(-1).view(np.int64)
    kv_heads = np.arange(numbers[_BLOCKS]) * heads // numbers[_GROUP]
    for line in range(np.uint64(num)):
        piece, block = order[line] >> _BLOCK_BITS, order[line] & ((1 << _BLOCK_BITS) - 1)
        piece, number = np.uint64(piece), np.uint64(block)
        tile, unit = np.uint64(item[piece]), slot[piece]
        for pair in range(field_pairs):
            wide[line * field_pairs + pair] = pairs[tile * field_pairs + pair]
        lines[line, _ITEM_KV_HEAD] = kv_heads[number]
        lines[line, _ITEM_HEAD] = block * heads
        lines[line, _ITEM_KV_BEGIN] = begin[piece]
        lines[line, _ITEM_KV_END] = end[piece]
        lines[line, _ITEM_OUT_SLOT] = unit if unit < 0 else unit + block * units


@inlined
def merge_neighbours(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    tiles: np.ndarray,
    item: np.ndarray,
    slot: np.ndarray,
    blocks: int,
) -> tuple[int, int]:
    """Write which units merge, where only pieces of one item do: they stand side by side.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        tiles: `[tiles, len(Tile)]`, int64 as all that follows.
        item: The item of each piece on the uncut line, ascending.
        slot: Its first unit, or -1.
        blocks: How often all that will be there.

    Returns:
        How many merges there are, and the most units of one; nothing is written if there is no
        room for all blocks.
    """
    num, count = item.size, tiles.shape[0]
    merges, tile, last = 0, 0, 0
    for piece in range(num):
        if piece and item[piece] == last:
            continue
        tile, last = tile + item[piece] - last, item[piece]
        if tile >= count:
            tile -= count
        if slot[piece] >= 0:
            merges += tiles[tile, _Q_LEN]
    if merges * blocks > numbers[_MAX_MERGES]:
        return merges, 0
    merge, unit, piece, splits = 0, 0, 0, 0
    tile, block, last = 0, 0, 0
    while piece < num:
        tile, last = tile + item[piece] - last, item[piece]
        if tile >= count:
            tile, block = tile - count, block + 1
        stop = piece + 1
        while stop < num and item[stop] == last:
            stop += 1
        if slot[piece] >= 0:
            splits = max(splits, stop - piece)
            for token in range(tiles[tile, _Q_LEN]):
                buffer[at[_MERGE_INDPTR] + merge] = unit
                place = tiles[tile, _Q_START] + token
                buffer[at[_MERGE_TARGET] + merge] = place * numbers[_BLOCKS] + block
                merge += 1
                for other in range(piece, stop):
                    buffer[at[_MERGE_UNITS] + unit] = slot[other] + token
                    unit += 1
        piece = stop
    return merges, splits


@inlined
def merge_anywhere(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    tiles: np.ndarray,
    item: np.ndarray,
    slot: np.ndarray,
    units: int,
    blocks: int,
) -> tuple[int, int]:
    """Write which units merge, where different tiles may have the same rows.

    Args and returns as of `merge_neighbours`, and how many units there are.
    """
    count = tiles.shape[0]
    target = np.empty(units, np.int64)
    for piece in range(item.size):
        if slot[piece] >= 0:
            block, tile = item[piece] // count, item[piece] % count
            for token in range(tiles[tile, _Q_LEN]):
                place = tiles[tile, _Q_START] + token
                target[slot[piece] + token] = place * numbers[_BLOCKS] + block
    order = np.argsort(target, kind="mergesort")
    merges = 0
    for i in range(units):
        if i == 0 or target[order[i]] != target[order[i - 1]]:
            merges += 1
    if merges * blocks > numbers[_MAX_MERGES]:
        return merges, 0
    merge, splits, since = 0, 0, 0
    for i in range(units):
        if i == 0 or target[order[i]] != target[order[i - 1]]:
            buffer[at[_MERGE_INDPTR] + merge] = i
            buffer[at[_MERGE_TARGET] + merge] = target[order[i]]
            merge, since = merge + 1, i
        splits = max(splits, i + 1 - since)
        buffer[at[_MERGE_UNITS] + i] = order[i]
    return merges, splits


@inlined
def finish_merges(
    buffer: np.ndarray,
    at: np.ndarray,
    numbers: np.ndarray,
    units: int,
    merges: int,
    splits: int,
    blocks: int,
) -> None:
    """Repeat the merges of one block of heads for the others, and write how many there are."""
    indptr = buffer[at[_MERGE_INDPTR] : at[_MERGE_INDPTR] + numbers[_MAX_MERGES] + 1]
    target = buffer[at[_MERGE_TARGET] : at[_MERGE_TARGET] + merges * blocks]
    merged = buffer[at[_MERGE_UNITS] : at[_MERGE_UNITS] + units * blocks]
    for block in range(1, blocks):
        for i in range(merges):
            indptr[block * merges + i] = indptr[i] + block * units
            target[block * merges + i] = target[i] + block
        for i in range(units):
            merged[block * units + i] = merged[i] + block * units
    indptr[merges * blocks :] = units * blocks
    counts = buffer[at[_COUNTS] : at[_COUNTS] + 16]
    counts[3], counts[4], counts[5] = units * blocks, merges * blocks, splits


@compiled
def lay_out(
    buffer: np.ndarray, at: np.ndarray, numbers: np.ndarray, tiles: np.ndarray
) -> tuple[int, int]:
    """Write items, what each CTA does, and how partial states merge.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `PARTS`.
        numbers: The spec's, by `Number`.
        tiles: `[tiles, len(Tile)]`, int64; there is one at least.

    Returns:
        The number that says how much room there is for what has too little, or -1; then how much
        it needs.
    """
    is_balanced = numbers[_SPLIT_SIZE] < 0
    # Pieces of all blocks of heads, or of one of them where all are cut in the same way.
    blocks = 1 if is_balanced else numbers[_BLOCKS]
    if is_balanced:
        item, begin, end, extra = cut_evenly(numbers, tiles)
    else:
        item, begin, end, extra = cut_at_multiples(numbers, tiles)
    num = item.size * blocks
    if num > numbers[_MAX_ITEMS]:
        return _MAX_ITEMS, num
    slot, units, is_any = number_units(tiles, item)
    if units * blocks > numbers[_MAX_UNITS]:
        return _MAX_UNITS, units * blocks
    common = describe_tiles(buffer, at, numbers, tiles)
    if is_balanced:
        begins = extra
        write_in_line(buffer, at, numbers, common, item, begin, end, slot)
    else:
        order, begins = assign_longest_first(extra, blocks, numbers[_CTAS])
        write_assigned(buffer, at, numbers, common, item, begin, end, slot, units, order)
    work_indptr = buffer[at[_WORK_INDPTR] : at[_WORK_INDPTR] + numbers[_CTAS] + 1]
    for cta in range(work_indptr.size):
        work_indptr[cta] = begins[cta - 1] if 0 < cta <= begins.size else num
    work_indptr[0] = 0
    buffer[at[_COUNTS] + 2] = num
    if units:
        if is_any:
            merges, splits = merge_anywhere(buffer, at, numbers, tiles, item, slot, units, blocks)
        else:
            merges, splits = merge_neighbours(buffer, at, numbers, tiles, item, slot, blocks)
        if merges * blocks > numbers[_MAX_MERGES]:
            return _MAX_MERGES, merges * blocks
        finish_merges(buffer, at, numbers, units, merges, splits, blocks)
    return -1, 0
