"""Plans to test with, and what a plan says, read off slowly."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import Item, Plan, PlanSpec
from jaxserve.pallas_kernels.prefixes import SharedPrefix


def page_table(
    kv_len: Sequence[int],
    page_size: int,
    *,
    seed: int = 0,
    shared: Sequence[SharedPrefix] = (),
    spare: int = 0,
) -> tuple[PageTable, int]:
    """Scatter requests over pages, in random order; shared prefixes share pages.

    Returns:
        The table, and the number of pages of the pool, the dummy included.
    """
    lengths = np.asarray(kv_len, np.int64)
    used = -(-lengths // page_size)
    rng = np.random.default_rng(seed)
    num = int(used.sum()) + 1 + spare
    pages = 1 + rng.permutation(num - 1)
    indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    indices = pages[: indptr[-1]].astype(np.int32)
    for prefix in shared:
        low, high = prefix.begin // page_size, prefix.end // page_size
        first = indptr[prefix.requests[0]]
        for request in prefix.requests[1:]:
            at = indptr[request]
            indices[at + low : at + high] = indices[first + low : first + high]
    return PageTable(indptr=indptr, indices=indices, kv_len=lengths.astype(np.int32)), num


def spec_for(q_len: Sequence[int], kv_len: Sequence[int], **settings: object) -> PlanSpec:
    """Return a spec with room for these requests and little more."""
    page_size = int(settings.setdefault("page_size", 16))
    room = {
        "max_requests": max(1, len(q_len)),
        "max_tokens": max(1, sum(q_len)),
        "max_pages": max(1, sum(-(-n // page_size) for n in kv_len)),
    }
    heads = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "q_dtype": "float32"}
    return PlanSpec(**{"kv_dtype": "float32", **heads, **room, **settings})


@st.composite
def lengths(draw, *, most: int = 6, longest: int = 300, page_size: int = 16, most_q: int = 40):
    """Draw the query tokens and the keys of some requests, edges included."""
    edges = [0, 1, page_size - 1, page_size, page_size + 1, 127, 128, 129]
    kv = st.one_of(st.sampled_from(edges), st.integers(0, longest))
    kv_len = draw(st.lists(kv, min_size=1, max_size=most))
    q_len = [draw(st.one_of(st.just(min(1, n)), st.integers(0, min(n, most_q)))) for n in kv_len]
    return q_len, kv_len


def items_of(plan: Plan) -> np.ndarray:
    """Return the items that are there."""
    return plan.items[: int(plan.num_items)]


def visits(plan: Plan, *, only_full: bool = False) -> np.ndarray:
    """Count how often each token, block of heads and key position is visited.

    Returns:
        Counts, `[tokens, blocks, positions]`, tokens in the order of the plan.
    """
    spec = plan.spec
    longest = int(plan.kv_len.max(initial=0)) + spec.tile_kv
    count = np.zeros((spec.max_tokens, spec.num_blocks, longest), np.int64)
    for item in items_of(plan):
        rows = slice(item[Item.Q_START], item[Item.Q_START] + item[Item.Q_LEN])
        begin, end = item[Item.KV_BEGIN], item[Item.KV_END]
        if only_full:
            begin, end = max(begin, item[Item.FULL_BEGIN]), min(end, item[Item.FULL_END])
        count[rows, item[Item.HEAD] // spec.heads_per_tile, begin : max(begin, end)] += 1
    return count


def seen(plan: Plan) -> np.ndarray:
    """Tell which token sees which key position by causality and windows, `[tokens, positions]`."""
    spec = plan.spec
    position = np.arange(int(plan.kv_len.max(initial=0)) + spec.tile_kv)[None, :]
    request, query = plan.token_request, plan.token_position[:, None]
    mask = (request[:, None] >= 0) & (position < plan.kv_len[np.maximum(request, 0)][:, None])
    if spec.causal:
        mask &= position <= query
    if spec.window is not None:
        mask &= position > query - spec.window
    return mask


def loads(plan: Plan) -> np.ndarray:
    """Return the work of each CTA, in keys, as the planner counts it."""
    spec, items = plan.spec, items_of(plan)
    keys = items[:, Item.KV_END] - items[:, Item.KV_BEGIN]
    rows = items[:, Item.Q_LEN] * spec.heads_per_tile
    cost = -(-keys // spec.tile_kv) * spec.tile_kv + spec.item_cost + spec.row_cost * rows
    sums = np.concatenate([[0], np.cumsum(cost.astype(np.int64))])
    return sums[plan.work_indptr[1:]] - sums[plan.work_indptr[:-1]]
