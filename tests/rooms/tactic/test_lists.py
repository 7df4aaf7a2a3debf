"""Selections as lists, through the attention over lists of pages."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.attention.tactic.lists import token_lists
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.token_attention.api import token_attention
from tests.rooms.tactic.cases import CAPACITY, HEADS, SCALE, config, random_context
from tests.rooms.tactic.test_select import choose

PAGE = 16


def paged(slots: np.ndarray) -> jnp.ndarray:
    """Cut slots into pages, behind a dummy page."""
    rows, heads, _, dim = slots.shape
    pages = slots.reshape(rows, heads, CAPACITY // PAGE, PAGE, dim).swapaxes(1, 2)
    pages = pages.reshape(-1, heads, PAGE, dim)
    return jnp.asarray(np.concatenate([np.full_like(pages[:1], np.nan), pages]))


def test_lists_over_pages_are_attention_to_what_is_read():
    context = random_context(4, (1000, 300, 0))
    settings = config()
    chosen, read, index = choose(context, [0.9, 0.6, 0.9], settings)
    lists = token_lists(chosen, index, jnp.asarray(context.length), config=settings)
    counts = np.diff(np.asarray(lists.indptr)).reshape(3, HEADS)
    assert (counts == read.sum(-1)).all()
    state = token_attention(
        jnp.asarray(context.q),
        PagedKV(k=paged(context.keys), v=paged(context.values)),
        jnp.arange(4) * (CAPACITY // PAGE),
        1 + jnp.arange(3 * (CAPACITY // PAGE)),
        jnp.asarray(np.maximum(context.length, 1)),
        lists,
        sm_scale=SCALE,
        backend="xla",
    )
    np.testing.assert_allclose(state.o, context.attend(read), atol=3e-5)


@pytest.mark.parametrize("capacity", [1, 500])
def test_lists_that_are_too_short_end_early(capacity):
    context = random_context(4, (1000, 700))
    chosen, read, index = choose(context, 1.0)
    lists = token_lists(
        chosen, index, jnp.asarray(context.length), config=config(), capacity=capacity
    )
    assert lists.positions.shape == (capacity,)
    assert int(lists.indptr[-1]) == min(capacity, read.sum())
