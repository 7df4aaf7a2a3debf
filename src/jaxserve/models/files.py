"""Reading files that may be damaged, with errors that say what was found and what to do."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxserve.core.errors import CheckpointError, ModelNotFoundError

AGAIN = "the file is damaged or was not downloaded whole; download it again."
"""The advice for most damaged files."""


def describe_start(head: bytes) -> str:
    """Say what a file seems to be, from its first bytes, when it is not what was expected.

    Args:
        head: At least the first 32 bytes, if the file has them.

    Returns:
        Words for an error message: what was found and what to do.
    """
    if not head:
        return "found an empty file; download it again."
    if head.startswith(b"version https://git-lfs"):
        return "found a Git LFS pointer instead of the file; run `git lfs pull`."
    if head.lstrip()[:1] == b"<":
        return "found a web page instead of the file; check the address and download it again."
    return f"found a file that begins with {head[:8]!r}; {AGAIN}"


def cannot_open(path: Path, error: OSError) -> ModelNotFoundError | CheckpointError:
    """Turn a failure to open or read a file into an error to raise.

    Args:
        path: The file.
        error: What the system said.

    Returns:
        `ModelNotFoundError` if there is no such file, otherwise `CheckpointError`.
    """
    if isinstance(error, FileNotFoundError):
        return ModelNotFoundError(f"{path}: no such file; check the path.")
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions."
    )


def read_json(path: Path) -> Mapping[str, object]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ModelNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); {describe_start(content[:64])}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: found {type(found).__name__}, expected a JSON object; repair the file or "
            "download the model again."
        )
    return {str(key): value for key, value in found.items()}
