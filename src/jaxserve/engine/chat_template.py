"""Chat messages to prompt text, through the Jinja template that comes with a model.

Templates are code from strangers: they run in Jinja's sandbox, see plain data only, and whatever
goes wrong in one is the request's error, not the server's.
"""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
from jinja2.parser import Parser

from jaxserve.core.clock import WallClock
from jaxserve.core.config import ContentFormat
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.core.protocols import Clock
from jaxserve.engine.tool_text import with_calls, with_tools

DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"

# Written behind the last message to find where it ends. The space tells whether the template
# strips messages; the private-use characters keep it apart from anything a user types.
_MARKER = "\ue000continue-here\ue000 "
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning_content", "reasoning")
_RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
)
# What a template, which may do anything with any data, has been seen to raise besides its own.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _GenerationTag(jinja2.ext.Extension):
    """Renders what stands between `{% generation %}` and `{% endgeneration %}` as it is.

    Training code marks the assistant's words with this tag; for a prompt it has no meaning.
    """

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Replace the block by its content, with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without private names, which would reach behind the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  any name may be a field
        for name in dict(*args[1:], **kwargs):
            _check_public(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401  template values
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the private name {name!r}")


def _to_json(
    value: Any,  # noqa: ANN401  any template value
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  a filter's arguments may be positional
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Write JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = _to_json
    made.globals["namespace"] = _Namespace
    # Jinja's annotations allow for its own globals only.
    made.globals["raise_exception"] = _raise_exception  # pyright: ignore[reportArgumentType]
    return made


class _Compiled:
    """A template ready to run, with what must be known of its text.

    Attributes:
        takes_parts: Whether it goes through a message's content as a list of typed parts.
        tests_strings: Whether it asks if the content is a string.
        knows_tools: Whether it shows the model which tools there are.
        knows_calls: Whether it writes the calls of earlier turns.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.template = _environment().from_string(source)
        tree = _environment().parse(source)
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        self.knows_calls = "tool_calls" in source
        names = _content_names(tree)
        loops = tree.find_all(jinja2.nodes.For)
        tests = tree.find_all(jinja2.nodes.Test)
        self.takes_parts = any(_is_content(loop.iter, names) for loop in loops)
        self.tests_strings = any(
            test.name == "string" and _is_content(test.node, names) for test in tests
        )


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> _Compiled:
    return _Compiled(source)


def _content_names(tree: jinja2.nodes.Template) -> set[str]:
    """Return the variables of a template that hold a message's content."""
    names = {"content"}
    for assign in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assign.target, jinja2.nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return names


def _is_content(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    match node:
        case jinja2.nodes.Name():
            return node.name in names
        case jinja2.nodes.Getattr():
            return node.attr == "content"
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
            return True
        case _:
            return False


class ChatTemplate:
    """The chat template of a model, or several under names.

    Args:
        templates: Template text by name. `default` is used unless a request brings tools and
            there is one named `tool_use`.
        variables: Values that every template sees, such as `bos_token`.
        clock: Tells the templates' `strftime_now` the time.

    Source: the environment that `transformers` gives to chat templates (names and options).
    Differs: a `developer` message becomes a system message where the template does not know that
    role, and content parts are joined or split as the template needs; both are what vLLM does.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        variables: Mapping[str, object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Keep the texts; each is compiled when it is first used."""
        self.templates = dict(templates)
        self._variables = dict(variables or {})
        self._clock: Clock = clock or WallClock()

    def check(self) -> None:
        """Compile every template.

        Raises:
            ConfigError: If one is not valid Jinja.
        """
        for name, source in self.templates.items():
            try:
                _compile(source)
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(
                    f"chat template {name!r} is not valid Jinja: {error} (line {error.lineno}). "
                    "Correct it, or leave it out to use the model's own."
                ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        content_format: ContentFormat = "auto",
        describe_tools: bool = False,
    ) -> str:
        """Write a conversation as one prompt.

        Args:
            messages: Messages with `role` and `content`; content is text, a list of text parts, or
                None.
            add_generation_prompt: End with what introduces the assistant's next message.
            continue_final_message: End within the last message instead, so that it is continued.
            tools: Function schemas that the model may call.
            chat_template: Name of a template of this model, or the text of another one.
            kwargs: Further variables for the template.
            content_format: Whether content reaches the template as a string or as a list of parts
                (openai); auto looks at the template.
            describe_tools: Whether a template that knows no tools gets them described in the
                system message, in the form that the tool parser `hermes` reads; calls and results
                of earlier turns likewise. Otherwise such a template leaves them out.

        Returns:
            The prompt. Special tokens are part of it; nothing is to be added when it is tokenised.

        Raises:
            RequestError: If the messages are malformed, there is no template, or it fails.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true; set "
                "add_generation_prompt to false to continue the last message.",
                param="continue_final_message",
            )
        extra = dict(kwargs or {})
        if taken := sorted(_RESERVED & extra.keys()):
            raise RequestError(
                f"chat_template_kwargs must not contain {', '.join(taken)}; use the request field "
                "of that name.",
                param="chat_template_kwargs",
            )
        compiled = self._choose(chat_template, has_tools=bool(tools))
        if describe_tools and tools and not compiled.knows_tools:
            listed = [_check_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
            messages = with_tools(listed, tools)
        if describe_tools and not compiled.knows_calls:
            listed = [_check_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
            messages = with_calls(listed)
        plain = _prepare(messages, compiled, content_format)
        if continue_final_message:
            _mark_end(plain)
        try:
            text = compiled.template.render(
                {
                    "documents": None,
                    "strftime_now": self._strftime_now,
                    **self._variables,
                    **extra,
                    "messages": plain,
                    "tools": [dict(tool) for tool in tools] if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(
                f"the chat template failed on these messages: {error or type(error).__name__}",
                param="messages",
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def knows_tools(self, chat_template: str | None = None) -> bool:
        """Tell whether the template that tools would be given to shows them to the model.

        Args:
            chat_template: Name of a template of this model, or the text of another one.

        Raises:
            RequestError: If there is no template, or it is not valid.
        """
        return self._choose(chat_template, has_tools=True).knows_tools

    def _choose(self, chat_template: str | None, *, has_tools: bool) -> _Compiled:
        if chat_template is not None:
            source = self.templates.get(chat_template, chat_template)
        elif has_tools and TOOLS_NAME in self.templates:
            source = self.templates[TOOLS_NAME]
        elif DEFAULT_NAME in self.templates:
            source = self.templates[DEFAULT_NAME]
        elif self.templates:
            raise RequestError(
                f"the model has no default chat template; name one of {', '.join(self.templates)} "
                "as chat_template.",
                param="chat_template",
            )
        else:
            raise RequestError(
                "the model has no chat template. Use /v1/completions, or start the server with "
                "--chat-template.",
                param="messages",
            )
        try:
            return _compile(source)
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the chat template is not valid Jinja: {error}", param="chat_template"
            ) from error

    def _strftime_now(self, form: str) -> str:
        return datetime.datetime.fromtimestamp(self._clock.unix()).astimezone().strftime(form)


def _prepare(
    messages: Sequence[Mapping[str, Any]], compiled: _Compiled, content_format: ContentFormat
) -> list[dict[str, Any]]:
    """Copy the messages into the form that the template expects."""
    if not messages:
        raise RequestError("messages must not be empty.", param="messages")
    form = _Form.of(compiled, content_format)
    plain = [_plain_message(place, message, form) for place, message in enumerate(messages)]
    if "developer" not in compiled.source and any(m["role"] == "developer" for m in plain):
        return _merge_system(plain)
    return plain


@dataclass(frozen=True, slots=True)
class _Form:
    """How a template takes a message's content."""

    takes_parts: bool
    takes_strings: bool

    @classmethod
    def of(cls, compiled: _Compiled, content_format: ContentFormat) -> "_Form":
        if content_format != "auto":
            is_openai = content_format == "openai"
            return cls(takes_parts=is_openai, takes_strings=not is_openai)
        is_string = compiled.tests_strings or not compiled.takes_parts
        return cls(takes_parts=compiled.takes_parts, takes_strings=is_string)


def _check_message(message: object, where: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object, got {type(message).__name__}.", param=where)
    return message


def _plain_message(place: int, message: object, form: _Form) -> dict[str, Any]:
    where = f"messages[{place}]"
    plain: dict[str, Any] = dict(_check_message(message, where))
    if not isinstance(plain.get("role"), str):
        raise RequestError(
            f"{where}.role must be a string such as 'user', got {plain.get('role')!r}.",
            param=f"{where}.role",
        )
    content = plain.get("content")
    if isinstance(content, str) and form.takes_strings:
        plain["content"] = content
    else:
        texts = list(_texts(content, f"{where}.content"))
        plain["content"] = (
            [{"type": "text", "text": text} for text in texts]
            if form.takes_parts and content is not None
            else "\n".join(texts)
        )
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, where) for call in plain["tool_calls"]]
    for name in _REASONING:  # known under two names; templates read either
        if plain.get(name):
            plain |= dict.fromkeys(_REASONING, plain[name])
            break
    return plain


def _texts(content: object, where: str) -> Iterator[str]:
    """Yield the text of each part of a message's content."""
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{where} must be a string or a list of text parts, got {type(content).__name__}.",
            param=where,
        )
    for place, part in enumerate(content):
        if isinstance(part, str):
            yield part
            continue
        kind = str(part.get("type", "text")) if isinstance(part, Mapping) else type(part).__name__
        text = part.get(_TEXT_PARTS.get(kind, "")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise RequestError(
                f"{where}[{place}] is a part of type {kind!r}; this model takes text parts only, "
                "such as {'type': 'text', 'text': 'Hello'}.",
                param=f"{where}[{place}]",
            )
        yield text


def _plain_call(call: object, where: str) -> dict[str, Any]:
    """Copy one tool call of an earlier turn, its arguments as an object where they are one."""
    if not isinstance(call, Mapping):
        raise RequestError(
            f"{where}.tool_calls must be a list of objects, got {call!r}.",
            param=f"{where}.tool_calls",
        )
    plain: dict[str, Any] = dict(call)
    function = plain.get("function")
    if isinstance(function, Mapping):
        plain["function"] = dict(function)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            plain["function"]["arguments"] = _parse_arguments(arguments)
    return plain


def _parse_arguments(text: str) -> dict[str, Any] | str:
    """Return the arguments as an object; as they are if a model wrote something else."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or of a size that nothing reads
        return text
    return value if isinstance(value, dict) else text


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn developer messages into system messages, and put those together at the front."""
    system = [m for m in messages if m["role"] in ("system", "developer")]
    others = [m for m in messages if m["role"] not in ("system", "developer")]
    contents = [m["content"] for m in system if m["content"]]
    if all(isinstance(content, str) for content in contents):
        merged: object = "\n\n".join(contents)
    else:
        merged = [
            {"type": "text", "text": text}
            for content in contents
            for text in _texts(content, "messages")
        ]
    return [{**system[0], "role": "system", "content": merged}, *others]


def _mark_end(messages: list[dict[str, Any]]) -> None:
    last = messages[-1]
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + _MARKER
    else:
        if not content:
            content.append({"type": "text", "text": ""})
        content[-1]["text"] += _MARKER


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_MARKER.rstrip())
    if at < 0:
        raise RequestError(
            "continue_final_message is true, but the chat template leaves out the last message.",
            param="continue_final_message",
        )
    # Without the marker's space the template strips messages, so the end of this one goes as well.
    return text[:at] if text.startswith(_MARKER, at) else text[:at].rstrip()
