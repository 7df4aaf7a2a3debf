"""Qwen2 and Qwen2.5: biases on the query, key and value projections."""

from jaxserve.models.layers import CausalLM


class Qwen2(CausalLM):
    """Qwen2 and Qwen2.5: biases on the query, key and value projections.

    Which parts it has (biases, per-head norms, tied output) is said by its configuration.
    """
