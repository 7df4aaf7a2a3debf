"""Root-mean-square norm, alone or after adding to the residual stream."""

from jaxserve.pallas_kernels.rms_norm.api import add_rms_norm as add_rms_norm
from jaxserve.pallas_kernels.rms_norm.api import rms_norm as rms_norm
