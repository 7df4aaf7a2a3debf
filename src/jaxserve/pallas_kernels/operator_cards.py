"""The cards of all operations that are launched one by one; attention has its own."""

from jaxserve.pallas_kernels.append_paged_kv import card as append_paged_kv
from jaxserve.pallas_kernels.card import KernelCard
from jaxserve.pallas_kernels.gated_activation import card as gated_activation
from jaxserve.pallas_kernels.rms_norm import card as rms_norm
from jaxserve.pallas_kernels.rope import card as rope
from jaxserve.pallas_kernels.sampling import card as sampling
from jaxserve.pallas_kernels.token_attention import card as token_attention

CARDS: dict[str, KernelCard] = {
    card.name: card
    for card in (
        append_paged_kv.CARD,
        gated_activation.CARD,
        gated_activation.GELU_CARD,
        rms_norm.ADD_CARD,
        rms_norm.CARD,
        rope.CARD,
        sampling.CARD,
        token_attention.CARD,
    )
}
"""By name."""
