"""Constrained completions: always valid, and nobody else notices."""

import json
import re
import threading

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, AsyncLLM, RequestError, SamplingParams, StructuredOutputsParams
from jaxserve.core.errors import ConfigError
from jaxserve.engine.constraints import vocabulary_of
from jaxserve.engine.tokenizer import Tokenizer
from tests.cases import slow
from tests.tiny import MAX_LEN, Bench, write_tiny_model

PROMPT = list(range(40, 75))
EOS = 258


def constrained(max_tokens=200, temperature=1.0, *, other=None, **constraint):
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**constraint), **(other or {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bench(folder):
    return Bench(folder, max_model_len=512)


def scalars():
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.integers(-50, 50).map(
            lambda low: {"type": "integer", "minimum": low, "maximum": low + 20}
        ),
        st.integers(0, 3).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}),
        st.sampled_from(["[a-c]{1,3}", "x+y?z"]).map(
            lambda p: {"type": "string", "pattern": f"^({p})$"}
        ),
        st.lists(st.integers(0, 9) | st.text(max_size=3), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.text(max_size=4).map(lambda value: {"const": value}),
    )


def compounds(children):
    return st.one_of(
        children.map(lambda c: {"type": "array", "items": c, "maxItems": 2}),
        st.lists(children, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        st.dictionaries(st.text('abcé_"', min_size=1, max_size=3), children, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        ),
    )


SCHEMAS = st.recursive(scalars(), compounds, max_leaves=5)


@given(st.lists(SCHEMAS, min_size=1, max_size=4), st.integers(0, 99), st.booleans())
@settings(max_examples=25)
def test_every_output_obeys_its_schema(bench, schemas, seed, greedy):
    params = [
        constrained(
            400, 0.0 if greedy else 1.0, json=schema, disable_any_whitespace=True,
            other={"seed": seed},
        )
        for schema in schemas
    ]  # fmt: skip
    for schema, output in zip(schemas, bench.generate([PROMPT] * len(params), params), strict=True):
        one = output.outputs[0]
        if one.finish_reason == "length":  # such as x+, which a model need not leave
            continue
        assert one.finish_reason == "stop"
        jsonschema.validate(json.loads(one.text), schema)


ATOMS = st.sampled_from(["a", "b", "é", "[ab]", "[^a]", r"\d", ".", r"\.", "(?:xy|z)", "[α-γ]"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{0,2}", "{2}", "{1,3}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(st.lists(REGEXES, min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=25)
def test_every_output_matches_its_regex(bench, patterns, seed):
    params = [constrained(regex=pattern, other={"seed": seed}) for pattern in patterns]
    outputs = bench.generate([PROMPT] * len(params), params)
    for pattern, output in zip(patterns, outputs, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch(pattern, output.outputs[0].text)


CASES = [
    constrained(regex="[a-f]{20,40}!", temperature=0.0),
    constrained(regex="[a-f]{20,40}!", other={"seed": 3}),
    constrained(
        json={"type": "array", "items": {"type": "boolean"}, "maxItems": 9}, other={"seed": 5}
    ),
    constrained(choice=["yes", "no", "perhaps"], temperature=0.0),
    constrained(regex="(ab|cd){10,30}", other={"seed": 1, "n": 3}),
    SamplingParams(max_tokens=40, seed=9, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
]


def ids_of(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def expected(folder):
    alone = Bench(folder, async_scheduling=False, enable_prefix_caching=False)
    return [ids_of([alone.generate([PROMPT], [params])[0]])[0] for params in CASES]


@pytest.mark.parametrize("overlap", [True, slow(False)])
@pytest.mark.parametrize(
    "options",
    [
        slow({}),
        slow({"kv_layout": "pages"}),
        slow({"num_gpu_blocks_override": 22}),
        {"num_gpu_blocks_override": 22, "kv_layout": "pages"},
        slow({"max_num_batched_tokens": 16}),
        slow({"max_num_seqs": 2}),
    ],
)
def test_batching_prefixes_and_preemption_change_nothing(folder, expected, overlap, options):
    bench = Bench(folder, async_scheduling=overlap, **{"max_model_len": 160} | options)
    for _ in range(2):  # the second time, prefixes are found
        outputs = bench.generate([PROMPT] * len(CASES), CASES)
        assert ids_of(outputs) == expected
    bench.assert_idle()
    if "num_gpu_blocks_override" in options:
        assert bench.metrics.num_preemptions > 0


def test_a_grammar_ends_the_completion_even_with_ignore_eos_and_min_tokens(bench):
    for other in ({"ignore_eos": True}, {"min_tokens": 50}, {"min_tokens": 9, "ignore_eos": True}):
        one = bench.generate([PROMPT], [constrained(regex="ab", other=other)])[0].outputs[0]
        assert (one.text, one.finish_reason, one.token_ids[-1]) == ("ab", "stop", EOS)


def test_min_tokens_holds_where_the_grammar_leaves_a_choice(bench):
    other = {"min_tokens": 12, "seed": 1}
    one = bench.generate([PROMPT], [constrained(regex="a*", other=other)])[0].outputs[0]
    assert len(one.token_ids) > 12


def test_stop_strings_and_limits_still_end_it(bench):
    params = [
        constrained(regex="abcdef", other={"stop": "cd"}),
        constrained(regex="a{100}", max_tokens=7),
    ]
    stopped, cut = bench.generate([PROMPT] * 2, params)
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("ab", "cd")
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == ("a" * 7, "length")


def test_penalties_and_bias_cannot_break_the_grammar(bench):
    other = {
        "logit_bias": {ord("z"): 100, ord("a"): -100}, "presence_penalty": 2, "top_k": 3,
        "repetition_penalty": 1.8, "seed": 2, "logprobs": 2,
    }  # fmt: skip
    one = bench.generate([PROMPT], [constrained(regex="[ab]{9}", other=other)])[0].outputs[0]
    assert re.fullmatch("[ab]{9}", one.text)
    assert all(token in entry for token, entry in zip(one.token_ids, one.logprobs, strict=True))


def test_a_slow_grammar_waits_apart_and_holds_nobody_up(folder):
    bench = Bench(folder)
    gate = threading.Event()
    compiler = bench.engine.constraints.compiler
    make = compiler._make_vocabulary

    def slow():
        assert gate.wait(30)
        return make()

    compiler._make_vocabulary = slow
    waiting = bench.submit(PROMPT, constrained(regex="ab"))
    other = bench.submit(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    while not bench.outputs[other].finished:
        bench.engine.step()
    assert not bench.events[waiting]
    assert bench.metrics.num_compiling == 1
    assert 'reason="deferred"} 1.0' in bench.metrics.render("m")
    aborted = bench.submit(PROMPT, constrained(regex="cd"))
    bench.engine.step()
    bench.engine.cancel(aborted)
    bench.engine.step()
    assert bench.outputs[aborted].outputs[0].finish_reason == "abort"
    gate.set()
    bench.run(steps=10**9)
    assert bench.outputs[waiting].outputs[0].text == "ab"
    assert bench.metrics.grammar_time.count == 2
    bench.assert_idle()
    assert not bench.engine.constraints.compiling


def test_a_grammar_that_does_not_compile_ends_its_request_alone(folder):
    bench = Bench(folder)
    bad = bench.submit(PROMPT, constrained(regex="(?=a)b", other={"n": 2}))
    good = bench.submit(PROMPT, constrained(regex="ab"))
    bench.run(steps=10**9)
    assert [("look-around" in error) for error in bench.errors(bad)] == [True, True]
    assert bench.outputs[good].outputs[0].text == "ab"
    assert bench.metrics.num_grammar_failures == 1
    bench.assert_idle()


def test_a_matcher_that_fails_ends_its_sequence_alone(folder):
    bench = Bench(folder)
    bad = bench.submit(PROMPT, constrained(regex="[ab]{50}"))
    good = bench.submit(PROMPT, constrained(regex="[ab]{50}"))
    while not bench.events[bad]:
        bench.engine.step()
    sequence = next(s for s in bench.engine._sequences.values() if s.request.request_id == bad)
    sequence.matcher.error = "too complex"
    bench.run()
    assert bench.errors(bad) == [
        "the grammar cannot be followed beyond 1 output tokens: too complex. Send a simpler one."
    ]
    assert len(bench.outputs[good].outputs[0].text) == 50
    bench.assert_idle()


def test_a_grammar_that_outgrows_its_limits_ends_its_request_alone(folder):
    many = {"type": "object", "properties": {f"key{i}": {} for i in range(2500)}}
    good = constrained(regex="[ab]{30}", temperature=0)
    alone = Bench(folder)
    wanted = alone.submit(PROMPT, good)
    alone.run(steps=10**9)
    bench = Bench(folder)
    bad = bench.submit(PROMPT, constrained(json=many))
    others = [bench.submit(PROMPT, good), bench.submit(PROMPT, SamplingParams(max_tokens=30))]
    bench.run(steps=10**9)
    (last,) = [event for event in bench.events[bad] if event.finish_reason is not None]
    assert last.error_param == "structured_outputs"
    assert "beyond 0 output tokens" in last.error or "beyond 1 output tokens" in last.error
    assert "items" in last.error
    assert "non-verbose" not in last.error
    assert bench.outputs[others[0]].outputs[0].text == alone.outputs[wanted].outputs[0].text
    assert bench.outputs[others[1]].outputs[0].finish_reason in ("stop", "length")
    bench.assert_idle()


def test_a_resumed_constrained_completion_goes_on(folder):
    sampling = constrained(regex="[a-z]{3}[0-9]{5}", other={"seed": 4})
    with LLM(folder, max_model_len=512, max_num_seqs=2) as llm:
        whole = llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs[0]
        for cut in (1, 4, len(whole.token_ids)):
            prompt = {"prompt_token_ids": PROMPT, "output_token_ids": whole.token_ids[:cut]}
            rest = llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0]
            assert rest.token_ids == whole.token_ids[cut:]
            assert whole.text.endswith(rest.text)
        ids = llm.host.tokenizer.encode("abc1x2")
        broken = {"prompt_token_ids": PROMPT, "output_token_ids": ids}
        match = f"does not allow token {ids[4]} at position 4"
        with pytest.raises(RequestError, match=match) as caught:
            llm.generate(broken, sampling, use_tqdm=False)
        assert caught.value.param == "output_token_ids"
        assert llm.host.engine.pool.num_held == 0


def test_nothing_compiles_late_and_free_steps_carry_no_mask(folder):
    bench = Bench(folder, enforce_no_recompile=True, max_num_seqs=2, max_num_batched_tokens=32)
    bench.engine.runner.warm_up()
    masks = []
    run = bench.engine.runner.run
    bench.engine.runner.run = lambda packed: masks.append(packed.mask) or run(packed)
    bench.generate([PROMPT], [SamplingParams(max_tokens=4, ignore_eos=True)])
    assert set(map(type, masks)) == {type(None)}
    before = bench.metrics.num_compilations
    bench.generate([PROMPT] * 2, [constrained(regex="abc"), SamplingParams(max_tokens=4)])
    assert any(mask is not None for mask in masks)
    assert bench.metrics.num_compilations == before


def test_the_library_raises_before_anything_runs(folder):
    with LLM(folder, max_num_seqs=2, max_model_len=128) as llm:
        with pytest.raises(RequestError, match="unclosed group"):
            llm.generate(["a", "b"], [SamplingParams(), constrained(regex="(")], use_tqdm=False)
        with pytest.raises(RequestError, match="unclosed group"):
            next(llm.stream("a", constrained(regex="(")))
        assert llm.host.engine.num_unfinished == 0
        output = llm.generate("a", constrained(choice=["ja", "nein"]), use_tqdm=False)[0]
        assert output.outputs[0].text in ("ja", "nein")


async def _generate(llm, params):
    return [output async for output in llm.generate("a", params)]


def test_the_asynchronous_face_raises_too(folder):
    import asyncio

    llm = AsyncLLM(folder, max_num_seqs=2, max_model_len=128, warmup="lazy")
    try:
        with pytest.raises(RequestError, match="unclosed group"):
            asyncio.run(_generate(llm, constrained(regex="(")))
        outputs = asyncio.run(_generate(llm, constrained(regex="ab")))
        assert outputs[-1].outputs[0].text == "ab"
    finally:
        llm.close()


def test_what_cannot_be_constrained_is_refused(folder, bench):
    from tests.tiny import tiny_module

    with pytest.raises(RequestError, match="need a tokenizer"):
        Bench(tiny_module()).submit(PROMPT, constrained(regex="a"))
    off = Bench(folder, structured_outputs_backend="none")
    with pytest.raises(RequestError, match="switched off by --structured-outputs-backend none"):
        off.submit(PROMPT, constrained(regex="a"))
    with pytest.raises(RequestError, match="allowed_token_ids cannot be combined"):
        constrained(regex="a", other={"allowed_token_ids": [1]})
    with pytest.raises(RequestError, match="must be a StructuredOutputsParams, got dict"):
        SamplingParams(structured_outputs={"regex": "a"})
    with pytest.raises(ConfigError, match="xgrammar is not built in; use llguidance"):
        Bench(folder, structured_outputs_config={"backend": "xgrammar"})
    with pytest.raises(ConfigError, match=r"has no key 'bakend'.*Did you mean 'backend'"):
        Bench(folder, structured_outputs_config={"bakend": "auto"})


def sentencepiece_metadata():
    """A vocabulary as a GGUF file describes it: pieces with a space mark, bytes, a few words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    words = ["▁", "a", "b", "▁a", "ab", "▁ab", "{", "}", '"', ":", "1", "▁1", '{"', "true"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(len(words))],
        "tokenizer.ggml.token_type": kinds + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_a_vocabulary_of_a_gguf_file_obeys_too():
    from tests.tiny import tiny_module

    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    bench = Bench(tiny_module(eos_token_id=2), tokenizer=tokenizer)
    schema = {
        "type": "object",
        "properties": {"ab": {"type": "boolean"}, "é": {"enum": [1, "a b"]}},
        "required": ["ab", "é"],
        "additionalProperties": False,
    }
    for seed in range(6):
        params = constrained(json=schema, other={"seed": seed})
        output = bench.generate([[1, 262, 264]], [params])[0].outputs[0]
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema)


def test_forced_text_is_spelled_without_special_tokens_and_added_spaces():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    spell = vocabulary_of(tokenizer, vocab_size=300, eos_ids=(2,)).encode
    for text in ("ab", " ab", "a</s>b", "é", ""):
        ids = spell(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert not set(ids) & tokenizer.special_ids


def test_the_context_is_long_enough_for_these_tests():
    assert MAX_LEN >= 512
