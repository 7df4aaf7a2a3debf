"""The cards of all operations: complete, true, and what plain JAX computes agrees with them."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import pallas_kernels
from jaxserve.pallas_kernels import backends, triton_launch
from jaxserve.pallas_kernels.card import KernelCard
from jaxserve.pallas_kernels.cards import PLACES, card_of, iter_cards

SMALL = sorted(PLACES.keys() - {"attention"})


def test_every_card_of_every_package_is_listed():
    folder = Path(pallas_kernels.__file__).parent
    defined = {
        value.name
        for path in folder.glob("*/card.py")
        for value in vars(
            importlib.import_module(f"jaxserve.pallas_kernels.{path.parent.name}.card")
        ).values()
        if isinstance(value, KernelCard)
    }
    assert [card.name for card in iter_cards()] == sorted(defined) == sorted(PLACES)


def test_an_unknown_operation_is_refused_with_a_hint():
    with pytest.raises(
        ValueError, match=r"no operation 'rms_nrom', expected one of .* mean 'rms_norm'"
    ):
        card_of("rms_nrom")


@pytest.mark.parametrize("name", sorted(PLACES))
def test_plain_jax_agrees_with_the_reference(name):
    card = card_of(name)
    for dtype in card.tolerances:
        inputs = card.make(card.tiny(), dtype, 7)
        assert card.supports("xla", card.tiny(), dtype) is None
        got = jax.tree.leaves(card.run(**inputs, backend="xla"))
        want = jax.tree.leaves(card.reference(**inputs))
        assert len(got) == len(want)
        for left, right in zip(got, want, strict=True):
            wide = (np.asarray(a, np.float32) for a in (left, right))
            assert card.difference(*wide, dtype) is None


@pytest.mark.parametrize("name", sorted(PLACES))
def test_work_grows_with_what_is_asked(name):
    card = card_of(name)
    tiny, usual = card.tiny(), card.usual()
    assert 0 < card.num_bytes(tiny, "float32") < card.num_bytes(usual, "float32")
    assert card.num_bytes(usual, "bfloat16") < card.num_bytes(usual, "float32")
    assert 0 <= card.num_flops(tiny) <= card.num_flops(usual)


class ChosenError(Exception):
    """Carries what was chosen out of a call."""


@pytest.mark.parametrize("name", SMALL)
def test_backends_stand_in_the_order_in_which_auto_tries_them(name, monkeypatch):
    card, choose = card_of(name), backends.choose

    def spy(backend, *, prefers_triton):
        raise ChosenError(choose(backend, prefers_triton=prefers_triton))

    monkeypatch.setattr(backends, "choose", spy)
    inputs = card.make(card.tiny(), "float32", 0)
    for reason in (None, "no GPU is here"):
        monkeypatch.setattr(triton_launch, "unavailable", lambda reason=reason: reason)
        with pytest.raises(ChosenError) as caught:
            card.run(**inputs)
        able = [b for b in card.backends if card.supports(b, card.tiny(), "float32") is None]
        assert caught.value.args == (able[0],)
