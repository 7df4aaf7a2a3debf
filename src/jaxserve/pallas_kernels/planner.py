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
    buffer = np.zeros(spec.num_words, np.int32) if out is None else out
    if buffer.shape != (spec.num_words,) or buffer.dtype != np.int32:
        raise ValueError(
            f"out must be int32 [{spec.num_words}] for this spec, got {buffer.dtype} "
            f"{buffer.shape}; leave it out."
        )
    plan = Plan(buffer=buffer, spec=spec)
    parts = _parts(spec, buffer)
    _write_requests(spec, parts, requests, shared)
    parts["merge_target"].fill(spec.max_tokens * spec.num_blocks)
    tiles = _visited(spec, _tiles(spec, requests))
    if shared:
        tiles = _with_shared(spec, parts, tiles, requests, shared)
    if tiles.q_len.size:
        is_balanced = spec.split_mode == "balanced"
        pieces = _cut_evenly(spec, tiles) if is_balanced else _cut_at_multiples(spec, tiles)
        _write_items(spec, parts, tiles, _with_partial(tiles, pieces))
    return plan


_SAME_PLACE = "tokens of two requests stand in the same place; correct q_start."
_Parts = dict[str, np.ndarray]
"""Parts of a plan's buffer by name."""


def _parts(spec: PlanSpec, buffer: np.ndarray) -> _Parts:
    parts = {name: buffer[where] for name, where in spec.slices}
    for name in ("items", "prefixes"):
        if name in parts:
            parts[name] = parts[name].reshape(spec.layout[name][2])
    return parts


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
    is_packed: bool
    """Whether tokens stand one after another, without gaps."""
    is_single: bool
    """Whether no request has more than one token."""


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
    is_single: bool
    """Whether all have one token."""

    def take(self, index: np.ndarray) -> "_Tiles":
        """Return the tiles at some indices."""
        return _Tiles(
            *(getattr(self, name)[index] for name in _TILE_ARRAYS),
            is_partial=None,
            is_single=self.is_single,
        )

    def overhead(self, spec: PlanSpec) -> tuple[np.ndarray | int, int]:
        """Return what each tile costs besides its keys, in keys, and the most."""
        of_token = spec.row_cost * spec.heads_per_tile
        if self.is_single:
            return of_token + spec.item_cost, of_token + spec.item_cost
        overhead = self.q_len * of_token + spec.item_cost
        return overhead, int(overhead.max())


_TILE_ARRAYS = tuple(f.name for f in dataclasses.fields(_Tiles) if not f.name.startswith("is_"))


@dataclasses.dataclass(slots=True)
class _Cuts:
    """Where items are cut in two, for tiles of one token each.

    Attributes:
        behind: The piece behind each cut; the one before it precedes it.
        item: What is cut, on the uncut line.
        tile: Its tile.
        middle: First key behind the cut.
    """

    behind: np.ndarray
    item: np.ndarray
    tile: np.ndarray
    middle: np.ndarray


@dataclasses.dataclass(slots=True)
class _Split:
    """Pieces whose rows have other pieces too.

    Attributes:
        at: Which pieces, ascending.
        tile: The tile of each.
        block: Its block of heads.
        begin: Its first key.
        end: One past the last key.
    """

    at: np.ndarray
    tile: np.ndarray
    block: np.ndarray
    begin: np.ndarray
    end: np.ndarray


@dataclasses.dataclass(slots=True)
class _Pieces:
    """Items before they are written: each a tile, a block of heads, and some of the tile's keys.

    Uncut, item i of the line is tile `i % count` in the block of heads `i // count`.

    Attributes:
        item: The item on the uncut line that each piece is of; None if nothing is cut.
        count: Number of pieces.
        split: What is cut.
        begins: Where each CTA but the first begins; those that are missing have nothing to do.
        order: In which order the CTAs take the pieces; None as they stand.
    """

    item: np.ndarray | None
    count: int
    split: _Cuts | _Split
    begins: np.ndarray
    order: np.ndarray | None


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
    num, indptr = q_len.size, np.asarray(table.indptr)
    bits = int(np.bitwise_or.reduce(q_len))  # in one pass: negative, or 0 and 1 alone, or more
    if bits < 0 or np.bitwise_or.reduce(kv_len) < 0:
        raise ValueError("q_len and kv_len must not be negative.")
    ends = q_len.cumsum()
    total = int(ends[-1]) if num else 0
    if q_start is None:
        starts, last = ends - q_len, total
    else:
        starts = np.array(q_start, np.int64)
        if starts.shape != q_len.shape or (num and starts.min() < 0):
            raise ValueError(
                f"q_start must be one index from 0 per request, [{num}], got {starts.tolist()}."
            )
        last = int((starts + q_len).max()) if num else 0
    if last > spec.max_tokens:
        raise ValueError(
            f"{last} query tokens, but the spec has room for {spec.max_tokens}; raise max_tokens."
        )
    if table.indices.size > spec.max_pages:
        raise ValueError(
            f"{table.indices.size} pages, but the spec has room for {spec.max_pages}; raise "
            "max_pages."
        )
    lacking = (indptr[1:] - indptr[:-1]) * spec.page_size < kv_len
    if lacking.any():
        worst = int(lacking.argmax())
        raise ValueError(
            f"request {worst} has {kv_len[worst]} keys but {indptr[worst + 1] - indptr[worst]} "
            f"pages of {spec.page_size}; add pages to the table."
        )
    if indptr[0] < 0 or indptr[-1] > table.indices.size:
        raise ValueError(
            f"indptr of the table goes from {indptr[0]} to {indptr[-1]}, but there are "
            f"{table.indices.size} pages; let it end at their number."
        )
    requests = _Requests(
        q_len=q_len,
        kv_len=kv_len,
        q_start=starts,
        shared_len=np.zeros(num, np.int64),
        table=table,
        num_tokens=total,
        is_packed=q_start is None and not spec.cascade_levels,
        is_single=bits <= 1,
    )
    if shared:
        _check_shared(spec, requests, shared)
    return requests


def _check_shared(spec: PlanSpec, requests: _Requests, shared: Sequence[SharedPrefix]) -> None:
    """Check shared prefixes, and mark their keys as read."""
    q_len = requests.q_len
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


def _write_requests(
    spec: PlanSpec, parts: _Parts, requests: _Requests, shared: Sequence[SharedPrefix]
) -> None:
    """Write what the plan says about requests and tokens, and bring tokens into its order."""
    table, q_len, kv_len = requests.table, requests.q_len, requests.kv_len
    num, total = q_len.size, requests.num_tokens
    kv_indptr = parts["kv_indptr"]
    kv_indptr[: num + 1] = table.indptr
    kv_indptr[num + 1 :] = kv_indptr[num]
    parts["kv_indices"][: table.indices.size] = table.indices
    parts["kv_len"][:num] = kv_len
    parts["q_len"][:num] = q_len
    parts["counts"][:2] = num, total
    if spec.variant.packed_mask != "none":
        words = parts["mask_indptr"]
        np.cumsum(q_len * -(-kv_len // 32), out=words[1 : num + 1])
        words[num + 1 :] = words[num]
    if spec.cascade_levels:
        token_place = parts["token_place"]
        order = _token_order(spec, requests, shared)
        if order.size > spec.max_tokens:
            raise ValueError(_SAME_PLACE)
        parts["token_order"][:] = order
        token_place[order] = np.arange(order.size, dtype=np.int32)
        nonempty = q_len > 0
        requests.q_start[nonempty] = token_place[requests.q_start[nonempty]]
    parts["q_start"][:num] = requests.q_start
    token_request, token_position = parts["token_request"], parts["token_position"]
    if requests.is_packed and requests.is_single and total == num:
        token_request[:num] = _counting(num)
        token_request[num:] = -1
        token_position[:num] = kv_len - 1
        return
    token_request.fill(-1)
    if requests.is_single:
        request = q_len.nonzero()[0]
        place, position = requests.q_start[request], kv_len[request] - 1
    else:
        request = _counting(num).repeat(q_len)
        offset = _counting(total) - (q_len.cumsum() - q_len)[request]
        place, position = requests.q_start[request] + offset, (kv_len - q_len)[request] + offset
    token_request[place] = request
    token_position[place] = position
    if not requests.is_packed and np.count_nonzero(token_request >= 0) < total:
        raise ValueError(_SAME_PLACE)


def _counting(num: int) -> np.ndarray:
    """Return 0, 1, ... as far as `num`; do not write to it."""
    size = max(1024, 1 << (num - 1).bit_length()) if num else 1024
    return _counted(size)[:num]


@functools.lru_cache(maxsize=32)
def _counted(size: int) -> np.ndarray:
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers


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
    count, keys, start = q_len, kv_len, requests.q_start
    index = request = _counting(q_len.size)
    if requests.is_single:
        if requests.num_tokens < q_len.size:
            request = q_len.nonzero()[0]
            count, keys, start = q_len[request], kv_len[request], start[request]
        offset = np.zeros(request.size, np.int64)
        low = keys - 1
        flags = count * int(ItemFlag.DECODE) if spec.decode_tokens else offset
    else:
        number = -(-q_len // most)
        request = index.repeat(number)
        offset = (_counting(request.size) - (number.cumsum() - number)[request]) * most
        length = q_len[request]
        count = np.minimum(length - offset, most)
        keys, start = kv_len[request], start[request] + offset
        low = keys - length + offset
        flags = (length <= spec.decode_tokens) * int(ItemFlag.DECODE)
    if requests.is_single and spec.window is None:
        begin = full_begin = offset
        end = full_end = keys
    else:
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
        rows=_counting(request.size),
        is_partial=None,
        is_single=requests.is_single,
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
    spec: PlanSpec,
    parts: _Parts,
    own: _Tiles,
    requests: _Requests,
    shared: Sequence[SharedPrefix],
) -> _Tiles:
    """Put tiles of shared prefixes before those of requests, which then read only the rest."""
    groups: list[_Tiles] = []
    positions = parts["token_position"].astype(np.int64)
    number = 0
    parts["shared_len"][: requests.q_len.size] = requests.shared_len
    for prefix in shared:
        members = np.asarray(prefix.requests)
        total = int(requests.q_len[members].sum())
        start = int(requests.q_start[members[requests.q_len[members] > 0]].min()) if total else 0
        offset = np.arange(0, total, spec.tile_tokens)
        if not offset.size:
            continue
        parts["prefixes"][number] = members[0], start, total, prefix.begin, prefix.end
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
        groups.append(
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
                is_single=False,
            )
        )
    parts["counts"][6] = number
    shared_len = requests.shared_len[own.request]
    own.is_partial = shared_len > 0
    own.begin = np.maximum(own.begin, shared_len)
    own.end = np.maximum(own.begin, own.end)
    groups.append(own)
    rows = np.cumsum([0, *(int(group.rows[-1]) + 1 if group.rows.size else 0 for group in groups)])
    for group, base in zip(groups, rows, strict=False):
        group.rows = group.rows + base
    names = (*_TILE_ARRAYS, "is_partial")
    arrays = (np.concatenate([getattr(group, name) for group in groups]) for name in names)
    return _Tiles(*arrays, is_single=False)


def _cut_evenly(spec: PlanSpec, tiles: _Tiles) -> _Pieces:
    """Lay tiles on a line, once per block of heads, and cut it into equal parts, one per CTA.

    Blocks come outermost, so that tiles of one request and head, which read the same keys, are
    near each other.
    """
    count, blocks, size = tiles.q_len.size, spec.num_blocks, spec.tile_kv
    length = (tiles.end - tiles.begin + (size - 1)) // size  # in tiles, as is all that follows
    overhead, highest = tiles.overhead(spec)
    ends = (length * size + overhead).cumsum()
    period = int(ends[-1])
    total = period * blocks
    # Fewer keys than this are not worth an item.
    least = -(-spec.item_cost // size)
    target = max(-(-total // spec.num_ctas), 2 * least * size + highest)
    block, place = np.divmod(np.arange(target, total, target), period)
    tile = ends.searchsorted(place, side="right")
    most = length[tile]
    # What is left behind the cut, rounded to tiles; an item is entered behind its overhead.
    key = most - ((ends[tile] - place + size // 2) // size)
    # Cut at the nearest place that leaves enough on both sides, be it the border of an item:
    # within `room` of the middle, both counted twice, it is not a border.
    room = np.maximum(most - least, 0)
    off = key + key - most
    is_inside = np.abs(off) < room
    item = block * count + tile + (off >= room)
    key = np.minimum(np.maximum(key, least), room) * size
    if not least:  # two cuts may have met in one place
        is_inside[1:] &= (item[1:] != item[:-1]) | (key[1:] != key[:-1])
    return _split(spec, tiles, item, tile, key, is_inside)


def _split(
    spec: PlanSpec,
    tiles: _Tiles,
    item: np.ndarray,
    tile: np.ndarray,
    key: np.ndarray,
    is_inside: np.ndarray,
) -> _Pieces:
    """Cut items behind their first `key` keys, and give each part of the line to a CTA.

    Args:
        spec: What is static.
        tiles: The tiles.
        item: The item of each cut, ascending.
        tile: Its tile, if the cut is inside.
        key: How many of its keys lie before the cut.
        is_inside: Whether the cut makes two pieces of it; others lie before their item.
    """
    count = tiles.q_len.size
    begins = item + is_inside.cumsum()
    inside = is_inside.nonzero()[0]
    behind, cut = begins[inside], item[inside]
    num = count * spec.num_blocks + inside.size
    of_item = None
    if inside.size:
        later = np.zeros(num, np.int64)
        later[behind] = 1
        of_item = _counting(num) - later.cumsum()
    tile = tile[inside]
    cuts = _Cuts(behind=behind, item=cut, tile=tile, middle=tiles.begin[tile] + key[inside])
    return _Pieces(
        item=of_item,
        count=num,
        split=cuts if tiles.is_single else _both_sides(tiles, cuts),
        begins=begins,
        order=None,
    )


def _both_sides(tiles: _Tiles, cuts: _Cuts) -> _Split:
    """List the pieces before and behind cuts, each once."""
    pieces = np.stack([cuts.behind - 1, cuts.behind], axis=1).reshape(-1)
    block, tile = np.divmod(cuts.item.repeat(2), tiles.q_len.size)
    is_new = np.ones(pieces.size, np.bool_)
    is_new[1:] = pieces[1:] != pieces[:-1]  # what lies between two cuts is listed twice
    at, tile, block = pieces[is_new], tile[is_new], block[is_new]
    begin, end = tiles.begin[tile], tiles.end[tile]
    later = at.searchsorted(cuts.behind)
    begin[later] = cuts.middle
    end[later - 1] = cuts.middle
    return _Split(at=at, tile=tile, block=block, begin=begin, end=end)


def _cut_at_multiples(spec: PlanSpec, tiles: _Tiles) -> _Pieces:
    """Cut items at multiples of the fixed size, counted from the first key of the request."""
    size, number = spec.fixed_split_size, tiles.q_len.size
    overhead, _ = tiles.overhead(spec)
    begin, end, tile = tiles.begin, tiles.end, _counting(number)
    is_split = np.zeros(number, np.bool_)
    if spec.split_mode == "fixed" and size is not None:
        low = begin // size
        count = np.maximum(-(-end // size) - low, 1)
        first = count.cumsum() - count
        tile = tile.repeat(count)
        chunk = _counting(tile.size) + (low - first)[tile]
        begin = np.maximum(begin[tile], chunk * size)
        end = np.minimum(end[tile], (chunk + 1) * size)
        is_split = (count > 1)[tile]
    cost = -(-(end - begin) // spec.tile_kv) * spec.tile_kv
    cost += overhead if isinstance(overhead, int) else overhead[tile]
    blocks = spec.num_blocks
    order, work_indptr = _assign_longest_first(np.tile(cost, blocks), spec.num_ctas)
    item = (np.arange(blocks)[:, None] * number + tile).reshape(-1)
    at = np.tile(is_split, blocks).nonzero()[0]
    block, piece = np.divmod(at, tile.size)
    split = _Split(at=at, tile=tile[piece], block=block, begin=begin[piece], end=end[piece])
    return _Pieces(item=item, count=item.size, split=split, begins=work_indptr[1:-1], order=order)


def _with_partial(tiles: _Tiles, pieces: _Pieces) -> _Pieces:
    """Count pieces as split if their rows see keys of other tiles too."""
    is_partial = tiles.is_partial
    if tiles.rows[-1] != tiles.rows.size - 1:  # some tiles appear more than once
        again = (tiles.rows[1:] == tiles.rows[:-1]).nonzero()[0]
        is_repeated = np.zeros(tiles.rows.size, np.bool_)
        is_repeated[again] = is_repeated[again + 1] = True
        is_partial = is_repeated if is_partial is None else is_partial | is_repeated
    if is_partial is None:
        return pieces
    split = pieces.split
    if isinstance(split, _Cuts):
        split = _both_sides(tiles, split)
    item = _counting(pieces.count) if pieces.item is None else pieces.item
    block, tile = np.divmod(item, tiles.q_len.size)
    is_split = is_partial[tile]
    is_split[split.at] = True
    at = is_split.nonzero()[0]
    block, tile = block[at], tile[at]
    begin, end = tiles.begin[tile], tiles.end[tile]
    known = at.searchsorted(split.at)
    begin[known], end[known] = split.begin, split.end
    split = _Split(at=at, tile=tile, block=block, begin=begin, end=end)
    return dataclasses.replace(pieces, split=split)


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


def _write_items(spec: PlanSpec, parts: _Parts, tiles: _Tiles, pieces: _Pieces) -> None:
    """Write items, what each CTA does, and how partial states merge."""
    num, count, order = pieces.count, tiles.q_len.size, pieces.order
    if num > spec.bounds[0]:
        raise ValueError(
            f"{num} work items, but the spec has room for {spec.bounds[0]}; raise max_items."
        )
    work_indptr, ctas = parts["work_indptr"], pieces.begins.size + 1
    work_indptr[1:ctas] = pieces.begins
    work_indptr[ctas:] = num
    parts["counts"][2] = num
    request = tiles.request
    line = np.empty((spec.num_blocks, count, len(Item)), np.int32)
    table = line[0]
    table[:] = _blank(count)
    table[:, Item.REQUEST] = request
    table[:, Item.Q_START] = tiles.q_start
    table[:, Item.Q_LEN] = tiles.q_len
    table[:, Item.Q_POS] = tiles.q_pos
    table[:, Item.KV_BEGIN] = tiles.begin
    table[:, Item.KV_END] = tiles.end
    table[:, Item.FULL_BEGIN] = tiles.full_begin
    table[:, Item.FULL_END] = tiles.full_end
    table[:, Item.TABLE_BASE] = parts["kv_indptr"][request]
    table[:, Item.KV_LEN] = kv_len = parts["kv_len"][request]
    table[:, Item.REQUEST_Q_LEN] = parts["q_len"][request]
    if spec.variant.packed_mask != "none":
        words = (kv_len + 31) // 32
        table[:, Item.MASK_BASE] = parts["mask_indptr"][request] + tiles.q_offset * words
    table[:, Item.FLAGS] = tiles.flags
    line[1:] = table
    line[:, :, Item.KV_HEAD : Item.HEAD + 1] = _heads(spec)
    line = line.reshape(-1, len(Item))
    items, item, split = parts["items"][:num], pieces.item, pieces.split
    if order is not None:
        item = order if item is None else item[order]
    if item is None:
        items[:] = line
    else:
        # Without "clip" the result would go through a buffer.
        line.take(item, 0, items, "clip")
    if isinstance(split, _Cuts):
        if split.behind.size:
            _write_cuts(spec, parts, tiles, split)
    elif split.at.size:
        place = split.at
        if order is not None:
            place = np.empty(num, np.int64)
            place[order] = _counting(num)
            place = place[split.at]
        items[place, Item.KV_BEGIN] = split.begin
        items[place, Item.KV_END] = split.end
        items[place, Item.OUT_SLOT] = _write_merges(spec, parts, tiles, split)


@functools.lru_cache(maxsize=64)
def _blank(count: int) -> np.ndarray:
    """Return items of which nothing is known but that they are not split."""
    blank = np.zeros((count, len(Item)), np.int32)
    blank[:, Item.OUT_SLOT] = -1
    return blank


@functools.lru_cache(maxsize=64)
def _heads(spec: PlanSpec) -> np.ndarray:
    """Return the key-value head and the first query head of each block, `[blocks, 1, 2]`."""
    head = np.arange(0, spec.q_heads, spec.heads_per_tile, dtype=np.int32)
    return np.stack([head // spec.group, head], axis=1)[:, None]


def _write_cuts(spec: PlanSpec, parts: _Parts, tiles: _Tiles, cuts: _Cuts) -> None:
    """Write what cuts change, for tiles of one token: the pieces of an item stand side by side."""
    behind, item, count = cuts.behind, cuts.item, cuts.behind.size
    is_first = np.empty(count, np.bool_)
    is_first[0] = True
    np.not_equal(item[1:], item[:-1], out=is_first[1:])
    # An item that is cut n times has n + 1 units.
    slot = _counting(count) + is_first.cumsum()
    before = behind - 1
    items = parts["items"]
    items[:, Item.KV_BEGIN][behind] = cuts.middle
    items[:, Item.KV_END][before] = cuts.middle
    unit = items[:, Item.OUT_SLOT]
    unit[behind] = slot
    unit[before] = slot - 1
    first = is_first.nonzero()[0]
    start, tile = slot[first] - 1, cuts.tile[first]
    target = tiles.q_start[tile] * spec.num_blocks + item[first] // tiles.q_len.size
    _write_units(spec, parts, _counting(int(slot[-1]) + 1), start, target)


def _write_merges(spec: PlanSpec, parts: _Parts, tiles: _Tiles, split: _Split) -> np.ndarray:
    """Number the units of partial states, and write which of them merge into what.

    Returns:
        The first unit of each split piece.
    """
    length = tiles.q_len[split.tile]
    slot = length.cumsum() - length
    total = int(slot[-1] + length[-1])
    piece = _counting(length.size).repeat(length)
    token = tiles.q_start[split.tile][piece] + _counting(total) - slot[piece]
    target = token * spec.num_blocks + split.block[piece]
    units = target.argsort(kind="stable")
    target = target[units]
    is_start = np.ones(total, np.bool_)
    is_start[1:] = target[1:] != target[:-1]
    _write_units(spec, parts, units, is_start.nonzero()[0], target[is_start])
    return slot


def _write_units(
    spec: PlanSpec, parts: _Parts, units: np.ndarray, start: np.ndarray, target: np.ndarray
) -> None:
    """Write which units of partial state merge into which unit of the output.

    Args:
        spec: What is static.
        parts: What is written to.
        units: Units in the order of merging.
        start: Where in it each merge begins.
        target: What it writes.
    """
    total, count = units.size, start.size
    if total > spec.bounds[1]:
        raise ValueError(
            f"{total} units of partial state, but the spec has room for {spec.bounds[1]}; raise "
            "max_units."
        )
    if count > parts["merge_target"].size:
        raise ValueError(
            f"{count} merges, but the spec has room for {parts['merge_target'].size}; raise "
            "max_units."
        )
    parts["merge_units"][:total] = units
    indptr = parts["merge_indptr"]
    indptr[:count] = start
    indptr[count:] = total
    parts["merge_target"][:count] = target
    splits = (indptr[1 : count + 1] - indptr[:count]).max()
    parts["counts"][3:6] = total, count, splits
