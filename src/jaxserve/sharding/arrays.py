"""Values of the host on the devices of a sharding, each device with its own part only."""

import jax
import numpy as np


def put(value: np.ndarray | np.generic, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put a value onto devices, of which other processes may have some.

    Args:
        value: The whole value; the same in every process that has one of the devices.
        sharding: Where its parts go; None is the default device.

    No device ever holds more than its part, and nothing is exchanged between processes.
    """
    if sharding is None:
        return jax.device_put(value)
    if sharding.is_fully_addressable and sharding.is_fully_replicated:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: np.asarray(whole[index])
    )
