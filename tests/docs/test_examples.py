"""What README and pages show is run: Python against the real model, curl against a real server.

Blocks of one document share their names, as a reader would type them one after the other. A block
marked `text` is not run.
"""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from jaxserve.core.config import EngineConfig
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.models.hub import DEFAULT_MODEL
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ADDRESS = re.compile(r"(?:http://)?(?:127\.0\.0\.1|localhost):8000")


def blocks(path: Path, language: str) -> list[str]:
    """Return the blocks of one language."""
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


def commands(path: Path) -> list[tuple[str, str]]:
    """Return each curl command of the console blocks, with what is shown below it."""
    found: list[tuple[str, str]] = []
    for block in blocks(path, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            match = re.match(r"((?:.*\\\n)*.*)\n((?:.*\n)*)", part)
            command, output = match.groups()
            if command.startswith("curl "):
                found.append((command, output))
    return found


def with_any(select):
    """Return README and the pages for which `select` finds something, named."""
    return [
        pytest.param(
            path,
            id=str(path.relative_to(ROOT)),
            marks=() if path.name in ("README.md", "server.md") else pytest.mark.slow,
        )
        for path in [ROOT / "README.md", *PAGES]
        if select(path)
    ]


@pytest.fixture(scope="module")
def url(default_model: Path) -> Iterator[str]:
    """A real server of the default model, on a free port."""
    engine = AsyncLLM(default_model, max_model_len=1024, max_num_seqs=4, warmup="lazy")
    state = ServerState(ServerConfig(), model=DEFAULT_MODEL, engine=engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(create_app(state), log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture
def compiling_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a step when it is needed first: at its real size, a model takes long for all."""
    make = EngineConfig.from_settings
    monkeypatch.setattr(
        EngineConfig, "from_settings", lambda settings: make({"warmup": "lazy"} | settings)
    )


@pytest.mark.weights
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("compiling_what_is_used")
@pytest.mark.parametrize("path", with_any(lambda path: blocks(path, "python")))
def test_python_runs(path: Path, url: str):
    names = {"__name__": "example"}
    for block in blocks(path, "python"):
        code = ADDRESS.sub(url, block)
        exec(compile(code, str(path), "exec"), names)  # noqa: S102  the documents are ours


@pytest.mark.weights
@pytest.mark.parametrize("path", with_any(commands))
def test_curl_is_answered_as_shown(path: Path, url: str):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    for command, shown in commands(path):
        done = subprocess.run(
            ["bash", "-c", ADDRESS.sub(url, command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if not done.stdout.startswith("{"):
            continue
        answer = json.loads(done.stdout)
        assert "error" not in answer
        if shown:
            expected = json.loads(shown.replace("\n", ""))
            assert answer["choices"] == expected["choices"]
            assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_examples_are_found():
    assert len(with_any(lambda path: blocks(path, "python"))) >= 6
    assert len(commands(ROOT / "README.md")) == 2
    assert len(commands(ROOT / "docs/quickstart/server.md")) == 5
    assert json.loads(commands(ROOT / "README.md")[0][1].replace("\n", ""))["choices"]
