"""What a choice among clusters works on: settings, where clusters lie, and what is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.cpu_kernels.emit import Emitter, Value, WeightType, const
from jaxserve.cpu_kernels.places import load_int

CLUSTER_BLOCK = 256
"""Clusters whose weights are predicted at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is fixed when the kernel is built.

    Attributes:
        head_len: Samples of the first range, which are all of its tokens.
        num_strata: Ranges behind it.
        drawn: Samples of each.
        z: Standard deviations of safety.
        uses_spread: Whether predicted weights count variances.
        uses_ratio: Whether samples correct predicted weights, rather than give mean ones.
        most: Tokens of the last cluster that are read at a time.
        num_buckets: Buckets of the order.
        bucket_shift: Bits of a float that it does not look at.
        highest_bucket: The remaining bits of the largest share.
    """

    head_len: int
    num_strata: int
    drawn: int
    z: float
    uses_spread: bool
    uses_ratio: bool
    most: int
    num_buckets: int
    bucket_shift: int
    highest_bucket: int

    @property
    def num_samples(self) -> int:
        """Samples of a head."""
        return self.head_len + self.num_strata * self.drawn


def num_blocks(clusters: int) -> int:
    """Return how many blocks so many clusters make."""
    return -(-clusters // CLUSTER_BLOCK)


def digest(sampling: Sampling) -> str:
    """Name settings in a few letters."""
    return f"{abs(hash(sampling)) % 16**12:x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Addresses of the clusters of one head, which lie in entries of so many each.

    Attributes:
        entries: The entries of its row.
        head: Its number.
        kv_heads: Heads of an entry.
        per_entry: Clusters of an entry.
        centroids: Mean keys of all entries.
        spread: Variances, float32.
        sizes: Tokens.
        begin: First places within the segment.
        kind: Element type of mean keys.
        segment_len: Places from segment to segment.
    """

    entries: Value
    head: Value
    kv_heads: int
    per_entry: int
    centroids: Value
    spread: Value
    sizes: Value
    begin: Value
    kind: WeightType
    segment_len: int

    def row(self, e: Emitter, cluster: Value) -> Value:
        """Return where a cluster lies among those of all entries and heads."""
        b, each = e.b, const(self.per_entry)
        entry = load_int(e, self.entries, b.udiv(cluster, each))
        first = b.mul(b.add(b.mul(entry, const(self.kv_heads)), self.head), each)
        return b.add(first, b.urem(cluster, each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Addresses of what one head writes; by number of the cluster unless said otherwise.

    Attributes:
        best: Highest logarithm of a weight of each block, for each query head.
        weight: Weights of each query head.
        size: Tokens.
        begin: First places.
        order: Numbers of clusters, the best first.
        ordered_size: Tokens; by the order.
        rank: Tokens before each cluster; by the order.
        model: Masses that the samples are compared with, for each query head; by the order. In the
            end, masses of what is not read.
        run_begin: First place of each run that is read; by the order.
        run_size: Its places.
        num_tokens: Tokens that are read, a single number.
        level: What masses are relative to, of each query head.
        mass: Estimated mass of all clusters, of each query head.
        tail: Estimated mass of what is not read, of each query head; None if nobody asks.
        share: Estimated share of the mass that is read, likewise.
        pieces: Run and place in it where each piece begins; None if nobody asks.
    """

    best: Sequence[Value]
    weight: Sequence[Value]
    size: Value
    begin: Value
    order: Value
    ordered_size: Value
    rank: Value
    model: Sequence[Value]
    run_begin: Value
    run_size: Value
    num_tokens: Value
    level: Value
    mass: Value
    tail: Value | None = None
    share: Value | None = None
    pieces: Value | None = None
