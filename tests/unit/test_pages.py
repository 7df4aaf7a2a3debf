import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.cache.pages import PagePool, chain_hashes
from jaxserve.core.errors import CapacityError

NUM_PAGES = 7


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain model: who holds what, what is known, and in which order it left."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 4)
        self.holders: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.idle: list[int] = []  # known pages that nobody holds, least recently used first
        self.counter = itertools.count()
        self.named: set[bytes] = set()
        self.told: list[bytes] = []
        self.pool.on_forget = self.told.append

    def held(self):
        return Counter(page for pages in self.holders for page in pages)

    def num_free(self):
        return NUM_PAGES - len(self.held())

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def take(self, count):
        if count > self.num_free():
            with pytest.raises(CapacityError, match=f"{count} needed, {self.num_free()} of"):
                self.pool.take(count)
            return
        blank = self.num_free() - len(self.idle)
        evicted = self.idle[: max(0, count - blank)]
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not set(taken) & set(self.held())
        assert 0 not in taken
        assert set(self.idle) & set(taken) == set(evicted), "not the least recently used"
        self.idle = self.idle[len(evicted) :]
        self.known = {h: page for h, page in self.known.items() if page not in evicted}
        self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(pages)
        still = self.held()
        for page in reversed(pages):
            if not still[page] and page in self.known.values():
                self.idle.append(page)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), again=st.booleans())
    def name(self, data, again):
        page = data.draw(st.sampled_from(sorted(self.held())))
        digest = b"%d" % next(self.counter)
        if again and self.known:
            digest = data.draw(st.sampled_from(sorted(self.known)))
        fresh = digest not in self.known and page not in self.known.values()
        assert self.pool.name(page, digest) == fresh
        if fresh:
            self.known[digest] = page
            self.named.add(digest)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def match_and_hold(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.known)), min_size=1, unique=True))
        cut = data.draw(st.integers(0, len(wanted)))
        pages = self.pool.match([*wanted[:cut], b"unknown", *wanted[cut:]])
        assert pages == [self.known[digest] for digest in wanted[:cut]]
        self.pool.hold(pages)
        self.idle = [page for page in self.idle if page not in pages]
        self.holders.append(pages)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget_one(self, data):
        digest = data.draw(st.sampled_from(sorted(self.known)))
        page = self.known.pop(digest)
        assert self.pool.name_of(page) == digest
        self.pool.forget_one(digest)
        self.pool.forget_one(b"unknown")
        self.named.remove(digest)
        self.idle = [other for other in self.idle if other != page]
        assert self.pool.name_of(page) is None

    @invariant()
    def tells_what_it_forgot(self):
        assert set(self.told) == self.named - set(self.known)
        assert len(self.told) == len(set(self.told))

    @rule()
    def forget(self):
        self.pool.forget()
        self.known.clear()
        self.idle.clear()

    @invariant()
    def agrees(self):
        assert self.pool.num_held == len(self.held())
        assert self.pool.num_free == self.num_free()
        assert self.pool.num_cached == len(self.known)
        for digest, page in self.known.items():
            assert self.pool.knows(digest)
            assert self.pool.match([digest]) == [page]


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_giving_back_more_often_than_taken_is_an_error():
    pool = PagePool(2, 4)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(pages)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = PagePool(3, 4)
    pages = pool.take(3)
    for page, digest in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.name(page, digest)
    pool.release(pages)
    pool.take(1)
    assert pool.match([b"a", b"b", b"c"]) == pages[:2]


TOKENS = st.lists(st.integers(0, 3), max_size=14)


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_two_sequences_share_a_hash_only_as_far_as_they_agree(first, second, page_size):
    one = chain_hashes(first, page_size, root=b"x")
    two = chain_hashes(second, page_size, root=b"x")
    assert len(one) == len(first) // page_size
    for page in range(min(len(one), len(two))):
        end = (page + 1) * page_size
        assert (one[page] == two[page]) == (first[:end] == second[:end])
    assert len(set(one)) == len(one)


@given(TOKENS, st.integers(1, 4), st.data())
def test_hashes_can_be_continued(tokens, page_size, data):
    whole = chain_hashes(tokens, page_size, root=b"x")
    parents = whole[: data.draw(st.integers(0, len(whole)))]
    assert chain_hashes(tokens, page_size, root=b"x", parents=parents) == whole
    assert parents == whole[: len(parents)], "the parents were changed"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=14))
def test_another_root_gives_other_hashes(tokens):
    one, two = (chain_hashes(tokens, 1, root=root) for root in (b"x", b"y"))
    assert not set(one) & set(two)
