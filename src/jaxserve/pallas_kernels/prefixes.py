"""Prefixes that requests share, found in their page tables.

Requests that share keys have them in the same pages, so the tables alone say who shares what;
nothing has to be asked of the cache.
"""

import dataclasses

import numpy as np

from jaxserve.pallas_kernels.paged import PageTable

MIN_ROWS = 32
"""Query rows per key-value head from which one tile for all of them pays."""
MIN_KEYS = 512
"""Keys from which the merging of states pays."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Requests whose tables begin with the same pages.

    Attributes:
        requests: Indices of the requests.
        begin: First key that they share and that no larger group shares: 0, or the `end` of the
            group that holds them all.
        end: One past the last; a multiple of the page size, and no larger than the number of keys
            that each request had before this step.
    """

    requests: tuple[int, ...]
    begin: int
    end: int


def find_shared_prefixes(
    q_len: np.ndarray,
    table: PageTable,
    *,
    page_size: int,
    group: int,
    levels: int,
    min_rows: int = MIN_ROWS,
    min_keys: int = MIN_KEYS,
) -> list[SharedPrefix]:
    """Find the prefixes that are worth reading once for all who share them.

    Args:
        q_len: Query tokens of each request; those without any are left out.
        table: Pages and lengths.
        page_size: Tokens per page.
        group: Query heads per key-value head.
        levels: How deeply prefixes may be nested.
        min_rows: Fewest query rows, tokens times `group`.
        min_keys: Fewest keys, without those of a larger group.

    Returns:
        Nested groups, larger ones before their parts.

    Source: FlashInfer (arXiv 2501.01005), composable formats; Hydragen (arXiv 2402.05099).
    """
    q_len = np.asarray(q_len, np.int64)
    before = np.where(q_len > 0, table.kv_len - q_len, 0) // page_size
    found: list[SharedPrefix] = []

    def search(members: np.ndarray, begin: int, depth: int, level: int) -> None:
        """Look among requests whose first `depth` pages are the same, `begin` of them taken."""
        members = members[before[members] > depth]
        if members.size < 2 or level == levels or q_len[members].sum() * group < min_rows:
            return
        pages = table.indices[table.indptr[members] + depth]
        values, counts = np.unique(pages, return_counts=True)
        for page in values[counts > 1]:
            same = members[pages == page]
            most = int(before[same].min())
            rows = table.indices[table.indptr[same][:, None] + np.arange(depth, most)]
            differs = (rows != rows[0]).any(axis=0)
            end = depth + int(differs.argmax()) if differs.any() else most
            pays = (end - begin) * page_size >= min_keys
            if pays and q_len[same].sum() * group >= min_rows:
                requests = tuple(int(r) for r in same)
                found.append(
                    SharedPrefix(requests=requests, begin=begin * page_size, end=end * page_size)
                )
                search(same, end, end, level + 1)
            else:
                search(same, begin, end, level)

    search(np.flatnonzero(q_len > 0), 0, 0, 0)
    return found
