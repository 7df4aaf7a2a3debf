"""GPUs as processes in network namespaces of their own, with links whose rates are bounded.

Each GPU has two interfaces: `nic`, to a switch that all GPUs share, whose rate is bounded at both
ends by token buckets; and `near`, to a switch of its server, as fast as the machine is. Addresses
of a server's own GPUs are routed over the latter.

Namespaces have no names: they are those of the processes, and the kernel takes them away, with
interfaces and queues, when the last of these ends. Processes get SIGKILL when the one that started
them ends, however it does. So nothing can be left over.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

TOOLS: Final = ("ip", "tc", "nsenter")
_PR_SET_PDEATHSIG: Final = 1


def why_not() -> str | None:
    """Return why this machine cannot make such a network; None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"needs Linux with iproute2 and util-linux; missing: {', '.join(missing) or 'Linux'}"
    probe = "import os; os.unshare(os.CLONE_NEWNET | os.CLONE_NEWUTS)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
    if found.returncode:
        return "needs root (CAP_SYS_ADMIN), to make network namespaces"
    script = (
        f"{probe}; import subprocess; run = lambda c: subprocess.run(c.split(), check=True);"
        "run('ip link add va type veth peer name vb'); run('ip link add vc type bridge');"
        "run('tc qdisc add dev va root tbf rate 1mbit burst 32kb latency 50ms')"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    if found.returncode:
        said = found.stderr.strip().splitlines() or ["no reason given"]
        return f"needs a kernel with veth, bridge and tbf: {said[0]}"
    return None


def enter() -> None:
    """Give this process namespaces of its own, and have it end with its parent."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    os.unshare(os.CLONE_NEWNET | os.CLONE_NEWUTS)


def address(gpu: int) -> str:
    """Return where a GPU is reached."""
    return f"10.77.0.{gpu + 1}"


def _shape(device: str, mbit: float) -> str:
    return f"tc qdisc add dev {device} root tbf rate {mbit}mbit burst 32kb latency 100ms"


def settle(gpu: int, gpus: int, mbit: float) -> None:
    """Enter a namespace, say so, and shape the link once its other end is there.

    Args:
        gpu: Which one this process is.
        gpus: GPUs of a server.
        mbit: Bandwidth of a link.
    """
    enter()
    print("entered", flush=True)
    sys.stdin.readline()
    for command in own_commands(gpu, gpus, mbit):
        subprocess.run(command.split(), check=True)


def own_commands(gpu: int, gpus: int, mbit: float) -> list[str]:
    """Return what sets up a GPU's interfaces, inside its namespace."""
    first = gpu - gpu % gpus
    routes = [
        f"ip route add {address(other)}/32 via 10.88.0.{other + 1} dev near src {address(gpu)}"
        for other in range(first, first + gpus)
        if other != gpu
    ]
    return [
        "ip link set lo up",
        f"ip addr add {address(gpu)}/24 dev nic",
        f"ip addr add 10.88.0.{gpu + 1}/24 dev near",
        "ip link set dev nic up",
        "ip link set dev near up",
        _shape("nic", mbit),
        *routes,
    ]


class Cluster:
    """Servers of GPUs, each a process that reads commands and writes answers, a line each.

    Args:
        servers: Servers.
        gpus: GPUs of each.
        mbit: Rate of each GPU's interface to the shared switch, in Mbit/s, per direction.
        module: What each process runs, as `python -m`.
        environment: Added to that of the processes.
    """

    def __init__(
        self,
        servers: int,
        gpus: int,
        mbit: float,
        module: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet."""
        self.servers, self.gpus, self.mbit = servers, gpus, mbit
        self._module, self._environment = module, {**os.environ, **(environment or {})}
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        """Start the processes and connect them."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all processes; their namespaces go with them."""
        self.close()

    def _start(self) -> None:
        count = self.servers * self.gpus
        switch = self._spawn([sys.executable, "-m", "benchmarks.rooms.flash.switch"])
        for gpu in range(count):
            arguments = [str(gpu), str(self.servers), str(self.gpus), str(self.mbit)]
            self._spawn([sys.executable, "-m", self._module, *arguments])
        for process in self._processes:
            self._expect(process, "entered")
        self._switch(switch.pid, "ip link set lo up")
        bridges = ["out", *(f"in{server}" for server in range(self.servers))]
        for bridge in bridges:
            self._switch(switch.pid, f"ip link add {bridge} type bridge")
            self._switch(switch.pid, f"ip link set {bridge} up")
        for gpu, process in enumerate(self._processes[1:]):
            for port, peer, bridge in (
                (f"p{gpu}", "nic", "out"),
                (f"q{gpu}", "near", f"in{gpu // self.gpus}"),
            ):
                self._switch(
                    switch.pid,
                    f"ip link add {port} type veth peer name {peer} netns {process.pid}",
                )
                self._switch(switch.pid, f"ip link set {port} master {bridge} up")
            self._switch(switch.pid, _shape(f"p{gpu}", self.mbit))
        self.tell(["set up"] * count)
        self.hear("ready")

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd=Path(__file__).resolve().parents[3],
        )
        self._processes.append(process)
        return process

    @staticmethod
    def _switch(pid: int, command: str) -> None:
        subprocess.run(
            ["nsenter", "-t", str(pid), "-n", *command.split()],
            check=True, capture_output=True, text=True,
        )  # fmt: skip

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _expect(self, process: subprocess.Popen[str], word: str) -> str:
        for line in self._pipe(process.stdout):
            if line.startswith(word):
                return line.removeprefix(word).strip()
            # Libraries write there, too: gloo says whom it has connected to.
        raise RuntimeError(f"a process ended where {word!r} was expected; it said why above.")

    def tell(self, lines: Sequence[str]) -> None:
        """Send each GPU a line."""
        for process, line in zip(self._processes[1:], lines, strict=True):
            pipe = self._pipe(process.stdin)
            pipe.write(line + "\n")
            pipe.flush()

    def hear(self, word: str) -> list[str]:
        """Wait for a line from each GPU that begins with a word, and return what follows it."""
        return [self._expect(process, word) for process in self._processes[1:]]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    self._pipe(pipe).close()
        self._processes = []
