"""Calls as bytes: a name, plain values, and arrays; nothing that runs when it is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Plain = int | float | str | bool | list["Plain"] | None
"""What JSON can carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One call.

    Attributes:
        name: What is to be done.
        values: Plain arguments.
        arrays: Arguments that are arrays.
    """

    name: str
    values: Mapping[str, Plain] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Write it: the length of the head, the head as JSON, the arrays one after the other."""
        parts = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        head = json.dumps(
            {
                "name": self.name,
                "values": dict(self.values),
                "arrays": [(name, part.dtype.str, part.shape) for name, part in parts.items()],
            }
        ).encode()
        body = [part.tobytes() for part in parts.values()]
        return b"".join([len(head).to_bytes(4, "little"), head, *body])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Message":
        """Read it; arrays are views of `data`."""
        start = 4 + int.from_bytes(data[:4], "little")
        head = json.loads(data[4:start])
        arrays: dict[str, np.ndarray] = {}
        for name, kind, shape in head["arrays"]:
            dtype = np.dtype(kind)
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
            start += count * dtype.itemsize
        return cls(name=head["name"], values=head["values"], arrays=arrays)
