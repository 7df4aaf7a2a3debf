"""Lists of tokens for the Mosaic kernel, interpreted, next to the answer in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.testing import interpret
from jaxserve.pallas_kernels.token_attention import TokenLists, mosaic
from jaxserve.pallas_kernels.variant import PLAIN
from tests.kernels.mosaic_cases import check_state
from tests.kernels.plans import page_table


@dataclass(frozen=True, kw_only=True)
class Lists:
    """One step: lists, and how the kernel is launched.

    Attributes:
        kv_len: Keys of each request.
        listed: Tokens on the list of each request's heads, `[requests][kv_heads]`.
        group: Query heads of each key-value head.
        dim: Dimension of heads.
        page_size: Tokens per page.
        dtype: Of everything.
        ctas: CTAs of the launch.
        stages: Tiles in flight.
        in_order: Whether lists are the first tokens, in order, instead of any in none.
    """

    kv_len: Sequence[int]
    listed: Sequence[Sequence[int]]
    group: int = 4
    dim: int = 64
    page_size: int = 16
    dtype: str = "float16"
    ctas: int = 2
    stages: int = 2
    in_order: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return len(self.listed[0])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the kernel made of a step.

    Attributes:
        o: Its outputs.
        lse: Its logarithms of mass.
        races_found: Whether accesses raced.
        want_o: Outputs in float64.
        want_lse: Logarithms in float64.
        step: The step.
    """

    o: np.ndarray
    lse: np.ndarray
    races_found: bool | None
    want_o: np.ndarray
    want_lse: np.ndarray
    step: Lists

    def check(self) -> None:
        """Compare."""
        check_state((self.o, self.want_o), (self.lse, self.want_lse), self.step.dtype)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A step with contents.

    Attributes:
        step: The step.
        q: Queries.
        cache: Pages.
        pages_of: Where each request's pages begin.
        pages: Pages of all requests.
        lists: The lists.
        want_o: Outputs in float64.
        want_lse: Logarithms in float64.
    """

    step: Lists
    q: np.ndarray
    cache: PagedKV
    pages_of: np.ndarray
    pages: np.ndarray
    lists: TokenLists
    want_o: np.ndarray
    want_lse: np.ndarray

    def outcome(self, state, *, races_found: bool | None = None) -> Outcome:
        """Put the answer beside a kernel's."""
        return Outcome(
            o=np.asarray(state.o, np.float64),
            lse=np.asarray(state.lse, np.float64),
            races_found=races_found,
            want_o=self.want_o,
            want_lse=self.want_lse,
            step=self.step,
        )


def problem(step: Lists, seed: int = 0) -> Problem:
    """Fill a step with contents.

    Whatever is on no list is NaN, and behind the last list there are positions of no token.
    """
    rng = np.random.default_rng(seed)
    dtype, heads = np.dtype(jnp.dtype(step.dtype)), step.kv_heads
    table, num_pages = page_table(step.kv_len, step.page_size, seed=seed)
    shape = (num_pages, heads, step.page_size, step.dim)
    pools = [np.full(shape, np.nan, dtype) for _ in range(2)]
    q = rng.standard_normal((len(step.kv_len), heads * step.group, step.dim)).astype(dtype)
    want_o = np.zeros(q.shape)
    want_lse = np.full(q.shape[:2], -np.inf)
    positions: list[np.ndarray] = []
    for request, length in enumerate(step.kv_len):
        pages = table.indices[table.indptr[request] :]
        for head, count in enumerate(step.listed[request]):
            chosen = np.arange(count) if step.in_order else rng.permutation(length)[:count]
            positions.append(chosen)
            if not count:
                continue
            where = (pages[chosen // step.page_size], head, chosen % step.page_size)
            keys, values = rng.standard_normal((2, count, step.dim)).astype(dtype)
            pools[0][where], pools[1][where] = keys, values
            rows = slice(head * step.group, (head + 1) * step.group)
            scores = q[request, rows].astype(float) @ keys.astype(float).T * step.dim**-0.5
            top = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - top)
            mass = weights.sum(axis=-1, keepdims=True)
            want_o[request, rows] = weights / mass @ values.astype(float)
            want_lse[request, rows] = ((top + np.log(mass)) / math.log(2.0))[:, 0]
    return Problem(
        step=step,
        q=q,
        cache=PagedKV(k=pools[0], v=pools[1]),
        pages_of=table.indptr,
        pages=table.indices,
        lists=TokenLists(
            indptr=np.cumsum([0, *map(len, positions)]).astype(np.int32),
            positions=np.concatenate([*positions, [10**6, -5, 3]]).astype(np.int32),
        ),
        want_o=want_o,
        want_lse=want_lse,
    )


def run(step: Lists, seed: int = 0) -> Outcome:
    """Run a step through the kernel, interpreted, and in float64."""
    given = problem(step, seed)

    def attend(q, cache, pages_of, pages, lists):
        return mosaic.token_attention(
            q,
            cache,
            pages_of,
            pages,
            lists,
            sm_scale=step.dim**-0.5,
            variant=PLAIN,
            config=mosaic.TuningConfig(stages=step.stages, ctas=1),
            multiprocessors=step.ctas,
        )

    done = interpret(attend, given.q, given.cache, given.pages_of, given.pages, given.lists)
    return given.outcome(done.value, races_found=done.races_found)
