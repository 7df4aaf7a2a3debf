"""Perfect matchings, row by row: shortest alternating paths over sets of servers that are bits."""

import numpy as np

from jaxserve.core.compiled import inlined

COLUMN, ROW, FREE, SEEN, QUEUE, PARENT = range(6)
"""Parts of the state of a matching: the column of each row, or -1; the row of each column, if it
has one; as bits the free columns, and those that a search has reached; the rows that it has
reached, and the row from which it came to each column. One array, since each that is passed on
costs as much as a short loop."""

WORD = 62
"""Bits of a word; a power of two of a word has a remainder of its own modulo 67, as 2 is a
primitive root of it."""
_PLACES = np.full(67, -1, np.int64)
for _bit in range(WORD):
    _PLACES[(1 << _bit) % 67] = _bit


@inlined
def find_edges(stuffed: np.ndarray, threshold: int, edges: np.ndarray) -> None:
    """Write which entries are at least the threshold, as bits of each row."""
    n, words = edges.shape
    for i in range(n):
        for w in range(words):
            bits, bit = 0, 1
            for j in range(w * WORD, min(n, (w + 1) * WORD)):
                if stuffed[i, j] >= threshold:
                    bits |= bit
                bit <<= 1
            edges[i, w] = bits


@inlined
def free_all(state: np.ndarray) -> None:
    """Match nothing."""
    n = state.shape[1]
    for i in range(n):
        state[COLUMN, i] = -1
        state[FREE, i] = 0
    for j in range(n):
        state[FREE, j // WORD] |= np.int64(1) << (j % WORD)


@inlined
def augment(root: int, words: int, edges: np.ndarray, state: np.ndarray) -> int:
    """Match one more row, along a shortest alternating path.

    Args:
        root: The row, which is free.
        words: Words that hold a set of columns.
        edges: `[n, words]`, the columns of each row.
        state: `[6, n]`; the matching is changed, and the queue, what was seen and the parents
            are written.

    Returns:
        0 if the row is matched now; else how many rows were reached, itself among them.
    """
    for w in range(words):
        state[SEEN, w] = 0
    state[QUEUE, 0] = root
    head, tail = 0, 1
    while head < tail:
        row = state[QUEUE, head]
        head += 1
        for w in range(words):
            new = edges[row, w] & ~state[SEEN, w]
            hit = new & state[FREE, w]
            if hit:
                bit = hit & -hit
                state[FREE, w] ^= bit
                column = w * WORD + _PLACES[bit % 67]
                while True:
                    before = state[COLUMN, row]
                    state[COLUMN, row] = column
                    state[ROW, column] = row
                    if row == root:
                        return 0
                    column = before
                    row = state[PARENT, column]
            state[SEEN, w] |= new
            while new:
                bit = new & -new
                new ^= bit
                column = w * WORD + _PLACES[bit % 67]
                state[PARENT, column] = row
                state[QUEUE, tail] = state[ROW, column]
                tail += 1
    return tail


@inlined
def match_rows(row: int, words: int, edges: np.ndarray, state: np.ndarray) -> tuple[int, int]:
    """Match all rows from one on.

    Returns:
        The row that cannot be matched and how many rows were reached from it, or n and 0.
    """
    n, reached = edges.shape[0], 0
    while row < n:
        if state[COLUMN, row] < 0:
            reached = augment(row, words, edges, state)
            if reached:
                break
        row += 1
    return row, reached
