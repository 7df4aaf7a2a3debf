"""Constraints written in the one language that the grammar engine reads.

The result is text, so that equal constraints are compiled once.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.core.errors import RequestError
from jaxserve.core.structured import ReasoningSpan, StructuredOutputsParams
from jaxserve.grammar.endless import is_endless

WHITESPACE = r"[ ]{1,2}|\r?\n[ \t]{0,40}"
"""White space of JSON unless a request names another: without a bound, a small model may write
spaces until it runs out of tokens."""

MAX_LEVELS = 20_000
"""Rules, groups and schemas of one grammar. The compiler descends into one from within another, and
its threads have stacks for so many (`compiler.STACK_BYTES`)."""
MAX_ASCII = 127
_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarDefaults:
    """What holds where a request says nothing.

    Attributes:
        disable_any_whitespace: No white space between the tokens of JSON.
        disable_additional_properties: Objects get no further properties unless a schema says so.
    """

    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


def grammar_text(params: StructuredOutputsParams, defaults: GrammarDefaults) -> str:
    """Write a constraint as a grammar.

    Args:
        params: The constraint.
        defaults: What holds where it says nothing.

    Returns:
        JSON text `{"grammars": [...]}`; whether it compiles is not known yet.

    Raises:
        RequestError: If the constraint is malformed, or no text can satisfy it.
    """
    parts = _parts(params, defaults)
    if params.reasoning is not None:
        parts = [{"name": "whole", "lark_grammar": _with_reasoning(params.reasoning)}, *parts]
    try:
        text = json.dumps({"grammars": parts}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the schema is not JSON: {error}.", param=_PARAM) from error
    levels = sum(map(_most_levels, parts))
    if levels > MAX_LEVELS:
        raise RequestError(
            f"the grammar may nest too deeply: it has {levels} rules, groups and schemas with "
            f"references among them, at most {MAX_LEVELS} are compiled. Send a smaller one.",
            param=_PARAM,
        )
    if params.json is not None and '"$ref"' in text and is_endless(params.schema):
        raise RequestError(
            "the schema cannot be met: it requires itself, so that no value of it has an end. Make "
            "one of the properties optional, or allow another form.",
            param=_PARAM,
        )
    return text


def _parts(params: StructuredOutputsParams, defaults: GrammarDefaults) -> list[dict[str, Any]]:
    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json_object else params.schema
        return [{"name": "inner", "json_schema": _schema(schema, params, defaults)}]
    if params.regex is not None:
        return [{"name": "inner", "lark_grammar": _regex(params.regex)}]
    if params.choice is not None:
        # One expression: a rule with as many alternatives as a choice may have is too complex.
        options = "|".join(dict.fromkeys(map(_literal, params.choice)))
        return [{"name": "inner", "lark_grammar": f"start: /({options})/"}]
    if params.grammar is not None:
        return [{"name": "inner", "lark_grammar": _lark(params.grammar)}]
    return [{"name": "inner", "lark_grammar": _tags(params.structural_tag or "", params, defaults)}]


def _most_levels(part: Mapping[str, Any]) -> int:
    """Bound from above how deeply the compiler may have to descend into a part.

    Without references no schema is deeper than `MAX_SCHEMA_DEPTH`, and regular expressions have a
    limit of their own.
    """
    grammar = part.get("lark_grammar")
    text = json.dumps(part["json_schema"]) if grammar is None else str(grammar)
    schemas = text.count("{") if "$ref" in text else 0
    return schemas if grammar is None else schemas + text.count(":") + text.count("(")


def quoted(text: str) -> str:
    r"""Write text as a string of a grammar.

    >>> quoted('a"b')
    '"a\\"b"'
    """
    return json.dumps(text, ensure_ascii=False)


def _schema(
    schema: Any,  # noqa: ANN401  any JSON value
    params: StructuredOutputsParams,
    defaults: GrammarDefaults,
) -> Any:  # noqa: ANN401
    if params.disable_additional_properties or defaults.disable_additional_properties:
        schema = closed(schema)
    if not isinstance(schema, Mapping):
        return schema
    options: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_any_whitespace or defaults.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    given = schema.get("x-guidance")
    return {**schema, "x-guidance": {**options, **(given if isinstance(given, Mapping) else {})}}


def closed(schema: Any) -> Any:  # noqa: ANN401  any JSON value
    """Return a schema whose objects get no properties besides those that it names.

    Args:
        schema: A JSON schema; left as it is where it speaks of further properties itself.
    """
    if isinstance(schema, list | tuple):
        return [closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    properties = made.get("properties")
    if isinstance(properties, Mapping) and isinstance(schema.get("type", "object"), str):
        made.setdefault("additionalProperties", False)
    return made


def _literal(text: str) -> str:
    r"""Write text as a regular expression that matches it alone.

    >>> _literal("a/b é")
    'a\\x{2f}b\\x{20}é'
    """
    return "".join(
        char if char.isalnum() or ord(char) > MAX_ASCII else f"\\x{{{ord(char):x}}}"
        for char in text
    )


def _regex(pattern: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415  loaded when the first grammar comes

    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise RequestError(
            "the regular expression cannot be used: it ends with a backslash that escapes nothing.",
            param=_PARAM,
        )
    try:
        return json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    except (ValueError, KeyError, IndexError) as error:
        raise RequestError(
            f"the regular expression cannot be used: {error}", param=_PARAM
        ) from None


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark  # noqa: PLC0415

    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises nothing narrower
        raise RequestError(
            f"the grammar is neither Lark nor EBNF: {error}.", param=_PARAM
        ) from error


def _with_reasoning(span: ReasoningSpan) -> str:
    """Write the grammar of free text up to the end mark, then the constrained part."""
    body = f"think[lazy]: /(.|\\n)*{_escaped(span.end)}/\n"
    if span.is_open:
        return f"start: think /\\s*/ @inner\n{body}"
    return f"start: (begin think /\\s*/)? @inner\nbegin: {quoted(span.start)}\n{body}"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def _tags(text: str, params: StructuredOutputsParams, defaults: GrammarDefaults) -> str:
    """Write free text with tagged structures.

    Source: vLLM's structural tags (`structures` and `triggers`); the grammar engine's own way of
    writing them.
    """
    from llguidance import StructTag  # noqa: PLC0415

    try:
        value = json.loads(text)
        structures, triggers = value["structures"], value["triggers"]
        tags = [
            StructTag(
                trigger=_trigger(entry["begin"], triggers),
                begin=entry["begin"],
                grammar=_schema(entry["schema"], params, defaults),
                end=entry["end"],
            )
            for entry in structures
        ]
        return StructTag.to_grammar(tags, assume_special=False)
    except RequestError:
        raise
    except (
        ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError,
    ) as error:  # fmt: skip
        raise RequestError(
            'structural_tag must be JSON {"structures": [{"begin", "schema", "end"}], '
            f'"triggers": [...]}}; the form with "format" is not known here ({error!r}).',
            param=_PARAM,
        ) from error


def _trigger(begin: str, triggers: list[str]) -> str:
    for trigger in triggers:
        if trigger and begin.startswith(trigger):
            return trigger
    raise RequestError(
        f"no trigger of the structural tag begins {begin!r}; triggers are {triggers}.",
        param=_PARAM,
    )
