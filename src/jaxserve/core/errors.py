"""The error tree. Every message says what was found, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class JaxserveError(Exception):
    """Base of every error that jaxserve raises on purpose."""


class ConfigError(JaxserveError, ValueError):
    """A setting is impossible, or two settings disagree."""


class RequestError(JaxserveError, ValueError):
    """The caller's request cannot be carried out.

    Attributes:
        status: HTTP status that a server answers with.
        param: Name of the offending request field, if one field is to blame.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        """Keep the message, the HTTP status and the name of the field to blame."""
        super().__init__(message)
        self.status = status
        self.param = param


class CapacityError(JaxserveError, RuntimeError):
    """Memory, pages or a queue are full.

    Attributes:
        retry_after_s: Seconds after which trying again makes sense, if known.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """Keep the message and the time after which to try again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeclinedError(CapacityError):
    """A scheduler declined a request whose service-level objectives it cannot keep.

    Attributes:
        reason: What is short: `compute`, `memory`, or `expired` if a deadline has passed already.
        objective: The objective that would be missed, such as `ttft_ms`.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "compute",
        objective: str = "ttft_ms",
        retry_after_s: float | None = None,
    ) -> None:
        """Keep the message, what stands against the request, and when to try again."""
        super().__init__(message, retry_after_s=retry_after_s)
        self.reason = reason
        self.objective = objective


class UnsupportedError(JaxserveError, NotImplementedError):
    """A right request, but not for this device, dtype, format or version."""


class MissingExtraError(JaxserveError, ImportError):
    """An optional package is missing; the message holds the install command."""


class CheckpointError(ConfigError):
    """A checkpoint is corrupt, truncated, or does not match its configuration."""


class ModelNotFoundError(ConfigError):
    """A model name or path leads nowhere."""


class EngineDeadError(JaxserveError, RuntimeError):
    """The engine loop has stopped; no further request can be served."""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Name the nearest known word, as a sentence to append to an error message.

    Args:
        found: The unknown word.
        known: Words that would have been accepted.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is near.

    >>> did_you_mean("tempurature", ["temperature", "top_p"])
    " Did you mean 'temperature'?"
    """
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.7)
    return f" Did you mean {near[0]!r}?" if near else ""
