"""Variants in Triton: their functions are traced by JAX and written anew as Triton functions.

A variant's function is elementwise, so its jaxpr is a list of statements, each of which has a
counterpart in Triton. Where JAX broadcasts in so many words, Triton does so by itself. The arrays
that a variant reads become loads.
"""

import functools
import hashlib
import linecache
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jaxtyping import Array

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.triton_numbers import sin_cos
from jaxserve.pallas_kernels.variant import AttentionVariant, ExtraKind

MAX_EXTRAS = 4
"""Arrays that a variant may read; kernels have so many pointers for them."""

_MAX_POWER = 8

_ROWS, _KEYS, _COLUMNS = 16, 32, 8
"""Sizes that functions are traced with; all different, so that a mix-up is an error."""

_TEMPLATES = {
    "add": "{0} + {1}", "add_any": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "rem": "{0} % {1}", "neg": "-{0}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "shift_left": "{0} << {1}",
    "shift_right_logical": "{0} >> {1}", "shift_right_arithmetic": "{0} >> {1}",
    "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})", "abs": "tl.abs({0})",
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "sin": "sin_cos({0})[0]", "cos": "sin_cos({0})[1]", "logistic": "tl.sigmoid({0})",
    # Its error is an absolute one, of about 1e-7; there is no call to a library.
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
    "square": "{0} * {0}", "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, 0))",
    "select_n": "tl.where({0}, {2}, {1})", "clamp": "tl.minimum(tl.maximum({1}, {0}), {2})",
}  # fmt: skip
"""Primitives of JAX and how Triton writes them."""
_SAME = frozenset({"broadcast_in_dim", "copy", "copy_p", "stop_gradient", "optimization_barrier"})
"""Primitives that change nothing here; Triton broadcasts where it must."""
_TYPES = {
    "float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16",
    "int32": "tl.int32", "uint32": "tl.uint32", "int8": "tl.int8", "uint8": "tl.uint8",
    "bool": "tl.int1", "int16": "tl.int16", "uint16": "tl.uint16",
}  # fmt: skip

_take = Primitive("take_extra")


@_take.def_abstract_eval
def _(*index: Any, shape: tuple[int, ...], dtype: Any, position: int, sizes: Any) -> Any:
    del index, position, sizes
    return jax.core.ShapedArray(shape, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonVariant:
    """The functions of a variant for kernels; each is None where the variant has none.

    Attributes:
        score_mod: (scores, q_pos, k_pos, head, request, q_len, kv_len, extras) -> scores; the
            extras are `MAX_EXTRAS` pointers.
        mask_mod: Likewise, to what is seen; the first argument only says how large the tile is.
        q_mod: (first half, second half, position, column, and the rest likewise) -> both halves.
        k_mod: Likewise.
    """

    score_mod: Any = None
    mask_mod: Any = None
    q_mod: Any = None
    k_mod: Any = None


def translate(
    variant: AttentionVariant,
    extras: Mapping[str, jax.ShapeDtypeStruct],
    *,
    sm_scale: float,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
) -> TritonVariant:
    """Write a variant's functions anew; the same arguments give the same functions.

    Args:
        variant: What to translate; `row_init` and `out_mod` are not for kernels, as they act once,
            on states that were merged.
        extras: Shapes and dtypes of the arrays that it reads; those of kind `head` and `request`
            must have one axis.
        sm_scale: What products of queries and keys are multiplied with.
        q_heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Dimension of queries and keys.

    Raises:
        UnsupportedError: If a function does what Triton cannot do element by element, or there are
            too many extras.
    """
    shapes = tuple((name, tuple(a.shape), jnp.dtype(a.dtype).name) for name, a in extras.items())
    return _translate(variant, shapes, (float(sm_scale), q_heads, kv_heads, head_dim))


def untranslatable(variant: AttentionVariant) -> str | None:
    """Say why a variant cannot be translated; None if it can, as far as it can be told beforehand.

    Arrays are taken to have as many axes as they are read with.
    """
    try:
        _translate(variant, None, (1.0, 1, 1, 64))
    except UnsupportedError as error:
        return str(error)
    return None


def ordered_extras(variant: AttentionVariant) -> tuple[str, ...]:
    """Return the names of a variant's arrays in the order of the kernels' pointers."""
    return tuple(sorted(variant.extras))


@functools.lru_cache(maxsize=256)
def _translate(
    variant: AttentionVariant,
    shapes: tuple[tuple[str, tuple[int, ...], str], ...] | None,
    model: tuple[float, int, int, int],
) -> TritonVariant:
    if len(variant.extras) > MAX_EXTRAS:
        raise UnsupportedError(
            f"a variant in Triton reads at most {MAX_EXTRAS} arrays, got {len(variant.extras)}: "
            f"{sorted(variant.extras)}; merge some, or use backend='xla'."
        )
    known = None if shapes is None else {name: (shape, dtype) for name, shape, dtype in shapes}
    missing = [name for name in variant.extras if known is not None and name not in known]
    if missing:
        raise ValueError(f"the variant reads the extras {missing}, which were not passed.")
    row, key, half = (_ROWS, 1), (1, _KEYS), (_ROWS, _COLUMNS)
    make = functools.partial(_Context, variant=variant, known=known, model=model)

    tile = [("tile", (_ROWS, _KEYS), "float32"), ("q_pos", row, "int32"), ("k_pos", key, "int32")]
    tile.append(("head", row, "int32"))
    operands = [("low", half, "float32"), ("high", half, "float32"), ("position", row, "int32")]
    operands.append(("column", (1, _COLUMNS), "int32"))
    scores, mask, q, k = variant.score_mod, variant.mask_mod, variant.q_mod, variant.k_mod
    return TritonVariant(
        score_mod=scores and _write("score_mod", _after_first(scores), tile, make),
        mask_mod=mask and _write("mask_mod", _without_first(mask), tile, make),
        q_mod=q and _write("q_mod", _after_second(q), operands, make),
        k_mod=k and _write("k_mod", _after_second(k), operands, make),
    )


def _after_first(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tiles_and_ctx: function(
        tiles_and_ctx[0], tiles_and_ctx[-1], *tiles_and_ctx[1:-1]
    )


def _without_first(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tiles_and_ctx: function(tiles_and_ctx[-1], *tiles_and_ctx[1:-1])


def _after_second(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tiles_and_ctx: function(
        *tiles_and_ctx[:2], tiles_and_ctx[-1], *tiles_and_ctx[2:-1]
    )


class _Context:
    """What the functions are traced with: whatever they ask for becomes an argument."""

    def __init__(
        self,
        asked: Mapping[str, Array],
        *,
        variant: AttentionVariant,
        known: Mapping[str, tuple[tuple[int, ...], str]] | None,
        model: tuple[float, int, int, int],
    ) -> None:
        self.sm_scale, self.q_heads, self.kv_heads, self.head_dim = model
        self._asked = asked
        self._known = known
        self._kinds = variant.extras
        self._order = ordered_extras(variant)

    @property
    def request(self) -> Array:
        return self._asked["request"]

    @property
    def q_len(self) -> Array:
        return self._asked["q_len"]

    @property
    def kv_len(self) -> Array:
        return self._asked["kv_len"]

    def __getitem__(self, name: str) -> Array:
        kind = self._kind(name)
        if kind == "array":
            raise UnsupportedError(f"the extra {name!r} is an array; read it with ctx.take.")
        index = {"scalar": (), "head": (self._asked["head"],), "request": (self.request,)}[kind]
        return self._load(name, index)

    def take(self, name: str, *index: Array) -> Array:
        self._kind(name)
        return self._load(name, index)

    def _kind(self, name: str) -> ExtraKind:
        if name not in self._kinds:
            raise ValueError(
                f"a function of the variant reads the extra {name!r}, which is not among its "
                f"extras {sorted(self._kinds)}; name it there."
            )
        return self._kinds[name]

    def _load(self, name: str, index: tuple[Array, ...]) -> Array:
        sizes, dtype = self._known[name] if self._known else ((1,) * len(index), "float32")
        if len(index) != len(sizes):
            raise ValueError(
                f"the extra {name!r} has {len(sizes)} axes, got {len(index)} indices for it."
            )
        shape = np.broadcast_shapes(*(np.shape(i) for i in index))
        return _take.bind(
            *(jnp.asarray(i, jnp.int32) for i in index),
            shape=shape,
            dtype=np.dtype(dtype),
            position=self._order.index(name),
            sizes=sizes,
        )


_ASKED = ("head", "request", "q_len", "kv_len")


def _write(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[tuple[str, tuple[int, ...], str]],
    make: Callable[..., _Context],
) -> Any:
    """Trace a function and write it as a Triton function."""
    names = [argument for argument, _, _ in arguments]
    others = [ask for ask in _ASKED if ask not in names]

    def traced(*values: Array) -> Any:
        tiles, asked = values[: len(names)], dict(zip(others, values[len(names) :], strict=True))
        if "head" in names:
            asked["head"] = tiles[names.index("head")]
        return function(*tiles, make(asked))

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in arguments]
    shapes += [jax.ShapeDtypeStruct((_ROWS, 1), "int32") for _ in others]
    closed = jax.make_jaxpr(traced)(*shapes)
    writer = _Writer(name)
    results = writer.closed(closed, [*names, *others])
    if name == "score_mod":
        # A score that depends on fewer than all of rows and keys is spread over the tile.
        results = [f"tl.broadcast_to({_tensor(results[0])}, tile.shape)"]
    given = ", ".join([*names, *others, *(f"extra{i}" for i in range(MAX_EXTRAS))])
    body = "\n".join(f"    {line}" for line in [*writer.lines, f"return {', '.join(results)}"])
    return _define(name, f"def {name}({given}):\n{body}\n")


def _define(name: str, source: str) -> Any:
    """Make a Triton function of source text; Triton reads it again from where tracebacks do."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<variant {name} {digest}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {
        "tl": tl,
        "sin_cos": sin_cos,
        "__name__": f"{__name__}.{name}_{digest}",
    }
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102  the text was written above
    return triton.jit(namespace[name])


def _tensor(value: str) -> str:
    """Make a tensor of a number, and leave a name as it is."""
    return value if value.isidentifier() else f"tl.full((1, 1), {value}, tl.float32)"


class _Writer:
    """Writes the equations of a jaxpr as statements."""

    def __init__(self, name: str) -> None:
        self.lines: list[str] = []
        self._name = name

    def closed(self, closed: ClosedJaxpr, arguments: Sequence[str]) -> list[str]:
        """Write a jaxpr and return what holds its results."""
        constants: list[str] = []
        for constant in closed.consts:
            if np.ndim(constant):
                raise UnsupportedError(
                    f"{self._name} closes over an array of shape {np.shape(constant)}, which "
                    "Triton kernels cannot hold; pass it as an extra."
                )
            constants.append(_number(np.asarray(constant).item()))
        return self._jaxpr(closed.jaxpr, [*constants, *arguments])

    def _jaxpr(self, jaxpr: Jaxpr, arguments: Sequence[str]) -> list[str]:
        names: dict[Var, str] = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def read(atom: Any) -> str:
            if isinstance(atom, Literal):
                return _number(np.asarray(atom.val).item())
            return names[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if inner is not None:
                closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
                results = self.closed(closed, values)
                names.update(zip(equation.outvars, results, strict=True))
                continue
            names[equation.outvars[0]] = self._equation(equation, values)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: JaxprEqn, values: list[str]) -> str:
        name, params = equation.primitive.name, equation.params
        dtype = equation.outvars[0].aval.dtype
        is_float = jnp.issubdtype(dtype, jnp.floating)
        is_spread = name in ("reshape", "squeeze", "expand_dims") and _is_number(values[0])
        if name in _SAME or is_spread:
            return values[0]
        if name == "convert_element_type":
            return self._convert(values[0], jnp.dtype(dtype).name)
        if name == "take_extra":
            return self._load(values, params)
        if name == "div":
            template = "{0} / {1}" if is_float else "{0} // {1}"
        elif name == "not":
            template = "{0} == 0" if dtype == jnp.bool_ else "~{0}"
        elif name == "integer_pow" and 0 < params["y"] <= _MAX_POWER:
            template = " * ".join(["{0}"] * params["y"])
        elif name in _TEMPLATES:
            template = _TEMPLATES[name]
        else:
            raise UnsupportedError(
                f"{self._name} uses {name!r}, which Triton kernels do not do element by element; "
                "use arithmetic, comparisons, jnp.where, and of functions exp, exp2, log, sqrt, "
                "sin, cos, tanh, abs, floor and ceil, or backend='xla'."
            )
        return self._let(template.format(*values))

    def _convert(self, value: str, dtype: str) -> str:
        """Convert; numbers take the type of what they meet, and so do types that nobody has."""
        kind = _TYPES.get(dtype)
        if kind is None or _is_number(value):
            return value
        return self._let(f"{value} != 0" if kind == "tl.int1" else f"{value}.to({kind})")

    def _load(self, index: list[str], params: Mapping[str, Any]) -> str:
        """Load an extra; what an index beyond the end finds is the last element's."""
        sizes: tuple[int, ...] = params["sizes"]
        flat = "0"
        for i, (at, size) in enumerate(zip(index, sizes, strict=True)):
            stride = math.prod(sizes[i + 1 :])
            flat += f" + tl.minimum(tl.maximum({at}, 0), {size - 1}) * {stride}"
        return self._let(f"tl.load(extra{params['position']} + ({flat}))")

    def _let(self, text: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name


def _is_number(value: str) -> bool:
    return not value.isidentifier()


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(value) if value >= 0 else f"({value!r})"
