import pytest

from jaxserve.core.event import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenEvent,
)


def make_output(num_completions=1):
    return RequestOutput(
        request_id="r",
        prompt="hi",
        prompt_token_ids=[1, 2],
        outputs=[CompletionOutput(index=i) for i in range(num_completions)],
    )


def test_events_add_up_to_the_completion():
    output = make_output()
    output.apply(TokenEvent(request_id="r", token_ids=(5,), text="One "))
    output.apply(TokenEvent(request_id="r", token_ids=(6, 7), text="two"))
    (completion,) = output.outputs
    assert completion.text == "One two"
    assert completion.token_ids == [5, 6, 7]
    assert not completion.finished()
    assert not output.finished


def test_the_last_event_ends_the_completion_and_brings_its_times():
    output = make_output()
    metrics = RequestMetrics(arrival_time=1.0, finished_time=2.0)
    event = TokenEvent(
        request_id="r", finish_reason=FinishReason.STOP, stop_reason="\n", metrics=metrics
    )
    output.apply(event)
    assert output.finished
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == "\n"
    assert output.metrics is metrics


def test_a_request_ends_with_the_last_of_its_completions():
    output = make_output(num_completions=2)
    output.apply(TokenEvent(request_id="r", index=1, finish_reason=FinishReason.LENGTH))
    assert not output.finished
    assert output.outputs[1].finished()
    output.apply(TokenEvent(request_id="r", index=0, finish_reason=FinishReason.ABORT))
    assert output.finished
    assert [c.finish_reason for c in output.outputs] == ["abort", "length"]


def test_log_probabilities_are_collected_and_summed_over_the_sampled_tokens():
    output = make_output()
    first = {5: Logprob(-0.5, 2), 9: Logprob(-0.1, 1)}
    second = {6: Logprob(-0.25, 1)}
    output.apply(TokenEvent(request_id="r", token_ids=(5,), logprobs=(first,)))
    output.apply(TokenEvent(request_id="r", token_ids=(6,), logprobs=(second,)))
    (completion,) = output.outputs
    assert completion.logprobs == [first, second]
    assert completion.cumulative_logprob == pytest.approx(-0.75)


def test_prompt_log_probabilities_and_cached_tokens_are_kept():
    output = make_output()
    prompt_logprobs = (None, {2: Logprob(-3.0, 7)})
    output.apply(TokenEvent(request_id="r", prompt_logprobs=prompt_logprobs, num_cached_tokens=16))
    output.apply(TokenEvent(request_id="r", num_cached_tokens=0))
    assert output.prompt_logprobs == list(prompt_logprobs)
    assert output.num_cached_tokens == 16


def test_finish_reasons_are_the_strings_of_the_protocol():
    known = ["stop", "length", "abort", "error", "declined"]
    assert [str(reason) for reason in FinishReason] == known
