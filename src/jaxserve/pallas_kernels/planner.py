"""Makes plans. A step must not wait for its plan, so the loops over items are compiled.

The balanced mode lays all work on a line, item after item, and cuts the line into equal pieces, one
per CTA. Only what lies across a cut is split, so there are fewer partial states than CTAs, and no
CTA has more than its share. The other modes have items of given sizes and assign the longest first.
"""

import dataclasses
import functools
import importlib
import types
from collections.abc import Sequence

import numpy as np

from jaxserve.pallas_kernels import planner_words as words
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import ItemFlag, Plan, PlanSpec
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
    tiles = _write_requests(plan, requests, shared)
    if spec.variant.block_mask is not None:
        tiles = _visited(spec, tiles)
    if shared:
        tiles = _with_shared(plan, tiles, requests, shared)
    _write_items(plan, tiles)
    return plan


_SAME_PLACE = "tokens of two requests stand in the same place; correct q_start."


@functools.cache
def _loops() -> types.ModuleType:
    """Return the compiled loops over requests; importing their compiler takes half a second."""
    return importlib.import_module("jaxserve.pallas_kernels.planner_loops")


@functools.cache
def _item_loops() -> types.ModuleType:
    """Return the compiled loops over items."""
    return importlib.import_module("jaxserve.pallas_kernels.planner_items")


@functools.lru_cache(maxsize=64)
def _numbers(spec: PlanSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return where the parts of a plan's buffer begin, and the numbers of its spec."""
    items, units = spec.bounds
    sizes = {"balanced": -1, "none": 0, "fixed": spec.fixed_split_size or 0}
    values = {
        words.Number.TILE_KV: spec.tile_kv,
        words.Number.TILE_TOKENS: spec.tile_tokens,
        words.Number.MAX_TOKENS: spec.max_tokens,
        words.Number.BLOCKS: spec.num_blocks,
        words.Number.HEADS_PER_TILE: spec.heads_per_tile,
        words.Number.GROUP: spec.group,
        words.Number.CTAS: spec.num_ctas,
        words.Number.ITEM_COST: spec.item_cost,
        words.Number.TOKEN_COST: spec.row_cost * spec.heads_per_tile,
        words.Number.DECODE_TOKENS: spec.decode_tokens,
        words.Number.WINDOW: spec.window or 0,
        words.Number.IS_CAUSAL: int(spec.causal),
        words.Number.HAS_MASK: int(spec.variant.packed_mask != "none"),
        words.Number.SPLIT_SIZE: sizes[spec.split_mode],
        words.Number.MAX_REQUESTS: spec.max_requests,
        words.Number.MAX_ITEMS: items,
        words.Number.MAX_UNITS: units,
        words.Number.MAX_MERGES: spec.layout["merge_target"][2][0],
    }
    starts = [spec.layout[name][0] for name in words.PARTS]
    return np.array(starts, np.int64), np.array([values[key] for key in words.Number], np.int64)


@dataclasses.dataclass(slots=True)
class _Requests:
    """What `make_plan` was given, in one form."""

    q_len: np.ndarray
    kv_len: np.ndarray
    q_start: np.ndarray
    """First token, in the order of the plan."""
    indptr: np.ndarray
    shared_len: np.ndarray
    """Keys that are read for several requests at once."""
    table: PageTable
    num_tokens: int
    num_tiles: int


def _check(
    spec: PlanSpec,
    q_len: np.ndarray,
    table: PageTable,
    q_start: np.ndarray | None,
    shared: Sequence[SharedPrefix],
) -> _Requests:
    """Check what `make_plan` was given."""
    # Copies, as compiled loops are compiled anew for arrays that cannot be written to.
    q_len, kv_len = np.array(q_len, np.int64), np.array(table.kv_len, np.int64)
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
    num, indptr = q_len.size, np.array(table.indptr, np.int64)
    starts = np.empty(num, np.int64) if q_start is None else np.array(q_start, np.int64)
    if starts.shape != q_len.shape or (q_start is not None and starts.min(initial=0) < 0):
        raise ValueError(
            f"q_start must be one index from 0 per request, [{num}], got {starts.tolist()}."
        )
    is_negative, total, last, tiles, lacking = _loops().measure(
        q_len, kv_len, indptr, starts, q_start is None, spec.page_size, spec.tile_tokens
    )
    if is_negative:
        raise ValueError("q_len and kv_len must not be negative.")
    if last > spec.max_tokens:
        raise ValueError(
            f"{last} query tokens, but the spec has room for {spec.max_tokens}; raise max_tokens."
        )
    if table.indices.size > spec.max_pages:
        raise ValueError(
            f"{table.indices.size} pages, but the spec has room for {spec.max_pages}; raise "
            "max_pages."
        )
    if lacking >= 0:
        raise ValueError(
            f"request {lacking} has {kv_len[lacking]} keys but "
            f"{indptr[lacking + 1] - indptr[lacking]} "
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
        indptr=indptr,
        shared_len=np.zeros(num if shared else 0, np.int64),
        table=table,
        num_tokens=total,
        num_tiles=tiles,
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


def _write_requests(plan: Plan, requests: _Requests, shared: Sequence[SharedPrefix]) -> np.ndarray:
    """Write what the plan says about requests and tokens, and bring tokens into its order.

    Returns:
        Tiles of query rows and what each of them sees, int64 `[tiles, len(words.Tile)]`.
    """
    spec, loops = plan.spec, _loops()
    plan.kv_indices[: requests.table.indices.size] = requests.table.indices
    if spec.cascade_levels:
        order = _token_order(spec, requests, shared)
        if order.size > spec.max_tokens:
            raise ValueError(_SAME_PLACE)
        plan.token_order[:] = order
        plan.token_place[order] = np.arange(order.size, dtype=np.int32)
        nonempty = requests.q_len > 0
        requests.q_start[nonempty] = plan.token_place[requests.q_start[nonempty]]
    tiles = np.empty((requests.num_tiles, len(words.Tile)), np.int64)
    at, numbers = _numbers(spec)
    is_apart = loops.write_requests(
        plan.buffer,
        at,
        numbers,
        requests.q_len,
        requests.kv_len,
        requests.indptr,
        requests.q_start,
        requests.num_tokens,
        tiles,
    )
    if not is_apart:
        raise ValueError(_SAME_PLACE)
    return tiles


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


def _visited(spec: PlanSpec, tiles: np.ndarray) -> np.ndarray:
    """Leave out blocks of keys that the variant hides from a whole tile."""
    ask, kinds, size = spec.variant.block_mask, words.Tile, spec.tile_kv
    if ask is None or not tiles.size:
        return tiles
    begin, end = tiles[:, kinds.BEGIN], tiles[:, kinds.END]
    count = np.maximum(-(-(end - begin) // size), 1)
    first = np.cumsum(count) - count
    tile = np.repeat(np.arange(count.size), count)
    low = begin[tile] + (np.arange(tile.size) - first[tile]) * size
    high = np.minimum(low + size, end[tile])
    q_low = tiles[tile, kinds.Q_POS]
    q_high = q_low + tiles[tile, kinds.Q_LEN]
    kind = np.broadcast_to(ask(tiles[tile, kinds.REQUEST], q_low, q_high, low, high), low.shape)
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
    taken = tiles[tile[at]]
    taken[:, kinds.BEGIN] = low[at]
    taken[:, kinds.END] = np.where(lonely[tile[at]], low[at], high[until])
    # The longest stretch of full blocks would be better; the first one is simpler to find.
    full_at, full_until = _first_full(is_full, at, until)
    has_full = full_until > full_at
    full_begin = low[np.where(has_full, full_at, 0)]
    full_end = np.where(has_full, high[full_until - 1], 0)
    taken[:, kinds.FULL_BEGIN] = np.maximum(taken[:, kinds.FULL_BEGIN], full_begin)
    taken[:, kinds.FULL_END] = np.minimum(taken[:, kinds.FULL_END], full_end)
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
    plan: Plan, own: np.ndarray, requests: _Requests, shared: Sequence[SharedPrefix]
) -> np.ndarray:
    """Put tiles of shared prefixes before those of requests, which then read only the rest."""
    spec, loops = plan.spec, _loops()
    kinds, (_, numbers) = words.Tile, _numbers(spec)
    groups: list[np.ndarray] = []
    rows, found = 0, 0
    plan.shared_len[: requests.q_len.size] = requests.shared_len
    for prefix in shared:
        members = np.asarray(prefix.requests)
        total = int(requests.q_len[members].sum())
        if not total:
            continue
        start = int(requests.q_start[members[requests.q_len[members] > 0]].min())
        plan.prefixes[found] = members[0], start, total, prefix.begin, prefix.end
        found += 1
        offset = np.arange(0, total, spec.tile_tokens)
        seen = plan.token_position[start : start + total].astype(np.int64)
        tiles = np.zeros((offset.size, len(kinds)), np.int64)
        tiles[:, kinds.REQUEST] = members[0]
        tiles[:, kinds.Q_START] = start + offset
        tiles[:, kinds.Q_LEN] = np.minimum(spec.tile_tokens, total - offset)
        tiles[:, kinds.Q_POS] = np.minimum.reduceat(seen, offset)
        tiles[:, kinds.FLAGS] = ItemFlag.SHARED
        tiles[:, kinds.ROWS] = rows + np.arange(offset.size)
        tiles[:, kinds.IS_PARTIAL] = 1
        for tile, high in zip(tiles, np.maximum.reduceat(seen, offset) + 1, strict=True):
            loops.write_bounds(numbers, tile, high, prefix.end)
        begin = np.maximum(tiles[:, kinds.BEGIN], prefix.begin)
        begin = np.where(begin < tiles[:, kinds.END], begin, prefix.begin)
        tiles[:, kinds.BEGIN] = begin
        tiles[:, kinds.END] = np.maximum(begin, tiles[:, kinds.END])
        full_end = np.minimum(tiles[:, kinds.FULL_END], prefix.end)
        # A variant was not asked about shared keys.
        tiles[:, kinds.FULL_END] = 0 if spec.variant.block_mask is not None else full_end
        rows += offset.size
        groups.append(tiles)
    plan.part("counts")[6] = found
    shared_len = requests.shared_len[own[:, kinds.REQUEST]]
    own[:, kinds.IS_PARTIAL] = shared_len > 0
    own[:, kinds.BEGIN] = np.maximum(own[:, kinds.BEGIN], shared_len)
    own[:, kinds.END] = np.maximum(own[:, kinds.BEGIN], own[:, kinds.END])
    own[:, kinds.ROWS] += rows
    return np.concatenate([*groups, own])


def _write_items(plan: Plan, tiles: np.ndarray) -> None:
    """Write items, what each CTA does, and how partial states merge."""
    spec = plan.spec
    at, numbers = _numbers(spec)
    plan.merge_target.fill(spec.max_tokens * spec.num_blocks)
    if not tiles.size:
        return
    lacking, needed = _item_loops().lay_out(plan.buffer, at, numbers, tiles)
    if lacking >= 0:
        what, name = {
            words.Number.MAX_ITEMS: ("work items", "max_items"),
            words.Number.MAX_UNITS: ("units of partial state", "max_units"),
            words.Number.MAX_MERGES: ("merges", "max_units"),
        }[words.Number(lacking)]
        raise ValueError(
            f"{needed} {what}, but the spec has room for {numbers[lacking]}; raise {name}."
        )
