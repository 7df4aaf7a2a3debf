"""Random constraints on outputs: good ones, bad ones, and ones that are a lot of work."""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["valid", "invalid", "pathological"]
KINDS: tuple[Kind, ...] = ("valid", "invalid", "pathological")
WEIGHTS = (5, 3, 2)
"""Of ten, so many of each kind."""
MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint, and what must come of it.

    Attributes:
        kind: valid ones must be served, invalid ones refused with 400; the others may be either.
        fields: `structured_outputs` of a request.
    """

    kind: Kind
    fields: dict[str, Any]


def draw(count: int, seed: int) -> list[Constraint]:
    """Draw constraints; the same for the same seed."""
    rng = random.Random(seed)
    kinds = rng.choices(KINDS, WEIGHTS, k=count)
    return [Constraint(kind, _DRAWN[kind](rng)) for kind in kinds]


def _valid(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"json": _schema(rng, MAX_DEPTH)}
    return {"regex": _regex(rng, MAX_DEPTH)}


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "null"]
    kind = rng.choice([*kinds, "object", "object", "array", "anyOf"] if depth else kinds)
    low = rng.randint(0, 5)
    match kind:
        case "string":
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(1, 20)}
        case "integer" | "number":
            return {"type": kind, "minimum": -low, "maximum": rng.randint(10, 10**6)}
        case "enum":
            return {"enum": sorted({_word(rng) for _ in range(rng.randint(1, 6))})}
        case "const":
            return {"const": rng.choice([_word(rng), low, True, None])}
        case "array":
            item = _schema(rng, depth - 1)
            return {"type": "array", "items": item, "minItems": low, "maxItems": low + 3}
        case "anyOf":
            return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
        case "object":
            names = sorted({_word(rng) for _ in range(rng.randint(1, 5))})
            return {
                "type": "object",
                "properties": {name: _schema(rng, depth - 1) for name in names},
                "required": names[: rng.randint(0, len(names))],
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))


def _regex(rng: random.Random, depth: int) -> str:
    if not depth:
        return rng.choice([_word(rng), "[a-f]", "[0-9]", "[^x]", r"\d", r"\w", "é", r"\."])
    inner = [_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    match rng.randrange(4):
        case 0:
            return "(" + "|".join(inner) + ")"
        case 1:
            return "".join(inner)
        case 2:
            return f"({inner[0]}){{{rng.randint(1, 3)},{rng.randint(3, 9)}}}"
        case _:
            return f"({inner[0]})?" + "".join(inner)


def _invalid(rng: random.Random) -> dict[str, Any]:
    word, low = _word(rng), rng.randint(5, 50)
    schemas: list[Any] = [
        {"type": word},
        {"type": "object", "properties": {word: {"type": word}}, "required": [word]},
        {"type": "string", "minLength": low, "maxLength": low - 3},
        {"type": "integer", "minimum": low, "maximum": low - 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": low, "maxItems": low - 1},
        {"type": "string", "pattern": f"[{word}"},
        {"$ref": f"#/$defs/{word}"},
        {"enum": []},
        {"type": "object", "properties": word},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "integer", "minimum": word},
        f"{{{word}",
    ]
    regexes = [
        f"({word}", f"[{word}", f"{word})", f"*{word}", f"(?={word})a", f"({word})\\1",
        f"{word}{{{low},{low - 2}}}", f"(?<!{word})b", "\\", f"[z-a]{word}", f"(?P<{word}a)",
    ]  # fmt: skip
    if rng.random() < 0.5:
        return {"json": rng.choice(schemas)}
    return {"regex": rng.choice(regexes)}


def _pathological(rng: random.Random) -> dict[str, Any]:
    word, many = _word(rng), rng.randint(500, 3000)
    deep: dict[str, Any] = {"type": "integer"}
    for level in range(rng.randint(20, 90)):
        deep = {
            "type": "object",
            "properties": {f"{word}{level}": deep},
            "required": [f"{word}{level}"],
        }
    return rng.choice(
        [
            {"json": deep},
            {"json": {"enum": [f"{word}{i}" for i in range(many)]}},
            {"json": {"type": "object", "properties": {f"{word}{i}": {} for i in range(many)}}},
            {"json": {"type": "array", "items": {"type": "string"}, "minItems": many}},
            {"json": {"anyOf": [{"type": "string", "maxLength": i} for i in range(1, many // 10)]}},
            {"json": {"$defs": {word: {"type": "array", "items": {"$ref": f"#/$defs/{word}"}}},
                      "$ref": f"#/$defs/{word}"}},
            {"json": {"oneOf": [{"minimum": i, "type": "number"} for i in range(many // 20)]}},
            {"json": {"type": "string", "pattern": f"^({word}|[a-z]{{0,{many}}}){{0,{many}}}$"}},
            {"regex": f"(({word}|a*)*b*)*{{1,{many}}}".replace("*{", "{")},
            {"regex": f"((a|b|{word}){{0,{many}}}){{0,{many // 50}}}"},
            {"regex": f".{{{many},{2 * many}}}"},
            {"regex": "|".join(f"{word}{i}.*" for i in range(many // 5))},
            {"regex": "(x+x+)+y" * rng.randint(1, 20)},
            {"regex": f"[^{word}]*{word}" * rng.randint(5, 40)},
            {"regex": f"(.*{word}){{10}}.{{0,{many}}}"},
            {"choice": [f"{word} {i}" for i in range(many)]},
        ]
    )  # fmt: skip


_DRAWN: dict[Kind, Callable[[random.Random], dict[str, Any]]] = {
    "valid": _valid,
    "invalid": _invalid,
    "pathological": _pathological,
}
