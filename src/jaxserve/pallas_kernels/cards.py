"""Every operation's card, by name; a module is imported when its card is asked for."""

import importlib
from collections.abc import Iterator

from jaxserve.pallas_kernels.card import KernelCard

MODULES = {"attention": "jaxserve.pallas_kernels.attention.card"}
"""Where each operation's `CARD` is."""


def iter_cards() -> Iterator[KernelCard]:
    """Import and return all cards, in order of their names."""
    for name in sorted(MODULES):
        yield importlib.import_module(MODULES[name]).CARD
