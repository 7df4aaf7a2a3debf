"""Makes plans, in numpy and without a loop over items: a step must not wait for its plan.

The balanced mode lays all work on a line, item after item, and cuts the line into equal pieces, one
per CTA. Only what lies across a cut is split, so there are fewer partial states than CTAs, and no
CTA has more than its share. The other modes have items of given sizes and assign the longest first.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import CTA_BITS, Item, ItemFlag, Plan, PlanSpec
from jaxserve.pallas_kernels.prefixes import SharedPrefix


def make_plan(
    spec: PlanSpec,
    q_len: np.ndarray,
    table: PageTable,
    *,
    q_start: np.ndarray | None = None,
    shared: Sequence[SharedPrefix] = (),
    out: np.ndarray | None = None,
) -> Plan:
    """Plan the attention of one step.

    Equal arguments give equal plans, to the last bit.

    Args:
        spec: What is static.
        q_len: Query tokens of each request; the last of them stands at its last key.
        table: Pages and numbers of keys of each request, with the keys of this step.
        q_start: First token of each request among the packed tokens; None packs them without gaps,
            in order.
        shared: Prefixes to be read once for all their requests, larger groups before their parts;
            only with `spec.cascade_levels`.
        out: Zeros to write the plan into, int32 `[spec.num_words]`; None allocates them.

    Returns:
        The plan, its buffer in numpy.

    Raises:
        ValueError: If there are more requests, tokens, pages or items than the spec has room for,
            or the arguments do not fit each other.

    Source: FlashInfer (arXiv 2501.01005), section 3.3.1, for the plan as such and for assigning
    the longest item first; Stream-K (arXiv 2301.03598) for cutting a line of work.

    Differs: The balanced mode cuts evenly rather than choosing a size of chunks, which leaves no
    CTA idle at the end and makes fewer partial states.
    """
    requests = _check(spec, q_len, table, q_start, shared)
    plan = Plan(buffer=np.zeros(spec.num_words, np.int32) if out is None else out, spec=spec)
    _write_requests(plan, requests, shared)
    plan.merge_target[:] = spec.max_tokens * spec.num_blocks
    tiles = _visited(spec, _tiles(spec, requests))
    if shared:
        tiles = _with_shared(plan, tiles, requests, shared)
    if tiles.q_len.size:
        is_balanced = spec.split_mode == "balanced"
        pieces = _cut_evenly(spec, tiles) if is_balanced else _cut_at_multiples(spec, tiles)
        _write_items(plan, tiles, pieces)
    return plan


@dataclasses.dataclass(slots=True)
class _Requests:
    """What `make_plan` was given, in one form."""

    q_len: np.ndarray
    kv_len: np.ndarray
    q_start: np.ndarray
    """First token, in the order of the plan."""
    shared_len: np.ndarray
    """Keys that are read for several requests at once."""
    table: PageTable
    num_tokens: int
    is_decode: bool
    """Whether every request has one token, one after another."""


@dataclasses.dataclass(slots=True)
class _Tiles:
    """Tiles of query rows and the keys that they visit, one array element per tile.

    A tile that visits several stretches of keys appears once for each, side by side.
    """

    request: np.ndarray
    q_start: np.ndarray
    q_offset: np.ndarray
    """Tokens of the request before the tile's."""
    q_len: np.ndarray
    q_pos: np.ndarray
    """Lowest position of a query."""
    begin: np.ndarray
    end: np.ndarray
    full_begin: np.ndarray
    full_end: np.ndarray
    flags: np.ndarray
    rows: np.ndarray
    """Equal numbers for equal query rows."""
    is_partial: np.ndarray | None
    """Whether the tile is merged with others whatever happens; None if none is."""

    def take(self, index: np.ndarray) -> "_Tiles":
        """Return the tiles at some indices."""
        return _Tiles(*(getattr(self, name)[index] for name in _TILE_ARRAYS), is_partial=None)

    def cost(self, spec: PlanSpec) -> tuple[np.ndarray, np.ndarray]:
        """Return what each tile costs, in keys, and the part that is not its keys."""
        overhead = self.q_len * (spec.row_cost * spec.heads_per_tile) + spec.item_cost
        return _whole_tiles(spec, self.end - self.begin) + overhead, overhead


_TILE_ARRAYS = tuple(f.name for f in dataclasses.fields(_Tiles) if f.name != "is_partial")


@dataclasses.dataclass(slots=True)
class _Pieces:
    """Items before they are written: each a tile, a block of heads, and some of the tile's keys.

    Attributes:
        tile: Index of the tile.
        block: Block of heads.
        is_split: Whether other pieces visit other keys of the same tile.
        at: Pieces whose keys are not all of the tile's; None if `begin` and `end` are of all.
        begin: First key of those.
        end: One past the last key.
        work_indptr: Where each CTA begins.
        order: In which order the CTAs take the pieces; None as they stand.
    """

    tile: np.ndarray
    block: np.ndarray
    is_split: np.ndarray
    at: np.ndarray | None
    begin: np.ndarray
    end: np.ndarray
    work_indptr: np.ndarray
    order: np.ndarray | None


def _whole_tiles(spec: PlanSpec, keys: np.ndarray) -> np.ndarray:
    return (keys + (spec.tile_kv - 1)) // spec.tile_kv * spec.tile_kv


def _check(
    spec: PlanSpec,
    q_len: np.ndarray,
    table: PageTable,
    q_start: np.ndarray | None,
    shared: Sequence[SharedPrefix],
) -> _Requests:
    """Check what `make_plan` was given."""
    q_len, kv_len = np.asarray(q_len, np.int64), np.asarray(table.kv_len, np.int64)
    if q_len.ndim != 1 or q_len.shape != kv_len.shape or table.indptr.size != q_len.size + 1:
        raise ValueError(
            "q_len and table must speak of the same requests, got shapes "
            f"{q_len.shape}, kv_len {kv_len.shape} and indptr {table.indptr.shape}."
        )
    if q_len.size > spec.max_requests:
        raise ValueError(
            f"{q_len.size} requests, but the spec has room for {spec.max_requests}; raise "
            "max_requests."
        )
    least, most = (int(q_len.min()), int(q_len.max())) if q_len.size else (0, 0)
    if least < 0 or (kv_len.size and kv_len.min() < 0):
        raise ValueError("q_len and kv_len must not be negative.")
    total = most * q_len.size if least == most else int(q_len.sum())
    if q_start is None:
        starts, last = np.cumsum(q_len) - q_len, total
    else:
        starts = np.array(q_start, np.int64)  # a copy, which the plan's order of tokens changes
        last = int((starts + q_len).max()) if q_len.size else 0
    if last > spec.max_tokens:
        raise ValueError(
            f"{last} query tokens, but the spec has room for {spec.max_tokens}; raise max_tokens."
        )
    if table.indices.size > spec.max_pages:
        raise ValueError(
            f"{table.indices.size} pages, but the spec has room for {spec.max_pages}; raise "
            "max_pages."
        )
    lacking = (table.indptr[1:] - table.indptr[:-1]) * spec.page_size < kv_len
    if lacking.any():
        worst = int(lacking.argmax())
        raise ValueError(
            f"request {worst} has {kv_len[worst]} keys but "
            f"{table.indptr[worst + 1] - table.indptr[worst]} pages of {spec.page_size}; add pages "
            "to the table."
        )
    requests = _Requests(
        q_len=q_len,
        kv_len=kv_len,
        q_start=starts,
        shared_len=np.zeros(q_len.size, np.int64),
        table=table,
        num_tokens=total,
        is_decode=least == most == 1 and q_start is None and not spec.cascade_levels,
    )
    depth = np.zeros(q_len.size, np.int64)
    for prefix in shared:
        if not set(prefix.requests) <= set(range(q_len.size)) or len(set(prefix.requests)) < 2:
            raise ValueError(
                f"a shared prefix needs at least two of {q_len.size} requests, got "
                f"{prefix.requests}."
            )
        depth[list(prefix.requests)] += 1
    if depth.max(initial=0) > spec.cascade_levels:
        raise ValueError(
            f"shared prefixes are nested {depth.max()} deep, but the spec has room for "
            f"{spec.cascade_levels}; raise cascade_levels."
        )
    for prefix in shared:
        _check_prefix(spec, requests, prefix)
    return requests


def _check_prefix(spec: PlanSpec, requests: _Requests, prefix: SharedPrefix) -> None:
    """Check one shared prefix, and mark its keys as read."""
    members = np.asarray(prefix.requests, np.int64)
    if not 0 <= prefix.begin < prefix.end or prefix.begin % spec.page_size:
        raise ValueError(
            f"a shared prefix must begin at a page and end behind it, got {prefix.begin} to "
            f"{prefix.end} with pages of {spec.page_size}."
        )
    before = int((requests.kv_len - requests.q_len)[members].min())
    if prefix.end > before or prefix.end % spec.page_size:
        raise ValueError(
            f"a shared prefix must end at a page and at no more than the {before} keys that its "
            f"requests had before this step, got {prefix.end}."
        )
    low, high = prefix.begin // spec.page_size, prefix.end // spec.page_size
    table = requests.table
    span = np.arange(low, high)
    pages = table.indices[table.indptr[members][:, None] + span[None, :]]
    if (pages != pages[0]).any():
        raise ValueError(
            f"requests {prefix.requests} do not have the same pages for keys {prefix.begin} to "
            f"{prefix.end}."
        )
    if (requests.shared_len[members] != prefix.begin).any():
        raise ValueError(
            f"the prefix of requests {prefix.requests} begins at {prefix.begin}, but larger groups "
            f"share {requests.shared_len[members].tolist()} keys of them; groups must be nested, "
            "larger ones first, each beginning where the next larger one ends."
        )
    requests.shared_len[members] = prefix.end


def _write_requests(plan: Plan, requests: _Requests, shared: Sequence[SharedPrefix]) -> None:
    """Write what the plan says about requests and tokens, and bring tokens into its order."""
    spec, table = plan.spec, requests.table
    num, q_len, kv_len = requests.q_len.size, requests.q_len, requests.kv_len
    kv_indptr = plan.kv_indptr
    kv_indptr[: num + 1] = table.indptr
    kv_indptr[num + 1 :] = table.indptr[-1]
    plan.kv_indices[: table.indices.size] = table.indices
    plan.kv_len[:num] = kv_len
    plan.q_len[:num] = q_len
    counts, token_request = plan.part("counts"), plan.token_request
    counts[0], counts[1] = num, requests.num_tokens
    if spec.variant.packed_mask != "none":
        words = plan.mask_indptr
        np.cumsum(q_len * -(-kv_len // 32), out=words[1 : num + 1])
        words[num + 1 :] = words[num]
    if spec.cascade_levels:
        order = _token_order(spec, requests, shared)
        plan.token_order[:] = order
        plan.token_place[order] = np.arange(order.size, dtype=np.int32)
        nonempty = q_len > 0
        requests.q_start[nonempty] = plan.token_place[requests.q_start[nonempty]]
    plan.q_start[:num] = requests.q_start
    if requests.is_decode:
        token_request[:num] = np.arange(num)
        token_request[num:] = -1
        plan.token_position[:num] = kv_len - 1
        return
    token_request[:] = -1
    request = np.repeat(np.arange(num), q_len)
    offset = np.arange(requests.num_tokens) - np.repeat(np.cumsum(q_len) - q_len, q_len)
    place = requests.q_start[request] + offset
    token_request[place] = request
    plan.token_position[place] = (kv_len - q_len)[request] + offset


def _token_order(spec: PlanSpec, requests: _Requests, shared: Sequence[SharedPrefix]) -> np.ndarray:
    """Bring tokens of requests that share a prefix side by side; padding goes to the end."""
    num = requests.q_len.size
    groups = np.zeros((len(shared) + 1, num), np.int64)
    groups[-1] = requests.q_start
    for row, prefix in enumerate(shared):
        # Requests outside follow those inside, in each part of a larger group.
        groups[row] = 1
        groups[row, list(prefix.requests)] = 0
    ranked = np.lexsort(groups[::-1])
    q_len, starts = requests.q_len[ranked], requests.q_start[ranked]
    places = np.cumsum(q_len) - q_len
    tokens = np.arange(int(q_len.sum())) + np.repeat(starts - places, q_len)
    is_used = np.zeros(spec.max_tokens, np.bool_)
    is_used[tokens] = True
    return np.concatenate([tokens, np.flatnonzero(~is_used)])


def _tiles(spec: PlanSpec, requests: _Requests) -> _Tiles:
    """Cut requests into tiles of query rows, and find what each tile sees."""
    q_len, kv_len, most = requests.q_len, requests.kv_len, spec.tile_tokens
    index = np.arange(q_len.size)
    if requests.is_decode:
        request, offset = index, np.zeros_like(index)
        count, keys, low, start = q_len, kv_len, kv_len - 1, requests.q_start
        flags = np.full(q_len.size, int(ItemFlag.DECODE))
    else:
        number = -(-q_len // most)
        request = np.repeat(index, number)
        offset = (np.arange(request.size) - np.repeat(np.cumsum(number) - number, number)) * most
        count = np.minimum(q_len[request] - offset, most)
        keys, start = kv_len[request], requests.q_start[request] + offset
        low = keys - q_len[request] + offset
        flags = (q_len[request] <= spec.decode_tokens) * int(ItemFlag.DECODE)
    begin, end, full_begin, full_end = _bounds(spec, low, low + count, keys)
    return _Tiles(
        request=request,
        q_start=start,
        q_offset=offset,
        q_len=count,
        q_pos=low,
        begin=begin,
        end=end,
        full_begin=full_begin,
        full_end=full_end,
        flags=flags,
        rows=index if requests.is_decode else np.arange(request.size),
        is_partial=None,
    )


def _bounds(
    spec: PlanSpec, low: np.ndarray, high: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the keys that queries at positions `low <= position < high` see: any, and all of them.

    Returns:
        Begin and end of the keys that some query sees, then of those that every query sees. Only
        the first two are within the request.
    """
    end, full_end = keys, keys
    if spec.causal:
        end = np.maximum(np.minimum(high, keys), 0)
        full_end = low + 1
    if spec.window is None:
        zero = np.zeros_like(low)
        return zero, end, zero, full_end
    tile = spec.tile_kv
    begin = np.maximum(low + (1 - spec.window), 0) // tile * tile
    begin = np.where(begin < end, begin, 0)
    end = np.where(low + (1 - spec.window) < end, end, 0)
    return begin, end, high - spec.window, full_end


def _visited(spec: PlanSpec, tiles: _Tiles) -> _Tiles:
    """Leave out blocks of keys that the variant hides from a whole tile."""
    ask = spec.variant.block_mask
    if ask is None:
        return tiles
    size = spec.tile_kv
    count = np.maximum(-(-(tiles.end - tiles.begin) // size), 1)
    first = np.cumsum(count) - count
    tile = np.repeat(np.arange(count.size), count)
    low = tiles.begin[tile] + (np.arange(tile.size) - first[tile]) * size
    high = np.minimum(low + size, tiles.end[tile])
    q_low = tiles.q_pos[tile]
    kind = np.broadcast_to(
        ask(tiles.request[tile], q_low, q_low + tiles.q_len[tile], low, high), low.shape
    )
    is_empty = kind == 0
    is_full = kind == 2
    # A run of visited blocks begins after a hidden one and at the beginning of a tile; a tile
    # that sees nothing keeps its first block, without keys, so that its output is written.
    is_first = np.zeros(tile.size, np.bool_)
    is_first[first] = True
    lonely = np.logical_and.reduceat(is_empty, first)
    is_kept = ~is_empty
    is_kept[first[lonely]] = True
    begins = is_kept & (is_first | ~np.concatenate([[False], is_kept[:-1]]))
    ends = is_kept & (np.append(is_first[1:], True) | ~np.append(is_kept[1:], False))
    at, until = np.flatnonzero(begins), np.flatnonzero(ends)
    taken = tiles.take(tile[at])
    taken.begin = low[at]
    taken.end = np.where(lonely[tile[at]], low[at], high[until])
    # The longest stretch of full blocks would be better; the first one is simpler to find.
    full_at, full_until = _first_full(is_full, at, until)
    has_full = full_until > full_at
    taken.full_begin = np.maximum(taken.full_begin, low[np.where(has_full, full_at, 0)])
    full_end = np.where(has_full, high[full_until - 1], 0)
    taken.full_end = np.minimum(taken.full_end, full_end)
    return taken


def _first_full(
    is_full: np.ndarray, at: np.ndarray, until: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the first stretch of full blocks, if any, in each run `at <= block <= until`."""
    blocks = np.arange(is_full.size + 1)
    fulls = np.append(is_full, False)
    # From each block on: the next one that is full, and the next one that is not.
    next_full = np.minimum.accumulate(np.where(fulls, blocks, is_full.size)[::-1])[::-1]
    next_other = np.minimum.accumulate(np.where(fulls, is_full.size, blocks)[::-1])[::-1]
    start = np.minimum(next_full[at], until + 1)
    return start, np.minimum(next_other[start], until + 1)


def _with_shared(
    plan: Plan, own: _Tiles, requests: _Requests, shared: Sequence[SharedPrefix]
) -> _Tiles:
    """Put tiles of shared prefixes before those of requests, which then read only the rest."""
    spec = plan.spec
    parts: list[_Tiles] = []
    positions = plan.token_position.astype(np.int64)
    number = 0
    plan.shared_len[: requests.q_len.size] = requests.shared_len
    for prefix in shared:
        members = np.asarray(prefix.requests)
        total = int(requests.q_len[members].sum())
        start = int(requests.q_start[members[requests.q_len[members] > 0]].min()) if total else 0
        offset = np.arange(0, total, spec.tile_tokens)
        if not offset.size:
            continue
        plan.prefixes[number] = members[0], start, total, prefix.begin, prefix.end
        number += 1
        count = np.minimum(spec.tile_tokens, total - offset)
        seen = positions[start : start + total]
        low = np.minimum.reduceat(seen, offset)
        high = np.maximum.reduceat(seen, offset) + 1
        end = np.full(offset.size, prefix.end)
        begin, end, full_begin, full_end = _bounds(spec, low, high, end)
        begin = np.maximum(begin, prefix.begin)
        begin = np.where(begin < end, begin, prefix.begin)
        end = np.maximum(begin, end)
        if spec.variant.block_mask is not None:
            full_end = np.zeros_like(full_end)  # it was not asked about shared keys
        parts.append(
            _Tiles(
                request=np.full(offset.size, members[0]),
                q_start=start + offset,
                q_offset=np.zeros_like(offset),
                q_len=count,
                q_pos=low,
                begin=begin,
                end=end,
                full_begin=full_begin,
                full_end=np.minimum(full_end, prefix.end),
                flags=np.full(offset.size, int(ItemFlag.SHARED)),
                rows=np.arange(offset.size),
                is_partial=np.ones(offset.size, np.bool_),
            )
        )
    plan.part("counts")[6] = number
    shared_len = requests.shared_len[own.request]
    own.is_partial = shared_len > 0
    own.begin = np.maximum(own.begin, shared_len)
    own.end = np.maximum(own.begin, own.end)
    parts.append(own)
    rows = np.cumsum([0, *(int(part.rows[-1]) + 1 if part.rows.size else 0 for part in parts)])
    for part, base in zip(parts, rows, strict=False):
        part.rows = part.rows + base
    return _Tiles(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(_Tiles)
        )
    )


def _cut_evenly(spec: PlanSpec, tiles: _Tiles) -> _Pieces:
    """Lay tiles on a line, once per block of heads, and cut it into equal parts, one per CTA.

    Blocks come outermost, so that tiles of one request and head, which read the same keys, are
    near each other.
    """
    count, blocks, size = tiles.q_len.size, spec.num_blocks, spec.tile_kv
    cost, overhead = tiles.cost(spec)
    places = np.zeros(count + 1, np.int64)
    np.cumsum(cost, out=places[1:])
    period = int(places[-1])
    total = period * blocks
    # Fewer keys than this are not worth an item.
    least = -(-spec.item_cost // size) * size
    target = max(-(-total // spec.num_ctas), 2 * least + int(overhead.max()))
    parts = -(-total // target)
    cuts = np.arange(1, parts) * total // parts
    block = cuts // period
    cuts -= block * period
    tile = places.searchsorted(cuts, side="right") - 1
    keys = (tiles.end - tiles.begin)[tile]
    key = (cuts - places[tile] - overhead[tile] + size // 2) // size * size
    # Cut at the nearest place that leaves enough on both sides, be it the border of an item.
    last = (keys - least) // size * size
    to_begin = 2 * key < np.where(last >= least, least, keys)
    to_end = ~to_begin & (2 * key >= np.where(last >= least, last + keys, 0))
    item = block * count + tile + to_end
    key = np.minimum(np.maximum(key, least), last)
    key[to_begin | to_end] = 0
    return _split(spec, tiles, item, key)


def _split(spec: PlanSpec, tiles: _Tiles, item: np.ndarray, key: np.ndarray) -> _Pieces:
    """Cut items behind their first `key` keys, and give each part of the line to a CTA.

    Args:
        spec: What is static.
        tiles: The tiles; item i is tile `i % count` in the block of heads `i // count`.
        item: The item of each cut, ascending.
        key: How many of its keys lie before the cut; 0 cuts before the item.
    """
    count = tiles.q_len.size
    is_inside = key > 0
    # Two cuts may have met in one place.
    is_inside[1:] &= (item[1:] != item[:-1]) | (key[1:] != key[:-1])
    inside = np.flatnonzero(is_inside)
    before = np.cumsum(is_inside)
    num = count * spec.num_blocks + inside.size
    work_indptr = np.full(spec.num_ctas + 1, num, np.int64)
    work_indptr[0] = 0
    work_indptr[1 : item.size + 1] = item + before
    behind = (item + before)[inside]
    tile, block = _grid(count, spec.num_blocks)
    is_split = np.zeros(num, np.bool_)
    is_split[behind] = True
    if behind.size:
        whole = np.arange(num) - np.cumsum(is_split)
        tile, block = tile[whole], block[whole]
    is_split[behind - 1] = True
    at = np.flatnonzero(is_split)
    begin, end = tiles.begin[tile[at]], tiles.end[tile[at]]
    later = at.searchsorted(behind)
    begin[later] += key[inside]
    end[later - 1] = begin[later]
    return _Pieces(
        tile=tile,
        block=block,
        is_split=is_split,
        at=at,
        begin=begin,
        end=end,
        work_indptr=work_indptr,
        order=None,
    )


@functools.lru_cache(maxsize=64)
def _grid(count: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tile and the block of heads of each item of an uncut line."""
    tile, block = np.tile(np.arange(count), blocks), np.repeat(np.arange(blocks), count)
    tile.flags.writeable = block.flags.writeable = False
    return tile, block


def _cut_at_multiples(spec: PlanSpec, tiles: _Tiles) -> _Pieces:
    """Cut items at multiples of the fixed size, counted from the first key of the request."""
    size, number = spec.fixed_split_size, tiles.q_len.size
    _, overhead = tiles.cost(spec)
    begin, end, tile = tiles.begin, tiles.end, np.arange(number)
    is_split = np.zeros(number, np.bool_)
    if spec.split_mode == "fixed" and size is not None:
        low = begin // size
        count = np.maximum(-(-end // size) - low, 1)
        tile = np.repeat(tile, count)
        chunk = np.arange(tile.size) + (low - np.cumsum(count) + count)[tile]
        begin = np.maximum(begin[tile], chunk * size)
        end = np.minimum(end[tile], (chunk + 1) * size)
        is_split = (count > 1)[tile]
    cost = _whole_tiles(spec, end - begin) + overhead[tile]
    blocks = spec.num_blocks
    order, work_indptr = _assign_longest_first(np.tile(cost, blocks), spec.num_ctas)
    return _Pieces(
        tile=np.tile(tile, blocks),
        block=np.repeat(np.arange(blocks), tile.size),
        is_split=np.tile(is_split, blocks),
        at=None,
        begin=np.tile(begin, blocks),
        end=np.tile(end, blocks),
        work_indptr=work_indptr,
        order=order,
    )


def _assign_longest_first(cost: np.ndarray, num_ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """Give each piece, the longest first, to the CTA that has least to do.

    Ties go to the lower index. As long as no CTA would be chosen twice, many choices are one: the
    least loaded CTAs in order, up to the first that has more to do than one that was just served.

    Returns:
        The order in which the CTAs take the pieces, and where each CTA begins in it.
    """
    longest = _descending(cost)
    cost = cost[longest] << CTA_BITS
    load = np.arange(num_ctas, dtype=np.int64)
    cta = np.empty(cost.size, np.uint16)
    done = 0
    while done < cost.size:
        load.sort()
        num = min(num_ctas, cost.size - done)
        after = load[:num] + cost[done : done + num]
        is_next = load[1:num] < np.minimum.accumulate(after)[:-1]
        if not is_next.all():
            num = int(is_next.argmin()) + 1
        cta[done : done + num] = load[:num] & ((1 << CTA_BITS) - 1)
        load[:num] = after[:num]
        done += num
    by_cta = np.argsort(cta, kind="stable")
    return longest[by_cta], cta[by_cta].searchsorted(np.arange(num_ctas + 1))


def _descending(cost: np.ndarray) -> np.ndarray:
    """Sort by decreasing cost; equal ones keep their order."""
    rest = int(cost.max()) - cost
    # Numbers of 16 bits are sorted by radix, several times as fast.
    return np.argsort(rest.astype(np.uint16) if rest.max() < 1 << 16 else rest, kind="stable")


def _write_items(plan: Plan, tiles: _Tiles, pieces: _Pieces) -> None:
    """Write items, what each CTA does, and how partial states merge."""
    spec, count, order = plan.spec, pieces.tile.size, pieces.order
    if count > spec.bounds[0]:
        raise ValueError(
            f"{count} work items, but the spec has room for {spec.bounds[0]}; raise max_items."
        )
    plan.work_indptr[:] = pieces.work_indptr
    plan.part("counts")[2] = count
    split, slot = _write_merges(plan, tiles, pieces)
    request, kv_len = tiles.request, plan.kv_len[tiles.request]
    table = np.empty((request.size, len(Item)), np.int32)
    table[:, Item.REQUEST] = request
    table[:, Item.Q_START] = tiles.q_start
    table[:, Item.Q_LEN] = tiles.q_len
    table[:, Item.Q_POS] = tiles.q_pos
    table[:, Item.KV_BEGIN] = tiles.begin
    table[:, Item.KV_END] = tiles.end
    table[:, Item.FULL_BEGIN] = tiles.full_begin
    table[:, Item.FULL_END] = tiles.full_end
    table[:, Item.TABLE_BASE] = plan.kv_indptr[request]
    table[:, Item.OUT_SLOT] = -1
    table[:, Item.KV_LEN] = kv_len
    table[:, Item.REQUEST_Q_LEN] = plan.q_len[request]
    table[:, Item.MASK_BASE] = plan.mask_indptr[request] + tiles.q_offset * -(-kv_len // 32)
    table[:, Item.FLAGS] = tiles.flags
    items = plan.items[:count]
    # Without "clip" the result would go through a buffer.
    np.take(table, pieces.tile if order is None else pieces.tile[order], 0, items, mode="clip")
    block = pieces.block if order is None else pieces.block[order]
    items[:, Item.HEAD] = block * spec.heads_per_tile
    items[:, Item.KV_HEAD] = block // (spec.group // spec.heads_per_tile)
    if order is not None:
        items[:, Item.KV_BEGIN] = pieces.begin[order]
        items[:, Item.KV_END] = pieces.end[order]
        slots = np.full(count, -1, np.int64)
        slots[split] = slot
        items[:, Item.OUT_SLOT] = slots[order]
    else:
        items[pieces.at, Item.KV_BEGIN] = pieces.begin
        items[pieces.at, Item.KV_END] = pieces.end
        items[split, Item.OUT_SLOT] = slot


def _write_merges(plan: Plan, tiles: _Tiles, pieces: _Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Number the units of partial states, and write which of them merge into what.

    Returns:
        Which pieces are split, and the first unit of each.
    """
    spec, is_split = plan.spec, pieces.is_split
    if tiles.is_partial is not None:
        is_split |= tiles.is_partial[pieces.tile]
    if tiles.rows[-1] != tiles.rows.size - 1:  # some tiles appear more than once
        again = np.flatnonzero(tiles.rows[1:] == tiles.rows[:-1])
        is_repeated = np.zeros(tiles.rows.size, np.bool_)
        is_repeated[again] = is_repeated[again + 1] = True
        is_split |= is_repeated[pieces.tile]
    split = np.flatnonzero(is_split)
    if not split.size:
        return split, split
    tile, block = pieces.tile[split], pieces.block[split]
    length = tiles.q_len[tile]
    ends = np.cumsum(length)
    slot, total = ends - length, int(ends[-1])
    if total > spec.bounds[1]:
        raise ValueError(
            f"{total} units of partial state, but the spec has room for {spec.bounds[1]}; raise "
            "max_units."
        )
    piece = np.repeat(np.arange(split.size), length)
    token = np.arange(total) + (tiles.q_start[tile] - slot)[piece]
    target = token * spec.num_blocks + block[piece]
    if tiles.is_partial is None and total == split.size:
        units = piece  # one token each, and pieces of the same rows stand side by side
    else:
        units = np.argsort(target, kind="stable")
        target = target[units]
    start = np.flatnonzero(np.concatenate([[True], target[1:] != target[:-1]]))
    if start.size > plan.merge_target.size:
        raise ValueError(
            f"{start.size} merges, but the spec has room for {plan.merge_target.size}; raise "
            "max_units."
        )
    plan.merge_units[:total] = units
    plan.merge_indptr[: start.size] = start
    plan.merge_indptr[start.size :] = total
    plan.merge_target[: start.size] = target[start]
    splits = int((np.append(start[1:], total) - start).max())
    plan.part("counts")[3:6] = total, start.size, splits
    return split, slot
