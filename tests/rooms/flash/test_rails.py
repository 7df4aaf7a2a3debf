"""The balance inside servers: equal parts, no more moves than needed, rows on their final rails."""

import numpy as np
from hypothesis import given, settings

from jaxserve.sharding.flash.rails import assign_rails
from jaxserve.sharding.flash.traffic import as_gpu_counts, spread_servers
from tests.rooms.flash.cases import gpu_counts, links, server_counts


def apply(traffic, moves):
    """Return rows by server, rail, server and final GPU, behind the moves."""
    found = traffic.copy()
    for server, out, into, receiver, final, rows in moves:
        assert rows > 0
        assert out != into
        found[server, out, receiver, final] -= rows
        found[server, into, receiver, final] += rows
    return found


@given(traffic=gpu_counts())
@settings(max_examples=100, deadline=None)
def test_every_rail_carries_an_equal_part(traffic):
    n, m = traffic.shape[:2]
    found = assign_rails(traffic)
    behind = apply(traffic, found.moves)
    assert (behind >= 0).all()
    for i in range(n):
        assert not (found.moves[:, 0] == found.moves[:, 3]).any()
        for j in range(n):
            if i == j:
                assert np.array_equal(behind[i, :, i], traffic[i, :, i])
                continue
            total = traffic[i, :, j].sum()
            part = total // m + (np.arange(m) < total % m)
            assert np.array_equal(behind[i, :, j].sum(axis=1), part)
            assert np.array_equal(behind[i, :, j].sum(axis=0), traffic[i, :, j].sum(axis=0))
            own = traffic[i, :, j].sum(axis=1)
            is_pair = (found.moves[:, 0] == i) & (found.moves[:, 3] == j)
            # Only what is over a part moves.
            moved = found.moves[is_pair, 5].sum()
            assert moved == np.maximum(own - part, 0).sum()
            assert found.balance[i, j] == np.abs(own - part).max()


@given(traffic=gpu_counts())
@settings(max_examples=60, deadline=None)
def test_what_ports_carry_follows_from_the_moves(traffic):
    n, m = traffic.shape[:2]
    found = assign_rails(traffic)
    up, most = np.zeros((4, n, m), np.int64), np.zeros((n, n), np.int64)
    for server, out, into, _, _, rows in found.moves:
        up[0, server, out] += rows
        up[1, server, into] += rows
    behind = apply(traffic, found.moves)
    for i in range(n):
        for j in range(n):
            if i != j:
                passed = behind[i, :, j] * (1 - np.eye(m, dtype=np.int64))
                up[2, j] += passed.sum(axis=1)
                up[3, j] += passed.sum(axis=0)
                most[i, j] = max(passed.sum(axis=0).max(), passed.sum(axis=1).max())
    assert np.array_equal(found.up, up)
    assert np.array_equal(found.redistribution, most)


def test_rows_go_to_their_final_rail_if_that_lacks_some():
    traffic = np.zeros((2, 4, 2, 4), np.int64)
    traffic[0, 0, 1] = [10, 10, 10, 10]
    found = assign_rails(traffic)
    assert found.moves.tolist() == [[0, 0, k, 1, k, 10] for k in (1, 2, 3)]
    assert found.redistribution[0, 1] == 0


def test_rows_on_their_final_rail_move_last():
    traffic = np.zeros((2, 2, 2, 2), np.int64)
    traffic[0, 0, 1] = [6, 2]
    found = assign_rails(traffic)
    # Two that are for the other rail, then two that were right where they were.
    assert found.moves.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 0, 2]]


@given(traffic=gpu_counts(max_servers=3, max_gpus=3))
@settings(max_examples=20, deadline=None)
def test_equal_inputs_give_equal_moves(traffic):
    for first, second in zip(assign_rails(traffic), assign_rails(traffic.copy()), strict=True):
        assert np.array_equal(first, second)


@given(counts=server_counts(max_servers=4, most=500))
@settings(max_examples=40, deadline=None)
def test_rows_of_servers_are_spread_evenly(counts):
    for gpus in (1, 3, 4):
        found = spread_servers(counts, gpus)
        assert np.array_equal(found.sum(axis=(1, 3)), counts)
        assert np.array_equal(found, as_gpu_counts(counts, links(gpus)))
        # Both ends differ by a row at most.
        for axis in (1, 3):
            part = found.sum(axis=axis)
            free = 2 if axis == 1 else 1
            assert (part.max(axis=free) - part.min(axis=free) <= 1).all()
