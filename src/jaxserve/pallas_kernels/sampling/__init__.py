"""Drawing tokens from logits, row by row, within top-k, top-p and min-p."""

from jaxserve.pallas_kernels.sampling.api import sample as sample
