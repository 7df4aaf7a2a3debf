"""A completion that was cut anywhere and resumed elsewhere ends as if nothing had happened."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import RequestError
from jaxserve.core.request import SamplingParams
from jaxserve.engine.llm import LLM
from tests.tiny import Bench, write_tiny_model

PROMPT = [*range(40, 71)]
SAMPLING = {
    "greedy": {"temperature": 0},
    "warm": {"temperature": 1.2, "seed": 11, "top_p": 0.95, "top_k": 60},
    "penalties": {
        "temperature": 0.9, "seed": 5, "presence_penalty": 0.7, "frequency_penalty": 0.9,
        "repetition_penalty": 1.3,
    },
    "bias": {"temperature": 1.0, "seed": 3, "logit_bias": {65: 3.0, 66: -4.0}, "min_p": 0.01},
    "min_tokens": {"temperature": 1.3, "seed": 2, "min_tokens": 25},
    "logprobs": {"temperature": 1.0, "seed": 8, "logprobs": 2, "prompt_logprobs": 1},
    "bytes": {"temperature": 1.8, "seed": 21, "ignore_eos": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def run(bench, sampling, output=(), prompt=PROMPT):
    name = bench.submit(prompt, sampling, output_token_ids=tuple(output))
    bench.run()
    bench.assert_idle()
    return bench.events[name]


def joined(events):
    last = events[-1]
    return (
        [t for e in events for t in e.token_ids],
        "".join(e.text for e in events),
        last.finish_reason,
        last.stop_reason,
        [
            (token, round(value.logprob, 3), value.rank)
            for e in events
            for entry in e.logprobs or ()
            for token, value in entry.items()
        ],
    )


def check_cut(bench, sampling, whole, cut):
    """Cut behind so many tokens; what was shown until then and what follows must be the whole."""
    shown, rest = [], list(whole)
    while rest and sum(len(e.token_ids) for e in shown) < cut:
        shown.append(rest.pop(0))
    tokens, text, reason, stop, logprobs = joined(whole)
    head = joined(shown) if shown else ([], "", None, None, [])
    assert head[0] == tokens[:cut]
    resumed = joined(run(bench, sampling, tokens[:cut]))
    assert head[0] + resumed[0] == tokens
    assert head[1] + resumed[1] == text
    assert head[4] + resumed[4] == logprobs
    assert resumed[2:4] == (reason, stop)


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_cut_anywhere_changes_nothing(bench, kind):
    sampling = SamplingParams(max_tokens=30, **SAMPLING[kind])
    whole = run(bench, sampling)
    count = len(joined(whole)[0])
    for cut in (1, 2, count // 2, count - 1, count):
        check_cut(bench, sampling, whole, cut)


@given(
    seed=st.integers(0, 50), start=st.integers(0, 20), length=st.integers(1, 4),
    include=st.booleans(), least=st.integers(0, 12), cut=st.integers(0, 30),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_stop_strings_match_across_the_cut(bench, seed, start, length, include, least, cut):
    free = SamplingParams(max_tokens=30, temperature=1.1, seed=seed, ignore_eos=True)
    text = joined(run(bench, free))[1]
    stop = text[start : start + length].replace("\ufffd", "") or "zz"
    sampling = free.replace(stop=[stop], include_stop_str_in_output=include, min_tokens=least)
    whole = run(bench, sampling)
    check_cut(bench, sampling, whole, min(cut, len(joined(whole)[0])))


def test_what_was_complete_ends_at_once_with_its_reason(bench):
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    tokens = joined(run(bench, sampling))[0]
    before = bench.metrics.num_steps
    (event,) = run(bench, sampling, tokens)
    assert (event.finish_reason.value, event.token_ids, event.text) == ("length", (), "")
    assert event.metrics.first_token_time is None
    stopped = sampling.replace(stop_token_ids=[tokens[3]])
    (event,) = run(bench, stopped, tokens)
    assert (event.finish_reason.value, event.stop_reason) == ("stop", tokens[3])
    assert bench.metrics.num_steps == before


def test_only_what_is_new_is_counted(bench):
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    tokens = joined(run(bench, sampling))[0]
    before = bench.metrics.generation_tokens, bench.metrics.request_generation_tokens.total
    run(bench, sampling, tokens[:8])
    assert bench.metrics.generation_tokens - before[0] == 4
    assert bench.metrics.request_generation_tokens.total - before[1] == 4


def test_impossible_resumptions_are_refused(bench):
    for sampling, output, match in (
        (SamplingParams(n=2), [1], "n must be 1, got 2"),
        (SamplingParams(), [999], r"must be in \[0, 259\), got 999"),
        (SamplingParams(), [-1], "got -1"),
        (SamplingParams(max_tokens=4), [1] * 5, "holds 5 tokens.* at most 4"),
        (SamplingParams(max_tokens=None), [1] * 500, "holds 500 tokens.* at most 481"),
    ):
        with pytest.raises(RequestError, match=match) as caught:
            bench.submit(PROMPT, sampling, output_token_ids=tuple(output))
        assert caught.value.param == "output_token_ids"


def test_the_library_takes_output_in_a_prompt_mapping(tmp_path):
    sampling = SamplingParams(max_tokens=12, temperature=1, seed=4, ignore_eos=True)
    with LLM(write_tiny_model(tmp_path), max_model_len=128, max_num_seqs=2) as llm:
        whole = llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs[0]
        prompt = {"prompt_token_ids": PROMPT, "output_token_ids": whole.token_ids[:5]}
        rest = llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0]
        assert whole.token_ids[5:] == rest.token_ids
        assert [(s.start, s.end) for s in rest.weight_versions] == [(0, 7)]
        with pytest.raises(RequestError, match="output_token_ids must be a list of token ids"):
            llm.generate({"prompt": "x", "output_token_ids": "abc"}, use_tqdm=False)
