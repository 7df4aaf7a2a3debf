"""Llama 2, 3 and 3.x, SmolLM2, and whatever else calls itself llama."""

from jaxserve.models.layers import CausalLM


class Llama(CausalLM):
    """Llama 2, 3 and 3.x, SmolLM2, and whatever else calls itself llama.

    Which parts it has (biases, per-head norms, tied output) is said by its configuration.
    """
