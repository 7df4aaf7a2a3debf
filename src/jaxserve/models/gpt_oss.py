"""gpt-oss: experts with biases and bounds, sinks, every other layer with a window."""

from typing import ClassVar

from jaxserve.models.layers import CausalLM, DecoderLayer
from jaxserve.models.moe import MoeLayer


class GptOss(CausalLM):
    """gpt-oss: experts with biases and bounds, sinks, every other layer with a window.

    Which experts it has and how they are chosen is said by its configuration.
    """

    layer_class: ClassVar[type[DecoderLayer]] = MoeLayer
