"""From flags to a running server, and back: take the port, load the model, serve, drain.

The port is taken first, so that a taken one is known at once; the server answers 503 while the
model is being loaded on a thread of its own. The first SIGTERM or Ctrl-C refuses new requests and
lets running ones finish; the second one stops at once.
"""

import asyncio
import contextlib
import copy
import errno
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jaxserve import __version__
from jaxserve.core.clock import WallClock
from jaxserve.core.errors import ConfigError, JaxserveError, MissingExtraError
from jaxserve.serve import flags
from jaxserve.serve.options import ListenOptions, ServerConfig, Settings

if TYPE_CHECKING:
    import uvicorn

    from jaxserve.engine.async_engine import AsyncLLM
    from jaxserve.serve.state import ServerState

BACKLOG = 2048
FLUSH_S = 5
"""Seconds that the last bytes of drained answers get to leave."""


def say(message: str) -> None:
    """Print one line for the person at the terminal."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str], *, prog: str = "jaxserve serve") -> int:
    """Run the server until it is told to stop.

    Args:
        argv: Arguments, without the program's name.
        prog: Name of the program, for messages.

    Returns:
        Exit code: 0 after a clean stop, 1 when the server could not start.

    Raises:
        SystemExit: With code 2, for wrong flags.
    """
    settings = flags.parse(
        argv, os.environ, prog=prog, warn=lambda text: say(f"{prog}: warning: {text}")
    )
    try:
        return run(settings)
    except JaxserveError as error:
        say(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        return 130
    return 1


def run(settings: Settings) -> int:
    """Serve with these settings.

    Returns:
        Exit code 0.

    Raises:
        JaxserveError: If the port is taken or the model cannot be loaded.
    """
    listen = settings.server.listen
    with bind(listen) as listener:
        return _serve(settings, listener)


@contextlib.contextmanager
def bind(listen: ListenOptions) -> Generator[socket.socket]:
    """Take the address, and give it back at the end.

    Raises:
        ConfigError: If somebody else has it, or it is not ours to take.
    """
    if listen.uds is not None:
        with _bind_unix(Path(listen.uds)) as listener:
            yield listener
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {listen.host!r}: {error.strerror}; choose another --host."
        ) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)  # two servers may bind the same port, but only one listens
        except OSError as error:
            where = f"{listen.host}:{listen.port}"
            raise ConfigError(_bind_problem(where, error)) from None
        yield listener


def _bind_problem(where: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program; stop it or choose another --port."
    if error.errno == errno.EACCES:
        return f"{where} needs more rights than you have; choose a --port above 1023."
    return f"cannot listen on {where}: {error.strerror}; choose another --host or --port."


@contextlib.contextmanager
def _bind_unix(path: Path) -> Generator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        try:
            _remove_stale(path)
            listener.bind(str(path))
            listener.listen(BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {str(path)!r}: {reason}; choose another --uds."
            ) from None
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(errno.EADDRINUSE, "it is in use by another program")
    path.unlink()


def address_of(config: ServerConfig, listener: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches the server.

    Raises:
        OSError: If the socket is closed.
    """
    if config.listen.uds is not None:
        return f"unix:{config.listen.uds}"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  every interface, so this machine's too
        host = "127.0.0.1"
    shown = f"[{host}]" if ":" in host else host
    return f"{config.scheme}://{shown}:{port}{config.listen.root_path}"


def _serve(settings: Settings, listener: socket.socket) -> int:
    try:
        import uvicorn  # noqa: PLC0415  an optional package, and not before the port is taken

        from jaxserve.models.hub import DEFAULT_MODEL  # noqa: PLC0415
        from jaxserve.serve.app import create_app  # noqa: PLC0415
        from jaxserve.serve.state import ServerState  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").split(".")[0] == "jaxserve":
            raise
        raise MissingExtraError(
            f"the server needs the package {error.name}; run: pip install 'jaxserve[serve]'"
        ) from None
    state = ServerState(settings.server, model=settings.model or DEFAULT_MODEL)
    config = uvicorn.Config(create_app(state), **_uvicorn_settings(settings.server))
    runner = _Runner(uvicorn.Server(config), settings, state, listener)
    return runner.run()


def _uvicorn_settings(config: ServerConfig) -> dict[str, Any]:
    tls = config.tls
    return {
        "lifespan": "off",
        "ws": "none",
        "server_header": False,
        "backlog": BACKLOG,
        "log_config": log_config(config),
        "log_level": None,
        "access_log": not config.log.disable_uvicorn_access_log,
        "timeout_keep_alive": config.listen.timeout_keep_alive,
        "timeout_graceful_shutdown": FLUSH_S,
        "ssl_keyfile": tls.ssl_keyfile,
        "ssl_certfile": tls.ssl_certfile,
        "ssl_keyfile_password": tls.ssl_keyfile_password,
        "ssl_ca_certs": tls.ssl_ca_certs,
        "ssl_cert_reqs": tls.ssl_cert_reqs,
        **({} if tls.ssl_ciphers is None else {"ssl_ciphers": tls.ssl_ciphers}),
    }


def log_config(config: ServerConfig) -> dict[str, Any]:
    """Return uvicorn's logging configuration with our own loggers beside its."""
    from uvicorn.config import LOGGING_CONFIG  # noqa: PLC0415  an optional package

    made = copy.deepcopy(LOGGING_CONFIG)
    level = config.log.uvicorn_log_level.upper()
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        made["loggers"].setdefault(name, {})["level"] = level
    ours = "DEBUG" if config.log.log_level == "trace" else config.log.log_level.upper()
    made["loggers"]["jaxserve"] = {"handlers": ["default"], "level": ours, "propagate": False}
    return made


class _Runner:
    """One server process: loads the model beside the event loop, and drains at the end."""

    def __init__(
        self,
        server: "uvicorn.Server",
        settings: Settings,
        state: "ServerState",
        listener: socket.socket,
    ) -> None:
        self.server = server
        self.settings = settings
        self.state = state
        self.listener = listener
        self.problem: BaseException | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> int:
        """Serve until told to stop.

        Raises:
            JaxserveError: If the model could not be loaded.
        """
        factory = self.server.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._main())
        if self.state.engine is not None:
            self.state.engine.close()
        if self.problem is not None:
            raise self.problem
        return 0

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        with self._signals():
            self._spawn(self._load())
            # uvicorn's own `serve` would put its signal handlers in place of ours
            await self.server._serve(sockets=[self.listener])  # noqa: SLF001

    def _spawn(self, work: Any) -> None:  # noqa: ANN401
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _load(self) -> None:
        clock = WallClock()
        start = clock.now()
        try:
            engine = await asyncio.to_thread(_make_engine, self.settings, self.state.model)
        except Exception as error:  # noqa: BLE001  raised again once the loop has ended
            self.problem = error
            self.server.should_exit = True
            return
        gc.collect()
        gc.freeze()  # the model's objects live as long as the server; do not walk them again
        self.state.engine = engine
        say(
            f"ready at {address_of(self.settings.server, self.listener)} "
            f"(model {self.state.model_names[0]}, context {engine.max_model_len} tokens, "
            f"after {clock.now() - start:.1f} s)"
        )

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        stops = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in stops}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.state.engine is None or self.state.is_draining or self.loop is None:
            # nothing to wait for, or asked twice; a thread that compiles cannot be interrupted
            say("stopped")
            sys.stdout.flush()
            os._exit(0 if number == signal.SIGTERM else 130)
        self.state.is_draining = True
        self.loop.call_soon_threadsafe(lambda: self._spawn(self._drain()))

    async def _drain(self) -> None:
        engine = self.state.engine
        timeout = self.settings.server.listen.shutdown_timeout
        if engine is not None:
            if engine.num_unfinished:
                say(f"stopping: {engine.num_unfinished} completions may go on for {timeout:g} s")
            if not await engine.drain(timeout):
                await self.state.abort_all()
                await engine.drain(FLUSH_S)
        self.server.should_exit = True


def _make_engine(settings: Settings, name: str) -> "AsyncLLM":
    from jaxserve.models.hub import resolve_model  # noqa: PLC0415  takes a moment to load

    say(f"jaxserve {__version__}: loading {name}")
    source: str | Path = name
    if settings.engine.model.load_format != "dummy":
        source = resolve_model(name, revision=settings.engine.model.revision)
    from jaxserve.engine.async_engine import AsyncLLM  # noqa: PLC0415  loads JAX, which takes long

    return AsyncLLM(source, config=settings.engine, progress=True)
