"""Which of a kernel's configurations is the fastest on a device: tables of what was measured.

A kernel names its candidates, every one of which compiles without spills; the first is the guess
without a measurement. `python -m benchmarks.tuning` measures them on the GPU that is present and
writes a table, `tables/<device>.json`, which is read here.
"""

import dataclasses
import functools
import importlib.resources
import json
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any

import jax

logger = logging.getLogger(__name__)

H200_MULTIPROCESSORS = 132
"""What plans count with where no GPU is: an H200, or an H100 with SXM."""


def device_name() -> str:
    """Return the name of the GPU that is present as tables are called by it; empty without one.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    device = jax.devices()[0]
    return slug(device.device_kind) if device.platform in ("cuda", "gpu") else ""


def slug(device_kind: str) -> str:
    """Reduce a name to lower case, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


@functools.cache
def multiprocessors() -> int:
    """Return how many multiprocessors the GPU that is present has; those of an H200 without one."""
    return int(getattr(jax.devices()[0], "core_count", 0) or H200_MULTIPROCESSORS)


def folder() -> Traversable:
    """Return where tables are."""
    return importlib.resources.files(__package__) / "tables"


@functools.cache
def measured(device: str) -> Mapping[tuple[str, str], Mapping[str, Any]]:
    """Read the table of a device.

    Args:
        device: Its name.

    Returns:
        The fastest configuration's fields by kernel and key (`name_of`); nothing if the device has
        no table.

    Raises:
        ValueError: If the table is no table.
    """
    file = folder() / f"{device}.json"
    if not device or not file.is_file():
        return {}
    return read(file.read_text(encoding="utf-8"), f"{device}.json")


def read(text: str, source: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Read a table's text; see `measured`.

    Args:
        text: JSON.
        source: What messages call it.

    Raises:
        ValueError: If it is no table.
    """
    wanted = '{"entries": [{"kernel": ..., "key": ..., "config": {...}}, ...]}'
    try:
        entries = json.loads(text)["entries"]
        return {(entry["kernel"], entry["key"]): dict(entry["config"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is no table of tuning: expected {wanted}, got {text[:80]!r} ({error}); "
            "write it again with `python -m benchmarks.tuning`."
        ) from None


def name_of(key: Any) -> str:  # noqa: ANN401  any kernel's key
    """Return a key as tables write it: its fields, like `dim=128 itemsize=2`."""
    fields = ((field.name, getattr(key, field.name)) for field in dataclasses.fields(key))
    return " ".join(f"{name}={value}" for name, value in fields)


def choose[Config](
    kernel: str,
    key: Any,  # noqa: ANN401  any kernel's key
    candidates: Sequence[Config],
    device: str,
) -> Config:
    """Choose a configuration.

    Args:
        kernel: The kernel.
        key: What its configurations are chosen by.
        candidates: What may be chosen, the guess first.
        device: Name of the device.

    Returns:
        The measured one if the device's table has one that is a candidate still; else the guess.
    """
    fields = measured(device).get((kernel, name_of(key)))
    if fields is None:
        return candidates[0]
    for candidate in candidates:
        if dataclasses.asdict(candidate) == fields:  # pyright: ignore[reportArgumentType]
            return candidate
    _tell(kernel, name_of(key), device)
    return candidates[0]


@functools.cache
def _tell(kernel: str, key: str, device: str) -> None:
    logger.warning(
        "the table of %s names a configuration of %s (%s) that is no candidate any more; the "
        "untuned one is taken. Measure again with `python -m benchmarks.tuning`.",
        device,
        kernel,
        key,
    )
