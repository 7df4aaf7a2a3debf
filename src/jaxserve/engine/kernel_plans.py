"""Plans of the paged kernels: one per step and kind of window, made on the host for all layers."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.pallas_kernels.attention.backends import Case, refusal, tuned
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.prefixes import find_shared_prefixes
from jaxserve.pallas_kernels.variant import PLAIN, soft_cap

if TYPE_CHECKING:
    from jaxserve.engine.batcher import Item
    from jaxserve.engine.shapes import PackedStep

_FIXED_SPLIT = 512
"""Keys per work item where results may not depend on other requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlans:
    """What is fixed about an engine's plans.

    Attributes:
        backend: Kernels that carry them out, as `pallas_kernels.attention` calls them.
        q_heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Dimension of a head.
        page_size: Tokens per page.
        dtype: Of queries, keys and values.
        windows: Windows of the layers, each once.
        cap: Bound of the scores; None has none.
        max_model_len: Most tokens per sequence.
        batch_invariant: Whether results may not depend on other requests.
        shares: Whether prefixes that several sequences hold are read once for all of them.
    """

    backend: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    windows: tuple[int | None, ...]
    cap: float | None
    max_model_len: int
    batch_invariant: bool
    shares: bool

    def specs(self, *, rows: int, tokens: int, has_drafts: bool) -> tuple[PlanSpec, ...]:
        """Return the specs of a step's plans, one per window.

        Args:
            rows: Sequence rows.
            tokens: Packed tokens.
            has_drafts: Whether rows may come with drafts, which are requests of their own.
        """
        return _specs(self, rows * (2 if has_drafts else 1), tokens)

    def refusal(self, platform: str, capability: str) -> str | None:
        """Return why the kernels cannot serve this engine; None if they can."""
        variant = PLAIN if self.cap is None else soft_cap(self.cap)
        for spec in self.specs(rows=1, tokens=1, has_drafts=False):
            case = Case(spec=spec, variant=variant, platform=platform, capability=capability)
            reason = refusal(self.backend, case)
            if reason is not None:
                return reason
        return None


@functools.lru_cache(maxsize=256)
def _specs(plans: KernelPlans, requests: int, tokens: int) -> tuple[PlanSpec, ...]:
    page = plans.page_size
    tile = 64 if 64 % page == 0 else page
    base = PlanSpec(
        q_heads=plans.q_heads,
        kv_heads=plans.kv_heads,
        head_dim=plans.head_dim,
        page_size=page,
        q_dtype=plans.dtype,
        kv_dtype=plans.dtype,
        max_requests=requests,
        max_tokens=tokens,
        max_pages=requests * -(-plans.max_model_len // page),
        tile_kv=tile,
        cascade_levels=1 if plans.shares else 0,
    )
    base = tuned(plans.backend, base)
    if plans.batch_invariant:
        size = -(-_FIXED_SPLIT // base.tile_kv) * base.tile_kv
        base = replace(base, fixed_split_size=size, cascade_levels=0)
    return tuple(replace(base, window=window) for window in plans.windows)


def fill_plans(packed: "PackedStep", items: "Sequence[Item]") -> None:
    """Plan a step whose tokens are laid out already.

    Request i of a plan is sequence row i. Drafts, which do not stand behind the decode that they
    follow, are requests of their own, behind all rows.
    """
    specs = packed.shape.plans
    spec, rows = specs[0], packed.shape.rows
    num = rows * (2 if packed.shape.drafts else 1)
    q_len, q_start, kv_len = (np.zeros(num, np.int64) for _ in range(3))
    pages: list[Sequence[int]] = [()] * num
    for item in items:
        for request, start, first, count in _requests(item, rows):
            q_len[request], q_start[request], kv_len[request] = count, start, first + count
            pages[request] = item.sequence.pages
    indptr = np.zeros(num + 1, np.int32)
    np.cumsum([len(part) for part in pages], out=indptr[1:])
    taken = [np.frombuffer(part, np.int32) for part in pages if len(part)]
    indices = np.concatenate(taken) if taken else np.zeros(0, np.int32)
    table = PageTable(indptr=indptr, indices=indices, kv_len=kv_len.astype(np.int32))
    shared = ()
    if spec.cascade_levels:
        shared = find_shared_prefixes(
            q_len, table, page_size=spec.page_size, group=spec.group, levels=spec.cascade_levels
        )
    for index, one in enumerate(specs):
        out = packed.fields[f"plan{index}"]
        make_plan(one, q_len, table, q_start=q_start, shared=shared, out=out)


def _requests(item: "Item", rows: int) -> Iterator[tuple[int, int, int, int]]:
    """List an item's requests: index, first token, position of that token, number of tokens."""
    if not item.sequence.has_device_token:
        yield item.row, rows + item.prefill_start, item.start, item.num_tokens
        return
    yield item.row, item.row, item.start, 1
    if item.drafts:
        yield rows + item.row, rows + item.draft_start, item.start + 1, len(item.drafts)


def fields_of(specs: tuple[PlanSpec, ...]) -> dict[str, tuple[int]]:
    """Name the parts of a packed step that hold its plans."""
    return {f"plan{index}": (spec.num_words,) for index, spec in enumerate(specs)}
