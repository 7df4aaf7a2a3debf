"""Drawing one token per row."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import backends
from jaxserve.pallas_kernels.backends import Backend
from jaxserve.pallas_kernels.sampling import reference, xla

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of logits."""


def sample(
    logits: Float[Array, "rows vocab"],
    key: UInt32[Array, "rows 2"],
    *,
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
    backend: Backend = "auto",
) -> Int[Array, " rows"]:
    """Draw one token per row from what min-p, then top-k, then top-p keep of its distribution.

    A token is kept if it is at least `min_p` times as likely as the likeliest, fewer than `top_k`
    tokens are likelier, and tokens likelier than it have less than `top_p` of the mass that the
    first two keep. Tokens that are equally likely are kept or dropped together.

    Nothing is sorted: a token is drawn from the whole distribution and checked by counting and
    adding up what is likelier; if it is refused, it and all that is no likelier are taken out, and
    the next is drawn. What is accepted has exactly the wanted distribution, up to the rounding of
    sums in float32 and to random numbers of 24 bits.

    Args:
        logits: Scores; each row has a finite one, and none is NaN or plus infinity.
        key: Two words per row; equal keys and rows give equal tokens, whatever else is in the
            batch. All backends draw the same random numbers.
        temperature: What scores are divided by; 0 takes the largest score instead, the first of
            equals.
        top_k: At most so many tokens, ties aside; 0 keeps all.
        top_p: Share of the mass that suffices; 1 keeps all.
        min_p: Least probability relative to the likeliest token; 0 keeps all.
        backend: "auto" is the kernel on a GPU, and plain JAX elsewhere.

    Returns:
        Token ids, int32.

    Raises:
        ValueError: If shapes do not fit.
        UnsupportedError: If dtypes are not supported, or the backend cannot run here.

    Source: rejection and dual pivots as in FlashInfer (arXiv 2501.01005, and its notes on sampling
    without sorting).

    Differs: top-p is a share of what top-k keeps, as in the engine and vLLM, so where both are set
    that mass is found first, by bisection.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    _check(logits, key, settings)
    chosen = backends.choose(backend, prefers_triton=True)
    if logits.shape[0] == 0:
        return jnp.zeros((0,), jnp.int32)
    if chosen == "triton":
        from jaxserve.pallas_kernels.sampling import triton  # noqa: PLC0415

        return triton.sample(logits, key, **settings)
    return (xla if chosen == "xla" else reference).sample(logits, key, **settings)


def _check(logits: Array, key: Array, settings: dict[str, Array]) -> None:
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"logits must be [rows, vocab] with a token at least, got {logits.shape}; reshape them."
        )
    rows = logits.shape[0]
    name = jnp.dtype(logits.dtype).name
    if name not in DTYPES:
        raise UnsupportedError(
            f"logits must have one of the dtypes {', '.join(DTYPES)}, got {name}; cast them."
        )
    if key.shape != (rows, 2) or key.dtype != jnp.uint32:
        raise ValueError(
            f"key must be two words of uint32 per row, [{rows}, 2], got {key.dtype.name} "
            f"{key.shape}; jax.random.key_data gives them."
        )
    for word, setting in settings.items():
        wants_integers = word == "top_k"
        kind = jnp.integer if wants_integers else jnp.floating
        if setting.shape != (rows,) or not jnp.issubdtype(setting.dtype, kind):
            raise ValueError(
                f"{word} must be one {'integer' if wants_integers else 'float'} per row, [{rows}], "
                f"got {setting.dtype.name} {setting.shape}; jnp.full makes it of one number."
            )
