"""DeepSeek-V3 and R1: DeepSeek-V2 whose router scores every expert by itself, and is balanced."""

from jaxserve.models.deepseek_v2 import DeepseekV2


class DeepseekV3(DeepseekV2):
    """DeepSeek-V3 and R1: DeepSeek-V2 whose router scores every expert by itself, and is balanced.

    The layers behind the last one of the model, which draft further tokens, are left out.
    """
