"""The planner's loops over requests and tiles, compiled by numba.

In numpy each of them takes dozens of calls of a microsecond or two, which a step's plan cannot
afford. What is asked once in a while, shared prefixes and what a variant hides, stays in numpy.
Without numba the loops run as they stand, and a plan takes milliseconds.

Nothing here checks bounds but where a function says so; callers do.
"""

import numpy as np

from jaxserve.core.compiled import compiled
from jaxserve.pallas_kernels import planner_words as words


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
        at: Where its parts begin, by `words.PARTS`.
        numbers: The spec's, by `words.Number`.
        q_len: Query tokens of each request, int64 as all that follows.
        kv_len: Keys.
        indptr: Where each request's pages begin.
        starts: First token of each request, in the order of the plan.
        total: Query tokens of all.
        tiles: Written, `[tiles, len(words.Tile)]`.

    Returns:
        Whether every token has a place of its own.
    """
    count, room = q_len.size, numbers[words.MAX_REQUESTS] + 1
    kv_indptr = buffer[at[words.KV_INDPTR] : at[words.KV_INDPTR] + room]
    mask_indptr = buffer[at[words.MASK_INDPTR] : at[words.MASK_INDPTR] + room]
    token_request = buffer[
        at[words.TOKEN_REQUEST] : at[words.TOKEN_REQUEST] + numbers[words.MAX_TOKENS]
    ]
    token_position = buffer[
        at[words.TOKEN_POSITION] : at[words.TOKEN_POSITION] + numbers[words.MAX_TOKENS]
    ]
    most, mask_words, tile = numbers[words.TILE_TOKENS], 0, 0
    token_request[:] = -1
    kv_indptr[0] = indptr[0]
    for request in range(count):
        length, keys, start = q_len[request], kv_len[request], starts[request]
        buffer[at[words.REQUEST_START] + request] = start
        buffer[at[words.REQUEST_Q] + request] = length
        buffer[at[words.REQUEST_KV] + request] = keys
        kv_indptr[request + 1] = indptr[request + 1]
        if numbers[words.HAS_MASK]:
            mask_words += length * ((keys + 31) // 32)
            mask_indptr[request + 1] = mask_words
        for i in range(length):
            if token_request[start + i] >= 0:
                return False
            token_request[start + i] = request
            token_position[start + i] = keys - length + i
        for offset in range(0, length, most):
            _write_tile(numbers, tiles[tile], request, start, offset, length, keys)
            tiles[tile, words.ROWS] = tile
            tile += 1
    kv_indptr[count + 1 :] = indptr[count]
    if numbers[words.HAS_MASK]:
        mask_indptr[count + 1 :] = mask_words
    buffer[at[words.COUNTS]], buffer[at[words.COUNTS] + 1] = count, total
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
    tile[words.REQUEST] = request
    tile[words.Q_START] = start + offset
    tile[words.Q_OFFSET] = offset
    tile[words.Q_LEN] = min(length - offset, numbers[words.TILE_TOKENS])
    tile[words.Q_POS] = low
    tile[words.FLAGS] = words.DECODE if length <= numbers[words.DECODE_TOKENS] else 0
    tile[words.IS_PARTIAL] = 0
    write_bounds(numbers, tile, low + tile[words.Q_LEN], keys)


@compiled
def write_bounds(numbers: np.ndarray, tile: np.ndarray, high: int, keys: int) -> None:
    """Write which of the first `keys` keys a tile sees: some query of it, and all of them.

    Queries are at positions from the tile's to `high`, which is excluded. The keys that some query
    sees are within those, the others need not be.
    """
    low, window = tile[words.Q_POS], numbers[words.WINDOW]
    begin, end, full_begin, full_end = 0, keys, 0, keys
    if numbers[words.IS_CAUSAL]:
        end, full_end = max(min(high, keys), 0), low + 1
    if window:
        first = low + 1 - window
        begin = max(first, 0) // numbers[words.TILE_KV] * numbers[words.TILE_KV]
        begin, end = (begin if begin < end else 0), (end if first < end else 0)
        full_begin = high - window
    tile[words.BEGIN], tile[words.END] = begin, end
    tile[words.FULL_BEGIN], tile[words.FULL_END] = full_begin, full_end
