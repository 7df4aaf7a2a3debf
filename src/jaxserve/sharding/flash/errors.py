"""What can be wrong with an exchange, by name."""

from jaxserve.core.errors import CapacityError, ConfigError


class TrafficError(ConfigError):
    """A matrix is none of traffic: not square, not whole, negative, or too large."""


class MeshError(ConfigError):
    """A mesh is not one of servers of GPUs, or a server of it spans hosts."""


class CountsError(ConfigError):
    """Devices disagree on counts, so that they would wait for each other forever."""


class RowsError(CapacityError):
    """Rows were left out as there was no room for them."""
