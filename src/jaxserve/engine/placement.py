"""Where sequences lie on the device: rows, pages, adapter slots, and the prefixes they share.

Where groups of devices have tokens of their own, rows follow each other group by group, each group
has pages of its own, and a sequence stays in the group that it was admitted to.
"""

from array import array
from collections.abc import Iterable

import numpy as np

from jaxserve.cache.pages import PageHash, PagePool, PagePools, chain_hashes, salt_hash
from jaxserve.core.errors import CapacityError
from jaxserve.engine.adapters import AdapterSlots
from jaxserve.engine.batcher import Item, RowTable
from jaxserve.engine.runner import Runner
from jaxserve.engine.segments import Segments
from jaxserve.engine.sequence import Phase, SequenceState

_SLACK = 1
"""By how many sequences a group may exceed the least busy one for the sake of a known prefix."""


class Placement:
    """Gives sequences their places and takes them back. Called by the engine's thread only.

    Args:
        runner: Holds what lies there.
        enable_prefix_caching: Whether prefixes are kept and shared.

    Attributes:
        adapters: Low-rank adapters on the device.
        pools: Page book-keeping.
        rows: Who has which row of the devices.
        segments: Clusters of full segments; None without sparse attention.
        table: What the device must be told about each row.
    """

    def __init__(self, runner: Runner, *, enable_prefix_caching: bool) -> None:
        """Start empty."""
        self.adapters = AdapterSlots(runner)
        self._runner = runner
        self._caching = enable_prefix_caching
        self._generation = 0
        self._dirty_bias: set[int] = set()
        self.clear()

    def clear(self) -> None:
        """Forget every row and page, because what they held is gone."""
        spec = self._runner.spec
        self.pools = PagePools(spec.num_pages, spec.page_size, spec.groups)
        self.rows: list[SequenceState | None] = [None] * spec.num_rows
        self._busy = [0] * spec.groups  # sequences of each group
        self.table = RowTable(spec.rows_per_group, spec.groups)
        self.segments = (
            None  # no attention is sparse on several devices
            if spec.sparse is None
            else Segments(self._runner, spec.sparse, self.pools.of_group[0], self._hash_up_to)
        )
        self._dirty_bias.clear()

    @property
    def running(self) -> list[SequenceState]:
        """Those that have a row, by row."""
        return [sequence for sequence in self.rows if sequence is not None]

    def group_of(self, sequence: SequenceState) -> int:
        """Return the group of devices that a running sequence is in."""
        return sequence.row // self._runner.spec.rows_per_group

    def in_group(self, group: int) -> list[SequenceState]:
        """Those that have a row in a group, by row."""
        return [one for one in self._rows_of(group) if one is not None]

    def _rows_of(self, group: int) -> list[SequenceState | None]:
        size = self._runner.spec.rows_per_group
        return self.rows[group * size : (group + 1) * size]

    def _pool_of(self, sequence: SequenceState) -> PagePool:
        return self.pools.of_group[self.group_of(sequence)]

    # Prefixes ----------------------------------------------------------------------------------

    def is_worth_waiting(self, sequence: SequenceState, first: SequenceState) -> bool:
        """Whether a sibling will soon have computed a prompt that both can share.

        Args:
            sequence: Waits.
            first: The first completion of the same request.
        """
        if sequence is first or not self._caching or sequence.prompt_len <= self.pools.page_size:
            return False
        return first.phase is not Phase.FINISHED and first.num_computed < first.prompt_len

    def match(self, sequence: SequenceState) -> list[int]:
        """Find cached pages for a waiting sequence; at least one token is left to compute.

        They are those of the group that would be the first choice.
        """
        return self._choices(sequence)[0][1]

    def _choices(self, sequence: SequenceState) -> list[tuple[int, list[int]]]:
        """Order groups by how well they suit a waiting sequence, each with the pages known there.

        The longest known prefix wins, but among those only that are hardly busier than the least
        busy one: a prompt that all begin with would else send all to one group.
        """
        hashes = self._usable_hashes(sequence)
        pools = self.pools.of_group
        if len(pools) == 1:
            return [(0, pools[0].match(hashes))]
        busy, found = self._busy, [pool.match(hashes) for pool in pools]
        limit = min(busy) + _SLACK

        def rank(group: int) -> tuple[bool, int, int, int]:
            is_busy = busy[group] > limit
            return is_busy, -len(found[group]), busy[group], -pools[group].num_free

        return [(group, found[group]) for group in sorted(range(len(pools)), key=rank)]

    def _usable_hashes(self, sequence: SequenceState) -> list[PageHash]:
        """Return the hashes of pages that a waiting sequence might take over."""
        if not self._caching or sequence.wants_prompt_logprobs:
            return []
        if sequence.request.pooling == "mean":
            return []  # the cache holds keys and values, not the states to be summed
        self._hash(sequence)
        return sequence.hashes[: (len(sequence.token_ids) - 1) // self.pools.page_size]

    def keep_prefix(self, sequence: SequenceState) -> None:
        """Make the full pages whose tokens are known available to others."""
        if not self._caching or sequence.is_stale:
            return
        self._hash(sequence)
        known = min(sequence.num_computed, len(sequence.token_ids)) // self.pools.page_size
        pool = self._pool_of(sequence)
        moves: list[tuple[int, int, int]] = []
        for block in range(sequence.num_named, known):
            page, digest = sequence.pages[block], sequence.hashes[block]
            if pool.name(page, digest):
                moves.append((sequence.row, block, page))
        sequence.num_named = max(sequence.num_named, known)
        if moves and not self._runner.spec.use_pages:
            self._runner.save_pages(moves)

    def start_generation(self, sequences: Iterable[SequenceState]) -> None:
        """Cut the prefix cache off from everything computed so far, because the weights changed.

        Running sequences keep their pages, but nobody else will find them.

        Args:
            sequences: All that are unfinished.
        """
        self._generation += 1
        self.pools.forget()
        for sequence in sequences:
            self.set_root(sequence)
            sequence.hashes = []
            sequence.is_stale = sequence.phase is Phase.RUNNING

    def set_root(self, sequence: SequenceState) -> None:
        """Begin a chain of prefix hashes that only sequences with equal states can have."""
        salt, adapter = sequence.request.cache_salt, sequence.adapter_key
        sequence.root_hash = salt_hash(salt, generation=self._generation, adapter=adapter)

    def _hash(self, sequence: SequenceState) -> None:
        if len(sequence.hashes) < len(sequence.token_ids) // self.pools.page_size:
            sequence.hashes = chain_hashes(
                sequence.token_ids,
                self.pools.page_size,
                root=sequence.root_hash,
                parents=sequence.hashes,
            )

    def _hash_up_to(self, sequence: SequenceState, num_tokens: int) -> PageHash | None:
        """Return the hash of a sequence's first tokens, whole pages; None if nobody may share."""
        if not self._caching or sequence.is_stale:
            return None
        self._hash(sequence)
        place = num_tokens // self.pools.page_size - 1
        return sequence.hashes[place] if place < len(sequence.hashes) else None

    # Coming and going --------------------------------------------------------------------------

    def admit(self, sequence: SequenceState) -> None:
        """Give a waiting sequence a row, pages for what is known of it, and its adapter's slot.

        Raises:
            CapacityError: If there are too few pages or slots; nothing is taken then.
        """
        slot = self.adapters.acquire(sequence.request.adapter)
        try:
            row, pages, fresh = self._take_place(sequence)
        except CapacityError:
            if slot:
                self.adapters.release(sequence.adapter_key)
            raise
        sequence.lora_slot = slot
        self.rows[row] = sequence
        sequence.row = row
        self._busy[self.group_of(sequence)] += 1
        sequence.phase = Phase.RUNNING
        sequence.pages = array("i", [*pages, *fresh])
        sequence.num_named = len(pages)
        sequence.is_stale = False
        sequence.num_computed = len(pages) * self.pools.page_size
        sequence.prompt_logprobs = []
        sequence.pooled = None
        if pages and not self._runner.spec.use_pages:
            self._runner.load_pages([(row, block, page) for block, page in enumerate(pages)])
        self._set_up_row(sequence)

    def _take_place(self, sequence: SequenceState) -> tuple[int, list[int], list[int]]:
        """Take a row, and pages in its group: those that are known there, and fresh ones.

        Raises:
            CapacityError: If no group has both; nothing is taken then.
        """
        total = -(-sequence.num_tokens // self.pools.page_size)
        problem: CapacityError | None = None
        for group, pages in self._choices(sequence):
            rows = self._rows_of(group)
            if None not in rows:
                continue
            pool = self.pools.of_group[group]
            pool.hold(pages)
            try:
                fresh = pool.take(total - len(pages))
            except CapacityError as error:
                pool.release(pages)
                problem = error
                continue
            return group * len(rows) + rows.index(None), pages, fresh
        raise problem or CapacityError("out of sequence rows.")

    def leave(self, sequence: SequenceState) -> None:
        """Take row, pages and slot from a sequence; the pages that are named stay findable."""
        if self.segments is not None:
            self.segments.release(sequence)
        if sequence.row >= 0:
            self._pool_of(sequence).release(sequence.pages)
        sequence.pages = array("i")
        sequence.num_named = 0
        sequence.has_device_token = False
        if sequence.lora_slot:
            self.adapters.release(sequence.adapter_key)
            sequence.lora_slot = 0
        if sequence.row >= 0:
            self._busy[self.group_of(sequence)] -= 1
            self.rows[sequence.row] = None
            self.table.clear(sequence.row)
            sequence.row = -1

    def _set_up_row(self, sequence: SequenceState) -> None:
        sampling, row = sequence.sampling, sequence.row
        self.table.set(row, sampling, sequence.seed_words)
        if not (sampling.needs_penalties or sampling.needs_bias or row in self._dirty_bias):
            return
        vocab = self._runner.spec.config.vocab_size
        output = np.asarray(sequence.token_ids[sequence.prompt_len :], np.int64)
        seen = np.zeros(vocab, bool)
        seen[np.asarray(sequence.token_ids[: sequence.prompt_len])] = True
        bias = np.zeros(vocab, np.float32)
        if sampling.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(sampling.allowed_token_ids)] = 0
        for token, value in (sampling.logit_bias or {}).items():
            bias[token] += value
        self._runner.set_row(row, np.bincount(output, minlength=vocab), seen, bias)
        if sampling.needs_bias:
            self._dirty_bias.add(row)
        else:
            self._dirty_bias.discard(row)

    # While running -----------------------------------------------------------------------------

    def reserve(self, sequence: SequenceState, num_tokens: int, num_draft: int) -> Item:
        """Give a running sequence the pages for a piece of work.

        Args:
            sequence: Which one.
            num_tokens: Tokens to compute whose ids are known or in flight.
            num_draft: Drafts behind them; fewer are taken where pages are short.

        Raises:
            CapacityError: If there are too few pages even without drafts.
        """
        end, pool = sequence.num_computed + num_tokens, self._pool_of(sequence)
        held = len(sequence.pages)
        if num_draft:
            room = (held + pool.num_free) * pool.page_size - end
            num_draft = max(0, min(num_draft, room))
        missing = -(-(end + num_draft) // pool.page_size) - held
        if missing > 0:
            sequence.pages.extend(pool.take(missing))
        return Item(
            sequence=sequence,
            row=sequence.row,
            start=sequence.num_computed,
            num_tokens=num_tokens,
            is_sampled=end == len(sequence.token_ids) + sequence.num_in_flight
            and sequence.has_length_left,
            num_draft=num_draft,
        )

    def drop_surplus_pages(self, sequence: SequenceState) -> None:
        """Take the pages back that only rejected drafts would have filled."""
        needed = -(-sequence.num_computed // self.pools.page_size)
        surplus = sequence.pages[needed:]
        del sequence.pages[needed:]
        self._pool_of(sequence).release(surplus)

    def compact(self, items: list[Item]) -> None:
        """Move sequences from high rows into holes where that makes the step smaller.

        Args:
            items: Work of the step, whose rows follow.
        """
        spec = self._runner.spec
        enough = spec.shapes.row_bucket(max(self._busy))
        for group in range(spec.groups):
            self._compact_group(group, enough)
        for item in items:
            item.settle(spec.rows_per_group)

    def _compact_group(self, group: int, rows: int) -> None:
        """Have no sequence of a group beyond its first rows, of which there are enough."""
        first = group * self._runner.spec.rows_per_group
        while True:
            own = self._rows_of(group)
            last = max((i for i, one in enumerate(own) if one is not None), default=-1)
            if last < rows:
                return
            source, target = first + last, first + own.index(None)
            sequence = self.rows[source]
            if sequence is None:
                raise AssertionError("an occupied row holds a sequence")
            self._runner.move_row(source, target, sequence.num_computed)
            self.table.move(source, target)
            if source in self._dirty_bias:
                self._dirty_bias.add(target)
            else:
                self._dirty_bias.discard(target)
            self.rows[target], self.rows[source] = sequence, None
            sequence.row = target
