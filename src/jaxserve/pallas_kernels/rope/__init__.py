"""Rotary position embedding: halves or neighbours, of whole heads or of their beginning."""

from jaxserve.pallas_kernels.rope.api import RopeTables as RopeTables
from jaxserve.pallas_kernels.rope.api import rope as rope
from jaxserve.pallas_kernels.rope.api import rope_tables as rope_tables
