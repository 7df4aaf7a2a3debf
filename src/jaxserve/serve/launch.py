"""From flags to a taken port; what comes after needs packages that take long to load."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NoReturn

from jaxserve.core.errors import ConfigError, JaxserveError, MissingExtraError
from jaxserve.serve import flags
from jaxserve.serve.options import ListenOptions, ServerConfig, Settings
from jaxserve.serve.terminal import leave, say

BACKLOG = 2048


def main(argv: Sequence[str], *, prog: str = "jaxserve serve") -> NoReturn:
    """Run the server until it is told to stop, and end the process.

    The exit code is 0 after a clean stop, 1 when the server could not start, 2 for wrong flags.

    Args:
        argv: Arguments, without the program's name.
        prog: Name of the program, for messages.
    """
    settings = flags.parse(
        argv, os.environ, prog=prog, warn=lambda text: say(f"{prog}: warning: {text}")
    )
    try:
        code = run(settings)
    except JaxserveError as error:
        say(f"{prog}: error: {error}")
        code = 1
    except KeyboardInterrupt:
        code = 130
    leave(code)


def run(settings: Settings) -> int:
    """Serve with these settings.

    Returns:
        Exit code 0.

    Raises:
        JaxserveError: If the port is taken or the model cannot be loaded.
    """
    listen = settings.server.listen
    if settings.engine.parallel.is_multi_host and not _leads(settings):
        return 0
    with bind(listen) as listener:
        return _serve(settings, listener)


def _leads(settings: Settings) -> bool:
    """Meet the other processes that run this engine; those behind the first follow it to the end.

    Returns:
        Whether this is the first one, which serves.
    """
    from jaxserve.engine.hosts import join  # noqa: PLC0415  loads JAX
    from jaxserve.models.hub import DEFAULT_MODEL  # noqa: PLC0415

    hosts = join(settings.engine.parallel)
    if hosts is None or hosts.leads:
        return True
    from jaxserve.engine.follower import follow  # noqa: PLC0415  loads JAX

    say(f"process {hosts.rank} of {hosts.size}: process 0 takes the requests")
    follow(settings.model or DEFAULT_MODEL, config=settings.engine)
    return False


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
        # optional packages, and nothing that is needed to find that the port is taken
        from jaxserve.serve.process import Process  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").split(".")[0] == "jaxserve":
            raise
        raise MissingExtraError(
            f"the server needs the package {error.name}; run: pip install 'jaxserve[serve]'"
        ) from None
    return Process(settings, listener, address_of(settings.server, listener)).run()
