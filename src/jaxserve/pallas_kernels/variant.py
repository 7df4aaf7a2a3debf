"""Variants of attention as plain functions, traced into every kernel and into the reference.

The functions see tiles, not scalars, and must stay elementwise: arithmetic of `jax.numpy`, `where`,
comparisons. No reshape, no transpose, no indexing: a kernel for the GPU keeps a tile in registers.
What they are given broadcasts against the tile: positions and heads are int32, and `ctx["name"]`
reads an array that the caller passes in `extra`.

>>> def tilt(by):
...     return AttentionVariant(score_mod=lambda s, ctx, q_pos, k_pos, head: s + by * k_pos)
>>> tilt(0.1) == tilt(0.1), tilt(0.1) == tilt(0.2)
(True, False)
"""

import functools
import math
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

ExtraKind = Literal["scalar", "head", "request", "array"]
"""What an extra array is indexed by, and so where kernels can read it from.

`scalar` is `[]`; `head` is `[q_heads]`; `request` is `[requests]`; each is given to the functions
as a tile that broadcasts against theirs. `array` has any shape and is read by `ctx.take`, which
not every backend can do.
"""

MaskKind = Literal["none", "shared", "per_head"]
"""Whether there is a packed mask, and whether heads have masks of their own."""


class TileContext(Protocol):
    """What the functions of a variant may ask besides their tile."""

    @property
    def sm_scale(self) -> float:
        """What products of queries and keys were multiplied with."""
        ...

    @property
    def q_heads(self) -> int:
        """Heads of queries."""
        ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Dimension of queries and keys."""
        ...

    @property
    def request(self) -> Array:
        """Request that the tile belongs to; int32."""
        ...

    @property
    def q_len(self) -> Array:
        """Query tokens of the request in this step; int32."""
        ...

    @property
    def kv_len(self) -> Array:
        """Keys of the request; int32."""
        ...

    def __getitem__(self, name: str) -> Array:
        """Read an extra of kind `scalar`, `head` or `request`; it broadcasts against the tile."""
        ...

    def take(self, name: str, *index: Array) -> Array:
        """Look up an extra of kind `array`, element by element."""
        ...


ScoreMod = Callable[[Array, TileContext, Array, Array, Array], Array]
"""(scores, ctx, q_pos, k_pos, head) -> scores."""
MaskMod = Callable[[TileContext, Array, Array, Array], Array]
"""(ctx, q_pos, k_pos, head) -> whether the key is seen."""
OperandMod = Callable[[Array, Array, TileContext, Array, Array], tuple[Array, Array]]
"""(first half, second half, ctx, position, column) -> both halves of the operand's columns."""
RowInit = Callable[[TileContext, Array], tuple[Array | float, Array | float]]
"""(ctx, head) -> score and number of added keys whose value is zero."""
OutMod = Callable[[Array, TileContext, Array, Array, Array], Array]
"""(o, ctx, lse, q_pos, head) -> o."""
BlockMask = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(request, q_low, q_high, k_low, k_high) -> 0 where a block is empty, 1 partly, 2 wholly seen.

A host function over numpy arrays that broadcast; positions `low <= position < high`.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionVariant:
    """How attention differs from the plain one.

    Variants are equal, and have equal hashes, when their functions have equal code and close over
    equal constants: a kernel that was compiled for one serves the other.

    Attributes:
        score_mod: Changes scores. They are natural: after scaling, before the exponential.
        mask_mod: Hides keys, in addition to causality and windows of the plan.
        q_mod: Changes queries before the product. The columns come in two halves, so that
            rotations need no shuffling; `column` counts within a half.
        k_mod: Likewise for keys, position by position.
        row_init: Adds keys with a score but without a value: attention sinks.
        out_mod: Changes the output, once, after everything was merged; `lse` is in base 2.
        use_softmax: Whether the weights are a softmax; otherwise `score_mod` gives the weights
            themselves, outputs are plain sums, and there is no lse.
        extras: Names and kinds of the arrays that the functions read.
        packed_mask: Whether keys are also hidden by bits, which are passed as the extra `mask`;
            `pack_mask` makes them.
        block_mask: Lets the plan leave out blocks that `mask_mod` or the packed mask hides.
    """

    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    q_mod: OperandMod | None = None
    k_mod: OperandMod | None = None
    row_init: RowInit | None = None
    out_mod: OutMod | None = None
    use_softmax: bool = True
    extras: Mapping[str, ExtraKind] = field(default_factory=dict)
    packed_mask: MaskKind = "none"
    block_mask: BlockMask | None = None
    key: Hashable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the parts fit, and compute the key."""
        if not self.use_softmax and self.score_mod is None:
            raise ValueError(
                "a variant without softmax needs a score_mod that gives weights, got none; "
                "sigmoid() is one."
            )
        if not self.use_softmax and self.row_init is not None:
            raise ValueError("a variant without softmax has no row_init, got one; leave it out.")
        if "mask" in self.extras:
            raise ValueError(
                "the extra 'mask' is the packed mask's; choose another name, or packed_mask."
            )
        parts = (
            self.score_mod,
            self.mask_mod,
            self.q_mod,
            self.k_mod,
            self.row_init,
            self.out_mod,
            self.use_softmax,
            tuple(sorted(self.extras.items())),
            self.packed_mask,
            self.block_mask,
        )
        object.__setattr__(self, "extras", types.MappingProxyType(dict(self.extras)))
        object.__setattr__(self, "key", constant_key(parts))

    def __eq__(self, other: object) -> bool:
        """Compare code and constants."""
        return isinstance(other, AttentionVariant) and self.key == other.key

    def __hash__(self) -> int:
        """Hash code and constants."""
        return hash(self.key)

    @property
    def is_plain(self) -> bool:
        """Whether this is plain softmax attention."""
        return self == PLAIN


def compose(*variants: AttentionVariant) -> AttentionVariant:
    """Apply variants one after another.

    Scores, queries, keys and outputs go through the functions from left to right; a key is seen
    if every variant lets it be seen.

    Raises:
        ValueError: If two variants add sinks, use different masks or block masks, or disagree
            about the kind of an extra; or if one but the last leaves out the softmax.
    """
    extras: dict[str, ExtraKind] = {}
    for variant in variants:
        for name, kind in variant.extras.items():
            if extras.setdefault(name, kind) != kind:
                raise ValueError(f"the extra {name!r} is both {extras[name]!r} and {kind!r}.")
    for variant in variants[:-1]:
        if not variant.use_softmax:
            raise ValueError("a variant without softmax gives weights, so it must come last.")
    masks: set[MaskKind] = {v.packed_mask for v in variants if v.packed_mask != "none"}
    if len(masks) > 1:
        raise ValueError(f"one packed mask at most, got {sorted(masks)}.")
    return AttentionVariant(
        score_mod=_chain_scores([v.score_mod for v in variants if v.score_mod]),
        mask_mod=_all_masks([v.mask_mod for v in variants if v.mask_mod]),
        q_mod=_chain_operand([v.q_mod for v in variants if v.q_mod]),
        k_mod=_chain_operand([v.k_mod for v in variants if v.k_mod]),
        row_init=_only("row_init", [v.row_init for v in variants if v.row_init]),
        out_mod=_chain_outputs([v.out_mod for v in variants if v.out_mod]),
        use_softmax=all(v.use_softmax for v in variants),
        extras=extras,
        packed_mask=masks.pop() if masks else "none",
        block_mask=_least_blocks([v.block_mask for v in variants if v.block_mask]),
    )


def soft_cap(bound: float) -> AttentionVariant:
    """Bend scores to stay between minus and plus `bound`. Source: Gemma 2."""

    def score_mod(s: Array, ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        del ctx, q_pos, k_pos, head
        return bound * jnp.tanh(s * (1.0 / bound))

    return AttentionVariant(score_mod=score_mod)


def alibi() -> AttentionVariant:
    """Lower scores by distance; the extra `slopes` `[q_heads]` says how much per token.

    Source: ALiBi (arXiv 2108.12409).
    """

    def score_mod(s: Array, ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        del head
        return s + ctx["slopes"] * (k_pos - q_pos).astype(jnp.float32)

    return AttentionVariant(score_mod=score_mod, extras={"slopes": "head"})


def alibi_slopes(q_heads: int) -> np.ndarray:
    """Return the slopes of the paper: a geometric sequence, interleaved for odd powers."""
    power = 2 ** math.floor(math.log2(q_heads))
    base = 2.0 ** (-8.0 / power)
    slopes = base ** np.arange(1, power + 1)
    between = 2.0 ** (-4.0 / power)
    rest = between ** np.arange(1, 2 * (q_heads - power) + 1, 2)
    return np.concatenate([slopes, rest]).astype(np.float32)


def window(size: int, *, first: int = 0) -> AttentionVariant:
    """Let a token see `size` keys back from itself, itself included, and the `first` ones.

    Args:
        size: Keys of the window.
        first: Keys at the beginning that every token sees.

    Source: Mistral 7B (windows); StreamingLLM, arXiv 2309.17453 (first tokens).
    """

    def mask_mod(ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        del ctx, head
        near = k_pos > q_pos - size
        return near | (k_pos < first) if first else near

    def block_mask(
        request: np.ndarray,
        q_low: np.ndarray,
        q_high: np.ndarray,
        k_low: np.ndarray,
        k_high: np.ndarray,
    ) -> np.ndarray:
        del request
        some = (k_high - 1 > q_low - size) | (k_low < first)
        every = (k_low > q_high - 1 - size) | (k_high <= first)
        return some.astype(np.int8) + (some & every)

    return AttentionVariant(mask_mod=mask_mod, block_mask=block_mask)


def sinks() -> AttentionVariant:
    """Add one key without a value per head; the extra `sinks` `[q_heads]` holds their scores.

    Source: the learned sinks of gpt-oss.
    """

    def row_init(ctx: TileContext, head: Array) -> tuple[Array, float]:
        del head
        return ctx["sinks"], 1.0

    return AttentionVariant(row_init=row_init, extras={"sinks": "head"})


def sigmoid(bias: float = 0.0) -> AttentionVariant:
    """Weigh every key by the sigmoid of its score; nothing is normalised.

    Source: sigmoid attention (arXiv 2409.04431).
    """

    def score_mod(s: Array, ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        del ctx, q_pos, k_pos, head
        # 1 / (1 + exp(-x)) through tanh, which every backend has.
        return 0.5 * jnp.tanh(0.5 * (s + bias)) + 0.5

    return AttentionVariant(score_mod=score_mod, use_softmax=False)


def rope(theta: float = 10_000.0) -> AttentionVariant:
    """Rotate queries and keys by their positions as they are read; the cache holds them bare.

    Pairs are (i, i + head_dim / 2), as in the models of Hugging Face.

    Source: RoFormer (arXiv 2104.09864).
    """

    def rotate(
        low: Array, high: Array, ctx: TileContext, position: Array, column: Array
    ) -> tuple[Array, Array]:
        rate = jnp.exp2(column.astype(jnp.float32) * (-2.0 * math.log2(theta) / ctx.head_dim))
        angle = position.astype(jnp.float32) * rate
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return low * cos - high * sin, high * cos + low * sin

    return AttentionVariant(q_mod=rotate, k_mod=rotate)


def packed_mask(*, per_head: bool = False) -> AttentionVariant:
    """Hide keys by bits that the caller passes as the extra `mask`; `pack_mask` makes them.

    Args:
        per_head: Whether every query head has a mask of its own.
    """
    return AttentionVariant(packed_mask="per_head" if per_head else "shared")


def pack_mask(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Pack one mask per request into words of 32 bits, the lowest bit first.

    Each row of keys begins at a word of its own, so that a tile of keys is some whole words; the
    rows of all requests follow each other.

    Args:
        masks: What each token of a request sees, `[q_len, kv_len]`; or, for masks per head, all
            `[q_heads, q_len, kv_len]`.

    Returns:
        uint32 `[words]`, or `[q_heads, words]`.

    Raises:
        ValueError: If some masks are per head and others are not.
    """
    if not masks:
        return np.zeros(0, np.uint32)
    if len({mask.ndim for mask in masks}) != 1 or masks[0].ndim not in (2, 3):
        raise ValueError(
            "masks must all be [q_len, kv_len] or all [q_heads, q_len, kv_len], got shapes "
            f"{[mask.shape for mask in masks]}."
        )
    parts: list[np.ndarray] = []
    for mask in masks:
        *lead, q_len, kv_len = mask.shape
        padded = np.zeros((*lead, q_len, -(-kv_len // 32) * 32), np.bool_)
        padded[..., :kv_len] = mask
        words = np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)
        parts.append(words.reshape(*lead, -1))
    return np.concatenate(parts, axis=-1)


def _only[T](name: str, parts: Sequence[T]) -> T | None:
    if len(parts) > 1:
        raise ValueError(f"one {name} at most, got {len(parts)}; merge them by hand.")
    return parts[0] if parts else None


def _chain_scores(parts: Sequence[ScoreMod]) -> ScoreMod | None:
    if len(parts) < 2:
        return _only("score_mod", parts)
    functions = tuple(parts)

    def score_mod(s: Array, ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        for part in functions:
            s = part(s, ctx, q_pos, k_pos, head)
        return s

    return score_mod


def _all_masks(parts: Sequence[MaskMod]) -> MaskMod | None:
    if len(parts) < 2:
        return _only("mask_mod", parts)
    functions = tuple(parts)

    def mask_mod(ctx: TileContext, q_pos: Array, k_pos: Array, head: Array) -> Array:
        seen = functions[0](ctx, q_pos, k_pos, head)
        for part in functions[1:]:
            seen = seen & part(ctx, q_pos, k_pos, head)
        return seen

    return mask_mod


def _chain_operand(parts: Sequence[OperandMod]) -> OperandMod | None:
    if len(parts) < 2:
        return _only("q_mod", parts)
    functions = tuple(parts)

    def operand_mod(
        low: Array, high: Array, ctx: TileContext, position: Array, column: Array
    ) -> tuple[Array, Array]:
        for part in functions:
            low, high = part(low, high, ctx, position, column)
        return low, high

    return operand_mod


def _chain_outputs(parts: Sequence[OutMod]) -> OutMod | None:
    if len(parts) < 2:
        return _only("out_mod", parts)
    functions = tuple(parts)

    def out_mod(o: Array, ctx: TileContext, lse: Array, q_pos: Array, head: Array) -> Array:
        for part in functions:
            o = part(o, ctx, lse, q_pos, head)
        return o

    return out_mod


def _least_blocks(parts: Sequence[BlockMask]) -> BlockMask | None:
    if len(parts) < 2:
        return _only("block_mask", parts)
    functions = tuple(parts)

    def block_mask(
        request: np.ndarray,
        q_low: np.ndarray,
        q_high: np.ndarray,
        k_low: np.ndarray,
        k_high: np.ndarray,
    ) -> np.ndarray:
        kinds = [part(request, q_low, q_high, k_low, k_high) for part in functions]
        return functools.reduce(np.minimum, kinds)

    return block_mask


def constant_key(value: object) -> Hashable:
    """Return what stands for a constant, or for a function's code and all that it closes over.

    Args:
        value: A constant, a container of constants, or a function.

    Raises:
        ValueError: If there is something whose equality cannot be told, such as a device array:
            it belongs into `extra`.
    """
    return _key(value, ())


_ATOMS = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, type(Ellipsis))


def _key(value: object, seen: tuple[int, ...]) -> Hashable:
    if id(value) in seen:  # a function that calls itself
        return ("again", seen.index(id(value)))
    within = (*seen, id(value))
    if isinstance(value, _ATOMS):
        return (type(value).__name__, repr(value))
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_key(part, within) for part in value))
    if isinstance(value, Mapping):
        return ("mapping", *((_key(k, within), _key(v, within)) for k, v in value.items()))
    if isinstance(value, np.ndarray):
        return ("ndarray", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, jax.Array):
        raise ValueError(  # noqa: TRY004  the type is right, only its place is not
            f"a variant's function closes over a device array of shape {value.shape}; pass it "
            "through extra and name it in extras."
        )
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    return _callable_key(value, within)


def _callable_key(value: object, seen: tuple[int, ...]) -> Hashable:
    if isinstance(value, functools.partial):
        return ("partial", *(_key(p, seen) for p in (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return ("method", _key(value.__self__, seen), _key(value.__func__, seen))
    if isinstance(value, types.CodeType):
        return _code_key(value, seen)
    module = getattr(value, "__module__", None) or ""
    if module.partition(".")[0] in ("builtins", "jax", "jaxlib", "math", "numpy"):
        return ("name", module, getattr(value, "__qualname__", repr(value)))
    if isinstance(value, types.FunctionType):
        return _function_key(value, seen)
    wrapped = getattr(value, "__wrapped__", None)
    if wrapped is not None:  # jax.jit and the like
        return ("wrapped", type(value).__qualname__, _key(wrapped, seen))
    if isinstance(value, type):
        return ("name", module, value.__qualname__)
    if isinstance(value, Hashable):
        return value
    raise ValueError(
        f"a variant's function closes over {value!r} of type {type(value).__name__}, which has no "
        "hash; use numbers, strings, tuples, numpy arrays or functions."
    )


def _function_key(function: types.FunctionType, seen: tuple[int, ...]) -> Hashable:
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    names = sorted(_global_names(function.__code__))
    constants = {n: function.__globals__[n] for n in names if n in function.__globals__}
    return (
        "function",
        _code_key(function.__code__, seen),
        _key(function.__defaults__, seen),
        _key(function.__kwdefaults__, seen),
        *(_key(cell, seen) for cell in cells),
        _key(constants, seen),
    )


def _code_key(code: types.CodeType, seen: tuple[int, ...]) -> Hashable:
    constants = tuple(_key(constant, seen) for constant in code.co_consts)
    return ("code", code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants)


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


PLAIN = AttentionVariant()
"""Softmax attention as it is."""
