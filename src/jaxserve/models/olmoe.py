"""OLMoE: many small experts, and norms over all heads of queries or keys together."""

from typing import ClassVar

from jaxserve.models.layers import CausalLM, DecoderLayer
from jaxserve.models.moe import MoeLayer


class Olmoe(CausalLM):
    """OLMoE: many small experts, and norms over all heads of queries or keys together.

    Which experts it has and how they are chosen is said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = MoeLayer
