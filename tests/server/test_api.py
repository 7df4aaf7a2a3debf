"""The endpoints, answered by a tiny real engine."""

import math
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.async_engine import AsyncLLM

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me something."}]
GREEDY = {"temperature": 0, "ignore_eos": True}


def ok(response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == status
    return error


def complete(ask, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return ok(ask(COMPLETIONS, {"prompt": prompt, **GREEDY, **fields}))


def chat(ask, **fields: Any) -> dict[str, Any]:
    return ok(ask(CHAT, {"messages": MESSAGES, "max_tokens": 8, **GREEDY, **fields}))


# Models, health, tokens ------------------------------------------------------------------------


def test_models(ask, engine: AsyncLLM):
    cards = ok(ask("/v1/models"))
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["tiny", "alias"]
    assert cards["data"][0]["max_model_len"] == engine.max_model_len
    assert ok(ask("/v1/models/alias"))["id"] == "alias"
    assert refusal(ask("/v1/models/other"), 404)["type"] == "NotFoundError"


def test_model_names_with_slashes(ask):
    names = {"served_model_name": ("org/name",)}
    assert ok(ask("/v1/models/org/name", settings=names))["id"] == "org/name"


def test_unknown_model_is_404(ask):
    error = refusal(ask(COMPLETIONS, {"prompt": "a", "model": "tiiny"}), 404)
    assert error["param"] == "model"
    assert error["message"].endswith("Did you mean 'tiny'?")


def test_the_name_asked_for_is_echoed(ask):
    assert complete(ask, model="alias")["model"] == "alias"
    assert complete(ask)["model"] == "tiny"


def test_health_of_a_warm_engine(ask):
    for path in ("/health", "/ping"):
        response = ask(path)
        assert (response.status_code, response.content) == (200, b"")


def test_tokenize_and_back(ask, engine: AsyncLLM):
    text = "Grüße, 日本 🎉"
    found = ok(ask("/tokenize", {"prompt": text, "return_token_strs": True}))
    assert found["count"] == len(found["tokens"]) == len(text.encode())
    assert found["max_model_len"] == engine.max_model_len
    assert found["token_strs"][0] == "G"
    assert ok(ask("/detokenize", {"tokens": found["tokens"]})) == {"prompt": text}


def test_tokenize_messages_applies_the_template(ask):
    tokens = ok(ask("/tokenize", {"messages": MESSAGES}))["tokens"]
    text = ok(ask("/detokenize", {"tokens": tokens}))["prompt"]
    assert text == "<|im_start|>user\nTell me something.<|im_end|>\n<|im_start|>assistant\n"


def test_tokenize_wants_one_of_two(ask):
    assert "either prompt or messages" in refusal(ask("/tokenize", {}))["message"]
    both = {"prompt": "a", "messages": MESSAGES}
    assert "either prompt or messages" in refusal(ask("/tokenize", both))["message"]


def test_detokenize_refuses_unknown_ids(ask):
    for bad in (-1, 10**6, 10**30):
        assert refusal(ask("/detokenize", {"tokens": [1, bad]}))["param"] == "tokens"


# Completions -----------------------------------------------------------------------------------


def test_completion_has_the_expected_form(ask):
    answer = complete(ask, "Hello")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["stop_reason"] is None
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["completion_tokens"] == 16, "16 is the default of completions"
    assert usage["total_tokens"] == 21


def test_a_prompt_may_be_text_or_ids_one_or_many(ask):
    ids = ok(ask("/tokenize", {"prompt": "Hello"}))["tokens"]
    text = complete(ask, "Hello")["choices"][0]["text"]
    assert complete(ask, ids)["choices"][0]["text"] == text
    many = complete(ask, ["Hello", "World", "Hello"])
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2]
    assert many["choices"][0]["text"] == many["choices"][2]["text"] == text
    assert many["choices"][1]["text"] != text
    assert many["usage"]["prompt_tokens"] == 15
    assert many["usage"]["completion_tokens"] == 48
    lists = complete(ask, [ids, ids])
    assert [choice["text"] for choice in lists["choices"]] == [text, text]


def test_several_prompts_with_several_completions_each(ask):
    answer = complete(ask, ["a", "b"], n=2, temperature=1, seed=5, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    single = complete(ask, "b", n=2, temperature=1, seed=5, max_tokens=6)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[2:] == [choice["text"] for choice in single["choices"]]
    assert texts[0] != texts[1]


def test_seed_repeats_and_no_seed_does_not(ask):
    seeded = [complete(ask, temperature=1, seed=3)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    free = {complete(ask, temperature=1)["choices"][0]["text"] for _ in range(3)}
    assert len(free) > 1


def test_second_completion_of_a_seeded_request_has_the_next_seed(ask):
    both = complete(ask, n=2, temperature=1, seed=11)["choices"]
    next_one = complete(ask, temperature=1, seed=12)["choices"][0]
    assert both[1]["text"] == next_one["text"]


def test_prefix_cache_is_reported(ask):
    prompt = "A prefix long enough to fill some pages of the cache, and then some more."
    complete(ask, prompt, max_tokens=1)
    usage = complete(ask, prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 48
    salted = complete(ask, prompt, max_tokens=1, cache_salt="mine")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_objectives_are_counted_by_tier(ask, stream: bool):
    tier = f"test-{stream}"
    slo = {"ttft_ms": 1e6, "tpot_ms": 1e6, "e2e_ms": 2e6, "tier": tier, "on_decline": "asap"}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    for path, body in ((COMPLETIONS, {"prompt": ["a", "b"]}), (CHAT, chat)):
        assert ask(path, {**body, "slo": slo, "stream": stream}).status_code == 200
    page = ask("/metrics").text
    for prefix in ("jaxserve", "vllm"):
        for objective in ("ttft", "tpot", "tpot_gap", "tpot_mean", "e2e", "request"):
            labels = f'engine="0",model_name="tiny",tier="{tier}",objective="{objective}"'
            assert f"{prefix}:slo_attained_total{{{labels}}} 3.0" in page
            assert f"{prefix}:slo_missed_total{{{labels}}} 0.0" in page


@pytest.mark.parametrize(
    ("slo", "param"),
    [
        ({}, "slo"),
        ({"tier": "x"}, "slo"),
        ({"ttft_ms": 0}, "slo.ttft_ms"),
        ({"ttft_ms": -5}, "slo.ttft_ms"),
        ({"ttft_ms": "soon"}, "slo.ttft_ms"),
        ({"ttft_ms": 5, "e2e_ms": 4}, "slo.e2e_ms"),
        ({"ttft_ms": 5, "tier": "no spaces"}, "slo.tier"),
        ({"ttft_ms": 5, "tier": "\ud800"}, "slo.tier"),
        ({"ttft_ms": 5, "on_decline": "cry"}, "slo.on_decline"),
        ({"ttft_ms": 5, "tpot": 5}, "slo"),
        ({"ttft_ms": 5, "\ud800" * 50: 5}, "slo"),
        (5, "slo"),
    ],
)
def test_bad_objectives_are_refused(ask, slo, param: str):
    for path, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        assert refusal(ask(path, {**body, "slo": slo}))["param"] == param


def test_no_objectives_are_no_objectives(ask):
    assert ok(ask(COMPLETIONS, {"prompt": "a", "slo": None}))


@pytest.mark.parametrize("salt", ["", "a/b", "x" * 129, "a\0", "\ud800"])
def test_bad_cache_salts(ask, salt: str):
    assert refusal(ask(COMPLETIONS, {"prompt": "a", "cache_salt": salt}))["param"] == "cache_salt"


def test_echo_puts_the_prompt_in_front(ask):
    text = complete(ask, "Hello")["choices"][0]["text"]
    assert complete(ask, "Hello", echo=True)["choices"][0]["text"] == "Hello" + text
    ids = ok(ask("/tokenize", {"prompt": "Hello"}))["tokens"]
    assert complete(ask, ids, echo=True)["choices"][0]["text"] == "Hello" + text


def test_logprobs_of_completions_have_four_lists(ask):
    choice = complete(ask, "Hello", max_tokens=5, logprobs=2)["choices"][0]
    lists = choice["logprobs"]
    assert list(lists) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert {len(values) for values in lists.values()} == {5}
    assert lists["text_offset"][0] == 0
    for token, logprob, top in zip(
        lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True
    ):
        assert logprob == max(top.values()), "greedy takes the most likely token"
        assert 1 <= len(top) <= 3
        assert token in top


def test_logprobs_zero_lists_the_token_itself(ask):
    lists = complete(ask, "Hello", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert [len(top) for top in lists["top_logprobs"]] == [1, 1]


def test_echo_with_logprobs_scores_the_prompt(ask):
    choice = complete(ask, "Hello", echo=True, logprobs=1, max_tokens=3)["choices"][0]
    lists = choice["logprobs"]
    assert lists["tokens"][:5] == list("Hello")
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(value < 0 for value in lists["token_logprobs"][1:])
    assert lists["text_offset"][:6] == [0, 1, 2, 3, 4, 5]
    assert len(lists["tokens"]) == 8


def test_echo_without_generation_scores_only_the_prompt(ask):
    answer = complete(ask, "Hello", echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "Hello"
    assert choice["logprobs"]["tokens"] == list("Hello")
    assert answer["usage"]["completion_tokens"] == 0
    longer = complete(ask, "Hello", echo=True, logprobs=1, max_tokens=3)["choices"][0]
    scores = longer["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scores[1:5], abs=1e-4)


def test_zero_tokens_without_echo_is_refused(ask):
    assert refusal(ask(COMPLETIONS, {"prompt": "a", "max_tokens": 0}))["param"] == "max_tokens"


def test_prompt_logprobs(ask):
    choice = complete(ask, "Hello", prompt_logprobs=2, max_tokens=1)["choices"][0]
    scores = choice["prompt_logprobs"]
    assert len(scores) == 5
    assert scores[0] is None
    ids = ok(ask("/tokenize", {"prompt": "Hello"}))["tokens"]
    own = scores[1][str(ids[1])]
    assert set(own) == {"logprob", "rank", "decoded_token"}
    assert own["decoded_token"] == "e"
    echoed = complete(ask, "Hello", echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert own["logprob"] == pytest.approx(echoed["logprobs"]["token_logprobs"][1], abs=1e-4)


def test_token_ids_on_request(ask):
    ids = ok(ask("/tokenize", {"prompt": "Hello"}))["tokens"]
    choice = complete(ask, "Hello", return_token_ids=True, max_tokens=4)["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert len(choice["token_ids"]) == 4
    assert ok(ask("/detokenize", {"tokens": choice["token_ids"]}))["prompt"] == choice["text"]
    lists = complete(ask, "Hello", logprobs=1, return_tokens_as_token_ids=True, max_tokens=4)
    tokens = lists["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in choice["token_ids"]]
    settings = {"return_tokens_as_token_ids": True}
    body = {"prompt": "Hello", "logprobs": 1, "max_tokens": 4, **GREEDY}
    assert (
        ok(ask(COMPLETIONS, body, settings=settings))["choices"][0]["logprobs"]["tokens"] == tokens
    )


# Where a completion ends -----------------------------------------------------------------------


def forced(ask, text: str, **fields: Any) -> dict[str, Any]:
    """Let the model say one byte over and over."""
    token = ok(ask("/tokenize", {"prompt": text}))["tokens"][0]
    return complete(ask, "x", allowed_token_ids=[token], **fields)


def test_allowed_tokens_and_bias(ask):
    assert forced(ask, "z", max_tokens=3)["choices"][0]["text"] == "zzz"
    token = ok(ask("/tokenize", {"prompt": "q"}))["tokens"][0]
    biased = complete(ask, "x", logit_bias={str(token): 100}, max_tokens=3)
    assert biased["choices"][0]["text"] == "qqq"


def test_stop_strings_end_and_are_cut(ask):
    choice = forced(ask, "z", stop="zzz")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["stop_reason"] == "zzz"
    kept = forced(ask, "z", stop=["no", "zz"], include_stop_str_in_output=True)["choices"][0]
    assert (kept["text"], kept["stop_reason"]) == ("zz", "zz")


def test_stop_tokens_report_their_id(ask):
    token = ok(ask("/tokenize", {"prompt": "z"}))["tokens"][0]
    choice = forced(ask, "z", stop_token_ids=[token])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    later = forced(ask, "z", stop_token_ids=[token], min_tokens=0, max_tokens=4)
    assert later["usage"]["completion_tokens"] == 1


def test_end_of_sequence_has_no_stop_reason(ask):
    end = ok(ask("/tokenize", {"prompt": "<|im_end|>"}))["tokens"]
    assert len(end) == 1
    body = {"prompt": "x", "temperature": 0, "allowed_token_ids": end}
    choice = ok(ask(COMPLETIONS, body))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", None, "")
    shown = ok(ask(COMPLETIONS, {**body, "ignore_eos": True, "max_tokens": 2}))["choices"][0]
    assert shown["finish_reason"] == "length"
    special = {**body, "ignore_eos": True, "max_tokens": 2, "skip_special_tokens": False}
    assert ok(ask(COMPLETIONS, special))["choices"][0]["text"] == "<|im_end|>" * 2


def test_minimum_length_holds_back_the_end(ask):
    end = ok(ask("/tokenize", {"prompt": "<|im_end|>"}))["tokens"]
    body = {"prompt": "x", "temperature": 0, "logit_bias": {str(end[0]): 100}, "max_tokens": 8}
    assert ok(ask(COMPLETIONS, body))["usage"]["completion_tokens"] == 1
    assert ok(ask(COMPLETIONS, {**body, "min_tokens": 5}))["usage"]["completion_tokens"] == 6


def test_too_many_tokens_are_clamped_to_what_is_left(ask, engine: AsyncLLM):
    prompt = "x" * (engine.max_model_len - 3)
    answer = complete(ask, prompt, max_tokens=10**9)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_leaves_no_room_is_refused(ask, engine: AsyncLLM):
    error = refusal(ask(COMPLETIONS, {"prompt": "x" * engine.max_model_len}))
    assert "maximum context length" in error["message"]
    assert error["type"] == "BadRequestError"


def test_long_prompts_can_be_truncated(ask, engine: AsyncLLM):
    prompt = "abc" * engine.max_model_len
    kept = complete(ask, prompt + "Hello", truncate_prompt_tokens=5, max_tokens=4)
    assert kept["usage"]["prompt_tokens"] == 5
    assert kept["choices"][0]["text"] == complete(ask, max_tokens=4)["choices"][0]["text"]
    first = complete(
        ask, "Hello" + prompt, truncate_prompt_tokens=5, truncation_side="right", max_tokens=4
    )
    assert first["choices"][0]["text"] == kept["choices"][0]["text"]
    most = complete(ask, prompt, truncate_prompt_tokens=-1)
    assert most["usage"]["prompt_tokens"] == engine.max_model_len - 1


# Chat ------------------------------------------------------------------------------------------


def test_chat_has_the_expected_form(ask):
    answer = chat(ask)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 8


def test_chat_fills_the_context_by_default(ask, engine: AsyncLLM):
    answer = chat(ask, max_tokens=None)
    assert answer["usage"]["total_tokens"] == engine.max_model_len


def test_max_completion_tokens_wins(ask):
    assert chat(ask, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_chat_equals_the_rendered_prompt(ask):
    tokens = ok(ask("/tokenize", {"messages": MESSAGES}))["tokens"]
    expected = complete(ask, tokens, max_tokens=8)["choices"][0]["text"]
    assert chat(ask)["choices"][0]["message"]["content"] == expected


def test_content_may_be_a_list_of_text_parts(ask):
    parts = [{"type": "text", "text": "Tell me something."}]
    again = chat(ask, messages=[{"role": "user", "content": parts}])
    assert again["choices"][0]["message"] == chat(ask)["choices"][0]["message"]


def test_images_are_refused_by_name(ask):
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = refusal(ask(CHAT, {"messages": [{"role": "user", "content": [part]}]}))
    assert error["param"] == "messages[0].content[0]"
    assert "image_url" in error["message"]


def test_chat_logprobs_are_nested_with_bytes(ask):
    choice = chat(ask, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    for entry in content:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"], "the sampled token comes first"
        assert entry["logprob"] <= 0
    plain = chat(ask, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * 8


def test_impossible_tokens_have_a_finite_logprob(ask, engine: AsyncLLM):
    assert engine.config.runner.logprobs_mode == "raw_logprobs"
    content = chat(ask, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
    values = [e["logprob"] for entry in content for e in (entry, *entry["top_logprobs"])]
    assert all(math.isfinite(value) and value >= -9999.0 for value in values)


def test_chat_extras(ask):
    answer = chat(ask, prompt_logprobs=0, return_token_ids=True)
    tokens = ok(ask("/tokenize", {"messages": MESSAGES}))["tokens"]
    assert answer["prompt_token_ids"] == tokens
    assert len(answer["prompt_logprobs"]) == len(tokens)
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["choices"][0]["token_ids"]) == 8


def test_continuing_the_last_message(ask):
    messages = [*MESSAGES, {"role": "assistant", "content": "Once"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = ok(ask("/tokenize", body))["tokens"]
    text = ok(ask("/detokenize", {"tokens": tokens}))["prompt"]
    assert text.endswith("<|im_start|>assistant\nOnce")
    plain = chat(ask, **body)["choices"][0]["message"]["content"]
    echoed = chat(ask, **body, echo=True)["choices"][0]["message"]["content"]
    assert echoed == "Once" + plain
    error = refusal(ask(CHAT, {**body, "add_generation_prompt": True}))
    assert error["param"] == "continue_final_message"


def test_templates_in_requests_need_trust(ask):
    body = {"messages": MESSAGES, "chat_template": "{{ messages[0].content }}!", **GREEDY}
    error = refusal(ask(CHAT, body))
    assert error["param"] == "chat_template"
    assert "--trust-request-chat-template" in error["message"]
    settings = {"trust_request_chat_template": True}
    found = ok(ask("/tokenize", body, settings=settings))
    assert found["count"] == len("Tell me something.!")


def test_template_arguments_of_server_and_request(ask):
    settings = {"default_chat_template_kwargs": {"prefix": "server"}}
    server = ok(ask("/tokenize", {"messages": MESSAGES}, settings=settings))
    request = {"messages": MESSAGES, "chat_template_kwargs": {"prefix": "request"}}
    both = ok(ask("/tokenize", request, settings=settings))
    texts = [ok(ask("/detokenize", {"tokens": f["tokens"]}))["prompt"] for f in (server, both)]
    assert texts[0].endswith("assistant\nserver")
    assert texts[1].endswith("assistant\nrequest")


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 2}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "odd"}}}, "structured_outputs"),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
        ({"suffix": "end"}, "suffix"),
        ({"attention_mass": 0}, "attention_mass"),
        ({"attention_mass": 1.5}, "attention_mass"),
        ({"attention_mass": "0.9"}, "attention_mass"),
        ({"attention_mass": 0.9}, "attention_mass"),  # sparse attention is off
    ],
)
def test_bad_values_name_the_field(ask, fields: dict[str, Any], param: str | None):
    error = refusal(ask(COMPLETIONS, {"prompt": "a", "temperature": 0, **fields}))
    assert error["param"] == param
    assert error["type"] == "BadRequestError"


def test_a_share_of_the_attention_mass_is_a_field_of_chats_too(ask):
    body = {"messages": MESSAGES, "max_tokens": 1}
    assert ok(ask(CHAT, {**body, "attention_mass": 1}))
    error = refusal(ask(CHAT, {**body, "attention_mass": 0.9}))
    assert error["param"] == "attention_mass"
    assert "--sparse-attention p=0.9" in error["message"]


def test_top_logprobs_need_logprobs(ask):
    error = refusal(ask(CHAT, {"messages": MESSAGES, "top_logprobs": 3}))
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(ask, number: str):
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        body = {"prompt": "a", name: float(number)}
        assert refusal(ask(COMPLETIONS, body))["param"] == name


def test_a_full_queue_is_503_with_retry_after(ask, engine: AsyncLLM):
    body = {"prompt": ["a"] * 40, "stream": True}
    response = ask(COMPLETIONS, body)
    error = refusal(response, 503)
    assert error["type"] == "ServiceUnavailableError"
    assert int(response.headers["retry-after"]) >= 1
    rejected = engine.metrics.rejections["max_num_queued_reqs"]
    assert rejected >= 1


def test_request_ids(ask):
    given = ask(COMPLETIONS, {"prompt": "a", "request_id": "field"})
    assert ok(given)["id"] == "cmpl-field"
    both = ask(
        COMPLETIONS, {"prompt": "a", "request_id": "field"}, headers={"X-Request-Id": "head"}
    )
    assert ok(both)["id"] == "cmpl-head"
    assert both.headers["x-request-id"] == "head"


def test_metrics_page_counts_what_was_done(ask, engine: AsyncLLM):
    before = engine.metrics.generation_tokens
    complete(ask, max_tokens=7)
    page = ask("/metrics")
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.labels.get("model_name") == "tiny"
    }
    assert values["jaxserve:generation_tokens_total"] == before + 7
    assert values["vllm:generation_tokens_total"] == before + 7
    assert "vllm:" not in ask("/metrics", settings={"metrics_alias": ()}).text
