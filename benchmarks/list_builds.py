"""The Mosaic kernel over lists of tokens in every configuration that is ever chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.token_attention import TokenLists, api, mosaic
from jaxserve.pallas_kernels.variant import PLAIN

MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListBuild:
    """The kernel in one configuration.

    Attributes:
        configuration: What it was built for and what was chosen, in words.
        function: Calls the kernel.
        arguments: Shapes and dtypes of its arguments.
        sizes: The example step, in the words of the operation's card.
        dtype: Of queries, keys and values.
        limit: Bytes of shared memory that the tuning table counts with.
        ctas: CTAs that are to share a multiprocessor.
    """

    configuration: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    sizes: Mapping[str, int]
    dtype: str
    limit: int
    ctas: int
    kernel: str = "token lists"

    @property
    def name(self) -> str:
        """Kernel and configuration in one."""
        return f"{self.kernel}: {self.configuration}"

    def backends(self) -> tuple[str, ...]:
        """Return the backends that say they can do this on an H200; asked where Triton is."""
        q, k, v, *_ = self.arguments
        cache = PagedKV(k=k, v=v)
        with triton_launch.record_launches(90):
            reasons = {
                "mosaic": mosaic.why_not(q, cache, PLAIN),
                "triton": api.refusal("triton", q, cache),
                "xla": None,
            }
        return tuple(name for name, reason in reasons.items() if reason is None)


def builds() -> list[ListBuild]:
    """Return all of them."""
    return [*tuned(), *varied()]


def tuned() -> Iterator[ListBuild]:
    """Yield a build for every entry of the tuning table."""
    for key, candidates in mosaic.tuning_table().items():
        for config in candidates:
            yield build(dim=key.dim, config=config)


def varied() -> Iterator[ListBuild]:
    """Yield builds of what else changes the code: groups, pages, dtypes, a single list."""
    yield build(group=1)
    yield build(group=5)
    yield build(group=8, dim=64)
    yield build(group=8, dim=256)
    yield build(page_size=8)
    yield build(page_size=128)
    yield build(dtype="float16")
    yield build(requests=1, kv_heads=1)


def build(
    *,
    requests: int = 64,
    kv_heads: int = 8,
    group: int = 4,
    dim: int = 128,
    page_size: int = 16,
    dtype: str = "bfloat16",
    config: mosaic.TuningConfig | None = None,
) -> ListBuild:
    """Return one build; a configuration that is None is the chosen one."""
    pages, listed = 4096, 1024
    chosen = config or mosaic.choose(dim)
    array = jax.ShapeDtypeStruct
    pool = array((pages, kv_heads, page_size, dim), jnp.dtype(dtype))
    integers = [
        array((size,), jnp.dtype("int32"))
        for size in (requests + 1, pages, requests * kv_heads + 1, requests * kv_heads * listed)
    ]

    def call(q: Any, k: Any, v: Any, pages_of: Any, table: Any, indptr: Any, at: Any) -> Any:  # noqa: ANN401
        return mosaic.token_attention(
            q,
            PagedKV(k=k, v=v),
            pages_of,
            table,
            TokenLists(indptr=indptr, positions=at),
            sm_scale=dim**-0.5,
            variant=PLAIN,
            config=chosen,
            multiprocessors=MULTIPROCESSORS,
        )

    words = f"{requests} requests of {kv_heads} heads, groups of {group}, pages of {page_size}"
    return ListBuild(
        configuration=(
            f"dim {dim}, {words}, {dtype} -> {chosen.stages} stages, {chosen.ctas} CTAs each"
        ),
        function=call,
        arguments=(
            array((requests, kv_heads * group, dim), jnp.dtype(dtype)),
            pool,
            pool,
            *integers,
        ),
        sizes={
            "requests": requests,
            "q_heads": kv_heads * group,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "pages": pages,
            "page_size": page_size,
            "listed": listed,
        },
        dtype=dtype,
        limit=mosaic.TuningKey(dim).shared_memory(chosen),
        ctas=chosen.ctas,
    )
