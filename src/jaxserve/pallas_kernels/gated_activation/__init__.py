"""Gates of feed-forward layers: an activation of one half times the other."""

from jaxserve.pallas_kernels.gated_activation.api import gelu_mul as gelu_mul
from jaxserve.pallas_kernels.gated_activation.api import silu_mul as silu_mul
