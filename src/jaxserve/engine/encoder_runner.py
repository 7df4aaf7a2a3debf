"""Runs batches of whole texts through an encoder: fixed shapes, compiled programs, one buffer in.

A batch is `[rows, length]`, padded on the right. Everything that it needs from the host travels in
one int32 array `[rows, length + 2]`: the tokens, the number of tokens, and how many of them belong
to the first text of a pair.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.attention.metadata import Backend, PaddedPlan
from jaxserve.engine.compiling import Programs
from jaxserve.models.bert import Bert
from jaxserve.models.bert_config import BertConfig
from jaxserve.models.pooling import PoolingConfig

_SMALLEST_LENGTH = 16
_ROW_STEP = 4
_EXTRA = 2


class Text(Protocol):
    """A text, or a pair of them, as a batch holds it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Its tokens."""
        ...

    @property
    def num_first(self) -> int:
        """How many of them belong to the first text of a pair; all, if it is no pair."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """One compiled batch.

    Attributes:
        rows: Texts.
        length: Tokens per text, padding included.
    """

    rows: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShapes:
    """Every batch shape of one encoder.

    Attributes:
        lengths: Lengths, ascending: 16, 32, 48, 64, 96, 128, ... up to the longest text.
        max_tokens: Most tokens of a batch, padding included; a longer text runs alone.
        max_rows: Most texts of a batch.
        one_per_length: Whether there is only one number of rows per length, so that a text always
            runs in the same program.
    """

    lengths: tuple[int, ...]
    max_tokens: int
    max_rows: int
    one_per_length: bool = False

    @classmethod
    def build(
        cls, *, max_length: int, max_tokens: int, max_rows: int, one_per_length: bool = False
    ) -> "BatchShapes":
        """Choose the lengths.

        Args:
            max_length: Tokens of the longest text.
            max_tokens: Most tokens of a batch.
            max_rows: Most texts of a batch.
            one_per_length: One number of rows per length.
        """
        lengths: list[int] = []
        power = _SMALLEST_LENGTH
        while power < max_length:
            lengths += [power, power + power // 2] if power > _SMALLEST_LENGTH else [power]
            power *= 2
        chosen = (*(length for length in lengths if length < max_length), max_length)
        return cls(
            lengths=chosen, max_tokens=max_tokens, max_rows=max_rows, one_per_length=one_per_length
        )

    def length_of(self, num_tokens: int) -> int:
        """Return the length with which a text runs."""
        return next(length for length in self.lengths if num_tokens <= length)

    def row_buckets(self, length: int) -> tuple[int, ...]:
        """Return the numbers of rows for texts of a length, ascending."""
        most = max(1, min(self.max_rows, self.max_tokens // length))
        if self.one_per_length:
            return (most,)
        buckets: list[int] = []
        rows = 1
        while rows < most:
            buckets.append(rows)
            rows *= _ROW_STEP
        return (*buckets, most)

    def rows_for(self, count: int, length: int) -> int:
        """Return the number of rows with which to run `count` waiting texts, or some of them.

        A number that would be less than half full is passed over for the next smaller one: the
        texts that are left make a batch of their own.
        """
        buckets = self.row_buckets(length)
        larger = next((rows for rows in buckets if rows >= count), buckets[-1])
        smaller = max((rows for rows in buckets if rows <= count), default=larger)
        return larger if count > larger // 2 else smaller

    def all_shapes(self) -> list[BatchShape]:
        """List every shape, small ones first."""
        shapes = [
            BatchShape(rows=rows, length=length)
            for length in self.lengths
            for rows in self.row_buckets(length)
        ]
        return sorted(shapes, key=lambda shape: (shape.rows, shape.length))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What is fixed for the life of an encoder's runner.

    Attributes:
        config: The model's shape.
        pooling: How a text's states become one vector; ignored with a classification head.
        shapes: The batch shapes.
        backend: Attention implementation.
        matmul_precision: Precision of matrix products; "highest" for float32.
    """

    config: BertConfig
    pooling: PoolingConfig
    shapes: BatchShapes
    backend: Backend
    matmul_precision: str


class EncoderRunner:
    """Owns an encoder's weights and compiled programs.

    Args:
        spec: What is fixed.
        graph: Structure of the model.
        state: Its weights; used where they are, never copied.
        mesh: Devices.
        on_compile: Called with the seconds of every compilation.
        cache_dir: Where compiled programs are kept between processes; None keeps none.
        forbid_late: Whether a compilation after warm-up is an error.

    Attributes:
        spec: What is fixed.
        programs: What it has compiled.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        graph: nnx.GraphDef[Bert],
        state: nnx.State,
        *,
        mesh: jax.sharding.Mesh,
        on_compile: Callable[[float], None],
        cache_dir: str | None = None,
        forbid_late: bool = False,
    ) -> None:
        """Keep the parts; compiles nothing yet."""
        self.spec = spec
        self.programs = Programs(
            matmul_precision=spec.matmul_precision,
            on_compile=on_compile,
            cache_dir=cache_dir,
            forbid_late=forbid_late,
        )
        self._state = state
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._forward = functools.partial(_forward, graph, spec)

    @property
    def params(self) -> nnx.State:
        """The weights being served."""
        return self._state

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program, so that no later batch compiles anything.

        Args:
            on_progress: Called with (programs done, programs in all).
        """
        shapes = self.spec.shapes.all_shapes()
        self.programs.warm_up(
            [functools.partial(self._program, shape) for shape in shapes], on_progress
        )

    def warm_up_essentials(self) -> None:
        """Compile one shape that takes every text; `warm_up` may then go on in the background."""
        shapes = self.spec.shapes
        longest = shapes.lengths[-1]
        self._program(BatchShape(rows=shapes.row_buckets(longest)[0], length=longest))
        self.programs.takes_larger = True

    def choose_shape(self, count: int, length: int) -> BatchShape:
        """Return the shape for some texts of a length, or another one that is compiled already.

        Args:
            count: Texts that wait.
            length: Length with which they run.
        """
        shapes = self.spec.shapes
        exact = BatchShape(rows=shapes.rows_for(count, length), length=length)
        if not self.programs.takes_larger or exact in self.programs:
            return exact
        ready = [s for s in shapes.all_shapes() if s in self.programs and s.length >= length]
        # The most texts at once, then the least padding.
        return min(ready, key=lambda s: (-min(s.rows, count), s.rows * s.length), default=exact)

    def run(self, texts: Sequence[Text], shape: BatchShape) -> jax.Array:
        """Launch one batch; returns at once, results follow when they are read.

        Args:
            texts: At most `shape.rows` texts of at most `shape.length` tokens.
            shape: The shape.

        Returns:
            One vector, or the outputs of the classification head, per row; float32.
        """
        packed = np.zeros((shape.rows, shape.length + _EXTRA), np.int32)
        packed[:, -_EXTRA] = 1  # a row of padding is a text of one token
        for row, text in enumerate(texts):
            ids = text.token_ids
            packed[row, : len(ids)] = ids
            packed[row, -_EXTRA:] = len(ids), text.num_first
        return self._program(shape)(self._state, jax.device_put(packed, self._everywhere))

    def _program(self, shape: BatchShape) -> Callable[[nnx.State, jax.Array], jax.Array]:
        packed = jax.ShapeDtypeStruct(
            (shape.rows, shape.length + _EXTRA), jnp.int32, sharding=self._everywhere
        )
        return self.programs.get(shape, self._forward, (), self._state, packed)

    def close(self) -> None:
        """Free the programs; the weights belong to the caller."""
        self.programs.stop()
        self.programs.clear()
        self._state = nnx.State({})


def _forward(
    graph: nnx.GraphDef[Bert], spec: EncoderSpec, state: nnx.State, packed: jax.Array
) -> jax.Array:
    model: Any = nnx.merge(graph, state)
    tokens, lengths, num_first = packed[:, :-_EXTRA], packed[:, -_EXTRA], packed[:, -1]
    place = jnp.arange(tokens.shape[1])[None]
    segments = ((place >= num_first[:, None]) & (place < lengths[:, None])).astype(jnp.int32)
    hidden = model(tokens, segments, PaddedPlan(lengths=lengths, backend=spec.backend))
    if spec.config.num_labels:
        return model.classify(hidden)
    return pool(hidden, lengths, spec.pooling)


def pool(
    hidden: Float[Array, "rows time hidden"], lengths: Int[Array, " rows"], how: PoolingConfig
) -> Float[Array, "rows hidden"]:
    """Make one vector of each row's states, in float32.

    Args:
        hidden: States, padded on the right.
        lengths: Tokens of each row; at least 1.
        how: Which states are taken together; its `normalize` is applied.

    Source: sentence-transformers' `Pooling` and `Normalize`.
    """
    wide = hidden.astype(jnp.float32)
    own = (jnp.arange(hidden.shape[1])[None] < lengths[:, None])[..., None]
    if how.pooling_type == "mean":
        vector = jnp.sum(jnp.where(own, wide, 0.0), axis=1) / lengths[:, None]
    elif how.pooling_type == "max":
        vector = jnp.max(jnp.where(own, wide, -jnp.inf), axis=1)
    else:
        place = lengths - 1 if how.pooling_type == "last" else jnp.zeros_like(lengths)
        vector = jnp.take_along_axis(wide, place[:, None, None], axis=1)[:, 0]
    if not how.normalize:
        return vector
    norm = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / jnp.maximum(norm, 1e-12)
