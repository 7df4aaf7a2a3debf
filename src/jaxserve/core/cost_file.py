"""Cost models as files: what `jaxserve profile` writes and `--cost-model` reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from jaxserve.core.cost import CostModel, LinearCost, Plane
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.cost_table import TableCost
from jaxserve.core.errors import ConfigError

FORMAT = "jaxserve cost model"
VERSION = 1
DEFAULT_MARGIN = 0.05
MOST_MARGIN = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFile:
    """A cost model with what is known about it.

    Attributes:
        cost: Times of steps.
        margin: Share by which to raise them before anything is promised.
        facts: Where and how it was measured, and how well it fits.
    """

    cost: CostModel
    margin: float = DEFAULT_MARGIN
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def cost_to_json(cost: CostModel) -> dict[str, Any]:
    """Return a cost model as an object of JSON.

    Raises:
        ConfigError: If it is of a kind that cannot be written.
    """
    if isinstance(cost, BucketCost):
        return {"kind": "buckets", **cost.to_json()}
    if isinstance(cost, LinearCost):
        return {"kind": "linear", "planes": [asdict(plane) for plane in cost.planes]}
    if isinstance(cost, TableCost):
        return {"kind": "table", **cost.to_json()}
    raise ConfigError(
        f"a {type(cost).__name__} cannot be written; use a table or a linear cost model."
    )


def cost_from_json(given: object, name: str) -> CostModel:
    """Return the cost model of an object of JSON.

    Args:
        given: The object.
        name: What to call it in messages.

    Raises:
        ConfigError: If it is of an unknown kind, or holds a bad value.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"the cost of {name} must be an object, got {type(given).__name__}.")
    fields = dict(cast("Mapping[str, Any]", given))
    kind = fields.pop("kind", None)
    if kind == "buckets":
        return BucketCost.from_json(fields, name)
    if kind == "linear":
        try:
            planes = [Plane(**plane) for plane in fields["planes"]]
        except (KeyError, TypeError):
            raise ConfigError(
                f"the planes of {name} must be objects with token, request, context, draft_step "
                "and base, in seconds."
            ) from None
        return LinearCost(*planes)
    if kind == "table":
        try:
            rows = [
                (float(a), float(b), float(c), float(d), float(e))
                for a, b, c, d, e in fields["rows"]
            ]
            return TableCost(rows, composition=fields.get("composition", "mixed"), name=name)
        except (KeyError, TypeError):
            raise ConfigError(f"the rows of {name} must be lists of five numbers.") from None
    raise ConfigError(f"the cost of {name} must be of kind buckets, linear or table, got {kind!r}.")


def read_cost(path: Path) -> CostFile:
    """Read a cost model: JSON as `write_cost` writes it, or a CSV table of measured steps.

    Raises:
        ConfigError: If the file cannot be read, or holds something else or a bad value.
    """
    try:
        if path.suffix in (".csv", ".gz"):
            return CostFile(cost=TableCost.read(path))
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path.name} is not JSON: {error}.") from None
    if not isinstance(given, Mapping) or given.get("format") != FORMAT:
        raise ConfigError(
            f"{path.name} is no cost model; write one with `jaxserve profile --output {path.name}`."
        )
    if given.get("version") != VERSION:
        raise ConfigError(
            f"{path.name} must be of version {VERSION}, got {given.get('version')!r}; write it "
            "again with `jaxserve profile`."
        )
    margin = given.get("margin", DEFAULT_MARGIN)
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not 0 <= margin <= MOST_MARGIN:
        raise ConfigError(
            f"the margin of {path.name} must be a number from 0 to {MOST_MARGIN:g}, got {margin!r}."
        )
    cost = cost_from_json(given.get("cost"), path.name)
    return CostFile(cost=cost, margin=float(margin), facts=given.get("facts", {}))


def write_cost(path: Path, made: CostFile) -> None:
    """Write a cost model.

    Raises:
        ConfigError: If it is of a kind that cannot be written, or the file cannot be.
    """
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "margin": made.margin,
            "facts": dict(made.facts),
            "cost": cost_to_json(made.cost),
        },
        indent=1,
    )
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be written: {error.strerror or error}.") from None
