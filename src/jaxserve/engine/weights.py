"""New weights for a running engine: checked as a whole, then laid out just as the old ones are."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.core.errors import ConfigError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import hf_name, is_kernel, load_params, turned_shape
from jaxserve.models.quantization import (
    is_finite,
    is_scale,
    not_finite,
    quantize_array,
    quantize_rows,
    scale_path,
    summed_axis,
)
from jaxserve.models.registry import flatten_params

logger = logging.getLogger(__name__)

Specs = Mapping[str, jax.ShapeDtypeStruct]
"""What is served: shape, dtype and sharding of every weight by path."""

Names = Literal["jaxserve", "hf"]

_MOST_NAMED = 50
_COMPUTED = ("rotary_emb.inv_freq",)
_HF_OUTPUT = "lm_head.weight"
_SAME_NOT_NEEDED = {"eos_token_ids", "bos_token_id", "torch_dtype", "max_position"}
"""Fields of a configuration that do not change what is computed from weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeights:
    """Weights that fit an engine.

    Attributes:
        leaves: One array per weight, in the order of the engine; None keeps the old one.
        num_shared: Arrays that are served where they are.
        num_moved: Arrays that were copied to other devices or out of host memory.
        num_cast: Arrays whose dtype was changed.
    """

    leaves: tuple[jax.Array | None, ...]
    num_shared: int
    num_moved: int
    num_cast: int


def prepare_weights(
    params: object,
    specs: Specs,
    *,
    names: Names = "jaxserve",
    partial: bool = False,
    donate: bool = False,
) -> NewWeights:
    """Check new weights as a whole, then bring them into the form of those being served.

    An array whose dtype and sharding agree is used as it is; others are cast and moved, one at a
    time. Where narrow weights are served, plain ones are quantised as they were at the start, and
    narrow ones are taken together with their scales.

    Args:
        params: An `nnx` module, an `nnx.State`, or a mapping, nested or by dotted path.
        specs: What is served.
        names: `hf` reads a flat mapping with the names and orientation of Hugging Face.
        partial: Whether weights may be left out.
        donate: Whether the given arrays may be freed as soon as they have been cast or moved.

    Raises:
        ConfigError: Names everything that is missing, unknown, of a wrong shape or no array.
    """
    if names not in get_args(Names):
        raise ConfigError(f"names must be {' or '.join(get_args(Names))}, got {names!r}.")
    given = _given(params)
    turned = names == "hf"
    weights = [path for path in specs if not is_scale(path)]
    wanted = {hf_name(path) if turned else path: path for path in weights}
    if turned:
        given = {
            name: leaf
            for name, leaf in given.items()
            if not name.endswith(_COMPUTED) and (name != _HF_OUTPUT or name in wanted)
        }
    arrays = {name: _as_array(leaf) for name, leaf in given.items()}
    if not turned:
        # Weights of the narrow type are no numbers without their scales.
        wanted |= {
            scale_path(path): scale_path(path)
            for path in weights
            if scale_path(path) in specs and _is_narrow(arrays.get(path), specs[path])
        }
    expected = {
        name: turned_shape(specs[path].shape) if turned and is_kernel(path) else specs[path].shape
        for name, path in wanted.items()
    }
    _check(arrays, given, expected, partial=partial)
    by_path = {wanted[name]: array for name, array in arrays.items() if array is not None}
    _check_kinds(by_path, specs)
    tally = _Tally()
    made: dict[str, jax.Array] = {}
    for path in specs:
        if path not in by_path:
            continue
        array, turn = by_path.pop(path), turned and is_kernel(path)
        if scale_path(path) in specs and not _is_narrow(array, specs[path]):
            made |= _quantize(path, array, specs, tally, turn=turn, donate=donate)
        else:
            made[path] = _fit(array, specs[path], tally, turn=turn, donate=donate)
    broken = [
        path
        for path in weights
        if scale_path(path) in made and not is_finite(made[scale_path(path)])
    ]
    if broken:
        raise ConfigError(f"{not_finite(broken)} Nothing was changed.")
    for (before, after), count in tally.casts.items():
        logger.info("cast %d weights from %s to %s", count, before, after)
    return NewWeights(
        leaves=tuple(made.get(path) for path in specs),
        num_shared=tally.num_shared,
        num_moved=tally.num_moved,
        num_cast=sum(tally.casts.values()),
    )


def read_weights(path: Path, config: ModelConfig, specs: Specs) -> dict[str, jax.Array]:
    """Read a checkpoint of the same model onto the devices.

    Args:
        path: A safetensors directory or a GGUF file.
        config: Configuration of the model being served.
        specs: What is served.

    Returns:
        Arrays by path, in dtype and sharding of what is served.

    Raises:
        ConfigError: If the checkpoint is damaged, missing, or of another model.
    """
    checkpoint = open_checkpoint(path)
    try:
        differences = [
            f"{field.name} {getattr(checkpoint.config, field.name)!r} instead of "
            f"{getattr(config, field.name)!r}"
            for field in dataclasses.fields(ModelConfig)
            if field.name not in _SAME_NOT_NEEDED
            and getattr(checkpoint.config, field.name) != getattr(config, field.name)
        ]
        if differences:
            raise ConfigError(
                f"the checkpoint is not of the model being served: {', '.join(differences)}."
            )
        return load_params(checkpoint, specs)
    finally:
        checkpoint.close()


class _Tally:
    """What happened to the arrays."""

    def __init__(self) -> None:
        self.num_shared = 0
        self.num_moved = 0
        self.casts: dict[tuple[str, str], int] = {}


def _given(params: object) -> dict[str, object]:
    if isinstance(params, nnx.Module):
        params = nnx.state(params)
    if not isinstance(params, nnx.State | Mapping):
        raise ConfigError(
            "weights must be an nnx module, an nnx.State or a mapping, got "
            f"{type(params).__name__}."
        )
    return flatten_params(params)


def _as_array(leaf: object) -> jax.Array | np.ndarray | None:
    """Return an array of numbers, or None for what is none."""
    if isinstance(leaf, jax.Array):
        return None if leaf.is_deleted() or not _is_real(leaf) else leaf
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if _is_real(array) else None


def _is_real(array: jax.Array | np.ndarray) -> bool:
    is_number = jnp.issubdtype(array.dtype, jnp.number)
    return is_number and not jnp.issubdtype(array.dtype, jnp.complexfloating)


def _why_not(leaf: object) -> str:
    if isinstance(leaf, jax.Array):
        return "deleted" if leaf.is_deleted() else str(leaf.dtype)
    return type(leaf).__name__


def _check(
    arrays: Mapping[str, jax.Array | np.ndarray | None],
    given: Mapping[str, object],
    expected: Mapping[str, tuple[int, ...]],
    *,
    partial: bool,
) -> None:
    known = {name: array for name, array in arrays.items() if name in expected}
    groups = {
        "missing": [] if partial else [name for name in expected if name not in arrays],
        "unknown": [name for name in arrays if name not in expected],
        "no array": [f"{n} ({_why_not(given[n])})" for n, array in known.items() if array is None],
        "of a wrong shape": [
            f"{name} {tuple(array.shape)} instead of {tuple(expected[name])}"
            for name, array in known.items()
            if array is not None and tuple(array.shape) != tuple(expected[name])
        ],
    }
    if partial and not known:
        groups["missing"] = ["all of them"]
    problems = [f"{what}: {_some(names)}" for what, names in groups.items() if names]
    if problems:
        raise ConfigError(
            f"the new weights do not fit the model, nothing was changed; {'; '.join(problems)}."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _is_narrow(array: jax.Array | np.ndarray | None, spec: jax.ShapeDtypeStruct) -> bool:
    return array is not None and array.dtype == spec.dtype


def _check_kinds(arrays: Mapping[str, jax.Array | np.ndarray], specs: Specs) -> None:
    """Refuse numbers that quantisation cannot start from: those of another scheme."""
    wrong = [
        f"{path} {array.dtype}"
        for path, array in arrays.items()
        if scale_path(path) in specs
        and not _is_narrow(array, specs[path])
        and (array.dtype.itemsize == 1 or not jnp.issubdtype(array.dtype, jnp.floating))
    ]
    if wrong:
        kind = next(spec.dtype for path, spec in specs.items() if scale_path(path) in specs)
        raise ConfigError(
            f"the new weights do not fit the model, nothing was changed; of a wrong type: "
            f"{_some(wrong)}; expected {kind} with scales, or floating-point numbers of two bytes "
            "or more."
        )


def _quantize(
    path: str,
    array: jax.Array | np.ndarray,
    specs: Specs,
    tally: _Tally,
    *,
    turn: bool,
    donate: bool,
) -> dict[str, jax.Array]:
    """Make narrow weights and scales of plain weights."""
    spec, scale_spec = specs[path], specs[scale_path(path)]
    axis = summed_axis(path)
    kinds = (str(array.dtype), str(spec.dtype))
    tally.casts[kinds] = tally.casts.get(kinds, 0) + 1
    if isinstance(array, jax.Array):
        source, is_near = array, array.sharding.device_set == spec.sharding.device_set
        if not is_near:
            source = jax.device_put(array.swapaxes(-1, -2) if turn else array, spec.sharding)
            tally.num_moved += 1
        made = quantize_array(source, spec, scale_spec, axis, turn=turn and is_near)
        if donate:
            jax.block_until_ready(made)
            array.delete()
        return dict(zip((path, scale_path(path)), made, strict=True))
    rows = array if turn or axis == -1 else np.swapaxes(array, -1, -2)
    try:
        stored, scale = quantize_rows(rows, spec.dtype)
    except ValueError:
        raise ConfigError(f"{not_finite([path])} Nothing was changed.") from None
    narrow = stored if axis == -1 else np.ascontiguousarray(np.swapaxes(stored, -1, -2))
    return {
        path: jax.device_put(narrow, spec.sharding),
        scale_path(path): jax.device_put(scale, scale_spec.sharding),
    }


def _fit(
    array: jax.Array | np.ndarray,
    spec: jax.ShapeDtypeStruct,
    tally: _Tally,
    *,
    turn: bool,
    donate: bool,
) -> jax.Array:
    """Bring one array into the dtype and onto the devices of the one it replaces."""
    value: jax.Array | np.ndarray = array.swapaxes(-1, -2) if turn else array
    if value.dtype != spec.dtype:
        kind = (str(value.dtype), str(spec.dtype))
        tally.casts[kind] = tally.casts.get(kind, 0) + 1
        value = value.astype(spec.dtype)
    if isinstance(value, jax.Array) and value.sharding.is_equivalent_to(spec.sharding, value.ndim):
        tally.num_shared += value is array
        result = value
    else:
        tally.num_moved += 1
        if isinstance(value, np.ndarray) and not donate and np.may_share_memory(value, array):
            value = value.copy()  # on a CPU JAX would serve memory to which its owner may write
        result = jax.device_put(value, spec.sharding)
    if donate and isinstance(array, jax.Array) and result is not array:
        result.block_until_ready()
        _free(array, result)
    return result


def _free(array: jax.Array, result: jax.Array) -> None:
    """Free a donated array unless the new one lies in the same memory."""
    if _buffers(array).isdisjoint(_buffers(result)):
        array.delete()


def _buffers(array: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
