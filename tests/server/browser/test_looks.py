"""Themes, widths, names and outline of the page."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.browsing import expect, say, wait_done

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Open = Callable[..., Any]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_chosen_and_read(open_page: Open, scheme: str):
    page = open_page(color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    assert shown_theme(page) == scheme
    say(page, "Hello", max_tokens=5)
    wait_done(page)
    assert_readable(page)
    toggle = page.get_by_role("button", name=f"Switch to the {other} theme")
    toggle.click()
    assert shown_theme(page) == other
    assert_readable(page)
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    assert shown_theme(page) == other
    page.get_by_role("button", name=f"Switch to the {scheme} theme").click()
    assert shown_theme(page) == scheme
    # what agrees with the system follows the system again
    page.emulate_media(color_scheme=other)
    assert shown_theme(page) == other


def shown_theme(page: Any) -> str:
    red, green, blue = colour(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    return "light" if red + green + blue > 384 else "dark"


def colour(text: str) -> list[float]:
    return [float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]


def luminance(text: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = [part / 255 for part in colour(text)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return math.sumprod(linear, (0.2126, 0.7152, 0.0722))


def assert_readable(page: Any) -> None:
    """Every visible text has a contrast of at least 4.5 with what lies behind it."""
    pairs = page.evaluate(
        """() => {
          const behind = (element) => {
            for (let one = element; one; one = one.parentElement) {
              const ground = getComputedStyle(one).backgroundColor;
              if (!ground.endsWith(', 0)')) return ground;
            }
          };
          const found = [];
          for (const element of document.querySelectorAll('body *')) {
            const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
            if (own && element.checkVisibility() && !element.disabled) {
              const {color} = getComputedStyle(element);
              found.push([element.tagName + ' ' + element.className, color, behind(element)]);
            }
          }
          return found;
        }"""
    )
    assert len(pairs) > 20
    for name, front, back in pairs:
        high, low = sorted((luminance(front), luminance(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name}: {front} on {back}"


def test_every_control_has_a_name_and_the_page_an_outline(open_page: Open):
    page = open_page()
    say(page, "Hello", max_tokens=5)
    wait_done(page)
    page.get_by_role("button", name="Edit this message").click()
    audit = page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          const name = (e) => (e.getAttribute('aria-label') || e.textContent.trim()
            || (e.labels && [...e.labels].map((l) => l.textContent.trim()).join(' ')) || '');
          const ids = all('[id]').map((e) => e.id);
          const refers = ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'];
          return {
            nameless: all('button, a, input, select, textarea, [role=img]')
              .filter((e) => !name(e)).map((e) => e.outerHTML),
            doubled: ids.filter((id, i) => ids.indexOf(id) !== i),
            dangling: refers.flatMap((a) => all(`[${a}]`).map((e) => e.getAttribute(a)))
              .filter((id) => !document.getElementById(id)),
            positive: all('[tabindex]').filter((e) => e.tabIndex > 0).length,
            alt: all('img:not([alt])').length,
            levels: all('h1, h2, h3').map((e) => +e.tagName[1]),
            landmarks: ['header', 'main', 'aside'].map((tag) => all(`body > ${tag}`).length),
            lang: document.documentElement.lang,
            title: document.title,
          };
        }"""
    )
    assert audit["nameless"] == []
    assert audit["doubled"] == []
    assert audit["dangling"] == []
    assert (audit["positive"], audit["alt"]) == (0, 0)
    assert audit["landmarks"] == [1, 1, 1]
    assert audit["levels"][0] == 1
    steps = zip(audit["levels"], audit["levels"][1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)
    assert (audit["lang"], audit["title"]) == ("en", "tiny · jaxserve")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_shows_chat_and_panel_in_turn(open_page: Open, width: int):
    page = open_page(viewport={"width": width, "height": 740})
    chat, panel = page.locator("#chat"), page.locator("#panel")
    expect(chat).to_be_visible()
    expect(panel).to_be_hidden()
    toggle = page.get_by_role("button", name="Server and settings")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    toggle.click()
    expect(panel).to_be_visible()
    expect(chat).to_be_hidden()
    page.locator("#max_tokens").fill("40")
    assert_fits(page)
    page.keyboard.press("Escape")
    expect(chat).to_be_visible()
    say_text = "A rather long message without an end, " * 4 + "x" * 200
    page.locator("#prompt").fill(say_text)
    page.locator("#prompt").press("Enter")
    wait_done(page)
    assert_fits(page)


def assert_fits(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, .message')]
          .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)
          .map((e) => e.outerHTML)"""
    )
    assert wide == []


def test_the_panel_can_be_put_away_beside_the_chat(open_page: Open):
    page = open_page(viewport={"width": 1200, "height": 800})
    toggle = page.get_by_role("button", name="Server and settings")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    toggle.click()
    expect(page.locator("#panel")).to_be_hidden()
    page.reload()
    expect(page.locator("#panel")).to_be_hidden()
    toggle.click()
    expect(page.locator("#panel")).to_be_visible()
