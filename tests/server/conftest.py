"""One tiny engine for all server tests, in process, and ways to ask it."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.tiny import write_tiny_model

MAX_LEN = 1024
MAX_SEQS = 4

Ask = Callable[..., httpx.Response]
_building = threading.Lock()  # pydantic completes the schemas of routes in no thread-safe way


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engine(tiny_folder: Path) -> Iterator[AsyncLLM]:
    """A real engine; each test leaves it idle."""
    made = AsyncLLM(
        tiny_folder,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=32 << 20,
        warmup="lazy",
        logprobs_mode="raw_logprobs",
        max_num_queued_reqs=32,
    )
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _is_left_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves no request and no held page behind."""
    yield
    if "engine" in request.fixturenames:
        running: AsyncLLM = request.getfixturevalue("engine")
        wait_until(lambda: running.num_unfinished == 0)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that happens on another thread."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def ask(engine: AsyncLLM) -> Ask:
    """Send one request to the application; settings are the server's."""
    return asking(engine)


def asking(engine: AsyncLLM) -> Ask:
    """Return a way to send one request to the application around an engine."""

    def send(
        path: str,
        body: dict[str, Any] | None = None,
        *,
        settings: dict[str, Any] | None = None,
        **request: Any,
    ) -> httpx.Response:
        config = ServerConfig.from_settings(
            {"served_model_name": ("tiny", "alias")} | (settings or {})
        )
        with _building:
            app = create_app(ServerState(config, model="tiny", engine=engine))

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                if body is None:
                    return await client.get(path, **request)
                content = json.dumps(body)
                headers = {"Content-Type": "application/json", **request.pop("headers", {})}
                return await client.post(path, content=content, headers=headers, **request)

        return asyncio.run(run())

    return send


@contextlib.contextmanager
def _running(engine: AsyncLLM | None, settings: dict[str, Any]) -> Iterator[str]:
    config = ServerConfig.from_settings({"served_model_name": ("tiny",)} | settings)
    app = create_app(ServerState(config, model="tiny", engine=engine))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def url(engine: AsyncLLM) -> Iterator[str]:
    """A real server on a free port of the loopback interface."""
    with _running(engine, {}) as address:
        yield address


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Start a real server with settings of its own, with or without the engine."""
    with contextlib.ExitStack() as stack:

        def start(*, with_engine: bool = True, **settings: Any) -> str:
            engine = request.getfixturevalue("engine") if with_engine else None
            return stack.enter_context(_running(engine, settings))

        yield start


@pytest.fixture(scope="session")
def events_of() -> Callable[[str], list[dict[str, Any]]]:
    """Check the form of a stream and return its objects, without the closing mark."""

    def read(text: str) -> list[dict[str, Any]]:
        frames = text.split("\n\n")
        assert frames.pop() == ""
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        assert frames.pop() == "data: [DONE]"
        return [json.loads(frame[6:]) for frame in frames]

    return read


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that happens on another thread."""
    return wait_until
