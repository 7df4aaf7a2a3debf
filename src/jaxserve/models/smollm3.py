"""SmolLM3: Llama with layers, every fourth as a rule, that do not rotate positions."""

from jaxserve.models.layers import CausalLM


class SmolLM3(CausalLM):
    """SmolLM3: Llama with layers, every fourth as a rule, that do not rotate positions.

    Which parts it has is said by its configuration.
    """
