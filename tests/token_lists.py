"""Lists of tokens to attend to, drawn at random."""

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.token_attention import TokenLists


def random_lists(rng, kv_len, kv_heads, share):
    """Choose about a share of each request's tokens, for each head anew, in any order.

    Returns:
        The lists, with room behind the last that holds nonsense, and the same as a dictionary of
        (request, head).
    """
    chosen, flat, indptr = {}, [], [0]
    for request, keys in enumerate(kv_len):
        for head in range(kv_heads):
            count = round(share * keys * rng.random() * 2) if share < 1 else keys
            chosen[request, head] = rng.permutation(keys)[: min(count, keys)]
            flat.extend(chosen[request, head].tolist())
            indptr.append(len(flat))
    positions = np.r_[flat, [10**6, -5, 3]].astype(np.int32)
    lists = TokenLists(indptr=jnp.asarray(indptr, jnp.int32), positions=jnp.asarray(positions))
    return lists, chosen
