"""From a matrix of rows to stages in which each server sends to one server at most.

Stuffing makes all sums of rows and columns equal. Then perfect matchings are peeled off one after
another, each over entries of at least a threshold, which only falls; between two of them all
matched edges stay but those that fell below it, so that a new matching takes one to three
augmenting paths instead of n. What is left when many small stages would cost more than they save
goes in rotations. Everything is in whole rows, so nothing is lost or made up.

A plan is one call of `decompose`, since each call from Python costs a microsecond or two.
"""

import numpy as np

from jaxserve.core.compiled import compiled, inlined
from jaxserve.sharding.flash.matching import (
    COLUMN,
    FREE,
    QUEUE,
    SEEN,
    WORD,
    find_edges,
    free_all,
    match_rows,
)

ANY, HALVING, BOTTLENECK = range(3)
"""How the threshold falls: it is 1 at once; over powers of two; or as little as can be."""
ASCENDING, DESCENDING = range(2)
"""Orders of stages by duration."""
OK, NEGATIVE, TOO_LARGE, TOO_FEW_STAGES = range(4)
"""What can be said of a matrix."""

_MOST = int(np.iinfo(np.int64).max)


@inlined
def check(counts: np.ndarray, columns: np.ndarray) -> tuple[int, int, int]:
    """Look for negative entries and sums that int64 cannot hold; the diagonal does not count.

    Args:
        counts: `[n, n]`, int64.
        columns: Written, the sums of columns.

    Returns:
        What can be said; then the largest sum of a row or column, and the sum of all.
    """
    n = counts.shape[0]
    total, largest = 0, 0
    for j in range(n):
        columns[j] = 0
    for i in range(n):
        row = 0
        for j in range(n):
            value = counts[i, j]
            if value < 0:
                return NEGATIVE, i, j
            if i != j:
                # Whatever is part of the total is no larger, so only that can be too large.
                if value > _MOST - total:
                    return TOO_LARGE, i, j
                total += value
                row += value
                columns[j] += value
        largest = max(largest, row)
    for j in range(n):
        largest = max(largest, columns[j])
    return OK, largest, total


@inlined
def stuff_into(
    counts: np.ndarray, columns: np.ndarray, largest: int, stuffed: np.ndarray, real: np.ndarray
) -> None:
    """Add to a matrix until all its rows and columns have the same sum.

    The diagonal takes all it can, as a server idles there; the north-west corner rule spreads the
    rest over 2n - 1 entries at most.

    Args:
        counts: `[n, n]`, int64.
        columns: Sums of columns; used up.
        largest: The largest sum of a row or column.
        stuffed: Written, `[n, n]`.
        real: Written, the matrix without its diagonal.
    """
    n = counts.shape[0]
    rows = np.empty(n, np.int64)
    for i in range(n):
        lacks = largest
        for j in range(n):
            value = counts[i, j] if i != j else 0
            stuffed[i, j] = value
            real[i, j] = value
            lacks -= value
        rows[i] = lacks
    for i in range(n):
        columns[i] = largest - columns[i]
        idle = min(rows[i], columns[i])
        stuffed[i, i] = idle
        rows[i] -= idle
        columns[i] -= idle
    i, j = 0, 0
    while i < n and j < n:
        more = min(rows[i], columns[j])
        stuffed[i, j] += more
        rows[i] -= more
        columns[j] -= more
        if rows[i] == 0:
            i += 1
        else:
            j += 1


@compiled
def grow(stages: np.ndarray, room: int) -> np.ndarray:
    """Return a copy with more room at its end."""
    found = np.empty((room, stages.shape[1]), stages.dtype)
    for k in range(stages.shape[0]):
        for i in range(stages.shape[1]):
            found[k, i] = stages[k, i]
    return found


@inlined
def lower(policy: int, words: int, reached: int, stuffed: np.ndarray, state: np.ndarray) -> int:
    """Return the next threshold, after no path led from the rows that were reached.

    A matching needs an entry of such a row in a column that they do not reach, so none exists
    above the largest of these.

    Args:
        policy: How it falls: to that entry, or to the next lower power of two.
        words: Words that hold a set of columns.
        reached: Rows in the queue.
        stuffed: `[n, n]`.
        state: `[6, n]`.
    """
    n, largest = stuffed.shape[0], 0
    for place in range(reached):
        row = state[QUEUE, place]
        for w in range(words):
            bits = state[SEEN, w]
            for j in range(w * WORD, min(n, (w + 1) * WORD)):
                if not bits & 1:
                    largest = max(largest, stuffed[row, j])
                bits >>= 1
    if policy == BOTTLENECK:
        return largest
    threshold = 1
    while threshold <= largest // 2:
        threshold *= 2
    return threshold


@compiled
def measure_rotations(real: np.ndarray, most: np.ndarray) -> tuple[int, int]:
    """Return how long rotations take for what is left, and how many there are.

    Args:
        real: `[n, n]`, what is left, with an empty diagonal.
        most: Written, the longest send of each rotation.

    Returns:
        The sum of the longest sends, and the number of rotations that send anything.
    """
    n = real.shape[0]
    for r in range(n):
        most[r] = 0
    for i in range(n):
        for j in range(i + 1, n):
            most[j - i] = max(most[j - i], real[i, j])
        for j in range(i):
            most[n + j - i] = max(most[n + j - i], real[i, j])
    length, number = 0, 0
    for r in range(1, n):
        length += most[r]
        number += most[r] > 0
    return length, number


@inlined
def start_threshold(policy: int, stuffed: np.ndarray) -> int:
    """Return a threshold above which there is no perfect matching: some row would be empty."""
    if policy == ANY:
        return 1
    n, least = stuffed.shape[0], _MOST
    for i in range(n):
        largest = 0
        for j in range(n):
            largest = max(largest, stuffed[i, j])
        least = min(least, largest)
    if policy == BOTTLENECK:
        return least
    threshold = 1
    while threshold <= least // 2:
        threshold *= 2
    return threshold


@inlined
def take(
    left: int,
    threshold: int,
    stuffed: np.ndarray,
    real: np.ndarray,
    edges: np.ndarray,
    state: np.ndarray,
    perms: np.ndarray,
    rows: np.ndarray,
    made: int,
) -> tuple[int, int]:
    """Take one stage out of the matrices; edges that fall below the threshold are unmatched.

    Returns:
        How much each row of the stuffed matrix lost, and the longest send that is real.
    """
    n, amount, longest = stuffed.shape[0], left, 0
    for i in range(n):
        amount = min(amount, stuffed[i, state[COLUMN, i]])
    for i in range(n):
        j = state[COLUMN, i]
        stays = stuffed[i, j] - amount
        stuffed[i, j] = stays
        sent = min(real[i, j], amount)
        real[i, j] -= sent
        perms[made, i], rows[made, i] = j, sent
        longest = max(longest, sent)
        if stays < threshold:
            w = 0 if j < WORD else j // WORD  # a division takes as long as all the rest
            bit = np.int64(1) << (j - w * WORD)
            edges[i, w] &= ~bit
            state[FREE, w] |= bit
            state[COLUMN, i] = -1
    return amount, longest


@inlined
def leave(
    counts: np.ndarray, perms: np.ndarray, rows: np.ndarray, kept: int, real: np.ndarray
) -> None:
    """Write what the stages that are kept leave of a matrix, without its diagonal."""
    n = counts.shape[0]
    for i in range(n):
        for j in range(n):
            real[i, j] = counts[i, j] if i != j else 0
    for k in range(kept):
        for i in range(n):
            real[i, perms[k, i]] -= rows[k, i]


@inlined
def sort(values: np.ndarray) -> np.ndarray:
    """Return the order of values, equal ones as they come.

    A merge from runs of one; numpy's own sorts take seconds to compile.
    """
    count = values.size
    places, merged = np.empty(count, np.int64), np.empty(count, np.int64)
    for k in range(count):
        places[k] = k
    run = 1
    while run < count:
        for start in range(0, count, 2 * run):
            middle, end = min(start + run, count), min(start + 2 * run, count)
            left, right = start, middle
            for k in range(start, end):
                if right == end or (
                    left < middle and values[places[left]] <= values[places[right]]
                ):
                    merged[k] = places[left]
                    left += 1
                else:
                    merged[k] = places[right]
                    right += 1
        for k in range(count):
            places[k] = merged[k]
        run *= 2
    return places


@inlined
def finish(
    real: np.ndarray, kept: int, perms: np.ndarray, rows: np.ndarray, tail: int, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Append rotations for what the kept stages leave, and put all in order.

    Args:
        real: `[n, n]`, what they leave.
        kept: Stages that are kept of those before.
        perms: `[at least kept, n]`.
        rows: Like `perms`.
        tail: Rotations that send anything.
        order: Of the stages, by duration.

    Returns:
        The permutation and the rows of each stage.
    """
    n = real.shape[0]
    most, length = np.zeros(n, np.int64), np.zeros(kept + tail, np.int64)
    shift = np.empty(tail, np.int64)
    for k in range(kept):
        for i in range(n):
            length[k] = max(length[k], rows[k, i])
    if tail:
        measure_rotations(real, most)
        k = 0
        for r in range(1, n):
            if most[r]:
                shift[k], length[kept + k] = r, most[r]
                k += 1
    if order == DESCENDING:
        for k in range(kept + tail):
            length[k] = -length[k]
    places = sort(length)
    out_perms = np.empty((kept + tail, n), np.int32)
    out_rows = np.empty((kept + tail, n), np.int64)
    for k in range(kept + tail):
        place = places[k]
        for i in range(n):
            if place < kept:
                out_perms[k, i] = perms[place, i]
                out_rows[k, i] = rows[place, i]
            else:
                j = i + shift[place - kept]
                j -= n if j >= n else 0
                out_perms[k, i] = j
                out_rows[k, i] = real[i, j]
    return out_perms, out_rows


@compiled
def consider(
    made: int,
    max_stages: int,
    length: int,
    row_cost: float,
    stage_cost: float,
    real: np.ndarray,
    most: np.ndarray,
    best: np.ndarray,
    best_seconds: float,
) -> float:
    """See whether it is best to go on in rotations from here.

    Args:
        made: Stages so far.
        max_stages: Stages at most.
        length: Sum of their longest sends.
        row_cost: Seconds per row of a stage's longest send.
        stage_cost: Seconds per stage.
        real: `[n, n]`, what is left.
        most: `[n]`; written.
        best: Stages that are kept, rotations behind, and the fewest stages of all; changed.
        best_seconds: What the best takes.

    Returns:
        What the best takes now.
    """
    more, tail = measure_rotations(real, most)
    seconds = row_cost * (length + more) + stage_cost * (made + tail)
    best[2] = min(best[2], made + tail)
    if made + tail <= max_stages and seconds < best_seconds:
        best[0], best[1] = made, tail
        return seconds
    return best_seconds


@compiled
def decompose(
    counts: np.ndarray,
    policy: int,
    order: int,
    is_choosing: bool,  # noqa: FBT001  compiled functions have no keywords
    first: int,
    cut: int,
    max_stages: int,
    row_cost: float,
    stage_cost: float,
) -> tuple[int, np.ndarray, np.ndarray, int, int, int, float]:
    """Make the stages of a matrix.

    Args:
        counts: `[n, n]`, int64, contiguous; the diagonal does not count.
        policy: How the threshold falls.
        order: Of the stages, by duration.
        is_choosing: Whether what is left may go in rotations, wherever that is cheapest.
        first: Matchings that are made at most; 0 leaves rotations only.
        cut: No threshold below the largest sum over `cut * n` is tried; 0: all are.
        max_stages: Stages at most, of both kinds.
        row_cost: Seconds per row of a stage's longest send.
        stage_cost: Seconds per stage.

    Returns:
        What can be said of the matrix; permutations `[stages, n]`, int32, and rows, int64; the
        largest sum of a row or column; the sum of all; how many stages are rotations; and the
        seconds that the stages take between servers. If the matrix is negative or too large,
        the two sums are the place of the entry; if stages are too few, the first of them is how
        many would do.
    """
    n = counts.shape[0]
    perms, rows = np.empty((0, n), np.int32), np.empty((0, n), np.int64)
    columns = np.empty(n, np.int64)
    said, largest, total = check(counts, columns)
    if said != OK or total == 0:
        return said, perms, rows, largest, total, 0, 0.0
    stuffed, real = np.empty((n, n), np.int64), np.empty((n, n), np.int64)
    stuff_into(counts, columns, largest, stuffed, real)

    room = min(first, 4 * n + 16)
    perms, rows = np.empty((room, n), np.int32), np.empty((room, n), np.int64)
    words = (n + WORD - 1) // WORD
    edges, state = np.empty((n, words), np.int64), np.empty((6, n), np.int64)
    most = np.empty(n, np.int64)
    free_all(state)

    threshold = start_threshold(policy, stuffed)
    least = largest // (cut * n) if cut else 0
    find_edges(stuffed, threshold, edges)
    best, seconds = np.array([-1, 0, _MOST]), np.inf
    if is_choosing:
        seconds = consider(0, max_stages, 0, row_cost, stage_cost, real, most, best, seconds)
    left, length, made, is_new, is_done = largest, 0, 0, False, False
    while left and made < min(first, max_stages):
        # A matching over entries of at least the threshold; where there is none, it falls.
        row = 0
        while not is_done:
            row, reached = match_rows(row, words, edges, state)
            if not reached:
                break
            if is_new:
                seconds = consider(
                    made, max_stages, length, row_cost, stage_cost, real, most, best, seconds
                )
                is_new = False
            threshold = lower(policy, words, reached, stuffed, state)
            find_edges(stuffed, threshold, edges)
            is_done = is_choosing and threshold < least
        # Whatever comes, all rows of the fullest server are sent, in one more stage at least.
        if is_done or row_cost * largest + stage_cost * (made + 1) >= seconds:
            break
        if made == room:
            room = min(first, 2 * room)
            perms, rows = grow(perms, room), grow(rows, room)
        amount, longest = take(left, threshold, stuffed, real, edges, state, perms, rows, made)
        length += longest
        made += 1
        left -= amount
        is_new = is_choosing
    if is_new or not left:
        seconds = consider(
            made, max_stages, length, row_cost, stage_cost, real, most, best, seconds
        )
    if best[0] < 0:
        return TOO_FEW_STAGES, perms[:0], rows[:0], best[2], total, 0, 0.0
    if best[1]:
        leave(counts, perms, rows, best[0], real)
    perms, rows = finish(real, best[0], perms, rows, best[1], order)
    return OK, perms, rows, largest, total, best[1], seconds


@compiled
def stuff(counts: np.ndarray) -> np.ndarray:
    """Return a matrix that is nowhere less and whose rows and columns have one sum, the largest.

    Args:
        counts: `[n, n]`, int64, not negative; the diagonal does not count.
    """
    stuffed, columns = np.empty_like(counts), np.empty(counts.shape[0], np.int64)
    _, largest, _ = check(counts, columns)
    stuff_into(counts, columns, largest, stuffed, np.empty_like(counts))
    return stuffed
