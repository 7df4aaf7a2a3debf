"""What the attention kernels share: the form of heads and slots, and the running softmax."""

from dataclasses import dataclass

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import F32, Emitter, Value, WeightType, const

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


def soften(
    e: Emitter, scores: Value, count: Value, top: Value, mass: Value, sums: list[Value]
) -> None:
    """Turn a block's scores into weights relative to the running maximum.

    Args:
        e: Emits the instructions.
        scores: The block's, float32; written.
        count: How many there are.
        top: The running maximum; updated.
        mass: Sums of weights, by lane; faded, and the block's are added.
        sums: Weighted sums of values; faded.
    """
    b = e.b
    best = e.variable(e.vector, e.splat_const(LOWEST))
    with e.loop(const(0), count, const(e.width)) as i:
        row = e.load(e.at(scores, i, 4), "float32")
        b.store(e.larger(b.load(best, typ=e.vector), row), best)
    before = b.load(top, typ=F32)
    highest = e.max_lanes(b.load(best, typ=e.vector))
    after = b.select(b.fcmp_ordered(">", highest, before), highest, before)
    b.store(after, top)
    fade = e.exp(e.splat(b.fsub(before, after)))
    b.store(b.fmul(b.load(mass, typ=e.vector), fade), mass)
    for part in sums:
        b.store(b.fmul(b.load(part, typ=e.vector), fade), part)
    shift = e.splat(after)
    with e.loop(const(0), count, const(e.width)) as i:
        place = e.at(scores, i, 4)
        weight = e.exp(b.fsub(e.load(place, "float32"), shift))
        e.store(weight, place)
        b.store(b.fadd(b.load(mass, typ=e.vector), weight), mass)
