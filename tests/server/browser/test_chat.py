"""Talking with a model through the page."""

from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.engine.async_engine import AsyncLLM
from tests.browsing import answer, expect, say, wait_done

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Open = Callable[..., Any]


def test_a_message_is_answered_piece_by_piece_and_counted(open_page: Open, engine: AsyncLLM):
    page = open_page()
    tokens = engine.metrics.generation_tokens
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const look = () => {
            const text = document.querySelector('.message.assistant .text');
            if (text) window.lengths.add(text.textContent.length);
          };
          new MutationObserver(look).observe(document.getElementById('log'),
            {childList: true, subtree: true, characterData: true});
        }"""
    )
    say(page, "Hello", temperature=0, max_tokens=300)
    done = wait_done(page)
    assert engine.metrics.generation_tokens - tokens == 300
    text = done.locator(".text").text_content()
    assert len(text) > 100
    assert len(page.evaluate("[...window.lengths]")) > 3, "the answer came in one piece"
    facts = done.locator(".facts")
    expect(facts).to_contain_text("TTFT")
    expect(facts).to_contain_text("tok/s")
    expect(facts).to_contain_text("+ 300 tokens")
    expect(facts).to_contain_text("cut off at the limit")
    expect(page.locator(".message.user .said")).to_have_text("Hello")
    expect(page.locator("#prompt")).to_have_value("")
    expect(page.locator("#prompt")).to_be_focused()


@pytest.mark.parametrize("way", ["key", "button"])
def test_stopping_frees_the_request(
    open_page: Open, engine: AsyncLLM, wait_for: Callable[..., None], way: str
):
    page = open_page()
    free = engine._host.engine.pool.num_pages
    aborted = engine.metrics.finished_by_reason["abort"]
    say(page, "Go on", temperature=0, max_tokens=4000)
    answer(page).locator(".text > *").first.wait_for()
    assert engine.num_unfinished == 1
    if way == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    stopped = wait_done(page, state="stopped")
    wait_for(lambda: engine.num_unfinished == 0)
    wait_for(lambda: engine.num_free_pages == free)
    assert engine.metrics.finished_by_reason["abort"] == aborted + 1
    expect(stopped.locator(".facts")).to_contain_text("stopped")
    assert stopped.locator(".text").text_content()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    say(page, "Again", max_tokens=3)
    wait_done(page, 1)


def test_a_double_click_on_send_does_not_stop(open_page: Open):
    page = open_page()
    page.locator("#max_tokens").fill("200")
    page.locator("#prompt").fill("Hello")
    page.locator("#go").dblclick()
    wait_done(page)


def test_settings_reach_the_request_and_outlive_the_page(open_page: Open):
    page = open_page()
    values = {
        "system": "Be brief.", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 3,
        "seed": 11,
    }  # fmt: skip
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello", **values)
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    del values["system"]
    assert {name: body[name] for name in values} == values
    assert body["model"] == "tiny"
    wait_done(page)
    page.reload()
    expect(page.locator("#top_k")).to_have_value("7")
    expect(page.locator("#system")).to_have_value("Be brief.")
    expect(page.locator(".said")).to_have_text("Hello")  # the conversation stays with the tab
    page.get_by_role("button", name="Reset").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "More", max_tokens=2)
    body = sent.value.post_data_json
    assert not {"temperature", "top_p", "top_k", "seed"} & set(body)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user"]
    wait_done(page, 1)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "3"), ("top_k", "1.5"), ("top_p", "0")]
)
def test_a_setting_out_of_range_is_pointed_at_and_nothing_is_sent(
    open_page: Open, name: str, value: str
):
    page = open_page()
    say(page, "Hello", **{name: value})
    field = page.locator(f"#{name}")
    expect(field).to_be_focused()
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#settings-note")).to_have_class("note wide problem")
    expect(page.locator("#prompt")).to_have_value("Hello")
    expect(page.locator(".message")).to_have_count(0)


def test_regenerate_edit_and_clear(open_page: Open):
    page = open_page()
    say(page, "One", temperature=0.9, max_tokens=20, seed=5)
    first = wait_done(page).locator(".text").text_content()
    say(page, "Two")
    wait_done(page, 1)
    page.get_by_role("button", name="Regenerate this answer").first.click()
    expect(page.locator(".message")).to_have_count(2)
    assert wait_done(page).locator(".text").text_content() == first, "the seed was not used"
    page.get_by_role("button", name="Edit this message").click()
    page.get_by_role("textbox", name="Edited message").fill("Other")
    page.get_by_role("button", name="Send", exact=True).first.click()
    expect(page.locator(".said")).to_have_text("Other")
    assert wait_done(page).locator(".text").text_content() != first
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator(".message")).to_have_count(0)


def test_clearing_while_an_answer_comes_frees_the_request(
    open_page: Open, engine: AsyncLLM, wait_for: Callable[..., None]
):
    page = open_page()
    say(page, "Go on", temperature=0, max_tokens=4000)
    answer(page).locator(".text > *").first.wait_for()
    page.get_by_role("button", name="New chat").click()
    wait_for(lambda: engine.num_unfinished == 0)
    expect(page.locator(".message")).to_have_count(0)
    say(page, "Hello", max_tokens=3)
    wait_done(page)


def test_a_refusal_is_shown_and_the_refused_message_is_not_sent_again(open_page: Open):
    page = open_page()
    say(page, "Too long " * 500)
    refused = wait_done(page, state="failed")
    expect(refused.get_by_role("alert")).to_contain_text("4096")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Short", max_tokens=2)
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Short"}]
    wait_done(page, 1)


START = (
    "document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')"
)
"""Lets the next Tab lead to the first thing on the page."""


def test_the_keyboard_alone_is_enough(open_page: Open):
    page = open_page()
    keys = page.keyboard
    focused = "document.activeElement.id || document.activeElement.textContent.trim()"
    expect(page.locator("#prompt")).to_be_focused()
    keys.type("First line")
    keys.press("Shift+Enter")
    keys.type("second line")
    expect(page.locator("#prompt")).to_have_value("First line\nsecond line")
    assert page.locator("#prompt").bounding_box()["height"] > 50
    page.locator("#prompt").fill("")
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    page.evaluate(START)
    order = []
    for _ in range(17):
        keys.press("Tab")
        order.append(page.evaluate(focused))
    assert order[0] == "Skip to the message field"
    wanted = [
        "theme", "panel-toggle", "What is the capital of France?", "prompt", "go", "system",
        "temperature", "top_p", "top_k", "max_tokens", "seed",
    ]  # fmt: skip
    assert [name for name in order if name in wanted] == wanted
    page.evaluate(START)
    keys.press("Tab")
    keys.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.locator("#max_tokens").fill("5")
    page.locator("#prompt").focus()
    keys.type("Hello")
    keys.press("Enter")
    wait_done(page)
    while page.evaluate(focused) != "Edit":
        keys.press("Shift+Tab")
    keys.press("Enter")
    keys.press("Escape")  # gives the edit up
    assert page.evaluate(focused) == "Edit"
    keys.press("Enter")
    keys.type(" again")
    keys.press("Enter")
    expect(page.locator(".said")).to_have_text("Hello again")
    wait_done(page)
