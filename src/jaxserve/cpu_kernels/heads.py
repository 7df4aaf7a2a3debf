"""What the attention kernels share: the form of heads and slots."""

from dataclasses import dataclass

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import WeightType

KEY_BLOCK = 64
"""Keys between two updates of the running softmax; slots hold a multiple of it."""
LOWEST = -1e30
"""Score of a key that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Sizes that are fixed when a kernel is built.

    Attributes:
        q_heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Size of a head.
        kind: Element type of the slots.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    kind: WeightType

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q_heads // self.kv_heads


def supports(head_dim: int, capacity: int) -> bool:
    """Tell whether heads fill whole vector registers and slots whole blocks."""
    return head_dim % ffi.host().width == 0 and capacity % KEY_BLOCK == 0
