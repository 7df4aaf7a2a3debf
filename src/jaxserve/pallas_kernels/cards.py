"""Every operation's card; a module is imported when its card is asked for."""

import importlib
from collections.abc import Iterator

from jaxserve.core.errors import did_you_mean
from jaxserve.pallas_kernels.card import KernelCard

PLACES = {
    "add_rms_norm": ("rms_norm", "ADD_CARD"),
    "append_paged_kv": ("append_paged_kv", "CARD"),
    "attention": ("attention", "CARD"),
    "gelu_mul": ("gated_activation", "GELU_CARD"),
    "rms_norm": ("rms_norm", "CARD"),
    "rope": ("rope", "CARD"),
    "sample": ("sampling", "CARD"),
    "silu_mul": ("gated_activation", "CARD"),
    "token_attention": ("token_attention", "CARD"),
}
"""Operation -> its package beside this file, and what its card is called in there."""


def card_of(name: str) -> KernelCard:
    """Import and return the card of an operation.

    Raises:
        ValueError: If there is no such operation.
    """
    if name not in PLACES:
        raise ValueError(
            f"there is no operation {name!r}, expected one of {', '.join(PLACES)}."
            f"{did_you_mean(name, tuple(PLACES))}"
        )
    package, attribute = PLACES[name]
    module = importlib.import_module(f"jaxserve.pallas_kernels.{package}.card")
    return getattr(module, attribute)


def iter_cards() -> Iterator[KernelCard]:
    """Import and return all cards, in order of their names."""
    return map(card_of, sorted(PLACES))
