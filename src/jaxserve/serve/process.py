"""A server process: load the model beside the event loop, serve, drain.

The server answers 503 while the model is being loaded on a thread of its own. The first SIGTERM or
Ctrl-C refuses new requests and lets running ones finish; the second one stops at once.
"""

import asyncio
import contextlib
import copy
import gc
import signal
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from jaxserve import __version__
from jaxserve.core.clock import WallClock
from jaxserve.core.errors import ConfigError, EngineDeadError
from jaxserve.models.hub import DEFAULT_MODEL, resolve_model
from jaxserve.serve.app import create_app
from jaxserve.serve.lora_routes import load_modules
from jaxserve.serve.options import ServerConfig, Settings
from jaxserve.serve.page import WithoutPolls
from jaxserve.serve.state import ServerState
from jaxserve.serve.terminal import leave, say

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncLLM

FLUSH_S = 5
"""Seconds that the last bytes of drained answers get to leave."""
BACKLOG = 2048
_WATCH_S = 1.0


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
    made = copy.deepcopy(LOGGING_CONFIG)
    level = config.log.uvicorn_log_level.upper()
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        made["loggers"].setdefault(name, {})["level"] = level
    made["filters"] = {"without_polls": {"()": WithoutPolls}}
    made["loggers"]["uvicorn.access"]["filters"] = ["without_polls"]
    ours = "DEBUG" if config.log.log_level == "trace" else config.log.log_level.upper()
    made["loggers"]["jaxserve"] = {"handlers": ["default"], "level": ours, "propagate": False}
    return made


class _Server(uvicorn.Server):
    """A server that leaves the signals to `Process`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Install no handlers."""
        yield


class Process:
    """One server process: loads the model beside the event loop, and drains at the end.

    Args:
        settings: What was asked for.
        listener: A listening socket.
        address: Where clients find it.

    Raises:
        ConfigError: If the TLS files cannot be used.
    """

    def __init__(self, settings: Settings, listener: socket.socket, address: str) -> None:
        """Build the application; nothing is loaded yet."""
        self.settings = settings
        self.state = ServerState(settings.server, model=settings.model or DEFAULT_MODEL)
        self._listener = listener
        self._address = address
        self._problem: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(create_app(self.state), **_uvicorn_settings(settings.server))
        try:
            config.load()
        except OSError as error:  # TLS errors are such, too
            raise ConfigError(
                f"the TLS files cannot be used: {error.strerror or error}. Check --ssl-certfile, "
                "--ssl-keyfile and --ssl-keyfile-password."
            ) from None
        self._server = _Server(config)

    def run(self) -> int:
        """Serve until told to stop.

        Returns:
            Exit code 0.

        Raises:
            JaxserveError: If the model could not be loaded.
        """
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._main())
        if isinstance(self._problem, EngineDeadError):
            raise self._problem  # its last step may never come back; nothing can be closed
        if self.state.engine is not None:
            self.state.engine.close()
        if self._problem is not None:
            raise self._problem
        return 0

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        with self._signals():
            self._spawn(self._load())
            await self._server.serve(sockets=[self._listener])

    def _spawn(self, work: Any) -> None:  # noqa: ANN401
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        clock = WallClock()
        start = clock.now()
        try:
            engine = await asyncio.to_thread(_make_engine, self.settings, self.state.model)
        except Exception as error:  # noqa: BLE001  raised again once the loop has ended
            self._problem = error
            self._server.should_exit = True
            return
        if self.settings.engine.parallel.is_multi_host:
            self._spawn(self._watch(engine))
        gc.collect()
        gc.freeze()  # the model's objects live as long as the server; do not walk them again
        self.state.engine = engine
        say(
            f"ready at {self._address} "
            f"(model {self.state.model_names[0]}, context {engine.max_model_len} tokens, "
            f"after {clock.now() - start:.1f} s)"
        )

    async def _watch(self, engine: "AsyncLLM") -> None:
        """End this process once its engine is dead, so that all can be started again."""
        while not self._server.should_exit:
            try:
                engine.check_health()
            except EngineDeadError as error:
                self._problem = error
                await self.state.idle(FLUSH_S)
                self._server.should_exit = True
                return
            await asyncio.sleep(_WATCH_S)

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
        if self.state.engine is None or self.state.is_draining or self._loop is None:
            # nothing to wait for, or asked twice; a thread that compiles cannot be interrupted
            say("stopped")
            leave(0 if number == signal.SIGTERM else 130)
        self.state.is_draining = True
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._drain()))

    async def _drain(self) -> None:
        engine = self.state.engine
        timeout = self.settings.server.listen.shutdown_timeout
        if engine is not None:
            if engine.num_unfinished:
                say(f"stopping: {engine.num_unfinished} completions may go on for {timeout:g} s")
            if not (await engine.drain(timeout) and await self.state.idle(FLUSH_S)):
                await self.state.abort()
                await self.state.give_up_calls()
                await self.state.idle(FLUSH_S)
        self._server.should_exit = True


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop where it is installed; a quarter less work per token."""
    try:
        import uvloop  # noqa: PLC0415  not on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


def _make_engine(settings: Settings, name: str) -> "AsyncLLM":
    say(f"jaxserve {__version__}: loading {name}")
    source: str | Path = name
    if settings.engine.model.load_format != "dummy":
        source = resolve_model(name, revision=settings.engine.model.revision)
    from jaxserve.cluster.start import fleet_options, open_fleet  # noqa: PLC0415  loads JAX
    from jaxserve.engine.async_engine import AsyncLLM  # noqa: PLC0415  loads JAX, which takes long

    options = fleet_options(settings.server.cluster, settings.engine)
    if options.is_fleet:
        # Actors look a name up where they are; it has been downloaded here by now.
        place = name if options.cluster == "ray" else source
        engine = open_fleet(place, options, config=settings.engine, progress=True)
    else:
        engine = AsyncLLM(source, config=settings.engine, progress=True)
    try:
        load_modules(engine, settings.server.api)
    except BaseException:
        engine.close()
        raise
    return engine
