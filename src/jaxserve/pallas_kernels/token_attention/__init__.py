"""Decode attention over chosen tokens, whose choice differs from head to head."""

from jaxserve.pallas_kernels.token_attention.api import TokenLists as TokenLists
from jaxserve.pallas_kernels.token_attention.api import token_attention as token_attention
