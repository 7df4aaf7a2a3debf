"""Model families as nnx modules, and the checkpoints that fill them."""
