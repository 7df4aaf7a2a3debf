"""What a request says about the form of its output: formats, constraints, tools, reasoning."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.core.errors import RequestError, did_you_mean
from jaxserve.core.structured import StructuredOutputsParams
from jaxserve.parsers.choice import ToolChoice, read_choice
from jaxserve.parsers.json_tools import HermesParser, JsonListParser, NamedParser
from jaxserve.parsers.reader import ReaderPlan
from jaxserve.parsers.reasoning import ReasoningParser
from jaxserve.parsers.registry import reasoning_parser, tool_parser
from jaxserve.serve.openai_api import ChatBody, ChatTemplateBody, GenerationBody
from jaxserve.serve.options import ApiOptions

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncLLM

_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_PROMPT_END = 64
"""Tokens at the end of the prompt that may show whether reasoning has been opened."""


def constraint_of(body: GenerationBody) -> StructuredOutputsParams | None:
    """Return the constraint that a request puts on its text.

    Args:
        body: Its `structured_outputs` and `response_format`.

    Raises:
        RequestError: If one is malformed, or both are given.
    """
    given = None
    if body.structured_outputs is not None:
        given = StructuredOutputsParams.from_mapping(body.structured_outputs)
    wanted = _format_constraint(body.response_format)
    if given is not None and wanted is not None:
        raise RequestError(
            "response_format and structured_outputs exclude each other; send one of them.",
            param="response_format",
        )
    return given or wanted


def _format_constraint(form: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    if form is None:
        return None
    kind = form.get("type")
    if kind not in _FORMATS:
        raise RequestError(
            f"response_format.type must be one of {', '.join(_FORMATS)}, got {kind!r}."
            f"{did_you_mean(str(kind), _FORMATS)}",
            param="response_format",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=json.dumps(dict(form)))
    wrapper = form.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
    if not isinstance(schema, Mapping):
        raise RequestError(
            "response_format of type json_schema needs {'json_schema': {'name': ..., 'schema': "
            "{...}}}; the schema is missing or no object.",
            param="response_format",
        )
    return StructuredOutputsParams(json=schema)


def choice_of(body: ChatBody, options: ApiOptions) -> ToolChoice:
    """Return what a chat request says about tools.

    Raises:
        RequestError: If it is malformed, or tools may be called and no parser is set up.
    """
    parallel = body.parallel_tool_calls is not False
    choice = read_choice(body.tools, body.tool_choice, parallel=parallel)
    if choice.mode != "none" and tool_parser(options.tool_call_parser) is None:
        raise RequestError(
            "tools need a parser for the model's calls; start the server with "
            "--tool-call-parser hermes (or the model's own), or send tool_choice 'none'.",
            param="tools",
        )
    return choice


def check_template(
    engine: "AsyncLLM", body: ChatTemplateBody, choice: ToolChoice, options: ApiOptions
) -> None:
    """Refuse free calls in a form that nobody tells the model about.

    A template that knows no tools gets them described in the form of the parser `hermes`; any
    other parser would wait for calls in vain. Forced calls do not depend on it.

    Raises:
        RequestError: If the template knows no tools and the parser is another one.
    """
    if choice.mode != "auto" or engine.tokenizer is None:
        return
    if tool_parser(options.tool_call_parser) is HermesParser:
        return
    if not engine.tokenizer.chat_template.knows_tools(body.chat_template):
        raise RequestError(
            "the model's chat template does not tell the model about tools, and their substitute "
            "is written for --tool-call-parser hermes. Use that parser, give --chat-template, or "
            "send tool_choice 'required'.",
            param="tools",
        )


def reading(
    engine: "AsyncLLM",
    body: ChatBody,
    choice: ToolChoice,
    tokens: list[int],
    options: ApiOptions,
) -> tuple[ReaderPlan | None, StructuredOutputsParams | None, bool]:
    """Decide how a chat's completions are read and what constrains them.

    Args:
        engine: Whose settings and tokenizer count.
        body: The request.
        choice: Its tools.
        tokens: Its prompt.
        options: Settings of the server.

    Returns:
        How to read them (None: as they are), the constraint, and whether special tokens must be
        kept in the text.

    Raises:
        RequestError: If a constraint is malformed or contradicts the tools.
    """
    parser = tool_parser(options.tool_call_parser)
    constraint = constraint_of(body)
    forced = choice.constraint(parser)
    if forced is not None and constraint is not None:
        raise RequestError(
            f"tool_choice {choice.mode!r} decides what the output looks like; leave out "
            "response_format and structured_outputs.",
            param="tool_choice",
        )
    constraint = forced or constraint
    reasoning = reasoning_parser(options.reasoning_parser)
    make_reasoning = None
    needs_special = False
    if reasoning is not None:
        end = "" if engine.tokenizer is None else engine.tokenizer.decode(
            tokens[-_PROMPT_END:], skip_special_tokens=False
        )  # fmt: skip
        make_reasoning = functools.partial(reasoning, end)
        needs_special = reasoning.needs_special_tokens
        constraint = _behind_reasoning(engine, constraint, make_reasoning())
    make_tools = None
    if choice.mode == "named":
        make_tools = functools.partial(NamedParser, choice.name)
    elif choice.mode == "required":
        make_tools = functools.partial(JsonListParser, choice.functions)
    elif choice.mode == "auto" and parser is not None:
        make_tools = functools.partial(parser, choice.functions)
        needs_special = needs_special or parser.needs_special_tokens
    if make_tools is None and make_reasoning is None:
        return None, constraint, False
    plan = ReaderPlan(
        reasoning=make_reasoning,
        tools=make_tools,
        parallel=choice.parallel,
        include_reasoning=body.include_reasoning is not False,
        is_named=choice.mode == "named",
    )
    return plan, constraint, needs_special


def _behind_reasoning(
    engine: "AsyncLLM", constraint: StructuredOutputsParams | None, parser: ReasoningParser
) -> StructuredOutputsParams | None:
    """Let a reasoning model think before its constrained answer."""
    if constraint is None or engine.config.structured.flag("enable_in_reasoning"):
        return constraint
    return dataclasses.replace(constraint, reasoning=parser.span())


def template_kwargs(body: ChatTemplateBody, options: ApiOptions) -> dict[str, Any]:
    """Return the variables of the chat template; those of the request win.

    `reasoning_effort` is one of them, and switches thinking on or off where a template knows that.
    """
    made: dict[str, Any] = dict(options.default_chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is not None:
        made |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return made | (body.chat_template_kwargs or {})
