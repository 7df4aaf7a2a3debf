"""Experts as checkpoints store them, and stacked as they are here.

Here each of the three projections of a layer's experts is one tensor `[experts, out, in]`, under
`mlp.experts`, and the router is `mlp.gate`. Most checkpoints store every expert by itself; Mixtral
under other names; gpt-oss stacks them, turned around, gate and up projection row by row in one
tensor, and as it is published in four bits per weight.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.models.buffer import empty_buffer
from jaxserve.models.config import ModelConfig

_OF_LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
_ONE = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = re.compile(r"mlp\.experts\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_MIXTRAL_ONE = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_BLOCKS, _SCALES = "_blocks", "_scales"
_FOUR_BITS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""What the lower three bits of an e2m1 number mean; the fourth is the sign."""
_EXPONENT_BIAS = 127
_BLOCK = 32
"""Weights that share a scale in mxfp4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlice:
    """Where in a checkpoint the experts' weights of one projection are.

    Attributes:
        sources: Names of the stored tensors: one for all experts, or one for each.
        shape: Shape of all experts together.
        rows: First row of each expert, and how many rows further the next one is.
        is_turned: Whether experts are stored `[in, out]`.
        scales: Name of the scales, where weights are stored in four bits.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int] = (0, 1)
    is_turned: bool = False
    scales: str | None = None

    def read(self, get: Callable[[str], np.ndarray]) -> np.ndarray:
        """Put the experts together.

        Args:
            get: Reads a stored tensor by name.

        Returns:
            `[experts, out, in]`, or `[experts, out]` for biases.
        """
        source, *others = self.sources
        whole = get(source)
        if others:
            stacked = empty_buffer(self.shape, whole.dtype)
            stacked[0] = whole
            for place, name in enumerate(others, start=1):
                stacked[place] = get(name)
            return stacked
        if self.scales is not None:
            whole = widen_mxfp4(whole, get(self.scales))
        if self.is_turned:
            whole = np.swapaxes(whole, 1, 2)
        start, step = self.rows
        return whole if (start, step) == (0, 1) else whole[:, start::step]


def widen_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Turn weights of four bits into bfloat16, which holds them exactly.

    Args:
        blocks: Two weights per byte, the lower half first, `[..., blocks, 16]`.
        scales: Exponent of each block, with a bias of 127, `[..., blocks]`.

    Returns:
        `[..., blocks * 32]`.

    Source: OCP Microscaling Formats (MX) 1.0; the order of gpt-oss's files.
    """
    table = np.concatenate([_FOUR_BITS, -_FOUR_BITS])
    wide = empty_buffer((*blocks.shape[:-1], _BLOCK), ml_dtypes.bfloat16)
    for place in np.ndindex(blocks.shape[:1]):  # one expert at a time in float32
        codes, exponent = blocks[place], scales[place].astype(np.int32) - _EXPONENT_BIAS
        for start, half in enumerate((codes & 15, codes >> 4)):
            wide[place][..., start::2] = np.ldexp(table[half], exponent[..., None])
    return wide.reshape(*blocks.shape[:-2], -1)


def own_name(config: ModelConfig, name: str) -> str | None:
    """Translate the name of a tensor that is no expert's own; None if the model does not use it."""
    match = _OF_LAYER.fullmatch(name)
    if config.experts is None or match is None:
        return name
    if config.model_type == "deepseek_v3" and int(match[2]) >= config.num_layers:
        return None  # drafts of further tokens
    rest = match[3]
    if config.model_type == "mixtral":
        rest = rest.replace("block_sparse_moe.gate.", "mlp.gate.")
    if config.model_type == "gpt_oss":
        rest = rest.replace("mlp.router.", "mlp.gate.")
    return match[1] + rest


def find_experts(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, ExpertSlice], set[str]]:
    """Find the experts in a checkpoint.

    Args:
        config: The model.
        shapes: Shape of every stored tensor, by name.
        where: The checkpoint, for error messages.

    Returns:
        Every stack under the name that it has here, and the stored tensors that belong to them.

    Raises:
        CheckpointError: If experts are missing or differ in shape.
    """
    if config.experts is None:
        return {}, set()
    if config.model_type == "gpt_oss":
        return _find_stacks(config, shapes)
    found: dict[str, dict[int, str]] = {}
    for source in shapes:
        match = _OF_LAYER.fullmatch(source)
        one = _match_one(config, match[3]) if match else None
        if match is not None and one is not None and int(match[2]) < config.num_layers:
            stack = f"{match[1]}mlp.experts.{one[1]}.weight"
            found.setdefault(stack, {})[one[0]] = source
    slices: dict[str, ExpertSlice] = {}
    for stack, sources in found.items():
        count = config.experts.num_experts
        if sorted(sources) != list(range(count)):
            raise CheckpointError(
                f"{where}: found {len(sources)} experts in {stack!r}, numbered up to "
                f"{max(sources)}, expected {count} from the configuration; check that "
                "configuration and weights belong to the same model, or download it again."
            )
        kinds = {shapes[source] for source in sources.values()}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{where}: the experts in {stack!r} have several shapes, {sorted(kinds)}; "
                "download the model again."
            )
        slices[stack] = ExpertSlice(
            sources=tuple(sources[i] for i in range(count)), shape=(count, *kinds.pop())
        )
    return slices, {source for part in slices.values() for source in part.sources}


def _match_one(config: ModelConfig, rest: str) -> tuple[int, str] | None:
    """Return number and projection of a tensor of one expert."""
    if config.model_type == "mixtral":
        match = _MIXTRAL_ONE.fullmatch(rest)
        ours = {stored: name for name, stored in _MIXTRAL.items()}
        return (int(match[1]), ours[match[2]]) if match else None
    match = _ONE.fullmatch(rest)
    return (int(match[1]), match[2]) if match else None


def _find_stacks(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, ExpertSlice], set[str]]:
    slices: dict[str, ExpertSlice] = {}
    taken: set[str] = set()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        for stored, parts in (
            ("gate_up_proj", (("gate_proj", 0), ("up_proj", 1))),
            ("down_proj", (("down_proj", 0),)),
        ):
            source, bias = prefix + stored, f"{prefix}{stored}_bias"
            is_narrow = source + _BLOCKS in shapes and source + _SCALES in shapes
            names = [source + _BLOCKS, source + _SCALES] if is_narrow else [source]
            for name, start in parts:
                rows = (start, len(parts))
                shape = _oriented(shapes.get(names[0], ()), is_narrow=is_narrow)
                if len(shape) == 3:
                    slices[f"{prefix}{name}.weight"] = ExpertSlice(
                        sources=(names[0],),
                        shape=(shape[0], len(range(start, shape[1], len(parts))), shape[2]),
                        rows=rows,
                        is_turned=not is_narrow,
                        scales=names[1] if is_narrow else None,
                    )
                    taken.update(names)
                if len(shapes.get(bias, ())) == 2:
                    count, width = shapes[bias]
                    slices[f"{prefix}{name}.bias"] = ExpertSlice(
                        sources=(bias,),
                        shape=(count, len(range(start, width, len(parts)))),
                        rows=rows,
                    )
                    taken.add(bias)
    return slices, taken


def _oriented(shape: tuple[int, ...], *, is_narrow: bool) -> tuple[int, ...]:
    """Return `[experts, out, in]` of a stored stack."""
    if is_narrow:
        return (*shape[:2], shape[2] * _BLOCK) if len(shape) == 4 else ()
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else ()


def unstack(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Give experts, and their routers, the form and the names that the family stores.

    Args:
        config: The model.
        tensors: Names and values of its tensors as they are here.

    Yields:
        Names and values as a checkpoint holds them.
    """
    held: dict[str, np.ndarray] = {}
    for name, value in tensors:
        match = _OF_LAYER.fullmatch(name)
        stack = _STACKED.fullmatch(match[3]) if match else None
        if config.experts is None or match is None:
            yield name, value
        elif stack is None:
            yield match[1] + _stored_name(config, match[3]), value
        elif config.model_type == "gpt_oss":
            held[name] = value
            yield from _stacked_gpt_oss(match[1], stack[1], stack[2], held)
        else:
            for index, expert in enumerate(value):
                place = f"mlp.experts.{index}.{stack[1]}"
                if config.model_type == "mixtral":
                    place = f"block_sparse_moe.experts.{index}.{_MIXTRAL[stack[1]]}"
                yield f"{match[1]}{place}.weight", expert


def _stored_name(config: ModelConfig, rest: str) -> str:
    if config.model_type == "mixtral":
        return rest.replace("mlp.gate.", "block_sparse_moe.gate.")
    return rest.replace("mlp.gate.", "mlp.router.") if config.model_type == "gpt_oss" else rest


def _stacked_gpt_oss(
    layer: str, projection: str, kind: str, held: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    prefix, suffix = f"{layer}mlp.experts.", "_bias" if kind == "bias" else ""
    if projection == "down_proj":
        whole = held.pop(f"{prefix}down_proj.{kind}")
        yield f"{prefix}down_proj{suffix}", _turned(whole)
        return
    names = [f"{prefix}{part}.{kind}" for part in ("gate_proj", "up_proj")]
    if all(name in held for name in names):
        gate, up = (held.pop(name) for name in names)
        pairs = np.stack([gate, up], axis=2)
        whole = pairs.reshape(gate.shape[0], -1, *gate.shape[2:])
        yield f"{prefix}gate_up_proj{suffix}", _turned(whole)


def _turned(whole: np.ndarray) -> np.ndarray:
    return np.swapaxes(whole, 1, 2) if whole.ndim == 3 else whole
