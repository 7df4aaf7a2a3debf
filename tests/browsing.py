"""What the tests of the page do with it; every wait ends as soon as it can."""

from typing import Any

import pytest

expect: Any = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=30_000)


def answer(page: Any, number: int = 0) -> Any:
    return page.locator(".message.assistant").nth(number)


def say(page: Any, text: str, **settings: object) -> None:
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def wait_done(page: Any, number: int = 0, state: str = "done") -> Any:
    expect(answer(page, number)).to_have_attribute("data-state", state)
    return answer(page, number)


def tile(page: Any, name: str) -> Any:
    return page.locator(f"#live-{name}")
