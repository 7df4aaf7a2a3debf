"""A server under test as a child process, and single questions to it."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT, PeerError, quiet_environment

MODEL = "smollm2-135m-instruct"
"""The model that comes with jaxserve's default installation."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of a server.

    Attributes:
        status: HTTP status.
        headers: Its headers, names in lower case.
        text: Its body.
    """

    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:  # noqa: ANN401  a JSON value
        """Return the body as JSON."""
        return json.loads(self.text)


def ask(url: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 300) -> Reply:
    """Send one request: GET without a body, else POST of JSON.

    Raises:
        OSError: If there is no answer.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)  # noqa: S310  our own server
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            status, head, content = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, head, content = error.code, error.headers, error.read()
    names = {name.lower(): value for name, value in head.items()}
    return Reply(status, names, content.decode(errors="replace"))


def metrics(url: str) -> dict[str, float]:
    """Read `/metrics`: values by name, summed over labels, the aliases left out."""
    found: dict[str, float] = {}
    for line in ask(f"{url}/metrics").text.splitlines():
        if line.startswith("jaxserve:"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0].removeprefix("jaxserve:")
            found[name] = found.get(name, 0.0) + float(value)
    return found


class Server:
    """`python -m jaxserve.serve` as a child process.

    Args:
        model: Name or path.
        dtype: Precision.
        log: Where its output goes.
        settings: Further flags.
    """

    def __init__(self, model: str, dtype: str, log: Path, settings: Sequence[str]) -> None:
        """Start it; `wait` returns when it is ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "jaxserve.serve", model, "--port", str(port)]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [*command, "--dtype", dtype, *settings],
                cwd=ROOT,
                env=quiet_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Wait until it answers `/health`.

        Raises:
            PeerError: If it ended, or was not ready in time.
        """
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            if self._process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.2)
        tail = self.log_lines()[-3:]
        raise PeerError(f"the server is not ready: {' | '.join(tail)}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310
                return answer.status == 200
        except OSError:  # refused, or answered with an error status
            return False

    def stop(self) -> None:
        """Send it SIGTERM and do not wait."""
        self._process.send_signal(signal.SIGTERM)

    def exit_status(self, timeout_s: float) -> int | None:
        """Wait for its end; None if it did not come in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=timeout_s)
        return None

    def log_lines(self) -> list[str]:
        """Return what it has printed."""
        return self._log.read_text(errors="replace").splitlines()

    def close(self) -> None:
        """Ask it to end, and see that it does."""
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(*settings: str, model: str = MODEL, dtype: str = "auto") -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        *settings: Flags.
        model: Name or path.
        dtype: Precision.
    """
    with tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as folder:
        server = Server(model, dtype, Path(folder) / "server.log", settings)
        try:
            server.wait(timeout_s=400)
            yield server
        finally:
            server.close()
