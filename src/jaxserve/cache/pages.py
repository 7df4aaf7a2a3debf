"""Host book-keeping of pages: reference counts, prefix hashes, least-recently-used eviction.

Page 0 is never handed out: padding tokens of the paged layout write there.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxserve.core.errors import CapacityError

PageHash = bytes


def chain_hashes(
    token_ids: Sequence[int],
    page_size: int,
    *,
    root: PageHash,
    parents: Sequence[PageHash] = (),
) -> list[PageHash]:
    """Hash every full page of a token sequence, each with all that comes before it.

    Args:
        token_ids: The tokens.
        page_size: Tokens per page.
        root: Hash of what else must agree for a page to be shared: model, adapter, salt.
        parents: Hashes of the first pages, already known; only later ones are computed.

    Returns:
        One hash per full page; two sequences share page i only if they agree in all tokens up to
        its end.
    """
    hashes = list(parents)
    previous = hashes[-1] if hashes else root
    for start in range(len(hashes) * page_size, len(token_ids) - page_size + 1, page_size):
        block = np.asarray(token_ids[start : start + page_size], np.int32).tobytes()
        previous = hashlib.blake2b(block, digest_size=16, key=previous).digest()
        hashes.append(previous)
    return hashes


def salt_hash(salt: str, *, generation: int = 0, adapter: str = "") -> PageHash:
    """Return where the hash chain of requests begins; only equal beginnings share pages.

    Args:
        salt: The requests' salt.
        generation: Of the weights; pages that other weights have computed are never found.
        adapter: Hexadecimal digest, of 16 bytes, of the adapter that is added to the weights;
            empty for none.
    """
    person = generation.to_bytes(8, "little")
    text = salt.encode("utf-8", "surrogatepass")
    key = bytes.fromhex(adapter)
    return hashlib.blake2b(text, digest_size=16, person=person, salt=key).digest()


class PagePool:
    """Which pages are free, held, or cached without a holder.

    Args:
        num_pages: Pages that can be handed out (page 0 comes on top).
        page_size: Tokens per page.

    Attributes:
        on_forget: Called with each prefix that is no longer known.

    Source: the block manager of vLLM (hash chain, reference counts, LRU of unreferenced pages).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Start with every page free."""
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._refs = [0] * (num_pages + 1)
        self._hash_of: dict[int, PageHash] = {}
        self._page_of: dict[PageHash, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.on_forget: Callable[[PageHash], None] | None = None

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, unreferenced cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that hold a known prefix."""
        return len(self._hash_of)

    @property
    def num_held(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.num_free

    def match(self, hashes: Iterable[PageHash]) -> list[int]:
        """Find the pages of the longest cached prefix; takes nothing."""
        pages: list[int] = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def knows(self, digest: PageHash) -> bool:
        """Tell whether some page holds the prefix `digest`."""
        return digest in self._page_of

    def name_of(self, page: int) -> PageHash | None:
        """Return the prefix that a page is known to hold."""
        return self._hash_of.get(page)

    def hold(self, pages: Iterable[int]) -> None:
        """Add one holder to each of some cached pages, so that they are not evicted."""
        for page in pages:
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1

    def take(self, count: int) -> list[int]:
        """Hand out pages with one holder each, evicting the least recently used if need be.

        Raises:
            CapacityError: If fewer than `count` can be had; nothing is taken then.
        """
        if count > self.num_free:
            raise CapacityError(
                f"out of KV pages: {count} needed, {self.num_free} of {self.num_pages} free."
            )
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _none = self._idle.popitem(last=False)
                digest = self._hash_of.pop(page)
                del self._page_of[digest]
                if self.on_forget is not None:
                    self.on_forget(digest)
            self._refs[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Take one holder off each page; the last pages of a prefix are evicted first."""
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] < 0:
                raise AssertionError(f"page {page} released more often than held")
            if self._refs[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, digest: PageHash) -> bool:
        """Record that a held page contains the prefix `digest`.

        Returns:
            Whether it was recorded; False if another page has that prefix already.
        """
        if digest in self._page_of or page in self._hash_of:
            return False
        self._page_of[digest] = page
        self._hash_of[page] = digest
        return True

    def forget_one(self, digest: PageHash) -> None:
        """Drop one prefix, if it is cached; a held page stays held."""
        page = self._page_of.pop(digest, None)
        if page is None:
            return
        del self._hash_of[page]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def forget(self) -> None:
        """Drop every cached prefix; held pages stay held."""
        if self.on_forget is not None:
            for digest in self._page_of:
                self.on_forget(digest)
        self._free.extend(self._idle)
        self._idle.clear()
        self._hash_of.clear()
        self._page_of.clear()


class PagePools:
    """The pages of several groups of devices, each of which has its own; counted together.

    Args:
        num_pages: Pages of each group that can be handed out.
        page_size: Tokens per page.
        groups: Groups.

    Attributes:
        page_size: Tokens per page.
        of_group: The pages of each group.
    """

    def __init__(self, num_pages: int, page_size: int, groups: int = 1) -> None:
        """Start with every page free."""
        self.page_size = page_size
        self.of_group = tuple(PagePool(num_pages, page_size) for _ in range(groups))

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out."""
        return sum(pool.num_pages for pool in self.of_group)

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, unreferenced cached ones included."""
        return sum(pool.num_free for pool in self.of_group)

    @property
    def num_cached(self) -> int:
        """Pages that hold a known prefix."""
        return sum(pool.num_cached for pool in self.of_group)

    @property
    def num_held(self) -> int:
        """Pages that some sequence holds."""
        return sum(pool.num_held for pool in self.of_group)

    def knows(self, digest: PageHash) -> bool:
        """Tell whether some page holds the prefix `digest`."""
        return any(pool.knows(digest) for pool in self.of_group)

    def forget(self) -> None:
        """Drop every cached prefix; held pages stay held."""
        for pool in self.of_group:
            pool.forget()
