"""Which rail each row takes: the balance inside servers, and what is left to do behind it.

For each pair of servers every GPU of the sender gets an equal part of the rows, the first ones one
more if they do not divide. A row stays where it is if its GPU is not over its part. Of those that
must go, rows whose final GPU is on a rail that lacks some go there, which saves them the second
hop; others fill what lacks in the order of rails, rows that would stay on their final rail last.
"""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import compiled


class Rails(NamedTuple):
    """What the balance moves, and what receivers have to pass on.

    Attributes:
        moves: `[moves, 6]`, int64: server, GPU from, GPU to, server of destination, GPU of
            destination, rows.
        balance: `[n, n]`: of each pair of servers, the most rows that a GPU of the sender gives or
            takes.
        redistribution: `[n, n]`: the same of the receiver, behind the send.
        up: `[4, n, m]`: rows of all pairs that each GPU gives and takes in the balance, and gives
            and takes behind the sends.
    """

    moves: np.ndarray
    balance: np.ndarray
    redistribution: np.ndarray
    up: np.ndarray


@compiled
def level(
    sender: int,
    receiver: int,
    part: np.ndarray,
    over: np.ndarray,
    moved: np.ndarray,
    moves: np.ndarray,
    count: int,
) -> int:
    """Move rows of one pair of servers until no rail has more than its part.

    Args:
        sender: The server that they are moved in.
        receiver: The server that they are for.
        part: `[m, m]`, rows by rail and final GPU; changed.
        over: `[m]`, what each rail has beyond its part; 0 behind.
        moved: `[2, m]`; written: rows that each GPU gives and takes.
        moves: `[room, 6]`; written as far as there is room.
        count: Moves before.

    Returns:
        Moves so far.
    """
    m = over.size
    for k in range(m):
        moved[0, k], moved[1, k] = 0, 0
    # The first turn sends rows to their final rails, the second one wherever some lack, and the
    # third one even those that are on their final rail.
    for turn in range(3):
        for k in range(m):
            for to in range(m):
                if over[k] <= 0 or over[to] >= 0:
                    continue
                low, high = (to, to + 1) if turn == 0 else (0, m) if turn == 1 else (k, k + 1)
                for final in range(low, high):
                    rows = min(over[k], -over[to], part[k, final])
                    if rows == 0 or (turn == 1 and final == k):
                        continue
                    part[k, final] -= rows
                    part[to, final] += rows
                    over[k] -= rows
                    over[to] += rows
                    moved[0, k] += rows
                    moved[1, to] += rows
                    if count < moves.shape[0]:
                        moves[count, 0], moves[count, 1], moves[count, 2] = sender, k, to
                        moves[count, 3], moves[count, 4], moves[count, 5] = receiver, final, rows
                    count += 1
    return count


@compiled
def pass_on(part: np.ndarray, moved: np.ndarray) -> None:
    """Write what GPUs of a receiver give and take, `[2, m]`, of rows by rail and final GPU."""
    m = part.shape[0]
    for k in range(m):
        moved[0, k], moved[1, k] = 0, 0
    for k in range(m):
        for final in range(m):
            if final != k:
                moved[0, k] += part[k, final]
                moved[1, final] += part[k, final]


@compiled
def assign(
    traffic: np.ndarray,
    moves: np.ndarray,
    balance: np.ndarray,
    redistribution: np.ndarray,
    up: np.ndarray,
) -> int:
    """Assign rails.

    Args:
        traffic: `[n, m, n, m]`, int64, not negative.
        moves: `[room, 6]`; written as far as there is room.
        balance: `[n, n]`, zeros; written, as are the next two.
        redistribution: `[n, n]`, zeros.
        up: `[4, n, m]`, zeros: rows that each GPU gives and takes before the sends, and behind
            them.

    Returns:
        How many moves there are.
    """
    n, m = traffic.shape[0], traffic.shape[1]
    part, over = np.empty((m, m), np.int64), np.empty(m, np.int64)
    moved = np.empty((2, m), np.int64)
    count = 0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            total = 0
            for k in range(m):
                over[k] = 0
                for final in range(m):
                    part[k, final] = traffic[i, k, j, final]
                    over[k] += part[k, final]
                total += over[k]
            for k in range(m):
                over[k] -= total // m + (k < total % m)
            count = level(i, j, part, over, moved, moves, count)
            for k in range(m):
                up[0, i, k] += moved[0, k]
                up[1, i, k] += moved[1, k]
                balance[i, j] = max(balance[i, j], moved[0, k], moved[1, k])
            pass_on(part, moved)
            for k in range(m):
                up[2, j, k] += moved[0, k]
                up[3, j, k] += moved[1, k]
                redistribution[i, j] = max(redistribution[i, j], moved[0, k], moved[1, k])
    return count


def assign_rails(traffic: np.ndarray) -> Rails:
    """Assign rails to the rows of all pairs of servers.

    Args:
        traffic: `[n, m, n, m]`, int64, contiguous, not negative.

    Returns:
        Moves in the order of pairs, and what they amount to. Equal inputs give equal moves.

    Source: FLASH, arXiv 2505.09764, on balancing inside servers.
    Differs: It says how much each GPU ends up with; which rows move is ours.
    """
    n, m = traffic.shape[:2]
    count = 4 * n * n * m
    while True:
        moves, up = np.empty((count, 6), np.int64), np.zeros((4, n, m), np.int64)
        balance, redistribution = np.zeros((n, n), np.int64), np.zeros((n, n), np.int64)
        count = assign(traffic, moves, balance, redistribution, up)
        if count <= len(moves):
            return Rails(moves[:count], balance, redistribution, up)


def sum_servers(traffic: np.ndarray) -> np.ndarray:
    """Return the rows of pairs of servers, `[n, n]`, of those of GPUs, `[n, m, n, m]`."""
    return traffic.sum(axis=(1, 3))
