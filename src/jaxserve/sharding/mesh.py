"""Build the mesh that one engine runs on."""

import jax
import numpy as np

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.rules import TENSOR_AXIS


def make_mesh(tensor_parallel_size: int = 1) -> jax.sharding.Mesh:
    """Build a one-axis mesh over the first local devices.

    Args:
        tensor_parallel_size: Devices that share each layer.

    Raises:
        ConfigError: If there are fewer devices.
    """
    devices = jax.local_devices()
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices, found "
            f"{len(devices)} {devices[0].platform} device(s)."
        )
    return jax.sharding.Mesh(np.asarray(devices[:tensor_parallel_size]), (TENSOR_AXIS,))


def host_mesh() -> jax.sharding.Mesh:
    """Build a mesh of the device whose memory is the host's, or of the default one without it."""
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        devices = jax.local_devices()
    return jax.sharding.Mesh(np.asarray(devices[:1]), (TENSOR_AXIS,))
