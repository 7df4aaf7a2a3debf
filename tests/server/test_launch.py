"""The server as a process: its port, its start, what it says when it cannot, and its end."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.serve.launch import address_of, bind
from jaxserve.serve.options import ListenOptions, ServerConfig
from tests.bert import BERT

ARGS = ["--warmup", "lazy", "--max-num-batched-tokens", "64", "--max-num-seqs", "4"]


class Server:
    """One `python -m jaxserve.serve`, with what it has printed."""

    def __init__(self, *args: str, module: str = "jaxserve.serve") -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "JAXSERVE_LOG_LEVEL": "warning"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def exit_code(self, timeout_s: float = 90) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def ready_url(self, timeout_s: float = 120) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = re.search(r"ready at (http://\S+)", self.text)
            if found:
                return found[1]
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(self.text)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.process.stderr.close()


@pytest.fixture
def start() -> Iterator[type[Server]]:
    made: list[Server] = []

    def run(*args: str, **options: str) -> Server:
        made.append(Server(*args, **options))
        return made[-1]

    yield run
    for server in made:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_is_one_line_and_exit_code_one_before_anything_is_loaded(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = start("nowhere", "--port", port)
        assert server.exit_code() == 1
    assert len(server.lines) == 1
    assert f"127.0.0.1:{port} is in use" in server.text
    assert "choose another --port" in server.text


def test_broken_tls_files_are_one_line_and_exit_code_one(start, tmp_path: Path):
    path = tmp_path / "key.pem"
    path.write_text("no key")
    server = start("--port", "0", "--ssl-certfile", str(path), "--ssl-keyfile", str(path))
    assert server.exit_code() == 1
    assert len(server.lines) == 1
    assert "the TLS files cannot be used" in server.text


def test_models_that_cannot_be_loaded_are_one_line_and_exit_code_one(
    start, tiny_folder: Path, tmp_path: Path
):
    weights = (tiny_folder / "model.safetensors").read_bytes()
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (truncated / name).write_bytes((tiny_folder / name).read_bytes())
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    wanted = {
        "smollm2-135m-instrukt": "Did you mean 'smollm2-135m-instruct'?",
        str(truncated): "model.safetensors",
    }
    servers = {name: start(name, "--port", "0", *ARGS) for name in wanted}
    for name, expected in wanted.items():
        server = servers[name]
        assert server.exit_code() == 1, server.text
        assert "Traceback" not in server.text
        errors = [line for line in server.lines if ": error: " in line]
        assert len(errors) == 1
        assert expected in errors[0]
        assert errors[0] == server.lines[-1]


def stream_lines(
    url: str, max_tokens: int, lines: list[str], headers_seen: threading.Event
) -> None:
    body = {"prompt": "x", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
                headers_seen.set()


def test_sigterm_refuses_new_requests_and_finishes_running_ones(start, tiny_folder: Path):
    port = free_port()
    patient = start(str(tiny_folder), "--port", str(port), *ARGS)
    hasty = start(
        "serve",
        str(tiny_folder),
        "--port",
        "0",
        "--shutdown-timeout",
        "0.1",
        *ARGS,
        module="jaxserve",
    )
    statuses = set()
    while "ready at" not in patient.text and patient.process.poll() is None:
        with contextlib.suppress(httpx.ConnectError):
            statuses.add(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
        time.sleep(0.1)
    assert statuses <= {503, 200}
    assert 503 in statuses, "the port answers while the model is being loaded"
    ends = {}
    for server, reason in ((patient, "length"), (hasty, "abort")):
        url = server.ready_url()
        assert httpx.get(f"{url}/health").status_code == 200
        lines: list[str] = []
        running = threading.Event()
        client = threading.Thread(target=stream_lines, args=(url, 2500, lines, running))
        client.start()
        assert running.wait(60)
        server.process.send_signal(signal.SIGTERM)
        refused = 0
        while client.is_alive() and not refused:
            try:
                late = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            except httpx.TransportError:
                break
            if late.status_code == 503:
                refused = int(late.headers["retry-after"])
                assert late.json()["error"]["type"] == "ServiceUnavailableError"
        client.join(60)
        assert refused or server is hasty
        assert server.exit_code() == 0, server.text
        assert lines[-1] == "data: [DONE]"
        ends[reason] = json.loads(lines[-2][6:])["choices"][0]["finish_reason"]
        assert "Traceback" not in server.text
    assert ends == {"length": "length", "abort": "abort"}


def test_embeddings_under_way_at_the_end_get_a_503(start, tmp_path: Path):
    folder = shutil.copytree(BERT / "plain", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}  # some work
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--port", "0", "--shutdown-timeout", "0", "--warmup", "lazy"]
    server = start(str(folder), "--load-format", "dummy", *flags)
    url = server.ready_url()
    body = {"input": [[1 + i % 50] * 60 for i in range(4096)], "truncate_prompt_tokens": -1}
    answers: list[httpx.Response] = []
    client = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60))
    )
    client.start()
    while not httpx.get(f"{url}/load").json()["server_load"]:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    client.join(60)
    assert server.exit_code() == 0, server.text
    assert answers[0].status_code == 503
    assert int(answers[0].headers["retry-after"]) >= 1
    assert "Traceback" not in server.text


def test_sigterm_while_loading_stops_at_once(start, tiny_folder: Path):
    server = start(str(tiny_folder), "--port", "0")
    while "loading" not in server.text:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code(20) == 0
    assert "Traceback" not in server.text


def test_addresses_are_printed_as_clients_write_them():
    config = ServerConfig(listen=ListenOptions(host="::", port=0, root_path="/api"))
    with bind(config.listen) as listener:
        port = listener.getsockname()[1]
        assert address_of(config, listener) == f"http://127.0.0.1:{port}/api"


def test_a_host_that_is_not_ours():
    refused = pytest.raises(ConfigError, match=r"cannot listen on .*; choose another --host")
    with refused, bind(ListenOptions(host="192.0.2.1", port=0)):
        pass


def test_unix_sockets_are_taken_once_and_removed(tmp_path: Path):
    path = tmp_path / "socket"
    options = ListenOptions(uds=str(path))
    with bind(options):
        assert path.is_socket()
        refused = pytest.raises(
            ConfigError, match="in use by another program; choose another --uds"
        )
        with refused, bind(options):
            pass
        assert path.is_socket()
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced(tmp_path: Path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with bind(ListenOptions(uds=str(path))):
        pass


def test_a_file_in_the_way_of_a_unix_socket_stays(tmp_path: Path):
    path = tmp_path / "precious"
    path.write_text("data")
    refused = pytest.raises(ConfigError, match="choose another --uds")
    with refused, bind(ListenOptions(uds=str(path))):
        pass
    assert path.read_text() == "data"
