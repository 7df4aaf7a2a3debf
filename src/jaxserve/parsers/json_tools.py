"""Tool calls as JSON objects: between tags, bare, in a list, or behind a mark."""

import json
from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxserve.parsers.base import Tool, ToolParser, held, short_id
from jaxserve.parsers.json_call import JsonCall, JsonValue

_SPACE = " \t\r\n"


class JsonToolParser(ToolParser):
    """What the formats share that write a call as one JSON object."""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "text"
        self._call = JsonCall()
        self._is_announced = False

    def _start_call(self, raw: str) -> None:
        """Expect an object; `raw` is what counts as text if none comes."""
        self._call, self._raw, self._is_announced = JsonCall(), raw, False

    def _read_call(self) -> Literal["more", "done", "failed"]:
        """Read on in the object; what fails before it has a name is reported as text."""
        call = self._call
        taken = self._take(call.feed(self._rest))
        if not self._is_announced:
            self._raw += taken
        if call.name is not None and not self._is_announced and not call.has_failed:
            self._begin_call(call.name)
            self._is_announced = True
        if self._is_announced:
            self._add_arguments(call.arguments)
            call.arguments = ""
        if call.has_failed:
            self._say_raw()
            return "failed"
        return "done" if call.is_done else "more"

    def _advance_text(self, mark: str, *, final: bool) -> bool:
        """Pass text on until a mark says that a call follows."""
        if self._text_until([mark], final=final) is None:
            return False
        self._start_call(mark)
        self._state = "call"
        return True

    def _advance_call(self, following: str) -> bool:
        """Read on in a call; `following` is the state after it."""
        outcome = self._read_call()
        if outcome == "more":
            return False
        self._state = "text" if outcome == "failed" else following
        return True


class HermesParser(JsonToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them.

    Source: the prompt format of Hermes 2 Pro, which Qwen2.5 and Qwen3 use as well.
    """

    open_mark: ClassVar[str] = "<tool_call>"
    close_mark: ClassVar[str] = "</tool_call>"

    @classmethod
    def structure(cls, name: str) -> tuple[str, str]:
        """Return what stands before and behind the arguments."""
        begin = f'{cls.open_mark}\n{{"name": {json.dumps(name)}, "arguments": '
        return begin, f"}}\n{cls.close_mark}"

    def _advance(self, *, final: bool) -> bool:
        if self._state == "text":
            return self._advance_text(self.open_mark, final=final)
        if self._state == "call":
            return self._advance_call("close")
        return self._skip_close(final=final)

    def _skip_close(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if text.startswith(self.close_mark):
            self._rest = text[len(self.close_mark) :]
        elif not final and self.close_mark.startswith(text):
            return False
        self._state = "text"
        return True


class Llama3Parser(JsonToolParser):
    """`{"name": ..., "parameters": {...}}` as the whole answer, several joined by `;`.

    `<|python_tag|>` in front of the first one is understood, and text in front of that.

    Source: the prompt format of Llama 3.1 and 3.2 (custom tools).
    """

    needs_special_tokens: ClassVar[bool] = True
    mark: ClassVar[str] = "<|python_tag|>"

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "start"

    def _advance(self, *, final: bool) -> bool:
        if self._state == "start":
            return self._advance_start(final=final)
        if self._state == "text":
            return self._advance_text(self.mark, final=final)
        if self._state == "call":
            return self._advance_call("next")
        return self._advance_next(final=final)

    def _advance_start(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if not text and not final:
            return False
        self._state = "text"
        if text.startswith("{"):
            self._start_call("")
            self._state = "call"
        return True

    def _advance_next(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        bare = text.removeprefix(";").lstrip(_SPACE)
        if not bare:
            if final:
                self._rest = ""
            return False
        self._state = "text"
        if text.startswith(";") and bare.startswith("{"):
            self._start_call(self._take(len(self._rest) - len(bare)))
            self._state = "call"
        return True


class MistralParser(JsonToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`.

    Source: the prompt formats of Mistral's tokenizers, version 3 to 7 and from 11 on.
    """

    needs_special_tokens: ClassVar[bool] = True
    make_id = staticmethod(short_id)
    mark: ClassVar[str] = "[TOOL_CALLS]"
    args_mark: ClassVar[str] = "[ARGS]"

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "text"
        self._value = JsonValue()

    def _advance(self, *, final: bool) -> bool:
        match self._state:
            case "text":
                if self._text_until([self.mark], final=final) is None:
                    return False
                self._raw = self.mark
                self._state = "kind"
                return True
            case "kind":
                return self._advance_kind(final=final)
            case "name":
                return self._advance_name(final=final)
            case "arguments":
                self._add_arguments(self._take(self._value.feed(self._rest)))
                self._state = "text" if self._value.is_done else "arguments"
                return self._value.is_done
            case "list":
                return self._advance_call("next")
            case _:
                return self._advance_next(final=final)

    def _advance_kind(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if not text:
            if final:
                self._raw += self._take(len(self._rest))
            return False
        self._raw += self._take(len(self._rest) - len(text))
        if text.startswith("["):
            self._raw += self._take(1)
            self._start_call(self._raw)
            self._state = "list"
        else:
            self._state = "name"
        return True

    def _advance_name(self, *, final: bool) -> bool:
        at = self._rest.find("{")
        if at < 0:
            if final:
                self._raw += self._take(len(self._rest))
            return False
        head = self._take(at)
        name = head.split("[")[0].strip()
        if name:
            self._begin_call(name)
            self._value = JsonValue()
            self._state = "arguments"
        else:
            self._raw += head
            self._say_raw()
            self._state = "text"
        return True

    def _advance_next(self, *, final: bool) -> bool:
        text = self._rest.lstrip(_SPACE)
        if not text:
            if final:
                self._rest = ""
            return False
        if text[0] == ",":
            self._rest = text[1:]
            self._start_call(",")
            self._state = "list"
        else:
            self._rest = text.removeprefix("]")
            self._state = "text"
        return True


class JsonListParser(JsonToolParser):
    """`[{"name": ..., "parameters": {...}}, ...]`: what a required call is constrained to."""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "start"

    def _advance(self, *, final: bool) -> bool:
        if self._state == "call":
            outcome = self._read_call()
            if outcome == "more":
                return False
            self._state = "next"
            return True
        text = self._rest.lstrip(_SPACE)
        if self._state == "text" or not text:
            if self._state == "text" or final:
                self._say(self._take(len(self._rest)))
            return False
        opening = "[" if self._state == "start" else ","
        if text[0] == opening:
            self._rest = text[1:]
            self._start_call(opening)
            self._state = "call"
        else:
            self._rest = text.removeprefix("]") if self._state == "next" else self._rest
            self._state = "text"
        return True


class NamedParser(ToolParser):
    """The whole text is the arguments of one function, to which the output is constrained.

    Args:
        name: The function.
    """

    def __init__(self, name: str) -> None:
        """Stand at the beginning of a text."""
        super().__init__()
        self._name = name

    def _advance(self, *, final: bool) -> bool:
        _ = final
        if not self.num_calls:
            self._begin_call(self._name)
        self._add_arguments(self._take(len(self._rest)))
        return False


def _marked(words: str) -> str:
    """Write one of DeepSeek's marks: fullwidth bars around words joined by a lower-eighth block."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


class DeepSeekParser(ToolParser):
    """DeepSeek's calls: a name behind a separator, then the arguments, in a fence or bare.

    Source: the chat templates of DeepSeek-V3 and -R1 (fence) and DeepSeek-V3.1 (bare).
    """

    begin: ClassVar[str] = _marked("tool calls begin")
    call: ClassVar[str] = _marked("tool call begin")
    separator: ClassVar[str] = _marked("tool sep")
    end: ClassVar[str] = _marked("tool call end")
    all_end: ClassVar[str] = _marked("tool calls end")
    has_fence: ClassVar[bool] = True
    needs_special_tokens: ClassVar[bool] = True

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        super().__init__(tools)
        self._state = "text"
        self._value = JsonValue()

    def _advance(self, *, final: bool) -> bool:
        match self._state:
            case "text":
                marks = [self.begin, self.call, self.end, self.all_end]
                mark = self._text_until(marks, final=final)
                if mark == self.call:
                    self._state, self._raw = "head", self.call
                return mark is not None
            case "head":
                return self._advance_head(final=final)
            case "arguments":
                self._add_arguments(self._take(self._value.feed(self._rest)))
                self._state = "tail" if self._value.is_done else "arguments"
                return self._value.is_done
            case _:
                return self._advance_tail(final=final)

    def _advance_head(self, *, final: bool) -> bool:
        at = self._rest.find("{")
        stop = self._rest.find(self.end)
        if at < 0 or 0 <= stop < at:
            if stop < 0 and not final:
                return False
            self._raw += self._take(stop if stop >= 0 else len(self._rest))
            self._say_raw()
            self._state = "text"
            return True
        before, _, after = self._rest[:at].partition(self.separator)
        name = (after.split("```")[0] if self.has_fence else before).strip()
        head = self._take(at)
        if not name or self.separator not in head:
            self._raw += head
            self._say_raw()
            self._state = "text"
            return True
        self._begin_call(name)
        self._value = JsonValue()
        self._state = "arguments"
        return True

    def _advance_tail(self, *, final: bool) -> bool:
        at = self._rest.find(self.end)
        if at >= 0:
            self._take(at + len(self.end))
            self._state = "text"
            return True
        self._take(len(self._rest) - (0 if final else held(self._rest, [self.end])))
        return False


class DeepSeek31Parser(DeepSeekParser):
    """DeepSeek-V3.1: the name in front of the separator, bare arguments behind it."""

    has_fence: ClassVar[bool] = False
