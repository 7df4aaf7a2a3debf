import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, RequestError, did_you_mean
from jaxserve.core.request import Request, SamplingParams, new_request_id


def test_defaults_are_those_of_the_field():
    params = SamplingParams()
    assert params.temperature == 1.0
    assert params.max_tokens == 16
    assert params.top_p == 1.0
    assert params.n == 1
    assert not params.is_greedy
    assert not params.needs_penalties
    assert not params.needs_bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be an integer in 1..16384, got 0."),
        ({"n": 1.0}, "n must be an integer in 1..16384, got 1.0."),
        ({"n": 16385}, "n must be an integer in 1..16384, got 16385."),
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2, 2], got -2.1."),
        ({"frequency_penalty": "a"}, "frequency_penalty must be in [-2, 2], got 'a'."),
        (
            {"repetition_penalty": 0},
            "repetition_penalty must be finite and greater than zero, got 0.",
        ),
        ({"temperature": -0.1}, "temperature must be in [0, 2], got -0.1."),
        ({"temperature": math.nan}, "temperature must be in [0, 2], got nan."),
        ({"temperature": True}, "temperature must be in [0, 2], got True."),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
        ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
        ({"top_k": -2}, "top_k must be 0 or -1 (off), or an integer of at least 1, got -2."),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5."),
        ({"seed": 2**63}, f"seed must be a 64-bit integer, got {2**63}."),
        ({"seed": "x"}, "seed must be a 64-bit integer, got 'x'."),
        ({"stop": ["a", ""]}, "stop must be made of non-empty strings, got ['a', '']."),
        ({"stop": list("abcde")}, "stop must be at most 4 strings, got 5."),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids must be made of token ids, got -1."),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0."),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, got -1."),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens=16, got 17."),
        ({"logprobs": -2}, "logprobs must be -1 or at least 0, got -2."),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be -1 or at least 0, got 1.5."),
        ({"allowed_token_ids": []}, "allowed_token_ids must be not empty, got []."),
    ],
)
def test_a_value_outside_its_range_is_refused_and_named(settings, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**settings)
    assert str(caught.value) == message
    assert caught.value.param in settings
    assert caught.value.status == 400


def test_several_greedy_completions_are_refused():
    with pytest.raises(RequestError, match="n must be 1 with greedy sampling") as caught:
        SamplingParams(n=2, temperature=0)
    assert caught.value.param == "n"


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="stop strings need detokenize=True") as caught:
        SamplingParams(stop="x", detokenize=False)
    assert caught.value.param == "stop"


def test_lists_come_in_one_form():
    params = SamplingParams(stop="end", stop_token_ids=[3, 4, 3], allowed_token_ids=[1, 2])
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.allowed_token_ids == (1, 2)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_a_seed_of_minus_one_means_none():
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=0).seed == 0


def test_true_asks_for_the_log_probability_of_one_candidate():
    params = SamplingParams(logprobs=True, prompt_logprobs=True)
    assert (params.logprobs, params.prompt_logprobs) == (1, 1)


def test_bias_is_clamped_and_its_keys_become_token_ids():
    params = SamplingParams(logit_bias={"5": 250, 6: -250, 7: 1})
    assert params.logit_bias == {5: 100.0, 6: -100.0, 7: 1.0}
    assert params.needs_bias


def test_tiny_temperatures_are_greedy_or_raised():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert SamplingParams(temperature=0.001).temperature == 0.01


@pytest.mark.parametrize(
    "settings", [{"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}]
)
def test_any_penalty_needs_token_counts(settings):
    assert SamplingParams(**settings).needs_penalties


def test_a_copy_with_changes_is_checked_too():
    params = SamplingParams(max_tokens=8)
    assert params.replace(max_tokens=9).max_tokens == 9
    assert params.max_tokens == 8
    with pytest.raises(RequestError, match="max_tokens must be"):
        params.replace(max_tokens=-1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(),
            "top_p": st.floats(),
            "top_k": st.integers(),
            "min_p": st.floats(),
            "n": st.integers(),
            "seed": st.integers(),
            "max_tokens": st.none() | st.integers(),
            "min_tokens": st.integers(),
            "logprobs": st.none() | st.booleans() | st.integers(),
            "stop": st.text() | st.lists(st.text()),
            "repetition_penalty": st.floats(),
        },
    )
)
def test_parameters_are_either_right_or_a_request_error(settings):
    try:
        params, blamed = SamplingParams(**settings), None
    except RequestError as error:
        params, blamed = SamplingParams(), error.param
    assert blamed is None or blamed in settings
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert params == params.replace()


def test_requests_are_frozen_and_their_ids_are_fresh():
    request = Request(request_id=new_request_id(), prompt_token_ids=(1,))
    assert request.sampling == SamplingParams()
    assert new_request_id() != new_request_id()
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.priority = 3


def test_request_errors_are_value_errors_with_a_status():
    error = RequestError("no", status=404, param="model")
    assert isinstance(error, ValueError)
    assert (error.status, error.param) == (404, "model")
    assert isinstance(ConfigError("no"), ValueError)


def test_a_suggestion_is_made_only_when_something_is_near():
    assert did_you_mean("tempurature", ["temperature", "top_p"]) == " Did you mean 'temperature'?"
    assert did_you_mean("zzz", ["temperature"]) == ""
