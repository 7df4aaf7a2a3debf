"""Qwen3: a norm on every query and key head, and heads wider than hidden / heads."""

from jaxserve.models.layers import CausalLM


class Qwen3(CausalLM):
    """Qwen3: a norm on every query and key head, and heads wider than hidden / heads.

    Which parts it has (biases, per-head norms, tied output) is said by its configuration.
    """
