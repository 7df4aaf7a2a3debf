"""Constraints become grammars; matchers follow tokens forth and back."""

import json
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import RequestError
from jaxserve.core.structured import ReasoningSpan, StructuredOutputsParams
from jaxserve.grammar.compiler import MAX_KEPT, MAX_ROW_ITEMS, GrammarCompiler, Vocabulary
from jaxserve.grammar.endless import is_endless
from jaxserve.grammar.matcher import MaskWriter
from jaxserve.grammar.text import MAX_LEVELS, GrammarDefaults, closed, grammar_text

EOS, SIZE = 256, 290


def vocabulary():
    tokens = [bytes([i]) for i in range(256)] + [b"", b"ab", b"true"] + [b""] * (SIZE - 259)
    return Vocabulary(
        tokens=tokens,
        special_ids=frozenset({EOS}),
        eos_ids=(EOS,),
        encode=lambda t: list(t.encode()),
    )


def make_compiler(**options):
    timings = []
    made = GrammarCompiler(
        options.pop("vocabulary", vocabulary),
        eos_ids=(EOS,),
        defaults=GrammarDefaults(**options.pop("defaults", {})),
        limit_s=options.pop("limit_s", 10),
        on_compiled=lambda seconds, good: timings.append((seconds, good)),
    )
    made.timings = timings
    return made


@pytest.fixture(scope="module")
def compiler():
    made = make_compiler()
    yield made
    made.close()


def matcher_of(compiler, **constraint):
    pending = compiler.compile(StructuredOutputsParams(**constraint))
    pending.wait()
    return pending.poll()


def allowed(matcher):
    masks = np.full((1, -(-SIZE // 32)), 0xFFFFFFFF, np.uint32)
    MaskWriter().write([(matcher, 0)], masks)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:SIZE]).tolist())


def accepts(compiler, text, **constraint):
    matcher = matcher_of(compiler, **constraint)
    return matcher.follow([*text.encode(), EOS]) and matcher.has_ended


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {
    "structures": [{"begin": "<f>", "schema": OBJECT, "end": "</f>"}],
    "triggers": ["<f"],
}


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (
            {"json": OBJECT},
            ['{"a":1}', '{"a": -2, "b": []}', '{\n  "a": 1\n}'],
            ["{}", '{"a":"1"}'],
        ),
        ({"json": json.dumps(OBJECT)}, ['{"a":1}'], ["{}", "[]"]),
        ({"json": OBJECT, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json": OBJECT, "disable_additional_properties": True}, ['{"a":1}'], ['{"a":1,"b":2}']),
        ({"json": OBJECT, "whitespace_pattern": " {0,9}"}, ['{       "a":1}'], ['{\n"a":1}']),
        ({"json_object": True}, ["{}", '{"x": [1]}'], ["[]", "1"]),
        ({"regex": r"^\d{2}/(a|é)+$"}, ["12/aé"], ["1/a", "12/"]),
        ({"choice": ["yes", "no", 'q"\n']}, ["yes", 'q"\n'], ["ye", "yesno"]),
        ({"grammar": 'start: "x" /[0-9]+/'}, ["x12"], ["x"]),
        ({"grammar": 'root ::= "x" digit+\ndigit ::= [0-9]'}, ["x12"], ["x"]),
        ({"structural_tag": json.dumps(TAG)}, ["so", 'so <f>{"a":1}</f> on'], ['<f>{"b":1}</f>']),
    ],
)
def test_every_kind_of_constraint(compiler, constraint, good, bad):
    for text in good:
        assert accepts(compiler, text, **constraint), text
    for text in bad:
        assert not accepts(compiler, text, **constraint), text


def test_reasoning_comes_first_and_is_free(compiler):
    closed_span = ReasoningSpan(start="<think>", end="</think>")
    open_span = ReasoningSpan(start="<think>", end="</think>", is_open=True)
    for text, optional, opened in [
        ("<think>any {</think>\n\nyes", True, True),
        ("any</think>yes", False, True),
        ("yes", True, False),
        ("<think>any</think>no", False, False),
    ]:
        assert accepts(compiler, text, choice=["yes"], reasoning=closed_span) == optional
        assert accepts(compiler, text, choice=["yes"], reasoning=open_span) == opened


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a"}, "unclosed group"),
        ({"json": {"type": "odd"}}, "Invalid type: odd"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "#/x"}}, "'/x' does not exist"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": "%%%"}, "neither Lark nor EBNF"),
        ({"structural_tag": '{"format": {}}'}, 'the form with "format" is not known'),
        (
            {"structural_tag": json.dumps(TAG | {"triggers": ["x"]})},
            "no trigger of the structural tag begins '<f>'",
        ),
        ({"json": {"const": "\ud800"}}, "does not compile"),
        ({"structural_tag": "[" * 100_000}, "structural_tag must be JSON"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "does not compile"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "does not compile"),
    ],
)
def test_what_does_not_compile_says_why(compiler, constraint, message):
    with pytest.raises(RequestError, match=message) as caught:
        matcher_of(compiler, **constraint)
    assert caught.value.param == "structured_outputs"
    assert "non-verbose" not in str(caught.value)


def tree(**changes):
    """A binary tree with a leaf of its own kind, or without."""
    node = {
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        "required": ["left", "right"],
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node | changes}}


def linked(kind):
    """Two lists that hold each other."""
    return {
        "$defs": {
            "a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/b"}},
            "b": kind,
        },
        "$ref": "#/$defs/a",
    }


ITSELF = {"$ref": "#"}
ENDLESS = [
    tree(),
    tree(required=["right"]),
    linked({"type": "array", "minItems": 2, "prefixItems": [{}, {"$ref": "#/$defs/a"}]}),
    linked({"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}),
    {"type": "object", "properties": {"a": {"allOf": [{}, ITSELF]}}, "required": ["a"]},
]
ENDING = [
    tree(required=[]),
    tree(properties={"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "right": {}}),
    linked({"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "items": False}),
    linked({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}]}),
    {"type": ["object", "null"], "properties": {"a": ITSELF}, "required": ["a"]},
    {"type": "object", "properties": {"$ref": {"const": "#"}}, "required": ["$ref"]},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_schemas_that_require_themselves_are_refused(compiler, schema):
    with pytest.raises(RequestError, match="cannot be met: it requires itself") as caught:
        compiler.compile(StructuredOutputsParams(json=schema))
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize("schema", ENDING)
def test_schemas_that_may_hold_themselves_are_not(compiler, schema):
    assert not is_endless(schema)
    matcher = matcher_of(compiler, json=schema)
    assert allowed(matcher)


def chain(kind, count):
    """A grammar of so many parts, each of which leads to the next."""
    if kind == "rules":
        rules = [f'r{i}: "(" r{i + 1} ")"' for i in range(count)]
        return {"grammar": "\n".join(["start: r0", *rules, f'r{count}: "a"'])}
    wrap = {"lists": lambda to: {"type": "array", "items": to}, "references": lambda to: to}[kind]
    places = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"json": {"$ref": "#/$defs/d0", "$defs": places | {f"d{count}": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("kind", "text"), [("rules", "((("), ("lists", "[[["), ("references", "1")]
)
def test_long_chains_compile_without_exhausting_the_stack(compiler, kind, text):
    """Threads of the usual 8 MB would take the whole process with them."""
    matcher = matcher_of(compiler, **chain(kind, 4000))
    assert matcher.copy().follow([*text.encode()])
    assert not matcher.copy().follow([*b"x"])


@pytest.mark.parametrize("kind", ["rules", "lists", "references"])
def test_endless_chains_are_refused_before_they_are_compiled(compiler, kind):
    with pytest.raises(RequestError, match=rf"nest too deeply: it has \d+ .*most {MAX_LEVELS} are"):
        compiler.compile(StructuredOutputsParams(**chain(kind, MAX_LEVELS + 1)))


def test_a_grammar_that_ends_allows_nothing_but_the_end(compiler):
    matcher = matcher_of(compiler, regex="a[bc]")
    assert allowed(matcher) == {97, 257}
    assert matcher.take(257)
    assert matcher.is_complete
    assert matcher.is_accepting
    assert allowed(matcher) == {EOS}
    assert matcher.take(EOS)
    assert matcher.has_ended
    assert not matcher.take(97)
    assert matcher.validate([97]) == 0


@given(st.data())
@settings(max_examples=40)
def test_going_back_is_as_if_one_had_not_gone(data):
    matcher = matcher_of(_shared(), regex="(ab|a|b){0,6}c?")
    path = [matcher.copy()]
    for _ in range(data.draw(st.integers(0, 6))):
        options = sorted(allowed(matcher))
        matcher.take(data.draw(st.sampled_from(options)))
        path.append(matcher.copy())
        if matcher.has_ended:
            break
    back = data.draw(st.integers(0, matcher.num_tokens))
    matcher.rollback(back)
    before = path[matcher.num_tokens]
    assert (matcher.num_tokens, matcher.has_ended) == (before.num_tokens, False or before.has_ended)
    assert allowed(matcher) == allowed(before)


@given(st.lists(st.sampled_from([97, 98, 99, 257, EOS]), max_size=5))
@settings(max_examples=40)
def test_validating_drafts_agrees_with_taking_them(drafts):
    matcher = matcher_of(_shared(), regex="(ab|a)c?")
    probe = matcher.copy()
    taken = 0
    while taken < len(drafts) and probe.take(drafts[taken]):
        taken += 1
    assert matcher.validate(drafts) == taken
    masks = np.full((len(drafts) + 1, -(-SIZE // 32)), 0xFFFFFFFF, np.uint32)
    assert MaskWriter().write_drafts(matcher, drafts, masks) == taken
    assert matcher.num_tokens == 0


_KEPT = []


def _shared():
    if not _KEPT:
        _KEPT.append(make_compiler())
    return _KEPT[0]


def test_a_failed_matcher_stays_so(compiler):
    matcher = matcher_of(compiler, regex="a")
    assert not matcher.take(98)
    assert "doesn't satisfy the grammar" in matcher.error
    assert not matcher.take(97)
    with pytest.raises(ValueError, match="cannot take 1 of 1 tokens back"):
        matcher.rollback(1)


def test_many_masks_at_once_are_those_of_each(compiler):
    matchers = [matcher_of(compiler, regex=f"{c}x") for c in "abcd"]
    masks = np.zeros((6, -(-SIZE // 32)), np.uint32)
    MaskWriter().write([(m, row) for row, m in enumerate(matchers, 1)], masks)
    for row, matcher in enumerate(matchers, 1):
        bits = np.unpackbits(masks[row].view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits[:SIZE])) == allowed(matcher)
    assert not masks[[0, 5]].any()


def test_equal_grammars_are_compiled_once_and_few_are_kept():
    compiler = make_compiler()
    first = compiler.compile(StructuredOutputsParams(regex="a"))
    assert compiler.compile(StructuredOutputsParams(regex="a")) is first
    first.wait()
    assert [good for _, good in compiler.timings] == [True]
    for number in range(MAX_KEPT):
        compiler.compile(StructuredOutputsParams(regex=f"b{number}"))
    assert compiler.compile(StructuredOutputsParams(regex="a")) is first  # in use
    del first
    for number in range(MAX_KEPT):
        compiler.compile(StructuredOutputsParams(regex=f"c{number}")).wait()
    count = len(compiler.timings)
    compiler.compile(StructuredOutputsParams(regex="a")).wait()
    assert len(compiler.timings) == count + 1
    compiler.close()


def test_a_slow_grammar_is_given_up():
    gate = threading.Event()

    def slow():
        gate.wait(20)
        return vocabulary()

    compiler = make_compiler(vocabulary=slow, limit_s=0.05)
    pending = compiler.compile(StructuredOutputsParams(regex="a"))
    with pytest.raises(RequestError, match=r"was not compiled within 0\.05 s; send a simpler one"):
        pending.wait()
    gate.set()
    compiler.close()


def test_closing_a_schema_leaves_what_it_says_itself():
    open_one = {"properties": {"a": {"properties": {}}}, "additionalProperties": True}
    assert closed(open_one)["additionalProperties"] is True
    assert closed(open_one)["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in closed({"type": "object"})


def test_defaults_hold_where_a_request_is_silent():
    defaults = GrammarDefaults(disable_any_whitespace=True, disable_additional_properties=True)
    text = grammar_text(StructuredOutputsParams(json=OBJECT), defaults)
    schema = json.loads(text)["grammars"][0]["json_schema"]
    assert schema["x-guidance"] == {"whitespace_flexible": False}
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, .* got none"),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice"),
        ({"regex": 1}, "regex must be a string, got int"),
        ({"choice": []}, "choice must hold 1 to 10000 strings, got 0 strings"),
        ({"choice": ["a", 1]}, "got int"),
        ({"choice": "ab"}, "choice must be a list of strings, got str"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": 1}, "json must be a JSON schema, got int"),
        ({"json_object": False}, "json_object must be true, got false"),
        ({"grammar": " "}, "grammar must not be empty"),
        ({"regex": "a", "whitespace_pattern": 1}, "whitespace_pattern must be a string"),
    ],
)
def test_wrong_constraints_are_named(fields, message):
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**fields)


def test_a_schema_of_great_depth_is_refused():
    schema = {"type": "integer"}
    for _ in range(40):
        schema = {"anyOf": [schema]}
    with pytest.raises(RequestError, match="64 levels deep"):
        StructuredOutputsParams(json=schema)
    with pytest.raises(RequestError, match="must be an object, got list"):
        StructuredOutputsParams.from_mapping([])
    with pytest.raises(RequestError, match="got 'regexp'"):
        StructuredOutputsParams.from_mapping({"regexp": "a"})


@pytest.mark.parametrize("count", [2, 2500, 10_000])
def test_any_permitted_number_of_choices_can_be_followed(count):
    compiler = _shared()
    matcher = matcher_of(compiler, choice=[f"word {i}" for i in range(count)])
    assert matcher.follow([*f"word {count - 1}".encode()])
    assert matcher.is_accepting
    assert not matcher.error


def optional_properties(count):
    return {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(count)}}


@pytest.mark.parametrize("count", [600, 950])
def test_objects_may_have_many_optional_properties(count):
    matcher = matcher_of(_shared(), json=optional_properties(count))
    assert matcher.follow([*f'{{"key3": 1, "key{count - 1}": 2}}'.encode()])
    assert matcher.is_accepting


def test_too_many_optional_properties_fail_with_limit_and_number():
    matcher = matcher_of(_shared(), json=optional_properties(MAX_ROW_ITEMS // 4 + 1))
    assert not matcher.follow([*b'{"key3"'])
    assert re.search(rf"has 40\d\d items; max is {MAX_ROW_ITEMS}", matcher.error)


TOO_WIDE = "start: /[ab]/ /[ab]/ /[ab]/ wide\nwide: " + " | ".join(
    f'"x{i}"' for i in range(MAX_ROW_ITEMS + 1)
)
"""A grammar that can be followed for two tokens and fails with the third."""


def test_drafts_behind_which_the_grammar_fails_are_not_to_be_verified():
    matcher = matcher_of(_shared(), grammar=TOO_WIDE)
    plain = matcher.copy()
    assert not plain.follow([*b"aba"])
    assert plain.num_tokens == 3
    for text, count in ((b"abax1", 2), (b"aba", 2), (b"ab", 2), (b"ax", 1), (b"x", 0)):
        drafts = [*text]
        masks = np.full((len(drafts) + 1, -(-SIZE // 32)), 0xFFFFFFFF, np.uint32)
        assert MaskWriter().write_drafts(matcher, drafts, masks) == count
        assert (masks[: count + 1] != 0xFFFFFFFF).any(axis=1).all()
        assert not matcher.error
    assert matcher.follow([*b"ab"])


@given(st.lists(st.text(min_size=1, max_size=6).filter(str.isprintable), min_size=1, max_size=4))
@settings(max_examples=40)
def test_a_choice_allows_its_strings_and_no_other(choices):
    matcher = matcher_of(_shared(), choice=choices)
    other = next(text for text in ("zz", "z", "q") if not any(c.startswith(text) for c in choices))
    for text in choices:
        path = matcher.copy()
        assert path.follow([*text.encode()]), text
        assert path.is_accepting
    assert not matcher.copy().follow([*other.encode()])


@pytest.mark.parametrize("text", ["a\nb", "\t", "a/b", "/", "[x]+", "\\", "\\d", '"', "\x00", "é "])
def test_choices_are_not_patterns(text):
    matcher = matcher_of(_shared(), choice=[text])
    assert matcher.follow([*text.encode()])
    assert matcher.is_accepting


@pytest.mark.parametrize("pattern", ["\\", "ab\\", "a\\\\\\"])
def test_a_pattern_that_ends_in_an_escape_is_refused(pattern):
    with pytest.raises(RequestError, match="ends with a backslash that escapes nothing"):
        matcher_of(_shared(), regex=pattern)
    assert matcher_of(_shared(), regex=pattern + "\\")
