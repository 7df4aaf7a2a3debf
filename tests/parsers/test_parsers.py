"""Parsers of tool calls and reasoning: what they find, and that it does not depend on the cuts."""

import itertools
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.parsers.choice import read_choice
from jaxserve.parsers.code_tools import typed
from jaxserve.parsers.json_tools import HermesParser, JsonListParser, MistralParser, NamedParser
from jaxserve.parsers.reader import OutputReader, ReaderPlan
from jaxserve.parsers.reasoning import ImplicitThinkParser, ThinkParser
from jaxserve.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    reasoning_parser,
    tool_parser,
)

TOOLS = [
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        },
    },
    {"name": "g"},
]

TOOL_CASES = {
    "hermes": [
        (
            'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "}<\\""}}\n</tool_call>\n'
            '<tool_call>{"arguments": {}, "name": "g"}</tool_call> Bye.',
            "Hi.\nBye.",
            [("f", {"a": 1, "b": '}<"'}), ("g", {})],
        ),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>{"name": "g"}', "", [("g", {})]),
        ("a <tool_cal", "a <tool_cal", []),
        ("1 < 2 \n", "1 < 2 \n", []),
    ],
    "llama3_json": [
        (
            '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
            "",
            [("f", {"a": 1}), ("g", {})],
        ),
        ('Wait.<|python_tag|>{"name": "g", "parameters": {}}', "Wait.", [("g", {})]),
        ('{"x": 1}', '{"x": 1}', []),
        ("no call", "no call", []),
    ],
    "mistral": [
        (
            'So [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            "So",
            [("f", {"a": 1}), ("g", {})],
        ),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{}', "", [("f", {"a": 1}), ("g", {})]),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ],
    "pythonic": [
        (
            "[f(a=1, b='x)'), g.h(c=[1, {'k': True}], d=None)]",
            "",
            [("f", {"a": 1, "b": "x)"}), ("g.h", {"c": [1, {"k": True}], "d": None})],
        ),
        ("[1, 2]", "[1, 2]", []),
        ("[f(1)]", "[f(1)]", []),
        ("see [f(a=1)]", "see [f(a=1)]", []),
        ("[f(a=__import__('os'))]", "[f(a=__import__('os'))]", []),
    ],
    "qwen3_coder": [
        (
            "So\n<tool_call>\n<function=f>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n3\n4\n"
            "</parameter>\n</function>\n</tool_call>\n"
            "<tool_call><function=g></function></tool_call>",
            "So",
            [("f", {"a": 3, "b": "3\n4"}), ("g", {})],
        ),
        ("<tool_call>hm</tool_call>", "<tool_call>hm</tool_call>", []),
    ],
    "deepseek_v3": [
        (
            "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"a": 1}\n```<｜tool▁call▁end｜>\n'
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n"
            "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "x",
            [("f", {"a": 1}), ("g", {})],
        ),
    ],
    "deepseek_v31": [
        (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>",
            "",
            [("f", {"a": 1})],
        ),
    ],
    "openai": [
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
            "",
            [("f", {"a": 1})],
        ),
        ("<|channel|>final<|message|>Hello<|return|>", "Hello", []),
        ("Hello", "Hello", []),
    ],
}

REASONING_CASES = {
    "deepseek_r1": [
        ("why\n</think>\n\nso", "why", "so"),
        ("<think>\nwhy</think>so</think>", "why", "so</think>"),
        ("<think>never", "never", ""),
    ],
    "qwen3": [
        ("<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("so </think>", "", "so </think>"),
        ("<thin", "", "<thin"),
    ],
    "mistral": [("[THINK]why[/THINK]so", "why", "so")],
    "openai_gptoss": [
        (
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>so",
            "why",
            "so",
        ),
    ],
}


def read(parser, pieces):
    """Feed pieces; return reasoning, content and calls, joined."""
    reasoning, content, calls = "", "", []
    for delta in [*map(parser.push, pieces), parser.finish()]:
        reasoning += delta.reasoning
        content += delta.content
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(calls)
                assert call.id
                calls.append([call.name, ""])
            else:
                assert call.id is None
                assert call.index == len(calls) - 1
            calls[call.index][1] += call.arguments
    return reasoning, content, calls


def cut(text, places):
    """Cut a text at these places."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[low:high] for low, high in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [(name, *case) for name, cases in TOOL_CASES.items() for case in cases],
)
def test_tool_parsers_find_calls_and_leave_the_rest(name, text, content, calls):
    _, got, found = read(tool_parser(name)(TOOLS), [text])
    assert got == content
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert read(tool_parser(name)(TOOLS), list(text)) == ("", got, found)


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [(name, *case) for name, cases in REASONING_CASES.items() for case in cases],
)
def test_reasoning_parsers_split_the_text(name, text, reasoning, content):
    assert read(reasoning_parser(name)(), [text]) == (reasoning, content, [])
    assert read(reasoning_parser(name)(), list(text)) == (reasoning, content, [])


PIECES = sorted(
    {
        "{",
        "}",
        '"',
        "name",
        ": ",
        ", ",
        " ",
        "\n",
        "\\",
        "[",
        "]",
        "(",
        ")",
        "=",
        "x",
        "f(a=1)",
        ";",
    }
    | {'{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {}}', "é", "1"}
    | {"<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<function=f>"}
    | {"<parameter=a>", "</parameter>", "</function>", "<think>", "</think>", "```json\n"}
    | {"<|channel|>", "final", "analysis", "<|message|>", "<|end|>", "<|start|>", "<|call|>"}
    | {"commentary to=functions.f", "[THINK]", "[/THINK]", "<", "<too", "<｜tool▁call▁begin｜>"}
    | {"function<｜tool▁sep｜>f\n", "<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>"}
    | {"f<｜tool▁sep｜>", "<｜tool▁calls▁end｜>", '{"a": 1, "b": "}<\\""}'}
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize("name", sorted(TOOL_CASES))
@given(TEXTS, st.lists(st.integers(0, 150), max_size=8))
@example('<tool_call>{"name": "f"', [3])
@settings(max_examples=120)
def test_no_cut_changes_what_a_tool_parser_finds(name, text, places):
    whole = read(tool_parser(name)(TOOLS), [text])
    assert read(tool_parser(name)(TOOLS), cut(text, places)) == whole
    if not whole[2] and name not in ("openai", "deepseek_v3", "deepseek_v31", "qwen3_coder"):
        assert whole[1] == text or name in ("mistral", "hermes", "pythonic", "llama3_json")
        assert whole[1].split() == text.split()


@pytest.mark.parametrize("name", sorted(REASONING_CASES))
@given(TEXTS, st.lists(st.integers(0, 150), max_size=8))
@settings(max_examples=120)
def test_no_cut_changes_what_a_reasoning_parser_finds(name, text, places):
    whole = read(reasoning_parser(name)(), [text])
    assert read(reasoning_parser(name)(), cut(text, places)) == whole


@pytest.mark.parametrize("make", [JsonListParser, lambda: NamedParser("f")])
@given(TEXTS, st.lists(st.integers(0, 150), max_size=8))
@settings(max_examples=60)
def test_no_cut_changes_forced_calls(make, text, places):
    assert read(make(), cut(text, places)) == read(make(), [text])


def hermes_text(calls):
    return "".join(
        f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls
    )


def list_text(calls):
    return json.dumps([{"name": n, "parameters": a} for n, a in calls])


def llama_text(calls):
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def mistral_text(calls):
    return "[TOOL_CALLS]" + json.dumps([{"name": n, "arguments": a} for n, a in calls])


def mistral_v11_text(calls):
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)


def deepseek_text(head, tail, calls):
    written = "".join(
        f"<｜tool▁call▁begin｜>{head.format(n)}{json.dumps(a)}{tail}<｜tool▁call▁end｜>"
        for n, a in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def deepseek_v3_text(calls):
    return deepseek_text("function<｜tool▁sep｜>{}\n```json\n", "\n```", calls)


def deepseek_v31_text(calls):
    return deepseek_text("{}<｜tool▁sep｜>", "", calls)


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "g.h", 'q"', "look_up-2"]),
        st.dictionaries(
            st.text(max_size=4), st.integers() | st.text(max_size=6) | st.sampled_from(PIECES),
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (tool_parser("hermes"), hermes_text),
        (JsonListParser, list_text),
        (tool_parser("llama3_json"), llama_text),
        (tool_parser("mistral"), mistral_text),
        (tool_parser("mistral"), mistral_v11_text),
        (tool_parser("deepseek_v3"), deepseek_v3_text),
        (tool_parser("deepseek_v31"), deepseek_v31_text),
    ],
)
@given(CALLS, st.lists(st.integers(0, 300), max_size=8))
@settings(max_examples=30)
def test_whatever_is_called_is_found_however_it_is_cut(make, write, calls, places):
    _, content, found = read(make(), cut(write(calls), places))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    ("name", "write"), [("hermes", hermes_text), ("mistral", mistral_v11_text),
                        ("deepseek_v3", deepseek_v3_text), ("deepseek_v31", deepseek_v31_text)]
)  # fmt: skip
def test_arguments_come_while_they_are_written(name, write):
    """Of a long argument, each piece brings all but what may still belong to a mark."""
    parser = tool_parser(name)()
    arguments = {"a": "word " * 40}
    text = write([("f", arguments)])
    start = text.index(json.dumps(arguments))
    parser.push(text[: start + 2])
    for at in range(start + 2, start + 150, 10):
        delta = parser.push(text[at : at + 10])
        assert "".join(call.arguments for call in delta.calls) == text[at : at + 10]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("hermes", hermes_text),
        ("llama3_json", llama_text),
        ("mistral", mistral_text),
        ("deepseek_v31", deepseek_v31_text),
        ("pythonic", lambda calls: f"[f(a={calls[0][1]['a']!r})]"),
    ],
)
def test_long_arguments_take_time_in_proportion(name, write):
    """Eight times the text must not take 64 times the work; in between there is room for noise."""

    def work(size):
        text, parser = write([("f", {"a": "word " * size})]), tool_parser(name)(TOOLS)
        start = time.process_time()
        read(parser, [text[at : at + 4] for at in range(0, len(text), 4)])
        return time.process_time() - start

    small = min(work(2_000) for _ in range(3))
    assert work(16_000) < 40 * small


def test_names_of_both_engines_with_dashes_or_underscores():
    assert tool_parser("qwen") is tool_parser("Hermes") is HermesParser
    assert tool_parser("gpt-oss") is tool_parser("openai")
    assert tool_parser("deepseekv3") is tool_parser("deepseek-v3")
    assert tool_parser("llama3") is tool_parser("llama3-json")
    assert tool_parser("qwen3-xml") is tool_parser("qwen3_coder")
    assert reasoning_parser("deepseek-r1") is ImplicitThinkParser
    assert reasoning_parser("gpt-oss") is reasoning_parser("openai_gptoss")
    assert tool_parser(None) is tool_parser("none") is reasoning_parser("") is None
    assert MistralParser.make_id().isalnum()
    assert len(MistralParser.make_id()) == 9


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"tool parser 'herms'.*Did you mean 'hermes'.*mistral"):
        tool_parser("herms")
    with pytest.raises(ConfigError, match="unknown reasoning parser 'deepthink'"):
        reasoning_parser("deepthink")
    assert all(TOOL_PARSERS[name] for name in TOOL_PARSERS)
    assert all(REASONING_PARSERS[name] for name in REASONING_PARSERS)


def test_the_prompt_may_have_opened_or_closed_the_reasoning():
    assert read(ThinkParser("...<think>\n"), ["why</think>so"])[:2] == ("why", "so")
    assert read(ImplicitThinkParser("<think>\n\n</think>\n\n"), ["so"])[:2] == ("", "so")
    assert ThinkParser("<think>\n").span().is_open
    assert not ThinkParser("x").span().is_open
    assert ThinkParser("<think></think>").span() is None


def test_a_reader_sorts_counts_and_drops():
    plan = ReaderPlan(reasoning=ThinkParser, tools=HermesParser, parallel=False)
    reader = OutputReader(plan)
    pieces = ["<think>", "a", "b", "</think>", "x"]
    pieces += ['<tool_call>{"name": "f"}</tool_call>'] * 2
    deltas = [reader.push(piece, 1) for piece in pieces]
    deltas.append(reader.finish())
    assert "".join(d.reasoning for d in deltas) == "ab"
    assert "".join(d.content for d in deltas) == "x"
    assert [c.name for d in deltas for c in d.calls if c.name] == ["f"]
    assert (reader.num_reasoning_tokens, reader.num_calls) == (2, 1)
    silent = OutputReader(ReaderPlan(reasoning=ThinkParser, include_reasoning=False))
    assert silent.push("<think>a</think>b").reasoning == ""


def test_values_get_the_type_of_their_schema():
    assert typed("true", {"type": "boolean"}) is True
    assert typed("[1]", {"type": "array"}) == [1]
    assert typed("x", {"type": "integer"}) == "x"
    assert typed("null", {"type": ["string", "null"]}) is None
    assert typed("3", None) == "3"
    assert typed("NaN", {"type": "number"}) == "NaN"
    for text in ("[NaN]", "[1e999]", '{"a": [-Infinity]}', "[" * 200_000):
        assert typed(text, {"type": ["array", "object"]}) == text


def tool(name="f", **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def nested(count):
    schema = {}
    for _ in range(count):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], None, "tools must be a list of 1 to 1024 functions, got 0 items"),
        (None, "required", "tool_choice needs tools"),
        ([{"type": "web"}], None, r"tools\[0\] must be"),
        ([tool("")], None, "function.name must be a string that is not empty"),
        ([tool(parameters=[])], None, "parameters must be a JSON schema, got list"),
        ([tool(parameters=nested(65))], None, "may be nested 64 levels deep"),
        ([tool(parameters=nested(2000))], "required", "may be nested 64 levels deep"),
        ([tool(), tool()], None, "the function 'f' twice"),
        ([tool()], "any", "tool_choice must be 'none', 'auto', 'required' or"),
        (
            [tool("weather")],
            {"type": "function", "function": {"name": "wether"}},
            "names 'wether', which is not among the tools.*Did you mean 'weather'",
        ),
    ],
)
def test_malformed_tools_are_named(tools, choice, message):
    with pytest.raises(RequestError, match=message):
        read_choice(tools, choice, parallel=True)


def test_forced_calls_are_constrained_and_free_ones_are_not():
    schema = {
        "type": "object",
        "$defs": {"x": {"type": "integer"}},
        "properties": {"a": {"$ref": "#/$defs/x"}},
    }
    tools = [tool("f", parameters=schema), tool("g")]
    assert read_choice(tools, None, parallel=True).constraint(HermesParser) is None
    assert read_choice(tools, "none", parallel=True).constraint(HermesParser) is None
    required = read_choice(tools, "required", parallel=False).constraint(None).schema
    assert required["maxItems"] == 1
    moved = required["$defs"]["tool_0"]["properties"]["a"]["$ref"]
    assert moved == "#/$defs/tool_0/$defs/x"
    named = read_choice(tools, {"function": {"name": "g"}}, parallel=True).constraint(None)
    assert named.schema["additionalProperties"] is False
    strict = [tool("f", strict=True)]
    assert read_choice(strict, "auto", parallel=True).constraint(HermesParser).structural_tag
    assert read_choice(strict, "auto", parallel=True).constraint(MistralParser) is None
