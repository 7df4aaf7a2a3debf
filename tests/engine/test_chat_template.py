"""Conversations become the prompts that transformers makes of them, and bad ones are refused."""

import json
from pathlib import Path

import pytest

from jaxserve.core.clock import VirtualClock
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.engine.chat_template import ChatTemplate

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "oracles" / "golden" / "chat_templates.json").read_text(
        encoding="utf-8"
    )
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
USER = [{"role": "user", "content": "Hi"}]


def render(template: str, messages: list, **options) -> str:
    """Render with a template of its own, without a generation prompt."""
    options.setdefault("add_generation_prompt", False)
    return ChatTemplate({"default": template}).render(messages, **options)


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_templates_render_as_in_transformers(name: str):
    template = ChatTemplate({"default": GOLDEN["templates"][name]}, variables=GOLDEN["variables"])
    cases = [case[1:] for case in GOLDEN["cases"] if case[0] == name]
    assert cases
    for messages, options, expected in cases:
        if expected is None:
            with pytest.raises(RequestError):
                template.render(messages, **options)
        else:
            assert template.render(messages, **options) == expected


def test_messages_and_options_are_left_as_they_were():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "assistant", "content": "so"},
    ]
    before = json.dumps(messages)
    render(PLAIN, messages, continue_final_message=True)
    assert json.dumps(messages) == before


def test_the_time_comes_from_the_clock():
    template = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, clock=VirtualClock(1e9))
    assert template.render(USER) == "2001"


# Content


def test_text_parts_are_joined_where_the_template_expects_a_string():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert render(PLAIN, [{"role": "user", "content": parts}]) == "<user>a\nb\nc"


LOOP = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "[{{ part.type }}:{{ part.text }}]{% endfor %}{% endfor %}"
)
ALIAS = (
    "{% for m in messages %}{% set body = m.content %}{% for part in body | list %}"
    "[{{ part['type'] }}:{{ part['text'] }}]{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.type }}:{{ part.text }}]{% endfor %}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [LOOP, ALIAS])
def test_content_becomes_parts_where_the_template_goes_through_them(template: str):
    assert render(template, USER) == "[text:Hi]"
    parts = [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert render(template, [{"role": "user", "content": parts}]) == "[text:a][text:b]"


def test_content_stays_as_it_is_where_the_template_takes_both_forms():
    assert render(BOTH, USER) == "Hi"
    assert render(BOTH, [{"role": "user", "content": [{"text": "Hi"}]}]) == "[text:Hi]"


def test_a_loop_over_pieces_of_a_string_does_not_ask_for_parts():
    template = (
        "{% for m in messages %}{% for x in m.content.split() %}{{ x }};{% endfor %}{% endfor %}"
    )
    assert render(template, [{"role": "user", "content": "a b"}]) == "a;b;"


@pytest.mark.parametrize("template", [PLAIN, "{{ messages[0].content | trim }}"])
def test_missing_content_is_empty(template: str):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant"},
    ):
        assert "None" not in render(template, [message])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "type 'image_url'"),
        ([{"type": "text"}], "type 'text'"),
        ([{"type": ["text"]}], "type \"\\['text'\\]\""),
        ([3], "type 'int'"),
        (3, "a list of text parts, got int"),
        ({"text": "x"}, "a list of text parts, got dict"),
    ],
)
def test_content_of_another_kind_is_refused(content: object, found: str):
    with pytest.raises(RequestError, match=found) as caught:
        render(PLAIN, [{"role": "user", "content": content}])
    assert caught.value.status == 400
    assert caught.value.param.startswith("messages[0].content")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages must not be empty"),
        (["hi"], r"messages\[0\] must be an object, got str"),
        (
            [*USER, {"content": "x"}],
            r"messages\[1\]\.role must be a string such as 'user', got None",
        ),
        ([{"role": 3}], "got 3"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "tool_calls must be a list of objects"),
    ],
)
def test_malformed_messages_are_refused(messages: list, text: str):
    with pytest.raises(RequestError, match=text):
        render(PLAIN, messages)


# Roles, tool calls, reasoning


def test_developer_becomes_system_and_system_messages_move_to_the_front():
    messages = [
        {"role": "user", "content": "one"},
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "two"},
    ]
    assert render(PLAIN, messages) == "<system>Be brief.\n\nBe kind.<user>one<user>two"
    assert render(LOOP, messages) == "[text:Be brief.][text:Be kind.][text:one][text:two]"


def test_a_template_that_knows_developer_gets_it():
    template = "{# developer #}" + PLAIN
    messages = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    assert render(template, messages) == "<system>a<developer>b"


def test_without_developer_system_messages_stay_where_they_are():
    messages = [*USER, {"role": "system", "content": "late"}]
    assert render(PLAIN, messages) == "<user>Hi<system>late"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, "é"]}', '{"a": [1, "é"]}'),
        ({"a": 1}, '{"a": 1}'),
        ("", "{}"),
        ("not json", '"not json"'),
        ("[1]", '"[1]"'),
        (None, "null"),
    ],
)
def test_arguments_of_earlier_calls_are_objects_where_they_can_be(arguments: object, expected: str):
    call = {"function": {"name": "f", "arguments": arguments}}
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(template, [{"role": "assistant", "tool_calls": [call]}]) == expected


@pytest.mark.parametrize("arguments", ["[" * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("template", [PLAIN, "{{ messages[0].tool_calls[0].function.arguments }}"])
def test_arguments_that_nothing_reads_stay_text(arguments: str, template: str):
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert arguments[:100] in render(template, messages, describe_tools=True).replace("\\", "")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_both_names(name: str):
    template = "{{ messages[0].reasoning }}/{{ messages[0].reasoning_content }}"
    message = {"role": "assistant", "content": "x", name: "because"}
    assert render(template, [message]) == "because/because"


# Choice of a template


def test_a_named_template_serves_requests_with_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    tool = {"type": "function", "function": {"name": "f"}}
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[]) == "plain"
    assert template.render(USER, tools=[tool]) == "tools"
    assert template.render(USER, chat_template="rag") == "rag"
    assert template.render(USER, chat_template="{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    ("templates", "text"),
    [
        ({}, "the model has no chat template. Use /v1/completions, or .*--chat-template"),
        ({"rag": "x", "tool_use": "y"}, "no default chat template; name one of rag, tool_use"),
    ],
)
def test_without_a_template_chat_is_refused(templates: dict, text: str):
    with pytest.raises(RequestError, match=text) as caught:
        ChatTemplate(templates).render(USER)
    assert caught.value.status == 400


# Continuing the last message


def test_the_two_ends_of_a_prompt_exclude_each_other():
    with pytest.raises(RequestError, match="set add_generation_prompt to false") as caught:
        render(PLAIN, USER, add_generation_prompt=True, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_parts_can_be_continued():
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b "}]}]
    assert render(LOOP, messages, continue_final_message=True) == "[text:a][text:b "
    empty = [{"role": "assistant", "content": []}]
    assert render(LOOP, empty, continue_final_message=True) == "[text:"
    assert render(PLAIN, empty, continue_final_message=True) == "<assistant>"


def test_a_template_that_drops_the_last_message_cannot_continue_it():
    with pytest.raises(RequestError, match="leaves out the last message"):
        render("{{ messages[0].role }}", USER, continue_final_message=True)


# Failures


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ raise_exception('No tools here.') }}", "failed on these messages: No tools here."),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9] + 'x' }}", "failed on these messages"),
        ("{{ messages | tojson(indent='x' * 2) | int + 'a' }}", "unsupported operand"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__ }}{{ ''.__class__.mro() }}", "access to attribute '__class__'"),
        ("{% set ns = namespace(_x=1) %}", "private name '_x'"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "private name '__x'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ [messages] | tojson }}{{ {'a': raise_exception} | tojson }}", "not JSON serializable"),
    ],
)
def test_a_failing_template_is_the_requests_error(template: str, text: str):
    with pytest.raises(RequestError, match=text) as caught:
        render(template, USER)
    assert caught.value.status == 400


def test_a_template_that_is_not_valid_is_refused():
    with pytest.raises(RequestError, match="not valid Jinja") as caught:
        render("{% if %}", USER)
    assert caught.value.param == "chat_template"
    with pytest.raises(ConfigError, match=r"chat template 'default' is not valid Jinja.*line 2"):
        ChatTemplate({"default": "\n{% nonsense %}"}).check()
    ChatTemplate({"default": PLAIN}).check()


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt"])
def test_request_fields_cannot_hide_among_the_template_variables(name: str):
    with pytest.raises(RequestError, match=f"must not contain {name}; use the request field"):
        render(PLAIN, USER, kwargs={name: []})


def test_template_variables_reach_the_template_and_win_over_the_models_own():
    template = ChatTemplate(
        {"default": "{{ bos_token }}{{ depth }}"}, variables={"bos_token": "<s>"}
    )
    assert template.render(USER, kwargs={"depth": 3}) == "<s>3"
    assert template.render(USER, kwargs={"bos_token": "!"}) == "!"
