"""The live view, and pages of servers with a key, several names or a root path."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browsing import expect, say, tile, wait_done

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Open = Callable[..., Any]


def test_the_live_view_follows_the_engine(open_page: Open):
    page = open_page()
    expect(tile(page, "running")).to_have_text("0")
    expect(tile(page, "generation")).to_have_text("0")
    total = page.locator("[data-tile=generation] .note")
    expect(total).to_contain_text("tokens in all")
    before = total.text_content()
    say(page, "Go on", temperature=0, max_tokens=4000)
    expect(tile(page, "running")).to_have_text("1")
    expect(tile(page, "generation")).not_to_have_text("0")
    expect(tile(page, "kv")).not_to_have_text("0 %")
    expect(page.locator("#busy")).to_contain_text("1 running")
    expect(total).not_to_have_text(before)
    expect(page.locator("[data-tile=generation] svg")).to_have_attribute(
        "aria-label", re.compile("Generation over the last two minutes: now .*, at most [1-9]")
    )
    page.keyboard.press("Escape")
    expect(tile(page, "running")).to_have_text("0")
    expect(tile(page, "kv")).to_have_text("0 %")
    expect(page.locator("#busy")).to_be_empty()
    # the same opening again comes from the prefix cache
    say(page, "Go on", max_tokens=2)
    expect(tile(page, "hits")).not_to_have_text("0 %")
    expect(tile(page, "hits")).not_to_have_text("–")
    wait_done(page, 1)


def test_polling_rests_while_nobody_looks_at_the_page(open_page: Open):
    page = open_page(with_clock=True)
    polls = []
    page.on("request", lambda request: polls.append(request.url))
    hide = """(isHidden) => {
      Object.defineProperty(document, 'hidden', {value: isHidden, configurable: true});
      document.dispatchEvent(new Event('visibilitychange'));
    }"""
    with page.expect_request("**/pages/live"):
        page.clock.run_for(1500)
    page.evaluate(hide, True)
    polls.clear()
    page.clock.run_for(60_000)
    assert polls == []
    with page.expect_request("**/pages/live"):
        page.evaluate(hide, False)


def test_rates_come_from_the_servers_own_clock(open_page: Open):
    page = open_page()
    first = {
        "time": 10, "running": 1, "waiting": 2, "kv_usage": 0.5, "prompt_tokens": 100,
        "cached_tokens": 40, "generation_tokens": 50,
    }  # fmt: skip
    second = first | {
        "time": 12, "prompt_tokens": 300, "cached_tokens": 90, "generation_tokens": 80,
    }  # fmt: skip
    restarted = second | {
        "time": 13,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "generation_tokens": 0,
    }
    found = page.evaluate(
        """async ([first, second, restarted]) => {
          const {sample, hitRate} = await import(new URL('pages/live.js', document.baseURI));
          const samples = [sample(first, null), sample(second, first), sample(restarted, second)];
          return [samples, hitRate(samples), hitRate([samples[0]])];
        }""",
        [first, second, restarted],
    )
    samples, hits, none = found
    assert [one["generation"] for one in samples] == [0, 15, 0]
    assert [one["prompt"] for one in samples] == [0, 100, 0]
    assert (hits, none) == (0.25, None)


def test_loading_and_a_lost_server_are_told(open_page: Open):
    page = open_page(with_engine=False)
    expect(page.locator("#status")).to_have_text("loading the model")
    expect(page.locator("#go")).to_be_disabled()
    page.context.set_offline(True)
    expect(page.locator("#status")).to_have_text("not reachable")
    page.context.set_offline(False)
    expect(page.locator("#status")).to_have_text("loading the model")


def test_a_key_is_asked_for_checked_and_kept_in_the_tab(open_page: Open):
    page = open_page(settings={"api_key": ("secret",)})
    key = page.get_by_label("This server asks for an API key")
    expect(key).to_be_visible()
    say(page, "Hello", max_tokens=3)
    expect(key).to_be_focused()
    expect(page.locator(".message")).to_have_count(0)
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#key-note")).to_have_text("The server does not know this key.")
    key.fill("secret")
    key.press("Enter")
    expect(key).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Enter")
    wait_done(page)
    assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")
    assert "secret" in page.evaluate("JSON.stringify({...sessionStorage})")
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    expect(key).to_be_hidden()


def test_no_key_is_asked_for_where_none_is_needed(open_page: Open):
    page = open_page()
    expect(page.locator("#model")).to_have_value("tiny")
    expect(page.locator("#key-form")).to_be_hidden()


def test_one_of_several_names_can_be_chosen(open_page: Open):
    page = open_page(settings={"served_model_name": ("tiny", "alias")})
    page.get_by_label("Model", exact=True).select_option("alias")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello", max_tokens=2)
    assert sent.value.post_data_json["model"] == "alias"
    wait_done(page)


@pytest.mark.parametrize("path", ["/api", "/api/", "/"])
def test_everything_works_below_a_root_path(open_page: Open, path: str):
    page = open_page(path=path, settings={"root_path": "/api"})
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello", max_tokens=3)
    assert ("/api/v1/" in sent.value.url) == path.startswith("/api")
    wait_done(page)
    expect(tile(page, "running")).to_have_text("0")
