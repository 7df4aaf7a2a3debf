"""`jaxserve shard explain`: how the weights of a model lie on several devices."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax.numpy as jnp

from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.core.units import format_bytes
from jaxserve.engine.parallel import check_model, rules_of
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.files import read_json
from jaxserve.models.hub import resolve_model
from jaxserve.models.quantization import Quantization, Scheme
from jaxserve.models.registry import abstract_model, named_weights
from jaxserve.sharding.explain import Placement, explain
from jaxserve.sharding.mesh import axis_sizes
from jaxserve.sharding.rules import (
    COPY_AXIS,
    EXPERT_AXIS,
    TENSOR_AXIS,
    LogicalAxisRules,
    names_of,
)

_LAYER = re.compile(r"(?<=\blayers\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Weights of neighbouring layers that lie alike.

    Attributes:
        path: Their name, with the layers as `0-47`.
        count: How many they are.
        placement: The first of them.
    """

    path: str
    count: int
    placement: Placement


def shard_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what `jaxserve shard` takes."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explainer = commands.add_parser(
        "explain", help="print path, shape, split axes and bytes per device of every weight"
    )
    explainer.add_argument(
        "model",
        metavar="MODEL",
        help="config.json, directory, GGUF file, or a name, whose files are downloaded",
    )
    explainer.add_argument(
        "--tp", type=int, default=1, metavar="N", help="devices that share each layer [1]"
    )
    explainer.add_argument(
        "--dp", type=int, default=1, metavar="N", help="groups of such devices [1]"
    )
    explainer.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="whole experts on all devices, as `serve` places them with this flag",
    )
    explainer.add_argument(
        "--ep",
        type=int,
        default=1,
        metavar="N",
        help="groups of devices that share the experts, whose matrices each group splits; a mesh "
        "of `make_mesh`, which no flag of `serve` makes [1]",
    )
    explainer.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the weights; auto is that of config.json, or bfloat16",
    )
    explainer.add_argument("--quantization", choices=get_args(Scheme), help="narrow weights")
    explainer.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(given: argparse.Namespace, out: Callable[[str], None]) -> int:
    """Print where the weights of a model would lie.

    Args:
        given: What `shard_parser` has read.
        out: Prints a line.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If the model cannot be had, or the mesh does not divide it.
    """
    config = read_config(given.model)
    dtype = given.dtype if given.dtype != "auto" else config.torch_dtype or "bfloat16"
    wanted = None if given.quantization is None else Quantization(scheme=given.quantization)
    _, state = abstract_model(config, dtype=jnp.dtype(dtype), quantization=wanted)
    sizes, rules = _mesh_of(given, config)
    placements = explain(named_weights(state), sizes, rules)
    whole = sum(placement.weight.num_bytes for placement in placements)
    device = sum(placement.device_bytes for placement in placements)
    notes = _notes(config, given.tp, sizes)
    if given.json:
        out(
            json.dumps(
                {
                    "model_type": config.model_type,
                    "dtype": dtype,
                    "mesh": sizes,
                    "weights": [
                        {
                            "path": placement.weight.path,
                            "shape": placement.weight.shape,
                            "spec": list(placement.spec),
                            "bytes": placement.weight.num_bytes,
                            "device_bytes": placement.device_bytes,
                        }
                        for placement in placements
                    ],
                    "bytes": whole,
                    "device_bytes": device,
                    "notes": notes,
                },
                indent=2,
            )
        )
        return 0
    out(
        f"{config.model_type}, {config.num_layers} layers, {dtype}, on "
        f"{given.ep * given.tp * given.dp} devices: "
        f"{', '.join(f'{name} {size}' for name, size in sizes.items())}"
    )
    for line in _table([_cells(row) for row in rows_of(placements)]):
        out(line)
    out(f"all weights {format_bytes(whole)}, per device {format_bytes(device)}")
    for note in notes:
        out(note)
    return 0


def _mesh_of(
    given: argparse.Namespace, config: ModelConfig
) -> tuple[dict[str, int], LogicalAxisRules]:
    """Return the axes of the mesh that is asked for, and what lies on them."""
    for name in ("tp", "dp", "ep"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name} must be at least 1 device, got {getattr(given, name)}.")
    if given.ep > 1:
        if given.dp > 1 or given.enable_expert_parallel:
            raise ConfigError(
                "--ep splits experts over a mesh axis of their own; leave it out, or leave out "
                "--dp and --enable-expert-parallel."
            )
        return {EXPERT_AXIS: given.ep, TENSOR_AXIS: given.tp}, LogicalAxisRules()
    options = ParallelOptions(
        tensor_parallel_size=given.tp,
        data_parallel_size=given.dp,
        enable_expert_parallel=given.enable_expert_parallel,
    )
    check_model(options, config)
    # Without shared experts each group of devices has all weights.
    groups = given.dp if given.enable_expert_parallel else 1
    return axis_sizes(given.tp, groups, kv_heads=config.num_kv_heads), rules_of(options)


def read_config(model: str) -> ModelConfig:
    """Read what a model is; of a directory or a `config.json` no weights are read."""
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return ModelConfig.from_hf(read_json(file))
    checkpoint = open_checkpoint(resolve_model(model))
    try:
        return checkpoint.config
    finally:
        checkpoint.close()


def rows_of(placements: Iterable[Placement]) -> list[Row]:
    """Bring together weights that differ in their layer only, where layers follow each other."""
    kinds: dict[object, list[tuple[int, Placement]]] = {}
    for placement in placements:
        weight = placement.weight
        found = _LAYER.search(weight.path)
        stem = _LAYER.sub("*", weight.path)
        kind = (stem, weight.shape, weight.itemsize, placement.spec)
        kinds.setdefault(kind, []).append((int(found[0]) if found else -1, placement))
    rows: list[Row] = []
    for members in kinds.values():
        members.sort(key=lambda member: member[0])
        runs: list[list[tuple[int, Placement]]] = []
        for member in members:
            if runs and runs[-1][-1][0] + 1 == member[0]:
                runs[-1].append(member)
            else:
                runs.append([member])
        for members_of_run in runs:
            first, last = members_of_run[0][0], members_of_run[-1][0]
            placement = members_of_run[0][1]
            name = str(first) if first == last else f"{first}-{last}"
            path = _LAYER.sub(name, placement.weight.path)
            rows.append(Row(path=path, count=len(members_of_run), placement=placement))
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    placement = row.placement
    spec = ", ".join("+".join(names_of(entry)) or "-" for entry in placement.spec)
    times = f" x {row.count}" if row.count > 1 else ""
    shape = " x ".join(str(size) for size in placement.weight.shape)
    return row.path, shape, f"({spec})", format_bytes(placement.device_bytes) + times


def _table(cells: list[tuple[str, ...]]) -> list[str]:
    rows = [("weight", "shape", "split along", "per device"), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _notes(config: ModelConfig, tensor: int, sizes: Mapping[str, int]) -> list[str]:
    notes: list[str] = []
    if config.num_heads % tensor:
        notes.append(
            f"note: {tensor} devices do not divide the number of heads ({config.num_heads}); "
            "projections are split inside heads, and devices exchange the parts in every layer"
        )
    copies = sizes.get(COPY_AXIS, 1)
    if copies > 1:
        notes.append(
            f"note: each of {config.num_kv_heads} heads of keys and values, and its cache, lies "
            f"on {copies} devices"
        )
    elif config.num_kv_heads % tensor:
        notes.append(
            "note: the cache is whole on each device, as they do not divide the number of heads of "
            f"keys and values ({config.num_kv_heads})"
        )
    return notes
