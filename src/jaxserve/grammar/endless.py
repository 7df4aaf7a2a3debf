"""Finds schemas that only endless text would satisfy: those that require themselves."""

from collections.abc import Iterator, Mapping
from typing import Any

MAX_REFERENCES = 500
"""Different references up to which a schema is examined; the work may grow with their square."""


def is_endless(schema: object) -> bool:
    """Tell whether every value of a JSON schema would have to contain itself.

    Only references within the schema count; what is said in other ways is taken to have an end, and
    so are schemas with more than `MAX_REFERENCES`.

    Args:
        schema: Any JSON value.

    >>> is_endless({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})
    True
    >>> is_endless({"type": "object", "properties": {"a": {"$ref": "#"}}})
    False
    """
    places = set(_references(schema))
    if len(places) > MAX_REFERENCES:
        return False
    targets = {place: _target(schema, place) for place in places}
    # The least fixed point: nothing ends until it has been shown to.
    ending: set[str] = set()
    has_grown = True
    while has_grown:
        found = {place for place, target in targets.items() if _ends(target, ending)}
        has_grown = found != ending
        ending = found
    return not _ends(schema, ending)


def _references(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            place = value.get("$ref")
            if isinstance(place, str) and place.startswith("#"):
                yield place
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _target(schema: object, place: str) -> object:
    """Follow a reference such as `#/$defs/tree`; what cannot be followed is an empty schema."""
    for part in place.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and name in schema:
            schema = schema[name]
        elif isinstance(schema, list | tuple) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return {}
    return schema


def _ends(schema: object, ending: set[str]) -> bool:
    """Tell whether a schema has a value of finite length, given the references that have."""
    if not isinstance(schema, Mapping):
        return True
    place = schema.get("$ref")
    if isinstance(place, str) and place.startswith("#") and place not in ending:
        return False
    parts = [*_needed_properties(schema), *_needed_items(schema), *_listed(schema, "allOf")]
    if not all(_ends(part, ending) for part in parts):
        return False
    choices = [_listed(schema, word) for word in ("anyOf", "oneOf")]
    return all(any(_ends(part, ending) for part in parts) for parts in choices if parts)


def _listed(schema: Mapping[str, Any], word: str) -> list[Any]:
    value = schema.get(word)
    return list(value) if isinstance(value, list | tuple) else []


def _needed_properties(schema: Mapping[str, Any]) -> list[Any]:
    properties, names = schema.get("properties"), _listed(schema, "required")
    if not isinstance(properties, Mapping) or schema.get("type") != "object":
        return []
    return [properties[name] for name in names if isinstance(name, str) and name in properties]


def _needed_items(schema: Mapping[str, Any]) -> list[Any]:
    count = schema.get("minItems", 0)
    if not isinstance(count, int) or count < 1 or schema.get("type") != "array":
        return []
    first = _listed(schema, "prefixItems")
    items = schema.get("items")
    rest = [items] if isinstance(items, Mapping) and count > len(first) else []
    return [*first[:count], *rest]
