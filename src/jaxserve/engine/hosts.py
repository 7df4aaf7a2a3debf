"""Several processes that run one engine: how they meet, talk, and notice that one is lost.

All of it goes through the service that `jax.distributed` starts in process 0. Steps are announced
in its key-value store and not by a collective: a process reads an announcement while its device
still computes the last step, and a collective would wait for that.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.core.errors import ConfigError, EngineDeadError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.engine.message import Message

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 600
"""Seconds that processes wait for each other at the start; hosts may have to pull an image."""
READY_TIMEOUT_S = 3600
"""Seconds that processes wait for each other to have compiled."""
_PART = 1 << 20
"""Bytes per entry of the store, whose messages have a limit."""
_WINDOW = 128
"""Announcements after which all processes meet, so that read ones can be dropped."""
_POLL_MS = 2000
_LATE = "DEADLINE_EXCEEDED"


class Hosts:
    """The processes that run engines together, seen from one of them.

    Args:
        client: Client of the service.
        rank: Which process this is; 0 leads.
        size: How many there are.
        timeout_s: Seconds without a sign of life after which a process counts as lost.

    Attributes:
        rank: Which process this is.
        size: How many there are.
        lost: Which process has been lost, in words; None while all live.
    """

    def __init__(self, client: Any, *, rank: int, size: int, timeout_s: float) -> None:  # noqa: ANN401  jaxlib exports no type
        """Begin to give signs of life."""
        self.rank, self.size = rank, size
        self.lost: str | None = None
        self.timeout_s = timeout_s
        self._client = client
        self._listeners: list[Callable[[str], None]] = []
        self._num_channels = 0
        self._is_closed = threading.Event()
        self._has_lost = threading.Event()
        self._watch = threading.Thread(target=self._run, name="jaxserve-hosts", daemon=True)
        self._watch.start()

    @property
    def leads(self) -> bool:
        """Whether this process tells the others what to do."""
        return self.rank == 0

    def on_loss(self, listener: Callable[[str], None]) -> None:
        """Have a function called, on another thread, when a process is lost."""
        self._listeners.append(listener)

    def wait_for_loss(self, timeout_s: float) -> str | None:
        """Wait until it is known which process has been lost; None if none is."""
        self._has_lost.wait(timeout_s)
        return self.lost

    def open_channel(self) -> "Channel":
        """Open a way for announcements; all processes open theirs in the same order."""
        self._num_channels += 1
        return Channel(self, self._client, f"jaxserve/{self._num_channels}")

    def close(self) -> None:
        """Give no more signs of life."""
        self._is_closed.set()
        self._watch.join(timeout=2)

    def _run(self) -> None:
        """Tell that this process lives, and look for those that do not."""
        pause = min(1.0, self.timeout_s / 4)
        others = [rank for rank in range(self.size) if rank != self.rank]
        # Followers watch process 0 only, which watches everybody and ends when one is lost.
        watched = others if self.leads else [0]
        seen: dict[int, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in watched}
        count = 0
        while not self._is_closed.wait(pause):
            count += 1
            try:
                self._client.key_value_set(f"jaxserve/alive/{self.rank}", str(count), True)  # noqa: FBT003
                for rank in watched:
                    found = self._sign_of(rank)
                    if found != seen[rank][0]:
                        seen[rank] = found, time.monotonic()
            except Exception as error:  # noqa: BLE001  jaxlib raises what it likes
                self._lose(f"process 0 of {self.size} cannot be reached any more ({_line(error)})")
                return
            late = [r for r in watched if time.monotonic() - seen[r][1] > self.timeout_s]
            if late and not self._is_closed.is_set():
                named = ", ".join(map(str, late))
                self._lose(
                    f"process {named} of {self.size} gave no sign of life for "
                    f"{self.timeout_s:g} s; look into its log, and start all of them again"
                )
                return

    def _sign_of(self, rank: int) -> str:
        try:
            return self._client.key_value_try_get(f"jaxserve/alive/{rank}")
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return ""
            raise

    def _lose(self, reason: str) -> None:
        self.lost = reason
        self._has_lost.set()
        logger.error("a host is lost: %s", reason)
        for listener in self._listeners:
            listener(reason)


class Channel:
    """Announcements of process 0 to all others, in order.

    Args:
        hosts: The processes.
        client: Client of the service.
        name: Of the channel, the same everywhere.
    """

    def __init__(self, hosts: Hosts, client: Any, name: str) -> None:  # noqa: ANN401
        """Nothing has been said yet."""
        self.hosts = hosts
        self._client, self._name = client, name
        self._count = 0
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Announce something.

        Raises:
            EngineDeadError: If a process is lost.
        """
        with self._lock:
            self._check()
            data, key = message.to_bytes(), self._key()
            num_parts = max(1, -(-len(data) // _PART))
            for part in range(num_parts - 1, -1, -1):  # the first part, which says how many, last
                piece = data[part * _PART : (part + 1) * _PART]
                head = num_parts.to_bytes(4, "little") if part == 0 else b""
                self._client.key_value_set_bytes(f"{key}/{part}", head + piece)
            self._advance()

    def receive(self) -> Message:
        """Wait for the next announcement.

        Raises:
            EngineDeadError: If process 0 is lost.
        """
        key = self._key()
        first = self._get(f"{key}/0")
        data = [first[4:]]
        data += [self._get(f"{key}/{i}") for i in range(1, int.from_bytes(first[:4], "little"))]
        self._advance()
        return Message.from_bytes(b"".join(data))

    def meet(self, name: str, timeout_s: float) -> None:
        """Wait until all processes are here.

        Raises:
            EngineDeadError: If one does not come in time.
        """
        try:
            self._client.wait_at_barrier(f"{self._name}/{name}", int(timeout_s * 1000))
        except Exception as error:
            self._check()
            raise EngineDeadError(
                f"{self.hosts.size} processes did not all come to {name!r} within {timeout_s:g} s "
                f"({_line(error)}); look into their logs, then start all of them again."
            ) from error

    def _key(self) -> str:
        return f"{self._name}/{self._count // _WINDOW}/{self._count}"

    def _get(self, key: str) -> bytes:
        while True:
            self._check()
            try:
                return self._client.blocking_key_value_get_bytes(key, _POLL_MS)
            except Exception as error:
                if _LATE not in str(error):
                    raise EngineDeadError(
                        f"process 0 cannot be reached any more ({_line(error)})."
                    ) from error

    def _advance(self) -> None:
        """Count one announcement; when a window is full, meet and drop it."""
        self._count += 1
        if self._count % _WINDOW:
            return
        window = self._count // _WINDOW - 1
        self.meet(f"window {window}", READY_TIMEOUT_S)
        if self.hosts.leads:
            self._client.key_value_delete(f"{self._name}/{window}/")

    def _check(self) -> None:
        if self.hosts.lost is not None:
            raise EngineDeadError(f"a host is lost: {self.hosts.lost}.")


_joined: list[Hosts] = []


def join(options: ParallelOptions) -> Hosts | None:
    """Meet the other processes; must come before anything touches a device.

    Args:
        options: Where and who they are.

    Returns:
        The processes; None if this one is alone. A second call returns the same.

    Raises:
        ConfigError: If they cannot meet.
    """
    if not options.is_multi_host:
        return None
    if _joined:
        return _joined[0]
    # A process that is lost is reported by `Hosts`; without this JAX would end all the others.
    jax.config.update("jax_enable_recoverability", True)  # noqa: FBT003
    # It would catch SIGTERM, with which servers are told to drain.
    jax.config.update("jax_enable_preemption_service", False)  # noqa: FBT003
    is_auto = options.dist_init_addr == "auto"
    try:
        jax.distributed.initialize(
            None if is_auto else options.dist_init_addr,
            options.nnodes,
            options.node_rank,
            cluster_detection_method=None if is_auto else "deactivate",
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=max(10, 2 * options.host_timeout),
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the processes cannot meet at dist_init_addr={options.dist_init_addr!r} "
            f"({_line(error)}); it must be an address of process 0 that all can reach, with a free "
            "port, and nothing may have used JAX's devices before."
        ) from error
    from jax._src import distributed  # noqa: PLC0415, TID251  JAX has no public way to its store

    client = distributed.global_state.client
    rank, size = jax.process_index(), jax.process_count()
    logger.info("process %d of %d, with %d devices", rank, size, jax.local_device_count())
    hosts = Hosts(client, rank=rank, size=size, timeout_s=options.host_timeout)
    _joined.append(hosts)
    return hosts


def leave_hosts() -> None:
    """Part from the other processes, at the end of this one."""
    while _joined:
        hosts = _joined.pop()
        hosts.close()
        with contextlib.suppress(Exception):  # the others may be gone
            jax.distributed.shutdown()


def _line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
