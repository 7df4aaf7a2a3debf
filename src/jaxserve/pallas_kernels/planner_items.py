"""The planner's loops over items, compiled by numba; see `planner_loops`.

Each call from Python costs some microseconds, so one function lays out all items; its parts are
compiled into it, once.
"""

import numpy as np

from jaxserve.core.compiled import compiled, inlined
from jaxserve.pallas_kernels import planner_words as words
from jaxserve.pallas_kernels.plan import CTA_BITS


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
    count, blocks, size = tiles.shape[0], numbers[words.BLOCKS], numbers[words.TILE_KV]
    length, ends = np.empty(count, np.int64), np.empty(count, np.int64)  # in tiles; in keys
    highest, period = 0, 0
    for tile in range(count):
        overhead = tiles[tile, words.Q_LEN] * numbers[words.TOKEN_COST] + numbers[words.ITEM_COST]
        highest = max(highest, overhead)
        length[tile] = (tiles[tile, words.END] - tiles[tile, words.BEGIN] + size - 1) // size
        period += length[tile] * size + overhead
        ends[tile] = period
    total = period * blocks
    # Fewer keys than this are not worth an item.
    least = (numbers[words.ITEM_COST] + size - 1) // size
    share = (total + numbers[words.CTAS] - 1) // numbers[words.CTAS]
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
        start = tiles[tile, words.BEGIN]
        while cut < inside and cut_item[cut] == item:
            items[piece], first[piece] = item, start
            start = tiles[tile, words.BEGIN] + cut_key[cut]
            end[piece] = start
            piece, cut = piece + 1, cut + 1
        items[piece], first[piece], end[piece] = item, start, tiles[tile, words.END]
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
    count, size = tiles.shape[0], numbers[words.SPLIT_SIZE]
    num = count
    if size:
        num = 0
        for tile in range(count):
            low = tiles[tile, words.BEGIN] // size
            num += max((tiles[tile, words.END] + size - 1) // size - low, 1)
    items, first, end = np.empty(num, np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    cost = np.empty(num, np.int64)
    piece = 0
    for tile in range(count):
        begin, stop = tiles[tile, words.BEGIN], tiles[tile, words.END]
        low = begin // size if size else 0
        chunks = max((stop + size - 1) // size - low, 1) if size else 1
        overhead = tiles[tile, words.Q_LEN] * numbers[words.TOKEN_COST] + numbers[words.ITEM_COST]
        for chunk in range(low, low + chunks):
            items[piece] = tile
            first[piece] = max(begin, chunk * size) if size else begin
            end[piece] = min(stop, (chunk + 1) * size) if size else stop
            keys = end[piece] - first[piece]
            rounded = (
                (keys + numbers[words.TILE_KV] - 1)
                // numbers[words.TILE_KV]
                * numbers[words.TILE_KV]
            )
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
        The pieces of all blocks, CTA after CTA, each with its block in the low `words.BLOCK_BITS`;
        and where each CTA but the first begins.
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
        step, count = int(cost[longest[run]]) << CTA_BITS, blocks * (stop - run)
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
                order[until[owner]] = longest[i] << words.BLOCK_BITS | block
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
    mask, stop, count, new = (1 << CTA_BITS) - 1, first + ctas, cta.size, 0
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
        tiles: `[tiles, len(words.Tile)]`, int64.
        item: The item of each piece on the uncut line, or its tile; ascending.

    Returns:
        The first unit of each piece, -1 if it has none, the units of all, and whether pieces of
        different tiles merge.
    """
    num, count, units, is_any = item.size, tiles.shape[0], 0, False
    is_partial = np.zeros(count, np.bool_)
    for tile in range(count):
        rows = tiles[tile, words.ROWS]
        is_again = tile > 0 and tiles[tile - 1, words.ROWS] == rows
        is_again |= tile + 1 < count and tiles[tile + 1, words.ROWS] == rows
        is_partial[tile] = is_again or tiles[tile, words.IS_PARTIAL] != 0
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
            units += tiles[tile, words.Q_LEN]
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
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        tiles: `[tiles, len(words.Tile)]`, int64.
    """
    common = np.zeros((tiles.shape[0], words.FIELDS), np.int32)
    for tile in range(tiles.shape[0]):
        row, line = tiles[tile], common[tile]
        request = row[words.REQUEST]
        keys = buffer[at[words.REQUEST_KV] + request]
        line[words.ITEM_REQUEST] = request
        line[words.ITEM_Q_START] = row[words.Q_START]
        line[words.ITEM_Q_LEN] = row[words.Q_LEN]
        line[words.ITEM_Q_POS] = row[words.Q_POS]
        line[words.ITEM_FULL_BEGIN] = row[words.FULL_BEGIN]
        line[words.ITEM_FULL_END] = row[words.FULL_END]
        line[words.ITEM_TABLE_BASE] = buffer[at[words.KV_INDPTR] + request]
        line[words.ITEM_KV_LEN] = keys
        line[words.ITEM_REQUEST_Q_LEN] = buffer[at[words.REQUEST_Q] + request]
        if numbers[words.HAS_MASK]:
            first = buffer[at[words.MASK_INDPTR] + request]
            line[words.ITEM_MASK_BASE] = first + row[words.Q_OFFSET] * ((keys + 31) // 32)
        line[words.ITEM_FLAGS] = row[words.FLAGS]
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
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        common: Of `describe_tiles`.
        item: The item of each piece on the uncut line, ascending; int64 as all that follows.
        begin: Its first key.
        end: One past its last key.
        slot: Its first unit of partial state, or -1.
    """
    num, field_pairs = item.size, np.uint64(words.FIELDS // 2)
    # Two fields at a time, and unsigned indices, as each signed one is looked at for being
    # negative: together that halves the time of this loop, the longest of a plan.
    wide = buffer[at[words.ITEMS] : at[words.ITEMS] + num * words.FIELDS].view(np.int64)
    lines = buffer[at[words.ITEMS] : at[words.ITEMS] + num * words.FIELDS].reshape(
        num, words.FIELDS
    )
    pairs = common.reshape(-1).view(np.int64)
    tile, last, head, kv_head = 0, 0, 0, 0
    for piece in range(np.uint64(num)):
        # Items ascend by one at most; dividing each would take most of the time.
        tile, last = tile + item[piece] - last, item[piece]
        if tile >= common.shape[0]:
            tile, head = tile - common.shape[0], head + numbers[words.HEADS_PER_TILE]
            kv_head = head // numbers[words.GROUP]
        begins = np.uint64(tile) * field_pairs
        for pair in range(field_pairs):
            wide[piece * field_pairs + pair] = pairs[begins + pair]
        lines[piece, words.ITEM_KV_HEAD] = kv_head
        lines[piece, words.ITEM_HEAD] = head
        lines[piece, words.ITEM_KV_BEGIN] = begin[piece]
        lines[piece, words.ITEM_KV_END] = end[piece]
        lines[piece, words.ITEM_OUT_SLOT] = slot[piece]


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
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        common: Of `describe_tiles`.
        item: The tile of each piece of one block; int64 as all that follows.
        begin: Its first key.
        end: One past its last key.
        slot: Its first unit of partial state, or -1.
        units: How many units one block has.
        order: Of `assign_longest_first`.
    """
    num, heads, field_pairs = (
        order.size,
        numbers[words.HEADS_PER_TILE],
        np.uint64(words.FIELDS // 2),
    )
    # As in `write_in_line`.
    wide = buffer[at[words.ITEMS] : at[words.ITEMS] + num * words.FIELDS].view(np.int64)
    lines = buffer[at[words.ITEMS] : at[words.ITEMS] + num * words.FIELDS].reshape(
        num, words.FIELDS
    )
    pairs = common.reshape(-1).view(np.int64)
    kv_heads = np.arange(numbers[words.BLOCKS]) * heads // numbers[words.GROUP]
    for line in range(np.uint64(num)):
        piece, block = order[line] >> words.BLOCK_BITS, order[line] & ((1 << words.BLOCK_BITS) - 1)
        piece, number = np.uint64(piece), np.uint64(block)
        tile, unit = np.uint64(item[piece]), slot[piece]
        for pair in range(field_pairs):
            wide[line * field_pairs + pair] = pairs[tile * field_pairs + pair]
        lines[line, words.ITEM_KV_HEAD] = kv_heads[number]
        lines[line, words.ITEM_HEAD] = block * heads
        lines[line, words.ITEM_KV_BEGIN] = begin[piece]
        lines[line, words.ITEM_KV_END] = end[piece]
        lines[line, words.ITEM_OUT_SLOT] = unit if unit < 0 else unit + block * units


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
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        tiles: `[tiles, len(words.Tile)]`, int64 as all that follows.
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
            merges += tiles[tile, words.Q_LEN]
    if merges * blocks > numbers[words.MAX_MERGES]:
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
            for token in range(tiles[tile, words.Q_LEN]):
                buffer[at[words.MERGE_INDPTR] + merge] = unit
                place = tiles[tile, words.Q_START] + token
                buffer[at[words.MERGE_TARGET] + merge] = place * numbers[words.BLOCKS] + block
                merge += 1
                for other in range(piece, stop):
                    buffer[at[words.MERGE_UNITS] + unit] = slot[other] + token
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
            for token in range(tiles[tile, words.Q_LEN]):
                place = tiles[tile, words.Q_START] + token
                target[slot[piece] + token] = place * numbers[words.BLOCKS] + block
    order = np.argsort(target, kind="mergesort")
    merges = 0
    for i in range(units):
        if i == 0 or target[order[i]] != target[order[i - 1]]:
            merges += 1
    if merges * blocks > numbers[words.MAX_MERGES]:
        return merges, 0
    merge, splits, since = 0, 0, 0
    for i in range(units):
        if i == 0 or target[order[i]] != target[order[i - 1]]:
            buffer[at[words.MERGE_INDPTR] + merge] = i
            buffer[at[words.MERGE_TARGET] + merge] = target[order[i]]
            merge, since = merge + 1, i
        splits = max(splits, i + 1 - since)
        buffer[at[words.MERGE_UNITS] + i] = order[i]
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
    indptr = buffer[at[words.MERGE_INDPTR] : at[words.MERGE_INDPTR] + numbers[words.MAX_MERGES] + 1]
    target = buffer[at[words.MERGE_TARGET] : at[words.MERGE_TARGET] + merges * blocks]
    merged = buffer[at[words.MERGE_UNITS] : at[words.MERGE_UNITS] + units * blocks]
    for block in range(1, blocks):
        for i in range(merges):
            indptr[block * merges + i] = indptr[i] + block * units
            target[block * merges + i] = target[i] + block
        for i in range(units):
            merged[block * units + i] = merged[i] + block * units
    indptr[merges * blocks :] = units * blocks
    counts = buffer[at[words.COUNTS] : at[words.COUNTS] + 16]
    counts[3], counts[4], counts[5] = units * blocks, merges * blocks, splits


@compiled
def lay_out(
    buffer: np.ndarray, at: np.ndarray, numbers: np.ndarray, tiles: np.ndarray
) -> tuple[int, int]:
    """Write items, what each CTA does, and how partial states merge.

    Args:
        buffer: The plan's, int32.
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        tiles: `[tiles, len(words.Tile)]`, int64; there is one at least.

    Returns:
        The number that says how much room there is for what has too little, or -1; then how much
        it needs.
    """
    is_balanced = numbers[words.SPLIT_SIZE] < 0
    # Pieces of all blocks of heads, or of one of them where all are cut in the same way.
    blocks = 1 if is_balanced else numbers[words.BLOCKS]
    if is_balanced:
        item, begin, end, extra = cut_evenly(numbers, tiles)
    else:
        item, begin, end, extra = cut_at_multiples(numbers, tiles)
    num = item.size * blocks
    if num > numbers[words.MAX_ITEMS]:
        return words.MAX_ITEMS, num
    slot, units, is_any = number_units(tiles, item)
    if units * blocks > numbers[words.MAX_UNITS]:
        return words.MAX_UNITS, units * blocks
    common = describe_tiles(buffer, at, numbers, tiles)
    if is_balanced:
        begins = extra
        write_in_line(buffer, at, numbers, common, item, begin, end, slot)
    else:
        order, begins = assign_longest_first(extra, blocks, numbers[words.CTAS])
        write_assigned(buffer, at, numbers, common, item, begin, end, slot, units, order)
    work_indptr = buffer[at[words.WORK_INDPTR] : at[words.WORK_INDPTR] + numbers[words.CTAS] + 1]
    for cta in range(work_indptr.size):
        work_indptr[cta] = begins[cta - 1] if 0 < cta <= begins.size else num
    work_indptr[0] = 0
    buffer[at[words.COUNTS] + 2] = num
    if units:
        if is_any:
            merges, splits = merge_anywhere(buffer, at, numbers, tiles, item, slot, units, blocks)
        else:
            merges, splits = merge_neighbours(buffer, at, numbers, tiles, item, slot, blocks)
        if merges * blocks > numbers[words.MAX_MERGES]:
            return words.MAX_MERGES, merges * blocks
        finish_merges(buffer, at, numbers, units, merges, splits, blocks)
    return -1, 0
