"""A runner with a second, smaller model, which drafts for the first.

The draft model's cache mirrors the other's: the same rows and pages, filled by the same packed
steps, copied, moved and dropped together. So wherever a sequence stands, after prefix hits,
preemption, moves and rejected drafts alike, the draft model has seen just what the model has seen,
and nothing is kept about it on the host. What that costs is one pass of the small model per step.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.cache import buffers
from jaxserve.cache.buffers import KvBuffers
from jaxserve.engine.runner import Runner, StepResult, describe
from jaxserve.engine.shapes import PackedStep, StepShape, packed_size, unpack
from jaxserve.engine.traced import RunnerSpec, attention_plan
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """A small model in device memory.

    Attributes:
        config: Its shape; the vocabulary is that of the model for which it drafts.
        graph: Structure of the module.
        state: Its weights.
        dtype: Precision of weights and activations.
    """

    config: ModelConfig
    graph: nnx.GraphDef[CausalLM]
    state: nnx.State
    dtype: str


class DraftedRunner(Runner):
    """Executes steps, and drafts with a second model what may come next.

    Args:
        spec: What is fixed about the model.
        graph: Structure of the model.
        state: Its weights.
        draft: The model that drafts.
        **settings: As for `Runner`.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        graph: nnx.GraphDef[CausalLM],
        state: nnx.State,
        *,
        draft: DraftModel,
        **settings: Any,  # noqa: ANN401  those of Runner
    ) -> None:
        """Allocate both caches."""
        # Where experts of the other model lie says nothing about this one's.
        sharding = None if spec.sharding is None else replace(spec.sharding, experts=None)
        self._draft_spec = replace(spec, config=draft.config, dtype=draft.dtype, sharding=sharding)
        self._draft_graph = draft.graph
        leaves, self._draft_tree = jax.tree.flatten(draft.state)
        self._draft_params: tuple[jax.Array, ...] = tuple(leaves)
        self._draft_slots: KvBuffers = ()
        self._draft_pages: KvBuffers = ()
        super().__init__(spec, graph, state, **settings)
        self._draft_param_specs = jax.tree.map(describe, self._draft_params)
        self._draft_slot_specs = jax.tree.map(describe, self._draft_slots)
        self._draft_page_specs = jax.tree.map(describe, self._draft_pages)

    def _allocate(self) -> None:
        super()._allocate()
        self._draft_slots, self._draft_pages = self._allocate_cache(self._draft_spec)

    # Programs ---------------------------------------------------------------------------------

    def warm_up_essentials(self) -> None:
        """Compile what every mix of requests fits into."""
        self._draft_program(self.spec.max_num_seqs)
        super().warm_up_essentials()

    def _all_programs(self) -> list[Callable[[], object]]:
        todo: list[Callable[[], object]] = [
            functools.partial(self._draft_program, rows)
            for rows in self.spec.shapes.draft_row_buckets
        ]
        if self._draft_slots:
            todo.append(self._draft_move_program)
        if self._draft_slots and self._draft_pages:
            todo += [self._draft_save_program, self._draft_load_program]
        return [*todo, *super()._all_programs()]

    def _step_program(self, shape: StepShape) -> Callable[..., Any]:
        # First, so that whoever finds the step's program finds its mirror too.
        self._mirror_program(shape)
        return super()._step_program(shape)

    @property
    def _draft_cache_specs(self) -> Any:  # noqa: ANN401  a pytree
        return self._draft_page_specs if self.spec.use_pages else self._draft_slot_specs

    def _mirror_program(self, shape: StepShape) -> Callable[..., Any]:
        fn = functools.partial(
            _mirror, self._draft_graph, self._draft_tree, self._draft_spec, shape
        )
        last = self._spec((self.spec.max_num_seqs,))
        packed = self._spec((packed_size(shape),))
        return self.programs.get(
            ("mirror", shape),
            fn,
            (1,),
            self._draft_param_specs,
            self._draft_cache_specs,
            last,
            packed,
        )

    def _draft_program(self, rows: int) -> Callable[..., Any]:
        fn = functools.partial(_draft, self._draft_graph, self._draft_tree, self._draft_spec, rows)
        shapes = self.spec.shapes
        return self.programs.get(
            ("draft", rows),
            fn,
            (1,),
            self._draft_param_specs,
            self._draft_cache_specs,
            self._spec((self.spec.max_num_seqs,)),
            self._spec((rows,)),
            self._spec((rows, shapes.pages_per_row)),
        )

    def _draft_move_program(self) -> Callable[..., Any]:
        index = self._spec(())
        return self.programs.get(
            "draft_move", buffers.move_row, (0,), self._draft_slot_specs, index, index, index
        )

    def _draft_save_program(self) -> Callable[..., Any]:
        return self.programs.get(
            "draft_save",
            buffers.save_pages,
            (0,),
            self._draft_page_specs,
            self._draft_slot_specs,
            *self._move_specs(),
        )

    def _draft_load_program(self) -> Callable[..., Any]:
        return self.programs.get(
            "draft_load",
            buffers.load_pages,
            (0,),
            self._draft_slot_specs,
            self._draft_page_specs,
            *self._move_specs(),
        )

    # Work -------------------------------------------------------------------------------------

    def run(self, packed: PackedStep) -> StepResult:
        """Launch one step of both models."""
        program = self._mirror_program(packed.shape)
        cache = self._draft_pages if self.spec.use_pages else self._draft_slots
        self._keep(program(self._draft_params, cache, self._rows.last_token, packed.buffer))
        return super().run(packed)

    def draft(
        self,
        rows: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[Sequence[int]],
        count: int,
    ) -> np.ndarray:
        """Draft what may follow the latest token of some rows; waits for the device.

        Args:
            rows: The rows; nothing of them is in flight.
            positions: Where the latest token of each stands; keys and values of the drafts go
                behind it.
            pages: Their pages; as many as that needs.
            count: Tokens wanted.

        Returns:
            Token ids, `[rows, count]`: those that the draft model finds likeliest.
        """
        size = self._draft_rows(1 + max(rows))
        position = np.full(size, -1, np.int32)
        position[list(rows)] = positions
        table = np.zeros((size, self.spec.shapes.pages_per_row), np.int32)
        if self.spec.use_pages:
            for row, held in zip(rows, pages, strict=True):
                table[row, : len(held)] = held
        program, where, token = self._draft_program(size), self._put(table), self._rows.last_token
        place = self._put(position)
        drawn: list[jax.Array] = []
        for _ in range(count):
            cache = self._draft_pages if self.spec.use_pages else self._draft_slots
            token, place, cache = program(self._draft_params, cache, token, place, where)
            self._keep(cache)
            drawn.append(token)
        return np.stack([np.asarray(token) for token in drawn], axis=1)[list(rows)]

    def _draft_rows(self, rows: int) -> int:
        """Return the least number of rows that is compiled, or is to be."""
        buckets = [size for size in self.spec.shapes.draft_row_buckets if size >= rows]
        ready = [size for size in buckets if ("draft", size) in self.programs]
        return ready[0] if ready and self.programs.takes_larger else buckets[0]

    def _keep(self, cache: KvBuffers) -> None:
        if self.spec.use_pages:
            self._draft_pages = cache
        else:
            self._draft_slots = cache

    def move_row(self, source: int, target: int, length: int) -> None:
        """Move a sequence to another row, in both caches."""
        super().move_row(source, target, length)
        if self._draft_slots:
            indices = (self._put(np.int32(i)) for i in (source, target, length))
            self._draft_slots = self._draft_move_program()(self._draft_slots, *indices)

    def save_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy (row, block, page) parts of slots into the page store, in both caches."""
        super().save_pages(moves)
        for count, columns in self._batches(moves):
            self._draft_pages = self._draft_save_program()(
                self._draft_pages, self._draft_slots, count, *columns
            )

    def load_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages of the store into (row, block, page) parts of slots, in both caches."""
        super().load_pages(moves)
        for count, columns in self._batches(moves):
            self._draft_slots = self._draft_load_program()(
                self._draft_slots, self._draft_pages, count, *columns
            )

    def drop_cache(self) -> None:
        """Free both caches and the row state until `restore_cache`; programs stay."""
        super().drop_cache()
        self._draft_slots = self._draft_pages = ()

    def cache_bytes(self) -> int:
        """Bytes of key-value cache on the device, the draft model's included."""
        own = jax.tree.leaves((self._draft_slots, self._draft_pages))
        return super().cache_bytes() + sum(leaf.nbytes for leaf in own)

    def _free(self) -> None:
        super()._free()
        for leaf in jax.tree.leaves((self._draft_slots, self._draft_pages)):
            if not leaf.is_deleted():
                leaf.delete()

    def close(self) -> None:
        """Free caches, row state and programs, and let the draft model go."""
        super().close()
        self._draft_slots = self._draft_pages = ()
        self._draft_params = ()


def _mirror(
    graph: nnx.GraphDef[CausalLM],
    tree: Any,  # noqa: ANN401  jax exports no public type of a tree structure
    spec: RunnerSpec,
    shape: StepShape,
    params: tuple[jax.Array, ...],
    cache: KvBuffers,
    last_token: jax.Array,
    packed: jax.Array,
) -> KvBuffers:
    """Compute the draft model's keys and values of a step's tokens. Donates `cache`."""
    model = nnx.merge(graph, jax.tree.unflatten(tree, params))
    part = unpack(packed, shape)
    parts = [last_token[: shape.rows], part["draft_token"], part["prefill_token"]]
    position = jnp.maximum(part["token_position"], 0)
    plan = attention_plan(spec, shape, part)
    return model(jnp.concatenate(parts), position, cache, plan)[1]  # type: ignore[return-value]


def _draft(
    graph: nnx.GraphDef[CausalLM],
    tree: Any,  # noqa: ANN401
    spec: RunnerSpec,
    rows: int,
    params: tuple[jax.Array, ...],
    cache: KvBuffers,
    token: jax.Array,
    position: jax.Array,
    page_table: jax.Array,
) -> tuple[jax.Array, jax.Array, KvBuffers]:
    """Decode one token greedily in each row whose position is not negative. Donates `cache`."""
    model = nnx.merge(graph, jax.tree.unflatten(tree, params))
    shape = StepShape(
        rows=rows, prefill=0, q_block=spec.shapes.q_block, pages_per_row=spec.shapes.pages_per_row
    )
    part = unpack(jnp.zeros((packed_size(shape),), jnp.int32), shape)
    is_used = position >= 0
    part["token_row"] = jnp.where(is_used, jnp.arange(rows), -1)
    part["token_position"] = jnp.maximum(position, 0)
    part["page_table"] = page_table
    plan = attention_plan(spec, shape, part)
    hidden, new_cache = model(token[:rows], part["token_position"], cache, plan)
    best = jnp.argmax(model.logits(hidden, plan), axis=-1).astype(jnp.int32)
    following = token.at[:rows].set(best)
    return following, jnp.where(is_used, position + 1, -1), new_cache  # type: ignore[return-value]
