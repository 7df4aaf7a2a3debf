"""Which keys each request and head reads."""

import dataclasses

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLists:
    """One list of positions per request and key-value head, in compressed sparse rows.

    How long the lists are is known on the device only. Row `request * kv_heads + head` is
    `positions[indptr[row]:indptr[row + 1]]`, each a position below the request's `kv_len`, in any
    order, none twice.

    Attributes:
        indptr: Where each row begins, ascending.
        positions: Positions of all rows; what lies behind the last row is ignored.
    """

    indptr: Int[Array, " rows_and_one"]
    positions: Int[Array, " capacity"]
