"""Whatever a client sends, the answer is not a 500, and the next client is served."""

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**31 - 1, 2**32, 2**63 - 1, 2**63, -(2**63), 10**40]),
    st.floats(),
)
ODD = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)  # fmt: skip
TEXT = st.text(st.characters(codec=None), max_size=20)  # lone surrogates too
IDS = st.integers(0, 258)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly sensible values, now and then odd ones."""
    return st.sampled_from([values] * 24 + [ODD]).flatmap(lambda chosen: chosen)


FIELDS = {
    "n": some(st.integers(1, 3)),
    "temperature": some(st.sampled_from([0, 0.5, 1, 2])),
    "top_p": some(st.floats(0.01, 1)),
    "top_k": some(st.integers(-1, 300)),
    "min_p": some(st.floats(0, 1)),
    "presence_penalty": some(st.floats(-2, 2)),
    "frequency_penalty": some(st.floats(-2, 2)),
    "repetition_penalty": some(st.floats(0.1, 2)),
    "seed": some(st.integers(-(2**63), 2**63 - 1)),
    "stop": some(st.lists(st.text("abc", min_size=1), max_size=4)),
    "stop_token_ids": some(st.lists(IDS, max_size=3)),
    "min_tokens": some(st.integers(0, 4)),
    "logit_bias": some(st.dictionaries(IDS.map(str), st.floats(-200, 200), max_size=3)),
    "allowed_token_ids": some(st.lists(IDS, max_size=3)),
    "prompt_logprobs": some(st.integers(0, 3)),
    "truncate_prompt_tokens": some(st.integers(1, 9)),
    "cache_salt": some(st.text("abc", min_size=1)),
    "request_id": some(st.text("abc", min_size=1)),
    "priority": some(st.integers(-5, 5)),
    "stream": some(st.booleans()),
    "stream_options": some(st.fixed_dictionaries({"include_usage": st.booleans()})),
    "return_token_ids": some(st.booleans()),
    "ignore_eos": some(st.booleans()),
    "skip_special_tokens": some(st.booleans()),
    "include_stop_str_in_output": some(st.booleans()),
    "model": some(st.just("tiny")),
}


def check(ask, path: str, body: dict[str, Any]) -> None:
    response = ask(path, body)
    assert response.status_code in (200, 400, 404, 503), response.text
    assert '"code":500' not in response.text
    again = ask(COMPLETIONS, {"prompt": "x", "max_tokens": 1})
    assert again.status_code == 200, "somebody else's request broke this one"


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    prompt=some(st.one_of(TEXT, st.lists(IDS, max_size=5), st.lists(TEXT, max_size=2))),
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    more=st.fixed_dictionaries(
        {}, optional={"echo": some(st.booleans()), "logprobs": some(st.integers(0, 3))}
    ),
)
def test_completions_never_fail(ask, prompt: Any, fields: dict[str, Any], more: dict[str, Any]):
    check(ask, COMPLETIONS, {"prompt": prompt, "max_tokens": 3, **fields, **more})


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    messages=some(
        st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
                optional={"content": some(TEXT), "name": ODD, "tool_calls": ODD},
            ),
            max_size=3,
        )
    ),
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    more=st.fixed_dictionaries(
        {},
        optional={
            "logprobs": some(st.booleans()),
            "top_logprobs": some(st.integers(-1, 3)),
            "echo": some(st.booleans()),
            "continue_final_message": some(st.booleans()),
            "add_generation_prompt": some(st.booleans()),
            "chat_template_kwargs": some(st.dictionaries(TEXT, ODD, max_size=2)),
        },
    ),
)
def test_chat_never_fails(ask, messages: Any, fields: dict[str, Any], more: dict[str, Any]):
    check(ask, CHAT, {"messages": messages, "max_tokens": 3, **fields, **more})


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    body=st.dictionaries(
        st.sampled_from(["prompt", "messages", "tokens", "model", "add_special_tokens"]),
        st.one_of(ODD, TEXT, st.lists(IDS, max_size=4)),
    )
)
def test_token_endpoints_never_fail(ask, body: dict[str, Any]):
    for path in ("/tokenize", "/detokenize"):
        assert ask(path, body).status_code in (200, 400, 404)


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "min_tokens", "seed", "priority", "n"])
@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**40])
def test_large_numbers_never_fail(ask, name: str, value: int):
    check(ask, COMPLETIONS, {"prompt": "x", "max_tokens": 2, name: value})


@pytest.mark.parametrize("value", [1e-300, 1e-38, 1e38, 1e300])
def test_extreme_penalties_never_fail(ask, value: float):
    check(ask, COMPLETIONS, {"prompt": "x", "max_tokens": 4, "repetition_penalty": value})
