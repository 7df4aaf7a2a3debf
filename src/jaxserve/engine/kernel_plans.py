"""Plans of the paged kernels: one per step and kind of window, made on the host for all layers."""

import functools
from collections.abc import Buffer, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jaxserve.pallas_kernels.attention.backends import Case, refusal, tuned
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.prefixes import (
    MIN_KEYS,
    MIN_ROWS,
    SharedPrefix,
    find_shared_prefixes,
)
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

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
        max_model_len: Most tokens per sequence.
        batch_invariant: Whether results may not depend on other requests.
        shares: Whether prefixes that several sequences hold may be read once for all of them.
        variant: How attention differs from the plain one, besides windows.
        extra: Arrays that the variant reads.
        has_sparse: Whether there is one more plan, the last, for layers in which some decodes
            leave something unread: they have no work in it.
    """

    backend: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    windows: tuple[int | None, ...]
    max_model_len: int
    batch_invariant: bool
    shares: bool
    variant: AttentionVariant = PLAIN
    extra: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    has_sparse: bool = False

    def specs(
        self, *, rows: int, tokens: int, has_drafts: bool, shares: bool, is_sparse: bool = True
    ) -> tuple[PlanSpec, ...]:
        """Return the specs of a step's plans, one per window, and one for sparse layers if any.

        Args:
            rows: Sequence rows.
            tokens: Packed tokens.
            has_drafts: Whether rows may come with drafts, which are requests of their own.
            shares: Whether shared prefixes are to be read once, where that can pay.
            is_sparse: Whether some row may leave something unread.
        """
        requests = rows * (2 if has_drafts else 1)
        specs = _specs(self, requests, tokens, shares and self.can_share(rows, tokens))
        return specs if is_sparse else specs[: len(self.windows)]

    def can_share(self, rows: int, tokens: int) -> bool:
        """Tell whether a step of so many rows and tokens could gain from shared prefixes."""
        is_enough = rows > 1 and tokens * (self.q_heads // self.kv_heads) >= MIN_ROWS
        return self.shares and not self.batch_invariant and is_enough and self._is_long

    @property
    def _is_long(self) -> bool:
        return self.max_model_len > MIN_KEYS

    def refusal(self, platform: str, capability: str) -> str | None:
        """Return why the kernels cannot serve this engine; None if they can."""
        for shares in (False, True):
            for spec in self.specs(rows=2, tokens=2 * MIN_ROWS, has_drafts=False, shares=shares):
                case = Case(
                    spec=spec, variant=self.variant, platform=platform, capability=capability
                )
                reason = refusal(self.backend, case)
                if reason is not None:
                    return reason
        return None


@functools.lru_cache(maxsize=256)
def _specs(
    plans: KernelPlans,
    requests: int,
    tokens: int,
    shares: bool,  # noqa: FBT001  a cache's key
) -> tuple[PlanSpec, ...]:
    page = plans.page_size
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
        variant=plans.variant,
        tile_kv=64 if 64 % page == 0 else page,
        cascade_levels=int(shares),
    )
    if plans.batch_invariant:
        size = -(-_FIXED_SPLIT // base.tile_kv) * base.tile_kv
        base = replace(base, fixed_split_size=size)
    base = tuned(plans.backend, base)
    windows = (*plans.windows, *([None] if plans.has_sparse else []))
    return tuple(replace(base, window=window) for window in windows)


class Request(NamedTuple):
    """One request of a plan.

    Attributes:
        place: Its index in the plan.
        start: Position of its first token in this step.
        num_tokens: Its tokens in this step.
        pages: Pages of its sequence, int32; as many as that needs, or more.
        is_sparse: Whether it leaves something unread where layers let it.
    """

    place: int
    start: int
    num_tokens: int
    pages: Buffer
    is_sparse: bool = False


class StepPlanner:
    """Plans one step: first who shares what, which decides about its shape, then the rest.

    Args:
        plans: What is fixed.
        num: How many places the plan has; those without a request have no tokens.
        requests: The requests.

    Attributes:
        shared: Prefixes to be read once for all their requests.
        is_sparse: Whether some request leaves something unread.
    """

    def __init__(self, plans: KernelPlans, num: int, requests: Sequence[Request]) -> None:
        """Say what each request has, and find what they share."""
        q_len, kv_len = [0] * num, [0] * num
        pages: list[memoryview | bytes] = [b""] * num
        self._num_whole, self._sparse = len(plans.windows), np.zeros(num, bool)
        for index, start, count, held, is_sparse in requests:
            self._sparse[index] = is_sparse
            q_len[index], kv_len[index] = count, start + count
            pages[index] = memoryview(held)[: -(-(start + count) // plans.page_size)]
        self.is_sparse = bool(self._sparse.any())
        self._q_len, keys = np.asarray(q_len), np.asarray(kv_len, np.int32)
        indptr = np.zeros(num + 1, np.int32)
        np.cumsum(-(-keys // plans.page_size), out=indptr[1:])
        indices = np.frombuffer(b"".join(pages), np.int32)
        self._table = PageTable(indptr=indptr, indices=indices, kv_len=keys)
        self.shared: Sequence[SharedPrefix] = ()
        if plans.can_share(len(requests), sum(q_len)):
            self.shared = find_shared_prefixes(
                self._q_len,
                self._table,
                page_size=plans.page_size,
                group=plans.q_heads // plans.kv_heads,
                levels=1,
            )

    def fill(
        self, specs: tuple[PlanSpec, ...], fields: Mapping[str, np.ndarray], q_start: np.ndarray
    ) -> None:
        """Write the plans of the step.

        Args:
            specs: Their specs.
            fields: The packed step, which has a place for each.
            q_start: First packed token of each request.
        """
        for index, (name, spec) in enumerate(zip(fields_of(specs), specs, strict=True)):
            q_len, shared = self._q_len, self.shared
            if index == self._num_whole and self.is_sparse:
                # Who leaves something unread is not known here to share anything with others.
                q_len, shared = np.where(self._sparse, 0, q_len), ()
            self._plan(spec, q_len, q_start, shared, fields[name])

    def _plan(
        self,
        spec: PlanSpec,
        q_len: np.ndarray,
        q_start: np.ndarray,
        shared: Sequence[SharedPrefix],
        out: np.ndarray,
    ) -> None:
        # Decodes without gaps are planned several times as fast.
        has_gaps = (q_start != np.cumsum(q_len) - q_len).any()
        make_plan(
            spec,
            q_len,
            self._table,
            q_start=q_start if has_gaps else None,
            shared=shared if spec.cascade_levels else (),
            out=out,
        )


def fields_of(specs: tuple[PlanSpec, ...]) -> dict[str, tuple[int]]:
    """Name the parts of a packed step that hold its plans."""
    return {f"plan{index}": (spec.num_words,) for index, spec in enumerate(specs)}
