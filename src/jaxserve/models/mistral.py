"""Mistral and Ministral: Llama with a sliding window in all or some of its layers."""

from jaxserve.models.layers import CausalLM


class Mistral(CausalLM):
    """Mistral and Ministral: Llama with a sliding window in all or some of its layers.

    Which parts it has is said by its configuration.
    """
