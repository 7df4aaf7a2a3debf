"""Sparse decode attention that reads as much of the context as a share of the attention mass takes.

Source: Tactic, arXiv 2502.12216. See the README of this folder.
"""

from jaxserve.attention.tactic.attention import sparse_decode as sparse_decode
from jaxserve.attention.tactic.clustering import build_index as build_index
from jaxserve.attention.tactic.config import TacticConfig as TacticConfig
