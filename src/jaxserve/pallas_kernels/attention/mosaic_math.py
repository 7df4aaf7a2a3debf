"""Fast and accurate forms of functions that variants call inside Mosaic kernels.

The device has instructions for tanh, sine and cosine that are too coarse for scores (2^-11) and for
angles outside of one turn; the library's exact forms have slow paths that need a stack. In between:
tanh through the exponential, and sine and cosine of an angle that was first brought to one turn.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]
from jaxtyping import Array

# 2 pi in three parts: the first two have so few bits that their products with small whole numbers
# are exact in float32 (Cody and Waite 1980).
_TURN = (6.28125, 0.001934051513671875, 1.2556658930407139e-06)


def with_fast_math[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that computes the same, with every tanh, sine and cosine replaced."""

    def fast(*args: P.args, **kwargs: P.kwargs) -> T:
        flat, tree = jax.tree.flatten((args, kwargs))
        arrays = [i for i, leaf in enumerate(flat) if isinstance(leaf, jax.Array)]

        def of_arrays(*values: Array) -> T:
            leaves = list(flat)
            for i, value in zip(arrays, values, strict=True):
                leaves[i] = value
            some, named = jax.tree.unflatten(tree, leaves)
            return function(*some, **named)  # type: ignore[call-arg]

        values = [flat[i] for i in arrays]
        closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*values)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed, values))

    return fast


def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent, with an error of a few units in the last place of 1."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2.0 * math.log2(math.e))) + 1.0)


def within_turn(x: Array) -> Array:
    """Subtract whole turns of 2 pi; good to 1e-6 for angles up to 100 000."""
    turns = jnp.round(x * (0.5 / math.pi))
    for part in _TURN:
        x = x - turns * part
    return x


def _sine(x: Array) -> Array:
    return jnp.sin(within_turn(x))


def _cosine(x: Array) -> Array:
    return jnp.cos(within_turn(x))


_FORMS: dict[str, Callable[[Array], Array]] = {"tanh": tanh, "sin": _sine, "cos": _cosine}


def _evaluate(closed: ClosedJaxpr, values: Sequence[Array]) -> list[Array]:
    jaxpr: Jaxpr = closed.jaxpr
    known: dict[Any, Array] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Array:  # noqa: ANN401  a variable or a literal
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in _FORMS:
            outputs: Any = _FORMS[equation.primitive.name](*inputs)
        elif isinstance(inner, ClosedJaxpr) and equation.primitive.name not in ("scan", "while"):
            outputs = _evaluate(inner, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
        several = equation.primitive.multiple_results
        results = outputs if several else [outputs]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
