"""Tensors of a checkpoint under the names of this package: some are cut out of larger ones.

Phi-3 stores the query, key and value projections of a layer as one tensor, and likewise the gate
and up projections. Here they are apart in every family, so that each can be split over devices by
its own heads. A model that also sees has its language model under a prefix.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.expert_tensors import ExpertSlice, find_experts, own_name, unstack

_LAYER = re.compile(r"(model\.layers\.\d+\.)(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(\w+)")
_PART = re.compile(r"(model\.layers\.\d+\.)(self_attn\.\w+|mlp\.\w+)\.(\w+)")
_TEXT = (("language_model.model.", "model."), ("model.language_model.", "model."))
_TEXT_OUTPUT = "language_model.lm_head.weight"
_SIGHT = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Where in a checkpoint a tensor is.

    Attributes:
        source: Name of the stored tensor.
        shape: Shape of the part.
        start: Its first row there; None if the part is the whole.
    """

    source: str
    shape: tuple[int, ...]
    start: int | None = None


def fused_parts(config: ModelConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """Return what the fused tensors of a layer consist of.

    Args:
        config: The model.

    Returns:
        Name of a stored tensor within its layer -> name and number of rows of each part, in
        order; empty if the family stores every projection by itself.
    """
    if config.model_type != "phi3":
        return {}
    kv_rows = config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj": (
            ("self_attn.q_proj", config.num_heads * config.head_dim),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
        ),
        "mlp.gate_up_proj": (
            ("mlp.gate_proj", config.intermediate_size),
            ("mlp.up_proj", config.intermediate_size),
        ),
    }


def slices_of(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Slice | ExpertSlice]:
    """Find every tensor of the language model, by its own name.

    Args:
        config: The model.
        shapes: Shape of every stored tensor, by Hugging Face name.
        where: The checkpoint, for error messages.

    Raises:
        CheckpointError: If a fused tensor has another number of rows than its parts together,
            two tensors would have one name, or experts are missing.
    """
    fused = fused_parts(config)
    stacks, taken = find_experts(config, shapes, where)
    found: dict[str, Slice] = {}
    for source, shape in shapes.items():
        if source in taken:
            continue
        for stored, part in _split(source, shape, fused, where):
            name = own_name(config, stored)
            if name is None:
                continue
            if name in found:
                raise CheckpointError(
                    f"{where}: found tensor {name!r} twice, as {found[name].source!r} and as "
                    f"{source!r}; remove the files that do not belong to the model."
                )
            found[name] = part
    return {**found, **stacks}


def fuse(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Put tensors together as the family stores them.

    Args:
        config: The model.
        tensors: Names and values of its tensors, apart.

    Yields:
        Names and values as a checkpoint holds them; a fused tensor when its last part has come.
    """
    home = {
        part: (whole, [name for name, _ in parts])
        for whole, parts in fused_parts(config).items()
        for part, _ in parts
    }
    held: dict[str, np.ndarray] = {}
    for name, value in unstack(config, tensors):
        match = _PART.fullmatch(name)
        if match is None or match[2] not in home:
            yield name, value
            continue
        layer, (whole, parts) = match[1], home[match[2]]
        held[name] = value
        names = [f"{layer}{part}.{match[3]}" for part in parts]
        if all(part in held for part in names):
            yield f"{layer}{whole}.{match[3]}", np.concatenate([held.pop(part) for part in names])


def _split(
    source: str,
    shape: tuple[int, ...],
    fused: Mapping[str, tuple[tuple[str, int], ...]],
    where: str,
) -> Iterator[tuple[str, Slice]]:
    name = text_name(source)
    if name is None:
        return
    match = _LAYER.fullmatch(name)
    parts = fused.get(match[2], ()) if match else ()
    if match is None or not parts:
        yield name, Slice(source=source, shape=shape)
        return
    total = sum(rows for _, rows in parts)
    if not shape or shape[0] != total:
        raise CheckpointError(
            f"{where}: found {source!r} of shape {shape}, expected {total} rows "
            f"({', '.join(f'{rows} of {part}' for part, rows in parts)}); check that configuration "
            "and weights belong to the same model, or download it again."
        )
    start = 0
    for part, rows in parts:
        yield (
            f"{match[1]}{part}.{match[3]}",
            Slice(source=source, shape=(rows, *shape[1:]), start=start),
        )
        start += rows


def text_name(source: str) -> str | None:
    """Return a tensor's name without what stands before the language model; None if it sees."""
    if source == _TEXT_OUTPUT:
        return "lm_head.weight"
    if source.removeprefix("model.").startswith(_SIGHT):
        return None
    for prefix, ours in _TEXT:
        if source.startswith(prefix):
            return ours + source.removeprefix(prefix)
    return source
