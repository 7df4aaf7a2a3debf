"""What a model writes becomes text and harmless elements, never markup."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.browsing import expect, say, wait_done

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Open = Callable[..., Any]


DRAW = """async (texts) => {
  const {Markdown} = await import(new URL('pages/markdown.js', document.baseURI));
  const home = document.createElement('div');
  document.body.append(home);
  const markdown = new Markdown(home);
  for (const text of texts) markdown.show(text);
  const html = home.innerHTML;
  const text = home.textContent;
  await new Promise((done) => setTimeout(done, 50));
  home.remove();
  return {html, text};
}"""


def draw(page: Any, *texts: str) -> dict[str, str]:
    return page.evaluate(DRAW, list(texts))


@pytest.fixture
def drawing_page(open_page: Open) -> Any:
    return open_page(with_engine=False)


def test_the_usual_markdown_is_drawn(drawing_page: Any):
    cases = {
        "# Title": "<h3>Title</h3>",
        "a **b** *c* `d` ~~e~~ _f_": (
            "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del> <em>f</em></p>"
        ),
        "snake_case_name 2*3*4 \\*x\\*": "<p>snake_case_name 2*3*4 *x*</p>",
        "**bold with `code` in it**": ("<p><strong>bold with <code>code</code> in it</strong></p>"),
        "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
        "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
        "1. a\n\n2. b": "<ol><li>a</li><li>b</li></ol>",
        "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
        "---": "<hr>",
        "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
        "| a | b |\n|---|---|\n| 1 | 2 |": (
            '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
            "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>"
        ),
        "[x](https://a.example/b?c=d)": (
            '<p><a href="https://a.example/b?c=d" target="_blank" '
            'rel="noopener noreferrer nofollow">x</a></p>'
        ),
    }
    assert {text: draw(drawing_page, text)["html"] for text in cases} == cases


def test_code_is_shown_as_it_stands(drawing_page: Any):
    code = "if a < b:\n    print('**x** <b>')\n"
    found = draw(drawing_page, f"Look:\n```python\n{code}```\nDone.")
    assert "<figcaption><span>python</span>" in found["html"]
    assert code.strip() in found["text"]
    open_ended = draw(drawing_page, "```\nnot closed yet")
    assert "<pre><code>not closed yet</code></pre>" in open_ended["html"]


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg/onload=window.hit=1>",
    "[x](javascript:window.hit=1)",
    "[x](JaVaScRiPt:window.hit=1)",
    "[x](data:text/html,<script>window.hit=1</script>)",
    "[x](//evil.example/) [y](/metrics) [z](vbscript:x)",
    "![x](https://evil.example/pixel.png)",
    "```html\n<script>window.hit = 1</script>\n```",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <b>x</b> |",
    "# <iframe src=https://evil.example></iframe>",
    "- <style>body{display:none}</style>",
    '[x](https://a.example/" onmouseover="window.hit=1)',
    "`<b onclick=window.hit=1>`",
    "> " * 500 + "deep",
    "- " * 500 + "deep",
    "*" * 3000,
    "[" * 3000,
    "`" * 3000,
    "**a" * 1000,
    "\0\x1b[31m\u202e\ud800 end",
]


def test_nothing_that_a_model_writes_becomes_markup(drawing_page: Any):
    for text in HOSTILE:
        assert_harmless(drawing_page, text)


def assert_harmless(page: Any, text: str) -> None:
    found = draw(page, text)
    audit = page.evaluate(
        """(html) => {
          const copy = new DOMParser().parseFromString(html, 'text/html');
          const all = [...copy.body.querySelectorAll('*')];
          return {
            tags: [...new Set(all.map((e) => e.tagName.toLowerCase()))],
            handlers: all.flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on')),
            links: all.filter((e) => e.href).map((e) => e.getAttribute('href')),
          };
        }""",
        found["html"],
    )
    harmless = {
        "p", "h3", "ul", "ol", "li", "blockquote", "pre", "code", "strong", "em", "del", "a", "hr",
        "figure", "figcaption", "span", "button", "div", "table", "thead", "tbody", "tr", "th",
        "td",
    }  # fmt: skip
    assert set(audit["tags"]) <= harmless, text
    assert audit["handlers"] == [], text
    assert all(link.startswith(("https://", "http://", "mailto:")) for link in audit["links"]), text
    assert page.evaluate("window.hit") is None, text


def test_a_growing_text_ends_up_as_if_drawn_at_once(drawing_page: Any):
    text = (
        "# A\n\nSome *text* with `code`\n\n```py\nx = 1\n\ny = 2\n```\n\n- one\n- two\n\n  more\n"
        "1. three\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quote\n\nend **bold** [l](https://a.example)"
    )
    whole = draw(drawing_page, text)
    grown = draw(drawing_page, *(text[:end] for end in range(len(text) + 1)))
    assert grown["html"] == whole["html"]


def test_streams_are_read_however_they_are_cut(drawing_page: Any):
    stream = 'data: {"a": "é😀"}\n\n: a comment\n\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\n'
    wanted = ['{"a": "é😀"}', "one\ntwo", "[DONE]"]
    read = """async ([text, size]) => {
      const {events} = await import(new URL('pages/api.js', document.baseURI));
      const bytes = new TextEncoder().encode(text);
      const body = new ReadableStream({start(to) {
        for (let i = 0; i < bytes.length; i += size) to.enqueue(bytes.slice(i, i + size));
        to.close();
      }});
      const found = [];
      for await (const data of events(body)) found.push(data);
      return found;
    }"""
    for size in (1, 2, 3, 7, 1000):
        assert drawing_page.evaluate(read, [stream, size]) == wanted


def test_texts_of_the_user_are_never_drawn_as_markdown(open_page: Open):
    page = open_page()
    text = "<b>x</b> **y** [z](https://a.example)"
    say(page, text, max_tokens=2)
    wait_done(page)
    expect(page.locator(".said")).to_have_text(text)
    assert (
        json.loads(page.evaluate("JSON.stringify([...document.querySelectorAll('.said *')])")) == []
    )
