"""Appending keys and values to pages, with rotation and with narrower numbers if wanted."""

from jaxserve.pallas_kernels.append_paged_kv.api import append_paged_kv as append_paged_kv
from jaxserve.pallas_kernels.append_paged_kv.api import kv_scale as kv_scale
from jaxserve.pallas_kernels.append_paged_kv.api import (
    rope_append_paged_kv as rope_append_paged_kv,
)
from jaxserve.pallas_kernels.append_paged_kv.api import token_slots as token_slots
