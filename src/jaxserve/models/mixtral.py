"""Mixtral: Mistral whose feed-forwards are experts, two per token as a rule."""

from typing import ClassVar

from jaxserve.models.layers import CausalLM, DecoderLayer
from jaxserve.models.moe import MoeLayer


class Mixtral(CausalLM):
    """Mixtral: Mistral whose feed-forwards are experts, two per token as a rule.

    Which experts it has and how they are chosen is said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = MoeLayer
