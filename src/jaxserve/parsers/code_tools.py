"""Tool calls that are not JSON: Python calls, and XML-like tags."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxserve.parsers.base import Tool, ToolParser

_SPACE = " \t\r\n"
_WORDS = {"true": True, "false": False, "null": None}


class PythonicParser(ToolParser):
    """`[name(key=value, ...), ...]` as the whole answer.

    A call is reported when its parenthesis closes, so that what is no call remains text.

    Source: the prompt format of Llama 3.2 (pythonic) and ToolACE.
    """

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "start"
        self._end = _CallEnd()

    def _advance(self, *, final: bool) -> bool:
        if self._state == "text":
            self._say(self._take(len(self._rest)))
            return False
        if self._state == "call":
            return self._advance_call(final=final)
        text = self._rest.lstrip(_SPACE)
        if not text:
            if final:
                self._say(self._take(len(self._rest)))
            return False
        opening = "[" if self._state == "start" else ","
        if text[0] == opening:
            self._raw += self._take(1 + len(self._rest) - len(text))
            self._state = "call"
            self._end = _CallEnd()
        elif self._state == "next" and text[0] == "]":
            self._rest = text[1:]
            self._state = "text"
        else:
            self._state = "text"
        return True

    def _advance_call(self, *, final: bool) -> bool:
        end = self._end.find(self._rest)
        if end == 0 and not final:
            return False
        found = _read_call(self._rest[:end].strip()) if end > 0 else None
        if found is None:
            self._say_raw()
            self._state = "text"
            return True
        self._take(end)
        name, arguments = found
        self._begin_call(name)
        self._add_arguments(json.dumps(arguments, ensure_ascii=False))
        self._state = "next"
        return True


class _CallEnd:
    """Finds where a call ends in a text that grows; looks at every character once."""

    __slots__ = ("_at", "_depth", "_escaped", "_quote")

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def find(self, text: str) -> int:
        """Return where the call at the beginning ends; 0 if it has not yet, -1 if never.

        Args:
            text: The same as last time, or longer.
        """
        while self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._quote:
                self._in_quotes(char)
            elif char in "'\"" and self._depth:
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._at if self._depth == 0 else -1
            elif not self._depth and not (char.isalnum() or char in "_." + _SPACE):
                return -1  # a name comes first
        return 0

    def _in_quotes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""


def _read_call(text: str) -> tuple[str, dict[str, Any]] | None:
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return None
        arguments = {str(k.arg): _value(k.value) for k in node.keywords if k.arg is not None}
        if len(arguments) != len(node.keywords):
            return None
        json.dumps(arguments, allow_nan=False)
        return ast.unparse(node.func), arguments
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:  # noqa: ANN401  a JSON value
    match node:
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_value(key)): _value(value) for key, value in pairs if key is not None}
        case _:
            return ast.literal_eval(node)


class QwenXmlParser(ToolParser):
    """`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

    Values are text; the function's schema says what they mean. Each argument is reported when it
    is complete.

    Source: the chat template of Qwen3-Coder.
    """

    open_mark: ClassVar[str] = "<tool_call>"
    close_mark: ClassVar[str] = "</tool_call>"
    function: ClassVar[str] = "<function="
    function_end: ClassVar[str] = "</function>"
    parameter: ClassVar[str] = "<parameter="
    parameter_end: ClassVar[str] = "</parameter>"

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "text"
        self._properties: Mapping[str, Any] = {}
        self._key = ""
        self._num_arguments = 0

    def _advance(self, *, final: bool) -> bool:
        match self._state:
            case "text":
                mark = self._text_until([self.open_mark, self.function], final=final)
                self._raw = mark or ""
                if mark is not None:
                    self._state = "open" if mark == self.open_mark else "name"
                return mark is not None
            case "open":
                return self._advance_open(final=final)
            case "name":
                return self._advance_name(final=final)
            case "inside":
                return self._advance_inside(final=final)
            case "value":
                return self._advance_value(final=final)
            case _:
                return self._advance_close(final=final)

    def _advance_open(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if not final and self.function.startswith(text):
            return False
        if text.startswith(self.function):
            self._raw += self._take(len(self._rest) - len(text) + len(self.function))
            self._state = "name"
        else:
            self._say_raw()
            self._state = "text"
        return True

    def _advance_name(self, *, final: bool) -> bool:
        at = self._rest.find(">")
        if at < 0:
            if final:
                self._raw += self._take(len(self._rest))
            return False
        name = self._take(at + 1)[:-1].strip()
        schema = self.tools.get(name, {}).get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._num_arguments = 0
        self._begin_call(name)
        self._state = "inside"
        return True

    def _advance_inside(self, *, final: bool) -> bool:
        marks = [self.parameter, self.function_end, self.close_mark]
        found = [(at, mark) for mark in marks if (at := self._rest.find(mark)) >= 0]
        if not found:
            if final:
                self._end_call()
                self._take(len(self._rest))
            return False
        at, mark = min(found)
        if mark == self.parameter:
            end = self._rest.find(">", at)
            if end < 0:
                if final:
                    self._end_call()
                    self._take(len(self._rest))
                return False
            self._key = self._take(end + 1)[at + len(mark) : -1].strip()
            self._state = "value"
            return True
        self._end_call()
        self._take(at + (len(mark) if mark == self.function_end else 0))
        self._state = "close"
        return True

    def _advance_value(self, *, final: bool) -> bool:
        marks = [self.parameter_end, self.parameter, self.function_end]
        found = [(at, mark) for mark in marks if (at := self._rest.find(mark)) >= 0]
        if not found:
            if final:  # cut off within a value: its call stays as incomplete as it is
                self._take(len(self._rest))
            return False
        at, mark = min(found)
        text = self._take(at).removeprefix("\n").removesuffix("\n")
        if mark == self.parameter_end:
            self._take(len(mark))
        value = json.dumps(typed(text, self._properties.get(self._key)), ensure_ascii=False)
        start = "{" if not self._num_arguments else ", "
        self._add_arguments(f"{start}{json.dumps(self._key, ensure_ascii=False)}: {value}")
        self._num_arguments += 1
        self._state = "inside"
        return True

    def _end_call(self) -> None:
        self._add_arguments("}" if self._num_arguments else "{}")

    def _advance_close(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if text.startswith(self.close_mark):
            self._rest = text[len(self.close_mark) :]
        elif not final and self.close_mark.startswith(text):
            return False
        self._state = "text"
        return True


def typed(text: str, schema: object) -> Any:  # noqa: ANN401  a JSON value
    """Give a value that was written as text the type that its schema names.

    Args:
        text: What the model wrote.
        schema: The parameter's schema; without one, the text remains text.

    >>> typed("3", {"type": "integer"}), typed("3", {"type": "string"})
    (3, '3')
    """
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = kind if isinstance(kind, list) else [kind]
    is_open = isinstance(schema, Mapping) and kind is None and bool(schema)
    if kinds == ["string"] or (kind is None and not is_open):
        return text
    word = text.strip()
    if word.lower() in _WORDS and (is_open or {"boolean", "null"} & set(map(str, kinds))):
        return _WORDS[word.lower()]
    try:
        value = json.loads(word)
        json.dumps(value, allow_nan=False)  # arguments are JSON, which has no NaN and no infinity
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value
