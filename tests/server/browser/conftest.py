"""A headless Chromium, and servers with a tiny real engine that it may look at."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.numpy
import tokenizers

from jaxserve.engine.async_engine import AsyncLLM
from tests.tiny import write_tiny_model

playwright = pytest.importorskip("playwright.sync_api")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyzĠ"  # the last one stands for a space


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    """A tiny engine that greedily writes letters and never comes to an end by itself."""
    folder = write_tiny_model(tmp_path_factory.mktemp("talker"))
    vocab = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for text, number in vocab.items():
        if text not in LETTERS:
            weights["lm_head.weight"][number] = 0
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    made = AsyncLLM(
        folder,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=32 << 20,
        warmup="lazy",
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A headless Chromium."""
    with playwright.sync_playwright() as tools:
        made = tools.chromium.launch(executable_path=chromium, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any, serve: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Open the page of a fresh server in a fresh profile.

    Whatever a test does, the page writes no error to the console and asks no other host.
    """
    contexts, problems = [], []

    def listen(page: Any, origin: str) -> None:
        def on_request(request: Any) -> None:
            if not request.url.startswith(origin):
                problems.append(f"asked for {request.url}")

        def on_console(message: Any) -> None:
            # a refusal, which the page shows, is written there by the browser itself
            if message.type in ("error", "warning") and "Failed to load" not in message.text:
                problems.append(message.text)

        page.on("request", on_request)
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))

    def run(
        *, path: str = "/", settings: dict[str, Any] | None = None, with_engine: bool = True,
        with_clock: bool = False, **profile: Any,
    ) -> Any:  # fmt: skip
        origin = serve(with_engine=with_engine, **(settings or {}))
        context = browser.new_context(**profile)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        listen(page, origin)
        if with_clock:
            page.clock.install()
        page.goto(origin + path)
        playwright.expect(page.locator("body")).to_have_attribute("data-ready", "true")
        if with_engine:
            playwright.expect(page.locator("#status")).to_have_text("ready")
        return page

    yield run
    for context in contexts:
        context.close()
    assert problems == []
