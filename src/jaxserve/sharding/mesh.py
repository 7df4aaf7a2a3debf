"""Build the mesh that one engine runs on."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.rules import COPY_AXIS, DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS


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


def axis_sizes(
    tensor_parallel_size: int, data_parallel_size: int = 1, *, kv_heads: int | None = None
) -> dict[str, int]:
    """Return the axes of the mesh of one engine, the outermost first.

    Args:
        tensor_parallel_size: Devices that share each layer.
        data_parallel_size: Groups of such devices.
        kv_heads: Heads of keys and values; None splits as if there were enough.

    >>> axis_sizes(8, 2, kv_heads=2), axis_sizes(4)
    ({'data': 2, 'tensor': 2, 'copy': 4}, {'tensor': 4})
    """
    heads = tensor_parallel_size if kv_heads is None else math.gcd(kv_heads, tensor_parallel_size)
    sizes = {
        DATA_AXIS: data_parallel_size,
        TENSOR_AXIS: heads,
        COPY_AXIS: tensor_parallel_size // heads,
    }
    return {name: size for name, size in sizes.items() if size > 1 or name == TENSOR_AXIS}


def engine_mesh(
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    *,
    kv_heads: int | None = None,
    replica: int = 0,
) -> jax.sharding.Mesh:
    """Build the mesh of one engine: groups of neighbours that share layers.

    One process takes its own devices, several processes take all that they have together. Hosts
    follow each other, so that the devices of a group lie on one host, or fill several.

    Args:
        tensor_parallel_size: Devices that share each layer.
        data_parallel_size: Groups of such devices; 1 makes no axis.
        kv_heads: Heads of keys and values. If more devices share a layer, each head lies on several
            of them, and these make an axis of their own. None splits as if there were enough.
        replica: Which engine of this process: each one takes the devices behind the last one's.

    Raises:
        ConfigError: If there are fewer devices, hosts with nothing to do, or groups that begin or
            end in the middle of a host that they share with others.
    """
    is_alone = jax.process_count() == 1
    devices = jax.local_devices() if is_alone else list(jax.devices())
    if not is_alone:
        devices.sort(key=lambda device: (device.process_index, device.id))
    wanted = tensor_parallel_size * data_parallel_size
    first = replica * wanted
    if first + wanted > len(devices):
        raise ConfigError(_too_few(tensor_parallel_size, data_parallel_size, replica, devices))
    if not is_alone:
        _check_hosts(tensor_parallel_size, data_parallel_size, devices)
    sizes = axis_sizes(tensor_parallel_size, data_parallel_size, kv_heads=kv_heads)
    chosen = np.asarray(devices[first : first + wanted]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(chosen, tuple(sizes))


def _too_few(tensor: int, data: int, replica: int, devices: Sequence[Any]) -> str:
    factor = f" x data_parallel_size={data}" if data > 1 else ""
    behind = f" behind those of {replica} other engines" if replica else ""
    fix = "use more devices, or lower the sizes"
    if devices[0].platform == "cpu":
        fix = (
            "lower the sizes, or for a test split the CPU with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return (
        f"tensor_parallel_size={tensor}{factor} needs as many devices{behind}, found "
        f"{len(devices)} {devices[0].platform} device(s); {fix}."
    )


def _check_hosts(tensor: int, data: int, devices: Sequence[Any]) -> None:
    counts = [len(list(own)) for _, own in groupby(devices, lambda one: one.process_index)]
    per_host = counts[0]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"hosts have different numbers of devices: {counts}; give all of them the same number, "
            "for example with CUDA_VISIBLE_DEVICES."
        )
    if tensor * data != len(devices):
        raise ConfigError(
            f"tensor_parallel_size={tensor} x data_parallel_size={data} is {tensor * data}, but "
            f"{len(counts)} hosts of {per_host} devices have {len(devices)}, and each must be "
            f"used; take data_parallel_size={max(1, len(devices) // tensor)}, or fewer hosts."
        )
    if per_host % tensor and tensor % per_host:
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        good = [str(n) for n in fitting if per_host % n == 0 or n % per_host == 0]
        raise ConfigError(
            f"tensor_parallel_size={tensor} makes groups that share hosts of {per_host} devices "
            "with others, and every layer would wait for the network; a group must lie on one "
            f"host, or fill several: use one of {', '.join(good)}."
        )


def host_mesh() -> jax.sharding.Mesh:
    """Build a mesh of the device whose memory is the host's, or of the default one without it."""
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        devices = jax.local_devices()
    return jax.sharding.Mesh(np.asarray(devices[:1]), (TENSOR_AXIS,))
