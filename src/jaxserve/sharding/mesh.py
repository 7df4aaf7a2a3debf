"""Build the mesh that one engine runs on."""

import jax
import numpy as np

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.rules import EXPERT_AXIS, TENSOR_AXIS


def make_mesh(tensor_parallel_size: int = 1, expert_parallel_size: int = 1) -> jax.sharding.Mesh:
    """Build a mesh over the first local devices; neighbours share layers.

    Args:
        tensor_parallel_size: Devices that share each layer.
        expert_parallel_size: Groups of such devices that share the experts; 1 makes no axis.

    Raises:
        ConfigError: If there are fewer devices.
    """
    devices = jax.local_devices()
    wanted = tensor_parallel_size * expert_parallel_size
    if wanted > len(devices):
        factor = f" x expert_parallel_size={expert_parallel_size}"
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size}"
            f"{factor if expert_parallel_size > 1 else ''} needs as many devices, found "
            f"{len(devices)} {devices[0].platform} device(s)."
        )
    chosen = np.asarray(devices[:wanted])
    if expert_parallel_size == 1:
        return jax.sharding.Mesh(chosen, (TENSOR_AXIS,))
    by_group = chosen.reshape(expert_parallel_size, tensor_parallel_size)
    return jax.sharding.Mesh(by_group, (EXPERT_AXIS, TENSOR_AXIS))


def host_mesh() -> jax.sharding.Mesh:
    """Build a mesh of the device whose memory is the host's, or of the default one without it."""
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        devices = jax.local_devices()
    return jax.sharding.Mesh(np.asarray(devices[:1]), (TENSOR_AXIS,))
