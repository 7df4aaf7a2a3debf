"""Every operation's card."""

from collections.abc import Iterator

from jaxserve.pallas_kernels.attention import card as attention
from jaxserve.pallas_kernels.card import KernelCard
from jaxserve.pallas_kernels.operator_cards import CARDS


def iter_cards() -> Iterator[KernelCard]:
    """Return all cards: attention's, and those of the other operations in order of their names."""
    yield attention.CARD
    yield from (CARDS[name] for name in sorted(CARDS))
