"""Which replica has seen which prompt: what a router knows of prefix caches without asking them."""

from collections import OrderedDict
from collections.abc import Sequence

from jaxserve.cache.pages import PageHash

MOST_PAGES = 1 << 17
"""Pages remembered per replica; the least recently used is forgotten first."""


class PrefixIndex:
    """Remembers the pages of prompts that went to each replica.

    It is a guess: a replica may have evicted a page since. A wrong one costs time and nothing else.

    Args:
        most_pages: Pages remembered per replica.
    """

    def __init__(self, *, most_pages: int = MOST_PAGES) -> None:
        """Start without having seen any prompt."""
        self._most = most_pages
        self._pages: dict[int, OrderedDict[PageHash, None]] = {}

    def match(self, replica: int, hashes: Sequence[PageHash]) -> int:
        """Return how many leading pages a replica is thought to hold."""
        known = self._pages.get(replica)
        if not known:
            return 0
        count = 0
        for digest in hashes:
            if digest not in known:
                break
            count += 1
        return count

    def placed(self, replica: int, hashes: Sequence[PageHash]) -> None:
        """Take note that a prompt goes to a replica."""
        known = self._pages.setdefault(replica, OrderedDict())
        for digest in hashes:
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > self._most:
            known.popitem(last=False)

    def forget(self, replica: int | None = None) -> None:
        """Take note that a replica has lost its cache; None is all of them."""
        if replica is None:
            self._pages.clear()
        else:
            self._pages.pop(replica, None)
