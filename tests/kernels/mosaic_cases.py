"""Tiny steps for the Mosaic kernels, interpreted, next to the oracle's answer."""

import dataclasses
import linecache
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.pallas_kernels.attention import mosaic_decode, mosaic_prefill
from jaxserve.pallas_kernels.attention.mosaic import changed_queries
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.testing import interpret
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant
from tests.kernels.plans import page_table
from tests.kernels.request_oracle import Options, attend

FP8 = ml_dtypes.float8_e4m3fn
TOLERANCE = {
    # Inputs and weights are rounded to the dtype; a little more than half a unit of the output.
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
    # Weights and values have 11 bits, but so few keys do not average errors of 8-bit values.
    "float8_e4m3fn": 4e-3,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: requests, heads, and how to attend.

    Attributes:
        q_len: Query tokens of each request.
        kv_len: Keys of each request.
        q_heads: Heads of queries.
        kv_heads: Heads of keys.
        dim: Dimension of heads.
        page_size: Tokens per page.
        dtype: Dtype of queries.
        kv_dtype: Dtype of keys; None is that of queries.
        scales: "none", "tensor", "head" or "page".
        options: What the oracle is told.
        variant: For the kernel.
        extra: For the kernel.
        plan: Further settings of the plan.
    """

    q_len: Sequence[int]
    kv_len: Sequence[int]
    q_heads: int = 4
    kv_heads: int = 1
    dim: int = 64
    page_size: int = 16
    dtype: str = "float16"
    kv_dtype: str | None = None
    scales: str = "none"
    options: Options = field(default_factory=Options)
    variant: AttentionVariant = PLAIN
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    plan: Mapping[str, object] = field(default_factory=dict)


def spec_of(step: Step, tile_q: int) -> PlanSpec:
    """Return the spec of a step."""
    settings = {"num_ctas": 2, "tile_kv": 64, "max_tokens": max(1, sum(step.q_len)), **step.plan}
    return PlanSpec(
        q_heads=step.q_heads,
        kv_heads=step.kv_heads,
        head_dim=step.dim,
        page_size=step.page_size,
        q_dtype=step.dtype,
        kv_dtype=step.kv_dtype or step.dtype,
        max_requests=len(step.q_len),
        max_pages=max(1, sum(-(-n // step.page_size) for n in step.kv_len)),
        causal=step.options.causal,
        window=None if step.variant.mask_mod else step.options.window,
        variant=step.variant,
        tile_q=tile_q,
        **settings,
    )


def pool_of(step: Step, table, num_pages: int, seed: int) -> PagedKV:
    """Make a pool with NaN wherever no key is; eight-bit numbers have a NaN of their own."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(jnp.dtype(step.kv_dtype or step.dtype))
    shape = (num_pages, step.kv_heads, step.page_size, step.dim)
    used = np.zeros((num_pages, step.page_size), bool)
    for request, length in enumerate(step.kv_len):
        pages = table.indices[table.indptr[request] : table.indptr[request + 1]]
        used[pages] |= np.arange(pages.size * step.page_size).reshape(-1, step.page_size) < length
    scale_shape = {
        "none": None,
        "tensor": (),
        "head": (step.kv_heads,),
        "page": (num_pages, step.kv_heads),
    }[step.scales]
    pools, scales = [], []
    for _ in range(2):
        pool = rng.standard_normal(shape).astype(dtype)
        pool[~np.broadcast_to(used[:, None, :, None], shape)] = np.nan
        pools.append(pool)
        if scale_shape is None:
            scales.append(None)
        else:
            scales.append(np.asarray(rng.uniform(0.5, 2.0, scale_shape), np.float32))
    return PagedKV(k=pools[0], v=pools[1], k_scale=scales[0], v_scale=scales[1])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a kernel made of a step.

    Attributes:
        o: Its outputs.
        lse: Its logarithms of mass.
        races_found: Whether accesses raced.
        want_o: The oracle's outputs.
        want_lse: The oracle's logarithms.
        step: The step.
    """

    o: np.ndarray
    lse: np.ndarray
    races_found: bool | None
    want_o: np.ndarray
    want_lse: np.ndarray
    step: Step

    def check(self) -> None:
        """Compare with the oracle."""
        lse = (self.lse, self.want_lse) if self.step.variant.use_softmax else None
        check_state((self.o, self.want_o), lse, self.step.kv_dtype or self.step.dtype)


def check_state(
    o: tuple[np.ndarray, np.ndarray], lse: tuple[np.ndarray, np.ndarray] | None, dtype: str
) -> None:
    """Compare a kernel's outputs, and logarithms of masses if there are any, with an oracle's."""
    limit = TOLERANCE[dtype] * max(1.0, np.abs(o[1]).max(initial=0.0))
    np.testing.assert_allclose(*o, rtol=0, atol=limit)
    if lse is not None:
        sees, wanted = (~np.isneginf(each) for each in lse)
        np.testing.assert_array_equal(sees, wanted)
        np.testing.assert_allclose(lse[0][wanted], lse[1][wanted], rtol=0, atol=2e-3)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A step with contents.

    Attributes:
        step: The step.
        q: Queries.
        kv: Keys and values.
        table: Pages.
        plan: What to do.
        scale: What products are multiplied with.
    """

    step: Step
    q: np.ndarray
    kv: PagedKV
    table: PageTable
    plan: Plan
    scale: float

    def outcome(self, o, lse, *, races_found: bool | None = None) -> Outcome:
        """Put the oracle's answer beside a kernel's."""
        step, count = self.step, sum(self.step.q_len)
        scales = {"k_scale": self.kv.k_scale, "v_scale": self.kv.v_scale}
        options = dataclasses.replace(step.options, **scales)
        pools = (np.asarray(pool) for pool in (self.kv.k, self.kv.v))
        want_o, want_lse = attend(self.q[:count], *pools, self.table, step.q_len, options)
        return Outcome(
            o=np.asarray(o[:count], np.float64),
            lse=np.asarray(lse[:count], np.float64),
            races_found=races_found,
            want_o=want_o,
            want_lse=want_lse,
            step=step,
        )


def problem(step: Step, tile_q: int, seed: int = 0) -> Problem:
    """Fill a step with contents."""
    spec = spec_of(step, tile_q)
    table, num_pages = page_table(step.kv_len, step.page_size, seed=seed)
    rng = np.random.default_rng(seed + 1)
    q = rng.standard_normal((spec.max_tokens, step.q_heads, step.dim))
    return Problem(
        step=step,
        q=q.astype(np.dtype(jnp.dtype(step.dtype))),
        kv=pool_of(step, table, num_pages, seed),
        table=table,
        plan=make_plan(spec, np.asarray(step.q_len), table),
        scale=step.options.scale or step.dim**-0.5,
    )


def run(step: Step, *, kernel: str, seed: int = 0, **config) -> Outcome:
    """Run a step through a kernel, interpreted, and through the oracle.

    Args:
        step: What to do.
        kernel: "decode", "prefill" with one computing warpgroup, or "prefill2" with two.
        seed: Of the numbers.
        **config: Of the kernel.
    """
    given = problem(step, tile_q(step, kernel), seed)
    spec = given.plan.spec

    def attention(q, kv, buffer, extra):
        planned = Plan(buffer=buffer, spec=spec)
        arguments = {"variant": step.variant, "extra": extra, "sm_scale": given.scale}
        q = changed_queries(q, planned, **arguments)
        if kernel == "decode":
            sizes = mosaic_decode.TuningConfig(**{"stages": 2, **config})
            return mosaic_decode.decode(q, kv, planned, **arguments, config=sizes)
        settings = {"tile_kv": 64, "schedule_barrier": kernel == "prefill2", **config}
        sizes = mosaic_prefill.TuningConfig(portable=True, **settings)
        return mosaic_prefill.prefill(q, kv, planned, **arguments, config=sizes)

    done = interpret(attention, given.q, given.kv, given.plan.buffer, dict(step.extra))
    return given.outcome(*done.value, races_found=done.races_found)


def tile_q(step: Step, kernel: str) -> int:
    """Return the rows of a tile that make a plan fit a kernel."""
    group = step.q_heads // step.kv_heads
    if kernel == "decode":
        return group * max(step.q_len)
    return mosaic_prefill.tile_q(group, warpgroups=2 if kernel == "prefill2" else 1)


class Without:
    """Mosaic GPU, except that a kernel's lines with some words in them do nothing."""

    def __init__(self, module, call, words):
        self.module, self.call, self.words, self.is_met = module, call, words, False

    def __getattr__(self, name):
        function = getattr(self.module, name)
        return self.unless_meant(function) if name == self.call else function

    def unless_meant(self, function):
        def called(*args, **kwargs):
            frame = sys._getframe(1)
            if self.words in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                self.is_met = True
            else:
                function(*args, **kwargs)

        return called
