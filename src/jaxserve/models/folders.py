"""Writing a folder of files so that it is there whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from jaxserve.core.errors import CapacityError, ConfigError, JaxserveError
from jaxserve.core.units import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
"""How libraries that write by themselves report the same."""


@contextlib.contextmanager
def new_folder(target: Path, *, num_bytes: int = 0) -> Generator[Path]:
    """Make a folder that appears under its name only when everything in it has been written.

    Args:
        target: The folder; it must not exist, or be empty. Its parents are made.
        num_bytes: Space that it will take, to refuse early where the disk has less.

    Yields:
        A temporary folder beside it, to be filled; removed if the block fails.

    Raises:
        ConfigError: If the target exists or cannot be written.
        CapacityError: If the disk is full; says how much is missing.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  keeps links, unlike resolve
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already; remove it, or choose another target.")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise CapacityError(
                f"the disk has too little space for {target}: found {format_bytes(free)} free, "
                f"expected {format_bytes(num_bytes)}, {format_bytes(num_bytes - free)} are "
                "missing; free some space or choose another target."
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield staging
            _open_up(staging)
            _put_in_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError as error:
        if not target.exists():
            raise
        raise ConfigError(
            f"{target} came to exist while it was being written; choose another target."
        ) from error


def _open_up(folder: Path) -> None:
    """Give the permissions that the user's new files have; temporary ones have fewer."""
    mask = os.umask(0o077)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def _explained(target: Path) -> Generator[None]:
    try:
        yield
    except JaxserveError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(target) from error
        raise ConfigError(
            f"cannot write {target} ({error.strerror or error}); check the path and its "
            "permissions."
        ) from error
    except Exception as error:
        if any(words in str(error) for words in _FULL_WORDS):
            raise _disk_full(target) from error
        raise


def _disk_full(target: Path) -> CapacityError:
    free = shutil.disk_usage(target.parent).free
    return CapacityError(
        f"the disk is full while writing {target}: found {format_bytes(free)} free; free some "
        "space or choose another target. Nothing was left behind."
    )
