"""Tools for chat templates that know none: written into the messages themselves.

The form is the one that the tool parser `hermes` reads, so that small models without a tool
template of their own can still be asked to call functions.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import RequestError

_INTRODUCTION = """You may call functions to help the user. They are listed here, one JSON object \
per line:
<tools>
{tools}
</tools>
To call a function, write only its name and arguments as a JSON object between these tags, once \
per call:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
The results come back between <tool_response> tags."""


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Describe tools in the system message; in a new one if there is none.

    Args:
        messages: A conversation; not changed.
        tools: The tools of the request.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=listed)
    made = [dict(message) for message in messages]
    if made and made[0].get("role") in ("system", "developer"):
        made[0]["content"] = _joined(made[0].get("content"), text)
        return made
    return [{"role": "system", "content": text}, *made]


def with_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write earlier calls into the assistant's text, and their results as words of the user.

    Args:
        messages: A conversation; not changed.

    Raises:
        RequestError: If a call is malformed.
    """
    made: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        one = dict(message)
        is_result = one.get("role") == "tool"
        if is_result:
            text = f"<tool_response>\n{_plain(one.get('content'))}\n</tool_response>"
            if was_result:
                made[-1]["content"] += "\n" + text
            else:
                made.append({"role": "user", "content": text})
        else:
            calls = one.pop("tool_calls", None)
            for call in calls if isinstance(calls, list) else ():
                one["content"] = _joined(one.get("content"), _call_text(call), gap="\n")
            made.append(one)
        was_result = is_result
    return made


def _call_text(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(
            f"a tool call must hold {{'function': {{'name': ..., 'arguments': ...}}}}, got "
            f"{str(call)[:100]!r}.",
            param="messages",
        )
    arguments: object = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    body = json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _joined(content: object, text: str, gap: str = "\n\n") -> object:
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{gap}{text}" if content else text


def _plain(content: object) -> str:
    if isinstance(content, list):
        parts = [part.get("text", "") if isinstance(part, Mapping) else part for part in content]
        return "\n".join(map(str, parts))
    return "" if content is None else str(content)
