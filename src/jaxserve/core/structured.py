"""What an output must look like: `StructuredOutputsParams`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.core.errors import RequestError

MAX_SCHEMA_DEPTH = 64
"""Deepest nesting of a JSON schema."""
MAX_CHOICES = 10_000

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningSpan:
    """Free text that a reasoning model writes in front of the constrained part.

    Attributes:
        start: The mark that opens it.
        end: The mark that closes it.
        is_open: Whether the prompt has opened it already; otherwise the model may leave it out.
    """

    start: str
    end: str
    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One constraint on the text of a completion; exactly one of the first six is given.

    Attributes:
        json: A JSON schema, as text or as an object.
        regex: A regular expression that the whole text matches (no look-around, no references).
        choice: The text is one of these strings.
        grammar: A grammar in Lark's notation or in EBNF as GBNF writes it.
        json_object: True for any JSON object.
        structural_tag: JSON text `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`:
            free text in which whatever begins with a trigger must be one of the structures.
        disable_any_whitespace: No white space between the tokens of JSON.
        disable_additional_properties: Objects of a schema that says nothing about further
            properties get none.
        whitespace_pattern: Regular expression of white space between the tokens of JSON.
        reasoning: Free text in front of it all; set by the server for reasoning models.

    Raises:
        RequestError: If none or several constraints are given, or a value has the wrong form.

    Source: vLLM `StructuredOutputsParams` (names, limits).
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    reasoning: ReasoningSpan | None = None

    def __post_init__(self) -> None:
        """Check that there is one constraint, and its type."""
        found = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(found) != 1:
            raise RequestError(
                f"structured_outputs needs exactly one of {', '.join(_CONSTRAINTS)}, got "
                f"{' and '.join(found) or 'none'}.",
                param=_PARAM,
            )
        self._check_types(found[0])
        if self.json is not None:
            check_depth(self.schema)

    def _check_types(self, name: str) -> None:
        value = getattr(self, name)
        kinds: dict[str, tuple[type, ...]] = {
            "json": (str, Mapping, bool),
            "choice": (list, tuple),
            "json_object": (bool,),
        }
        if not isinstance(value, kinds.get(name, (str,))):
            expected = {"json": "a JSON schema", "choice": "a list of strings"}.get(
                name, "a string"
            )
            expected = "true" if name == "json_object" else expected
            raise RequestError(
                f"structured_outputs.{name} must be {expected}, got {type(value).__name__}.",
                param=_PARAM,
            )
        if name == "json_object" and not value:
            raise RequestError(
                "structured_outputs.json_object must be true, got false; leave it out instead.",
                param=_PARAM,
            )
        if name == "choice":
            _check_choices(value)
        if name in ("grammar", "structural_tag") and not value.strip():
            raise RequestError(f"structured_outputs.{name} must not be empty.", param=_PARAM)
        if self.whitespace_pattern is not None and not isinstance(self.whitespace_pattern, str):
            raise RequestError(
                "structured_outputs.whitespace_pattern must be a string, got "
                f"{type(self.whitespace_pattern).__name__}.",
                param=_PARAM,
            )

    @property
    def schema(self) -> Any:  # noqa: ANN401  a JSON value
        """The JSON schema as an object.

        Raises:
            RequestError: If the text is not JSON.
        """
        if not isinstance(self.json, str):
            return self.json
        try:
            return json.loads(self.json)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(
                f"structured_outputs.json is not valid JSON: {error}.", param=_PARAM
            ) from None

    @classmethod
    def from_mapping(cls, value: object, *, where: str = _PARAM) -> "StructuredOutputsParams":
        """Build from the object of a request.

        Args:
            value: The object.
            where: What to call it in messages.

        Raises:
            RequestError: If it is no object or has an unknown key.
        """
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{where} must be an object, got {type(value).__name__}.", param=where
            )
        known = set(cls.__dataclass_fields__) - {"reasoning"}
        unknown = sorted(str(key) for key in value if key not in known)
        if unknown:
            raise RequestError(
                f"{where} must hold {', '.join(sorted(known))} only, got {unknown[0]!r}.",
                param=where,
            )
        return cls(**value)


def _check_choices(choices: Sequence[object]) -> None:
    wrong = next((one for one in choices if not isinstance(one, str)), None)
    if wrong is not None or not 0 < len(choices) <= MAX_CHOICES:
        found = f"{type(wrong).__name__}" if wrong is not None else f"{len(choices)} strings"
        raise RequestError(
            f"structured_outputs.choice must hold 1 to {MAX_CHOICES} strings, got {found}.",
            param=_PARAM,
        )


def check_depth(schema: object, *, param: str = _PARAM) -> None:
    """Refuse a schema that is nested too deeply.

    Args:
        schema: Any JSON value.
        param: The request's field, for the error.

    Raises:
        RequestError: If it is deeper than `MAX_SCHEMA_DEPTH`.
    """
    level: list[object] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise RequestError(
        f"a JSON schema may be nested {MAX_SCHEMA_DEPTH} levels deep, this one is deeper.",
        param=param,
    )


def _children(value: object) -> Sequence[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list | tuple) else ()
