"""Phi-3, Phi-3.5 and Phi-4 (dense): a sliding window, longrope, heads rotated in part."""

from jaxserve.models.layers import CausalLM


class Phi3(CausalLM):
    """Phi-3, Phi-3.5 and Phi-4 (dense): a sliding window, longrope, heads rotated in part.

    Its checkpoints hold query, key and value projections in one tensor, and likewise gate and up
    projection; they are taken apart as they are read (`models.fused`).
    """
