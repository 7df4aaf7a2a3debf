"""Selections as lists, through the attention over lists of pages."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.attention import dense
from jaxserve.attention.tactic.lists import attend_lists, token_lists
from jaxserve.pallas_kernels.attention import tuning
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.testing import interpret
from jaxserve.pallas_kernels.token_attention import api
from jaxserve.pallas_kernels.token_attention.api import token_attention
from jaxserve.pallas_kernels.token_attention.lists import TokenLists
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


def arrays(page_size, dtype="bfloat16"):
    pool = jnp.zeros((5, 2, page_size, 64), dtype)
    return jnp.zeros((3, 8, 64)), PagedKV(k=pool, v=pool)


def test_the_kernel_over_lists_is_the_engines_own_where_it_can_be(monkeypatch):
    assert dense._list_backend("mosaic", *arrays(16)) == "xla"
    monkeypatch.setattr(api, "present_device", lambda: ("gpu", "9.0"))
    assert dense._list_backend("mosaic", *arrays(16)) == "mosaic"
    assert dense._list_backend("mosaic", *arrays(4)) == "xla"
    assert dense._list_backend("triton", *arrays(16)) == "xla"
    monkeypatch.setattr(api.triton_launch, "unavailable", lambda: None)
    assert dense._list_backend("mosaic", *arrays(16)) == "mosaic"
    assert dense._list_backend("mosaic", *arrays(16, "float32")) == "triton"
    assert dense._list_backend("triton", *arrays(16)) == "triton"
    assert dense._list_backend("pallas-reference", *arrays(16)) == "reference"
    assert dense._list_backend("pallas-xla", *arrays(16)) == "xla"


@pytest.mark.mosaic
@pytest.mark.slow
def test_a_selection_is_read_by_the_mosaic_kernel(monkeypatch):
    monkeypatch.setattr(api, "present_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(tuning, "multiprocessors", lambda: 1)
    rng = np.random.default_rng(0)
    pool = PagedKV(
        k=jnp.asarray(rng.normal(size=(7, 2, 16, 64)), jnp.float16),
        v=jnp.asarray(rng.normal(size=(7, 2, 16, 64)), jnp.float16),
    )
    q = jnp.asarray(rng.normal(size=(2, 8, 64)), jnp.float16)
    table = jnp.asarray([[3, 1, 5], [2, 6, 4]])
    rows = [rng.permutation(48)[:count] for count in (40, 0, 3, 17)]
    lists = TokenLists(
        indptr=jnp.asarray(np.cumsum([0, *map(len, rows)]), jnp.int32),
        positions=jnp.asarray(np.concatenate(rows), jnp.int32),
    )

    def read(backend):
        def call(q, pool, table, lists):
            length = jnp.asarray([48, 48])
            return attend_lists(q, pool, table, length, lists, scale=0.125, backend=backend)

        return call

    got = interpret(read("mosaic"), q, pool, table, lists).value
    for found, want in zip(got, read("reference")(q, pool, table, lists), strict=True):
        np.testing.assert_allclose(found, want, atol=2e-3)
