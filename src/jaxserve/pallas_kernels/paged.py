"""Keys and values in pages, and the table that says which pages belong to whom.

There is one layout in the house, `[pages, kv_heads, page_size, head_dim]`: one head of one page is
one contiguous block, which one bulk copy moves. Other layouts are converted at the door. Page 0 is
a dummy: tables are padded with it, and what it holds never matters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError

KV_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8")
"""Dtypes of keys and values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PagedKV:
    """Keys and values of one layer.

    Attributes:
        k: Keys.
        v: Values; their dimension may differ from that of keys.
        k_scale: What stored keys are multiplied with to get the true ones: one number, one per
            head `[kv_heads]`, or one per page and head `[pages, kv_heads]`; None is 1.
        v_scale: Likewise for values.
    """

    k: Float[Array, "pages kv_heads page_size head_dim"]
    v: Float[Array, "pages kv_heads page_size v_head_dim"]
    k_scale: Array | None = None
    v_scale: Array | None = None

    @classmethod
    def from_nhd(
        cls,
        k: Float[Array, "pages page_size kv_heads head_dim"],
        v: Float[Array, "pages page_size kv_heads v_head_dim"],
        *,
        k_scale: Array | None = None,
        v_scale: Array | None = None,
    ) -> "PagedKV":
        """Convert the layout in which a page holds all heads of a token side by side.

        This copies; convert once, not in every step.
        """
        return cls(
            k=jnp.swapaxes(k, 1, 2), v=jnp.swapaxes(v, 1, 2), k_scale=k_scale, v_scale=v_scale
        )

    @property
    def num_pages(self) -> int:
        """Pages of the pool, the dummy included."""
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k.shape[2]

    def check(self) -> None:
        """Check shapes and dtypes.

        Raises:
            ValueError: If keys, values and scales do not fit each other.
            UnsupportedError: If the dtype is none of `KV_DTYPES`.
        """
        if self.k.ndim != 4 or self.v.ndim != 4 or self.k.shape[:3] != self.v.shape[:3]:
            raise ValueError(
                "keys and values must be [pages, kv_heads, page_size, dim] with equal leading "
                f"axes, got {self.k.shape} and {self.v.shape}; PagedKV.from_nhd converts "
                "[pages, page_size, kv_heads, dim]."
            )
        names = {self.k.dtype.name, self.v.dtype.name}
        if len(names) != 1 or not names <= set(KV_DTYPES):
            raise UnsupportedError(
                f"keys and values must share one dtype of {', '.join(KV_DTYPES)}, "
                f"got {self.k.dtype.name} and {self.v.dtype.name}; cast them."
            )
        allowed = ((), (self.kv_heads,), (self.num_pages, self.kv_heads))
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None and jnp.shape(scale) not in allowed:
                raise ValueError(
                    f"{name} must have shape (), (kv_heads,) = {allowed[1]} or "
                    f"(pages, kv_heads) = {allowed[2]}, got {jnp.shape(scale)}."
                )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Which pages hold which request's keys; a host record, in compressed sparse rows.

    Attributes:
        indptr: Where each request's pages begin in `indices`, int32 `[requests + 1]`.
        indices: Pages of all requests, in order of position, int32.
        kv_len: Tokens of each request, those of this step included, int32 `[requests]`; the last
            page may be partly filled, and pages behind it are allowed and ignored.
    """

    indptr: np.ndarray
    indices: np.ndarray
    kv_len: np.ndarray

    @classmethod
    def from_rows(cls, rows: np.ndarray, kv_len: np.ndarray, page_size: int) -> "PageTable":
        """Make a table out of one padded row of pages per request.

        Args:
            rows: Pages, `[requests, pages_per_row]`.
            kv_len: Tokens of each request.
            page_size: Tokens per page.

        Raises:
            ValueError: If a row has too few pages for its request.
        """
        kv_len = np.asarray(kv_len, np.int32)
        used = -(-kv_len // page_size)
        width = rows.shape[1] if rows.ndim == 2 else 0
        if used.size and used.max() > width:
            worst = int(used.argmax())
            raise ValueError(
                f"request {worst} with {kv_len[worst]} tokens needs {used[worst]} pages of "
                f"{page_size}, got a row of {width}; pass wider rows."
            )
        indptr = np.zeros(used.size + 1, np.int32)
        np.cumsum(used, out=indptr[1:])
        taken = np.arange(width, dtype=np.int32) < used[:, None]
        return cls(indptr=indptr, indices=rows[taken].astype(np.int32), kv_len=kv_len)
