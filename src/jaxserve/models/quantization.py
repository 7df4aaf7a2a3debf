"""Weight-only quantisation: narrow weights with one scale per output channel.

A weight `w[:, j]` of a linear layer becomes `stored[:, j] * scale[j]`, where the scale brings the
channel's largest magnitude to the largest number of the narrow type, and zero to zero. Activations,
norms and biases stay as they are, and so do sums: products are taken with the stored numbers, and
scales are applied to their float32 sums. A tied embedding is the output projection too: its rows
are output channels there, and the same rows are looked up.

Source: symmetric per-channel quantisation as in Jacob et al. (2018), "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference"; float8_e4m3fn of Micikevicius et
al. (2022), "FP8 Formats for Deep Learning".
"""

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Shaped

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.models.buffer import empty_buffer
from jaxserve.models.layers import CausalLM, Embedding, Linear, param
from jaxserve.models.moe import ExpertLinear

Scheme = Literal["int8", "fp8"]
KINDS: Mapping[Scheme, np.dtype] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Element type of the stored weights, by scheme."""
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_SUFFIX = "_scale"
_REGEX = "re:"
_CHUNK = 1 << 20
"""Weights quantised at a time on the host, so that temporaries stay small."""

Specs = Mapping[str, jax.ShapeDtypeStruct]
"""Shape, dtype and sharding of parameters by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which weights become how narrow.

    Attributes:
        scheme: `int8` or `fp8` (float8_e4m3fn).
        ignore: Layers that keep their precision: full names (`model.layers.0.mlp.down_proj`), last
            parts of names (`lm_head`, `down_proj`), or `re:` and a regular expression for the
            beginning of full names, as in vLLM's configurations.
    """

    scheme: Scheme
    ignore: tuple[str, ...] = ()

    def choose(self, paths: Iterable[str]) -> frozenset[str]:
        """Choose among the parameters of a model.

        Args:
            paths: Its parameters.

        Returns:
            Those that become narrow.

        Raises:
            ConfigError: If an entry of `ignore` fits no layer, or all of them fit all layers.
        """
        found = set(paths)
        unused = {"embed_tokens.embedding"} if "lm_head.kernel" in found else set[str]()
        linear = {path: layer_name(path) for path in found - unused if is_linear(path)}
        kept: set[str] = set()
        for entry in self.ignore:
            fitting = {path for path, name in linear.items() if _fits(entry, name)}
            if not fitting:
                names = {name.rpartition(".")[2] for name in linear.values()}
                raise ConfigError(
                    f"quantization_config.ignore: found {entry!r}, which fits no layer, expected "
                    f"one of {', '.join(sorted(names))}, a full name, or {_REGEX} and a regular "
                    f"expression.{did_you_mean(entry, [*names, *linear.values()])}"
                )
            kept |= fitting
        if kept == linear.keys():
            raise ConfigError(
                "quantization_config.ignore leaves no layer to quantise; shorten it, or leave "
                "quantization out."
            )
        return frozenset(linear.keys() - kept)


def _fits(entry: str, name: str) -> bool:
    if not entry.startswith(_REGEX):
        return entry == name or entry == name.rpartition(".")[2]
    try:
        return re.match(entry.removeprefix(_REGEX), name) is not None
    except re.error as error:
        raise ConfigError(
            f"quantization_config.ignore: {entry!r} is no regular expression: {error}."
        ) from None


def is_linear(path: str) -> bool:
    """Tell whether a parameter is the weight of a linear layer, a tied embedding included.

    Routers are none: they are small, and a token sent to another expert is a large error.
    """
    return path.endswith((".kernel", ".embedding")) and not path.endswith(".mlp.gate.kernel")


def layer_name(path: str) -> str:
    """Name the layer of a weight as checkpoints do; a tied embedding is the output projection.

    >>> layer_name("layers.0.mlp.up_proj.kernel"), layer_name("embed_tokens.embedding")
    ('model.layers.0.mlp.up_proj', 'lm_head')
    """
    stem = path.rpartition(".")[0]
    return "lm_head" if stem in {"lm_head", "embed_tokens"} else f"model.{stem}"


def scale_path(path: str) -> str:
    """Return where the scales of a weight are."""
    return path + _SUFFIX


def is_scale(path: str) -> bool:
    """Tell whether a parameter holds the scales of another one."""
    return path.endswith((".kernel_scale", ".embedding_scale"))


def narrow_paths(paths: Iterable[str]) -> frozenset[str]:
    """Return the weights that have scales."""
    return frozenset(path.removesuffix(_SUFFIX) for path in paths if is_scale(path))


def scheme_of(arrays: Mapping[str, Any]) -> Scheme | None:
    """Tell how parameters, or what describes them, are quantised; None if they are not.

    Raises:
        ConfigError: If weights with scales are of a type that no scheme has, or of several.
    """
    kinds = {np.dtype(arrays[path].dtype) for path in narrow_paths(arrays) if path in arrays}
    if not kinds:
        return None
    found: list[Scheme] = [scheme for scheme, kind in KINDS.items() if kinds == {kind}]
    if not found:
        raise ConfigError(
            f"parameters with scales are of type {', '.join(sorted(map(str, kinds)))}, expected "
            f"all of {' or all of '.join(str(kind) for kind in KINDS.values())}."
        )
    return found[0]


# Structure --------------------------------------------------------------------------------------


def quantized_model(
    graph: nnx.GraphDef[CausalLM],
    state: nnx.State,
    kind: np.dtype | None,
    chosen: Container[str] = (),
) -> tuple[nnx.GraphDef[CausalLM], nnx.State]:
    """Describe a model with places for narrow weights and scales, or for plain weights again.

    Args:
        graph: Its structure.
        state: Its weights, or descriptions of them.
        kind: Type of the narrow weights; None: all become plain.
        chosen: Paths of the weights that become narrow.

    Returns:
        The structure, and shapes for weights.
    """
    dtype = jax.tree.leaves(state["norm"])[0].dtype

    def make(state: nnx.State) -> CausalLM:
        module = nnx.merge(graph, state)
        for path, layer in nnx.iter_modules(module):
            if isinstance(layer, Linear | ExpertLinear | Embedding):
                _set_form(layer, ".".join(map(str, path)), kind, chosen, dtype)
        return module

    return nnx.split(nnx.eval_shape(make, state))


def _set_form(
    layer: Linear | ExpertLinear | Embedding,
    path: str,
    kind: np.dtype | None,
    chosen: Container[str],
    dtype: jnp.dtype,
) -> None:
    name = "embedding" if isinstance(layer, Embedding) else "kernel"
    old = cast(nnx.Param[Array], getattr(layer, name))
    axes, shape = list(old.get_metadata("axes")), list(old.get_value().shape)
    narrow = kind if f"{path}.{name}" in chosen else None
    setattr(layer, name, param(jnp.zeros(shape, narrow or dtype), *axes))
    scale: nnx.Param[Array] | None = None
    if narrow is not None:
        axis = summed_axis(name)
        del axes[axis], shape[axis]
        scale = param(jnp.zeros(shape, jnp.float32), *axes)
    setattr(layer, scale_path(name), nnx.data(scale))
    if isinstance(layer, Embedding):
        layer.dtype = dtype


def summed_axis(path: str) -> int:
    """Return the axis of a weight, from the end, that is summed over; scales have the others."""
    return -2 if path.endswith("kernel") else -1


# Numbers ----------------------------------------------------------------------------------------


def _quantize(xp: ModuleType, weight: Any, kind: np.dtype, axis: int) -> tuple[Any, Any]:  # noqa: ANN401  arrays of numpy or JAX
    """Quantise along an axis; the same to the last bit with either library."""
    largest = _LARGEST[kind.name]
    wide = weight.astype(np.float32)
    scale = xp.max(xp.abs(wide), axis=axis, keepdims=True) * np.float32(1 / largest)
    # Below the normal numbers a processor may take the scale for zero, so it is.
    scale = xp.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
    inverse = xp.where(scale > 0, np.float32(1) / xp.where(scale > 0, scale, 1), 0)
    units = xp.clip(wide * inverse.astype(np.float32), -largest, largest)
    stored = xp.rint(units) if kind.name == "int8" else units
    return stored.astype(kind), xp.squeeze(scale, axis)


def quantize_rows(
    weight: Shaped[np.ndarray, "*stack out_size in_size"], kind: np.dtype
) -> tuple[Shaped[np.ndarray, "*stack out_size in_size"], Float32[np.ndarray, "*stack out_size"]]:
    """Quantise a weight on the host, a few rows at a time.

    Args:
        weight: Floating-point numbers, one row per output channel; may be a view of a file. Stacks
            are of experts.
        kind: int8 or float8_e4m3fn.

    Returns:
        The narrow numbers, and the scale of each row. A row of zeros has the scale zero.

    Raises:
        ValueError: If a weight is not a finite number.
    """
    stored = empty_buffer(weight.shape, kind)
    scale = empty_buffer(weight.shape[:-1], np.float32)
    step = max(1, _CHUNK // weight.shape[-1])
    for place in np.ndindex(weight.shape[:-2]):
        rows = weight[place]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            if not np.isfinite(rows[part]).all():
                raise ValueError("found a value that is not a finite number")
            stored[place][part], scale[place][part] = _quantize(np, rows[part], kind, 1)
    return stored, scale


def quantize_array(
    weight: Array,
    spec: jax.ShapeDtypeStruct,
    scale_spec: jax.ShapeDtypeStruct,
    axis: int,
    *,
    turn: bool = False,
) -> tuple[Array, Array]:
    """Quantise a weight on its devices.

    Args:
        weight: Floating-point numbers.
        spec: What the narrow weight shall be.
        scale_spec: What the scales shall be.
        axis: The axis of `spec`, from the end, that is summed over.
        turn: Whether the weight's two last axes are exchanged.

    Returns:
        The narrow numbers and the scales; scales are not finite where a weight is not.
    """
    shardings = (spec.sharding, scale_spec.sharding)
    return _quantize_program(np.dtype(spec.dtype), axis, shardings, turn=turn)(weight)


@functools.lru_cache(maxsize=64)
def _quantize_program(
    kind: np.dtype, axis: int, shardings: tuple[Any, Any], *, turn: bool
) -> Callable[[Array], tuple[Array, Array]]:
    def quantize(weight: Array) -> tuple[Array, Array]:
        return _quantize(jnp, weight.swapaxes(-1, -2) if turn else weight, kind, axis)

    return jax.jit(quantize, out_shardings=shardings)


def is_finite(scale: Array) -> bool:
    """Tell whether all weights behind some scales are finite numbers."""
    return bool(jnp.isfinite(scale).all())


def quantize_params(arrays: Mapping[str, Array], specs: Specs) -> dict[str, Array]:
    """Bring parameters in memory into the form of a quantised model.

    Args:
        arrays: Plain parameters by path; those that stay plain are shared.
        specs: What the model takes.

    Raises:
        ConfigError: If a weight is not finite; names it.
    """
    made: dict[str, Array] = {}
    for path, spec in specs.items():
        if is_scale(path):
            continue
        scale_spec = specs.get(scale_path(path))
        if scale_spec is None:
            made[path] = arrays[path]
            continue
        stored, scale = quantize_array(arrays[path], spec, scale_spec, summed_axis(path))
        if not is_finite(scale):
            raise ConfigError(not_finite([path]))
        made[path], made[scale_path(path)] = stored, scale
    return made


def not_finite(paths: Iterable[str]) -> str:
    """Say which weights cannot be quantised."""
    return (
        f"found values that are not finite numbers in {', '.join(paths)}; such weights cannot be "
        "quantised, give finite ones."
    )


def dequantized(arrays: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield plain parameters one by one: float32 for narrow weights, the others as they are.

    Args:
        arrays: Parameters by path.
    """
    for path, array in arrays.items():
        if is_scale(path):
            continue
        scale = arrays.get(scale_path(path))
        if scale is None:
            yield path, array
        else:
            wide = scale[..., None, :] if summed_axis(path) == -2 else scale[..., None]
            yield path, array.astype(np.float32) * wide


def dequantize(params: nnx.State) -> nnx.State:
    """Turn the weights of a quantised model into plain ones, which gradients can be taken of.

    Args:
        params: Weights, such as `llm.params`.

    Returns:
        The numbers that are computed with, in the precision of the norms; what is plain is shared.
    """
    dtype = jax.tree.leaves(params["norm"])[0].dtype
    by_path = dict(nnx.to_flat_state(params))
    names = {".".join(map(str, path)): path for path in by_path}
    plain: list[tuple[Any, nnx.Variable[Array]]] = []
    for name, array in dequantized({n: by_path[path].get_value() for n, path in names.items()}):
        variable = by_path[names[name]]
        is_narrow = scale_path(name) in names
        plain.append((names[name], variable.replace(array.astype(dtype) if is_narrow else array)))
    return nnx.from_flat_state(plain)
