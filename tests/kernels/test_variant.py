import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels import variant
from jaxserve.pallas_kernels.variant import AttentionVariant, compose, constant_key

GAIN = 2.0


def made(score_mod):
    return AttentionVariant(score_mod=score_mod)


def cap_by(bound):
    return made(lambda s, ctx, q_pos, k_pos, head: bound * jnp.tanh(s / bound))


def test_equal_code_and_constants_are_equal_variants():
    assert cap_by(3.0) == cap_by(3.0)
    assert hash(cap_by(3.0)) == hash(cap_by(3.0))
    assert cap_by(3.0) != cap_by(4.0)
    assert cap_by(3.0) != cap_by(3)  # an int divides otherwise
    assert {cap_by(3.0): 1}[cap_by(3.0)] == 1


def test_globals_count_as_constants(monkeypatch):
    def scaled():
        return made(lambda s, ctx, q_pos, k_pos, head: s * GAIN)

    before = scaled()
    assert before == scaled()
    monkeypatch.setitem(globals(), "GAIN", 3.0)
    assert before != scaled()


def test_what_functions_call_counts():
    def outer(by):
        def inner(s):
            return s + by

        return made(lambda s, ctx, q_pos, k_pos, head: inner(s))

    assert outer(1) == outer(1)
    assert outer(1) != outer(2)


def test_defaults_partials_and_arrays_count():
    def biased(s, ctx, q_pos, k_pos, head, *, by):
        return s + by

    def default(by):
        return made(lambda s, ctx, q_pos, k_pos, head, by=by: s + by)

    def table(values):
        return made(lambda s, ctx, q_pos, k_pos, head: s + values[0])

    assert made(functools.partial(biased, by=1)) == made(functools.partial(biased, by=1))
    assert made(functools.partial(biased, by=1)) != made(functools.partial(biased, by=2))
    assert default(1) == default(1)
    assert default(1) != default(2)
    assert table(np.arange(3)) == table(np.arange(3))
    assert table(np.arange(3)) != table(np.arange(3.0))
    assert made(jax.jit(lambda s, ctx, q_pos, k_pos, head: s)) != made(None)


def test_recursion_ends():
    def make():
        def down(n):
            return 0 if n == 0 else down(n - 1)

        return down

    assert constant_key(make()) == constant_key(make())


def test_device_arrays_and_unhashable_things_are_refused():
    array = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"closes over a device array of shape \(3,\); pass it"):
        made(lambda s, ctx, q_pos, k_pos, head: s + array)
    things = {1, 2}
    with pytest.raises(ValueError, match=r"closes over \{1, 2\} of type set, which has no hash"):
        made(lambda s, ctx, q_pos, k_pos, head: s + len(things))


def test_parts_must_fit():
    with pytest.raises(ValueError, match="needs a score_mod that gives weights"):
        AttentionVariant(use_softmax=False)
    with pytest.raises(ValueError, match="without softmax has no row_init"):
        AttentionVariant(
            use_softmax=False, score_mod=lambda s, *_: s, row_init=lambda ctx, head: (0.0, 1.0)
        )
    with pytest.raises(ValueError, match="'mask' is the packed mask's"):
        AttentionVariant(extras={"mask": "head"})
    with pytest.raises(ValueError, match="one row_init at most, got 2"):
        compose(variant.sinks(), variant.sinks())
    with pytest.raises(ValueError, match="so it must come last"):
        compose(variant.sigmoid(), variant.soft_cap(1.0))
    with pytest.raises(ValueError, match="both 'head' and 'scalar'"):
        compose(variant.alibi(), AttentionVariant(extras={"slopes": "scalar"}))
    with pytest.raises(ValueError, match="one packed mask at most"):
        compose(variant.packed_mask(), variant.packed_mask(per_head=True))


def test_composition_is_by_value_too():
    def both():
        return compose(variant.soft_cap(3.0), variant.alibi(), variant.window(8))

    assert both() == both()
    assert both() != compose(variant.alibi(), variant.soft_cap(3.0), variant.window(8))
    assert compose() == variant.PLAIN
    assert compose(variant.sinks()) == variant.sinks()
    assert both().extras == {"slopes": "head"}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 70)), max_size=4), st.booleans())
def test_packed_masks_hold_every_bit(shapes, per_head):
    rng = np.random.default_rng(0)
    heads = (3,) if per_head else ()
    masks = [rng.random((*heads, *shape)) < 0.5 for shape in shapes]
    words = variant.pack_mask(masks)
    base = 0
    for mask in masks:
        q_len, kv_len = mask.shape[-2:]
        stride = -(-kv_len // 32)
        for q in range(q_len):
            for k in range(kv_len):
                word = words[..., base + q * stride + k // 32]
                assert ((word >> np.uint32(k % 32)) & 1 == mask[..., q, k]).all()
        base += q_len * stride
    assert words.shape[-1] == base


def test_masks_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"must all be \[q_len, kv_len\] or all"):
        variant.pack_mask([np.ones((2, 3), bool), np.ones((1, 2, 3), bool)])


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_alibi_slopes_are_those_of_the_paper(heads):
    slopes = variant.alibi_slopes(heads)
    assert slopes.shape == (heads,)
    power = 2 ** int(np.log2(heads))
    np.testing.assert_allclose(slopes[:power], 2 ** (-8 * np.arange(1, power + 1) / power))
    rest = variant.alibi_slopes(2 * power)[::2][: heads - power]
    np.testing.assert_allclose(slopes[power:], rest)


def test_the_example_holds():
    assert doctest.testmod(variant).failed == 0
