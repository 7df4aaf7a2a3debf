"""Child processes that are measured in turn, and how much processor time everybody takes."""

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PEER_MODULES = {
    "transformers": "benchmarks.peers.transformers_peer",
    "llama.cpp": "benchmarks.peers.llama_cpp_peer",
}


class PeerError(RuntimeError):
    """A measured process failed; the message is what it said."""


def oracle_python() -> Path | None:
    """Find the Python of the oracle environment: JAXSERVE_ORACLE_PYTHON, else ORACLES/bin."""
    named = os.environ.get("JAXSERVE_ORACLE_PYTHON")
    folder = Path(os.environ.get("ORACLES") or ROOT / ".venv-oracles")
    python = Path(named) if named else folder / "bin" / "python"
    return python if python.exists() else None


def quiet_environment() -> dict[str, str]:
    """Return an environment in which `benchmarks` and `jaxserve` are found from this checkout."""
    parts = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(part for part in parts if part)
    return {**os.environ, "PYTHONPATH": paths, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "0"}


class Child:
    """A worker process that answers JSON lines (see `benchmarks.peers.protocol`).

    Args:
        python: Interpreter.
        module: What it runs.
        log: Where its standard error goes.
        environment: Variables to add.
    """

    def __init__(
        self,
        python: Path | str,
        module: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                cwd=ROOT,
                env={**quiet_environment(), **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(
        self,
        op: str,
        *,
        timeout_s: float | None = None,
        **arguments: Any,  # noqa: ANN401  anything JSON knows
    ) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            op: Name of the worker's method.
            timeout_s: Longest wait; the process is killed after it. None waits without end.
            **arguments: What the method takes.

        Raises:
            PeerError: If it answered with an error, ended, or took too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            # One answer per request, so nothing can wait in the text layer's own buffer.
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                self._process.kill()
                raise PeerError(f"{op!r} took longer than {timeout_s:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise PeerError(f"process ended at {op!r}: {' | '.join(tail) or 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{op!r} failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it: asked kindly, by the end of its input, then not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Processor seconds per second of wall time, as shares of one core.

    Attributes:
        measured: By the process under measurement.
        idle: By the other children together, which should do nothing.
        foreign: By everything else on the machine but this program.
    """

    measured: float
    idle: float
    foreign: float


class LoadMeter:
    """Tells who used the processor during a measurement.

    Args:
        pids: Children by name.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        """Remember the processes."""
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._self = psutil.Process()

    def _read(self) -> tuple[float, float, dict[str, float]]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # guest time is counted in user time already
        busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        busy -= _seconds(self._self)
        own = {name: _seconds(process) for name, process in self._processes.items()}
        return time.perf_counter(), busy, own

    def start(self) -> None:
        """Begin."""
        self._before = self._read()

    def stop(self, measured: str) -> Load:
        """End, and share out what happened since `start`."""
        (wall_0, busy_0, own_0), (wall_1, busy_1, own_1) = self._before, self._read()
        wall = wall_1 - wall_0
        own = {name: own_1[name] - own_0[name] for name in own_1}
        mine, everybody = own[measured], sum(own.values())
        return Load(
            measured=mine / wall,
            idle=(everybody - mine) / wall,
            foreign=max(0.0, busy_1 - busy_0 - everybody) / wall,
        )


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def random_prompts(seed: Sequence[int], count: int, length: int, vocab: int) -> list[list[int]]:
    """Draw token ids, the same for every engine; the first 1000 ids (special ones) are left out."""
    import numpy as np

    low = min(1000, vocab // 2)
    draw = np.random.default_rng(seed).integers(low, vocab, size=(count, length))
    return draw.tolist()
