"""Qwen3-MoE: Qwen3 whose feed-forwards are experts, in all layers or in some."""

from typing import ClassVar

from jaxserve.models.layers import CausalLM, DecoderLayer
from jaxserve.models.moe import MoeLayer


class Qwen3Moe(CausalLM):
    """Qwen3-MoE: Qwen3 whose feed-forwards are experts, in all layers or in some.

    Which experts it has and how they are chosen is said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = MoeLayer
