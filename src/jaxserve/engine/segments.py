"""Which segments of which sequences have clusters: the host's side of sparse attention.

An entry belongs to a full segment, which is a run of whole pages. It is named like the last of
them, by the hash of all tokens up to its end, so whoever finds the pages of a prefix finds its
clusters, and it is forgotten together with that page. What nobody holds is evicted, the least
recently used first.
"""

from collections.abc import Callable, Iterable

from jaxserve.cache.pages import PageHash, PagePool
from jaxserve.core.errors import CapacityError
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import SequenceState
from jaxserve.engine.sparse import SparseSpec

_MOST_PER_STEP = 4
"""Segments clustered behind one step; what is found in a cached prefix may be many at once."""


class Segments:
    """Gives segments their entries and takes them back. Called by the engine's thread only.

    Args:
        runner: Holds the clusters.
        spec: Settings.
        pool: Pages; tells which prefixes it forgets.
        hash_of: Gives the hash of a sequence's first tokens, of so many; None if nobody may share
            them.

    Attributes:
        entries: Book-keeping of entries.
    """

    def __init__(
        self,
        runner: Runner,
        spec: SparseSpec,
        pool: PagePool,
        hash_of: Callable[[SequenceState, int], PageHash | None],
    ) -> None:
        """Start empty."""
        self.entries = PagePool(spec.num_entries, spec.segment_len)
        self._runner = runner
        self._spec = spec
        self._pool = pool
        self._hash_of = hash_of
        pool.on_forget = self.entries.forget_one

    def extend(self, sequences: Iterable[SequenceState]) -> None:
        """Give entries to segments that have become full, and lie behind the recent window."""
        left = _MOST_PER_STEP
        for sequence in sequences:
            while self._is_due(sequence):
                end = (len(sequence.segments) + 1) * self._spec.segment_len
                digest = self._hash_of(sequence, end)
                found = [] if digest is None else self.entries.match([digest])
                if found:
                    self.entries.hold(found)
                    sequence.segments += found
                    continue
                if not left or not self._build(sequence, digest):
                    break
                left -= 1

    def _is_due(self, sequence: SequenceState) -> bool:
        if sequence.attention_mass >= 1 or sequence.row < 0:
            return False
        number, config = len(sequence.segments), self._spec.config
        end = (number + 1) * self._spec.segment_len
        is_long = sequence.num_tokens >= config.min_context and number < self._spec.num_segments
        return is_long and end + config.window <= sequence.num_computed

    def _build(self, sequence: SequenceState, digest: PageHash | None) -> bool:
        """Cluster the next segment; False where there is no entry for it."""
        try:
            (entry,) = self.entries.take(1)
        except CapacityError:
            return False  # read whole until others have left
        number, pages = len(sequence.segments), self._spec.pages_per_segment
        own = sequence.pages[number * pages : (number + 1) * pages]
        self._runner.cluster(sequence.row, own, number, entry)
        if digest is not None:
            self.entries.name(entry, digest)
        sequence.segments.append(entry)
        return True

    def release(self, sequence: SequenceState) -> None:
        """Take the entries of a sequence that leaves; those of cached prefixes stay findable."""
        for entry in sequence.segments:
            digest = self.entries.name_of(entry)
            if digest is not None and not self._pool.knows(digest):
                self.entries.forget_one(digest)
        self.entries.release(sequence.segments)
        sequence.segments = []
