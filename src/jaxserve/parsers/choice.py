"""What a request says about tools: which there are, and whether one must be called."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.core.errors import RequestError, did_you_mean
from jaxserve.core.structured import StructuredOutputsParams, check_depth
from jaxserve.parsers.base import Tool, ToolParser

Mode = Literal["none", "auto", "required", "named"]

MAX_TOOLS = 1024
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Tools of one request.

    Attributes:
        tools: As the request wrote them, for the chat template.
        functions: The functions among them.
        mode: Whether one may or must be called.
        name: The function that must be called, if one is named.
        parallel: Whether several calls may be made at once.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    functions: tuple[Tool, ...] = ()
    mode: Mode = "none"
    name: str = ""
    parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether a call must be made."""
        return self.mode in ("required", "named")

    def constraint(self, parser: type[ToolParser] | None) -> StructuredOutputsParams | None:
        """Return what the output must look like; None if it is free.

        Args:
            parser: The parser of free calls, which knows the form of `strict` ones.
        """
        if self.mode == "named":
            function = next(f for f in self.functions if f["name"] == self.name)
            return StructuredOutputsParams(json=schema_of(function))
        if self.mode == "required":
            return StructuredOutputsParams(json=self._list_schema())
        if self.mode == "auto" and any(f.get("strict") for f in self.functions):
            return self._strict(parser)
        return None

    def _list_schema(self) -> dict[str, Any]:
        options: list[dict[str, Any]] = []
        shared: dict[str, Any] = {}
        for number, function in enumerate(self.functions):
            place = f"tool_{number}"
            shared[place] = _moved(schema_of(function), f"#/$defs/{place}")
            options.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        "parameters": {"$ref": f"#/$defs/{place}"},
                    },
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        most = {} if self.parallel else {"maxItems": 1}
        return {
            "type": "array",
            "minItems": 1,
            **most,
            "items": {"anyOf": options},
            "$defs": shared,
        }

    def _strict(self, parser: type[ToolParser] | None) -> StructuredOutputsParams | None:
        structures: list[dict[str, Any]] = []
        for function in self.functions:
            around = None if parser is None else parser.structure(function["name"])
            if around is None:
                return None  # this format has no fixed text around arguments
            schema = schema_of(function) if function.get("strict") else {"type": "object"}
            structures.append({"begin": around[0], "schema": schema, "end": around[1]})
        trigger = structures[0]["begin"].split("\n")[0]
        return StructuredOutputsParams(
            structural_tag=json.dumps({"structures": structures, "triggers": [trigger]})
        )


def schema_of(function: Tool) -> Mapping[str, Any]:
    """Return the schema of a function's arguments; that of no arguments if it names none."""
    return function.get("parameters") or _NO_PARAMETERS


def _moved(schema: Any, place: str) -> Any:  # noqa: ANN401  a JSON value
    """Return a schema whose references to its own root lead to its new place."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = place + reference[1:]
    return made


def read_choice(tools: object, tool_choice: object, *, parallel: bool) -> ToolChoice:
    """Check the tools of a request.

    Args:
        tools: The field `tools`; None if it is absent.
        tool_choice: The field `tool_choice`; None if it is absent, which means auto.
        parallel: The field `parallel_tool_calls`.

    Raises:
        RequestError: If a field is malformed, or they contradict each other.
    """
    if tools is None:
        if tool_choice not in (None, "none", "auto"):
            raise RequestError(
                "tool_choice needs tools; send both or neither.", param="tool_choice"
            )
        return ToolChoice()
    if not isinstance(tools, Sequence) or not 0 < len(tools) <= MAX_TOOLS:
        found = f"{len(tools)} items" if isinstance(tools, Sequence) else type(tools).__name__
        raise RequestError(
            f"tools must be a list of 1 to {MAX_TOOLS} functions, got {found}.", param="tools"
        )
    functions = tuple(_function(tool, place) for place, tool in enumerate(tools))
    names = [function["name"] for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"tools holds the function {twice!r} twice; rename one.", param="tools")
    mode, name = _mode(tool_choice, names)
    return ToolChoice(
        tools=tuple(tools), functions=functions, mode=mode, name=name, parallel=parallel
    )


def _function(tool: object, place: int) -> Tool:
    where = f"tools[{place}]"
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if kind != "function" or not isinstance(function, Mapping):
        raise RequestError(
            f"{where} must be {{'type': 'function', 'function': {{'name': ...}}}}, got "
            f"{str(tool)[:100]!r}.",
            param=where,
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError(
            f"{where}.function.name must be a string that is not empty, got {name!r}.",
            param=f"{where}.function.name",
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise RequestError(
            f"{where}.function.parameters must be a JSON schema, got {type(parameters).__name__}.",
            param=f"{where}.function.parameters",
        )
    check_depth(parameters, param=f"{where}.function.parameters")
    return function


def _mode(tool_choice: object, names: Sequence[str]) -> tuple[Mode, str]:
    if tool_choice is None:
        return "auto", ""
    if tool_choice in ("none", "auto", "required"):
        return tool_choice, ""  # type: ignore[return-value]
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': "
            f"{{'name': ...}}}}, got {str(tool_choice)[:100]!r}.",
            param="tool_choice",
        )
    if name not in names:
        raise RequestError(
            f"tool_choice names {name!r}, which is not among the tools "
            f"({', '.join(map(repr, names[:10]))}).{did_you_mean(name, names)}",
            param="tool_choice",
        )
    return "named", name
