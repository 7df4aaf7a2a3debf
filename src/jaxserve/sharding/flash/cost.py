"""What links cost: rates, fixed times and incast of a cluster with two tiers of links."""

import math
from dataclasses import dataclass, fields, replace

from jaxserve.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Links of a cluster of servers with equally many GPUs each; every rate is per direction.

    Attributes:
        gpus: GPUs of a server, each with a port on both tiers (m).
        up_rate: Bytes per second of a GPU's scale-up port, inside a server (B1).
        out_rate: Bytes per second of a GPU's scale-out port, between servers (B2).
        up_latency: Seconds that a step inside a server takes whatever its size (alpha1).
        out_latency: Seconds that a step between servers takes whatever its size (alpha2).
        incast: What each doubling of the senders to one port adds to its time, as a share
            (gamma); 0 if a port serves many senders as fast as one.

    Raises:
        ConfigError: If there is no GPU, a rate is not above 0, or anything else below 0.
    """

    gpus: int = 8
    up_rate: float = 450e9
    out_rate: float = 50e9
    up_latency: float = 3e-6
    out_latency: float = 10e-6
    incast: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no links are like."""
        if not isinstance(self.gpus, int) or isinstance(self.gpus, bool) or self.gpus < 1:
            raise ConfigError(
                f"gpus must be a whole number of at least 1, got {self.gpus!r}; give the GPUs of "
                "one server."
            )
        for field in fields(self)[1:]:
            value, is_rate = getattr(self, field.name), field.name.endswith("_rate")
            if not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                needed = "above 0, in bytes per second" if is_rate else "0 or more"
                raise ConfigError(
                    f"{field.name} must be finite and {needed}, got {value!r}; measure it, or "
                    "leave it out for the default."
                )

    def per_row(self, row_bytes: int) -> "CostModel":
        """Return the same links for matrices that count rows instead of bytes.

        Args:
            row_bytes: Bytes of one row, at least 1.

        Raises:
            ConfigError: If a row has no bytes.

        >>> CostModel(out_rate=50e9).per_row(1000).out_rate
        50000000.0
        """
        if row_bytes < 1:
            raise ConfigError(f"row_bytes must be at least 1, got {row_bytes}; count all bytes.")
        return replace(self, up_rate=self.up_rate / row_bytes, out_rate=self.out_rate / row_bytes)
