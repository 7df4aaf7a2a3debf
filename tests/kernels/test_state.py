import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels import state
from jaxserve.pallas_kernels.state import AttentionState, add_mass, merge, merge_states, to_natural

finite = st.floats(-300, 300, width=32)


@st.composite
def states(draw, num: int):
    """Draw states of three rows, some of which have seen nothing."""
    drawn = []
    for _ in range(num):
        lse = np.array([draw(st.one_of(finite, st.just(-np.inf))) for _ in range(3)], np.float32)
        o = np.array([[draw(st.floats(-4, 4, width=32)) for _ in range(2)] for _ in range(3)])
        o = np.where(np.isneginf(lse)[:, None], 0.0, o).astype(np.float32)
        drawn.append(AttentionState(o=jnp.asarray(o), lse=jnp.asarray(lse)))
    return drawn


def same(a: AttentionState, b: AttentionState) -> None:
    np.testing.assert_allclose(a.lse, b.lse, atol=1e-4, rtol=1e-6)
    np.testing.assert_allclose(a.o, b.o, atol=1e-4)


@given(parts=states(3))
def test_merging_is_associative_and_commutative(parts):
    a, b, c = parts
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b), merge(b, a))


@given(parts=states(1))
def test_the_empty_state_is_the_identity_to_the_last_bit(parts):
    (a,) = parts
    none = AttentionState.empty((3, 2))
    for merged in (merge(a, none), merge(none, a)):
        assert (merged.o == a.o).all()
        assert (merged.lse == a.lse).all()


def test_two_empty_states_are_an_empty_state():
    none = AttentionState.empty((3, 2))
    merged = merge(none, none)
    assert (merged.o == 0).all()
    assert jnp.isneginf(merged.lse).all()


@given(st.integers(0, 99), st.integers(1, 6))
def test_states_of_parts_merge_into_the_state_of_the_whole(seed, num):
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=(2, 24)) * 20, rng.normal(size=(24, 3))

    def attend(at):
        if not len(at):
            return AttentionState.empty((2, 3))
        s = scores[:, at]
        top = s.max(axis=1, keepdims=True)
        w = np.exp(s - top)
        o = w @ values[at] / w.sum(axis=1, keepdims=True)
        lse = (top[:, 0] + np.log(w.sum(axis=1))) / np.log(2)
        return AttentionState(o=jnp.asarray(o, jnp.float32), lse=jnp.asarray(lse, jnp.float32))

    owner = rng.integers(0, num, 24)
    parts = [attend(np.flatnonzero(owner == i)) for i in range(num)]
    same(merge_states(parts), attend(np.arange(24)))


def test_bases_are_not_mixed():
    lse = jnp.asarray([0.0, 10.0, -jnp.inf])
    np.testing.assert_allclose(to_natural(lse), np.array([0, 10, -np.inf]) * np.log(2), rtol=1e-6)
    two = AttentionState(o=jnp.ones((1, 1)), lse=jnp.asarray([3.0]))
    assert merge(two, two).lse[0] == 4.0  # twice the mass is one more in base 2
    assert pytest.approx(np.log2(np.e)) == state.LOG2_E


def test_mass_without_values_dilutes():
    a = AttentionState(o=jnp.ones((2, 1)), lse=jnp.asarray([0.0, 0.0]))
    diluted = add_mass(a, jnp.zeros(2), jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(diluted.o[:, 0], [0.5, 1.0])
    np.testing.assert_allclose(diluted.lse, [1.0, 0.0])
    natural = add_mass(a, jnp.full(2, np.log(3.0)))
    np.testing.assert_allclose(natural.o[:, 0], [0.25, 0.25], rtol=1e-6)


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="at least one state, got none"):
        merge_states([])


def test_half_precision_outputs_stay_half_precision():
    a = AttentionState(o=jnp.ones((1, 2), jnp.bfloat16), lse=jnp.zeros(1))
    assert merge(a, a).o.dtype == jnp.bfloat16
