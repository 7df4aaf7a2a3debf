"""Runs steps on the device: owns the compiled programs, the cache buffers and the row state."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.cache import buffers
from jaxserve.cache.buffers import KvBuffers
from jaxserve.core.errors import RequestError
from jaxserve.engine import groups
from jaxserve.engine.compiling import Programs
from jaxserve.engine.experts import ExpertSlots
from jaxserve.engine.parallel import kv_axis
from jaxserve.engine.pooled import Pooled, pool_chunks
from jaxserve.engine.sampler import RowState, Sampled
from jaxserve.engine.shapes import DrawShape, PackedStep, StepShape, mask_words, packed_size
from jaxserve.engine.sparse import (
    Reading,
    SparseSpec,
    allocate_clusters,
    cluster_layer,
)
from jaxserve.engine.traced import (
    Balance,
    RunnerSpec,
    draw_tokens,
    move_row,
    run_step,
    score_prompts,
    set_row,
)
from jaxserve.models import lora
from jaxserve.models.layers import CausalLM
from jaxserve.models.lora import Factors, LoraBuffers, LoraShape
from jaxserve.models.registry import flatten_params
from jaxserve.sharding.arrays import put
from jaxserve.sharding.rules import DATA_AXIS, LogicalAxisRules

MAX_MOVES = 64
"""Pages copied between slots and store by one launch."""


@dataclass(slots=True, kw_only=True)
class StepResult:
    """Results of one step, still on their way from the device.

    Attributes:
        sampled: Tokens and log-probabilities per row, then per draft token, group by group.
        hidden: Final hidden states of the prefill tokens, those of each group padded to the most
            that there can be.
        reading: What attention counted, where it may leave something unread.
    """

    sampled: Sampled
    hidden: jax.Array
    reading: Reading = ()


class Runner:
    """Executes step plans that the batcher has turned into packed buffers.

    Args:
        spec: What is fixed.
        graph: Structure of the model.
        state: Its weights; used where they are, never copied.
        mesh: Devices.
        on_compile: Called with the seconds of every compilation.
        cache_dir: Where compiled programs are kept between processes; None keeps none.
        forbid_late: Whether a compilation after warm-up is an error.
        frees: Whether weights may be freed that have been copied to where they are served.

    The runner never sees a request or a deadline.

    Attributes:
        spec: What is fixed.
        programs: What it has compiled.
        experts: Slots of experts, if these move between devices.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        graph: nnx.GraphDef[CausalLM],
        state: nnx.State,
        *,
        mesh: jax.sharding.Mesh,
        on_compile: Callable[[float], None],
        cache_dir: str | None = None,
        forbid_late: bool = False,
        frees: bool = False,
    ) -> None:
        """Allocate cache and row state; compiles nothing yet."""
        self.spec = spec
        self._graph = graph
        leaves, self._tree = jax.tree.flatten(state)
        self._mesh = mesh
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        by_group = PartitionSpec() if spec.sharding is None else spec.sharding.by_group
        self._by_group = NamedSharding(mesh, by_group)
        self.programs = Programs(
            matmul_precision=spec.matmul_precision,
            on_compile=on_compile,
            cache_dir=cache_dir,
            forbid_late=forbid_late,
            # Arrays of the caller's own attention are constants of the programs.
            shares=spec.shapes.kernels is None or not spec.shapes.kernels.extra,
        )
        # As others see them: experts in their order.
        self._outer_specs = jax.tree.map(describe, tuple(leaves))
        self.experts = self._make_slots(flatten_params(state))
        self._params: tuple[jax.Array, ...] = self._spread(leaves, frees=frees)
        self._found: dict[StepShape, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._no_masks: dict[int, jax.Array] = {}
        self._adapters: tuple[LoraBuffers, ...] = ()
        self._num_steps = 0
        self._allocate()
        self.restore_adapters()
        # Programs are lowered against descriptions: live buffers may be donated meanwhile.
        self._param_specs = jax.tree.map(describe, self._params)
        self._slot_specs = jax.tree.map(describe, self.slots)
        self._page_specs = jax.tree.map(describe, self.pages)
        self._row_specs = jax.tree.map(describe, self._rows)
        self._cluster_specs = jax.tree.map(describe, self._clusters)
        self._adapter_specs = jax.tree.map(describe, self._adapters)

    def _make_slots(self, arrays: Mapping[str, Any]) -> ExpertSlots | None:
        sharding = self.spec.sharding
        if sharding is None or sharding.experts is None or not sharding.experts.is_balanced:
            return None
        return ExpertSlots(self.spec.config, sharding, list(arrays), self.programs)

    def _spread(self, leaves: Sequence[jax.Array], *, frees: bool) -> tuple[jax.Array, ...]:
        """Put weights where they are served."""
        if self.experts is None:
            return tuple(leaves)
        placed: list[jax.Array] = []
        for index, leaf in enumerate(leaves):
            placed.append(self.experts.spread_leaf(index, leaf))
            if frees and placed[-1] is not leaf:
                placed[-1].block_until_ready()
                leaf.delete()
        return tuple(placed)

    def _allocate(self) -> None:
        self.slots, self.pages = self._allocate_cache(self.spec)
        self._clusters = allocate_clusters(self.spec.sparse, self.spec.config, self._everywhere)
        make = _rows_program(self.spec.num_rows, self.spec.config.vocab_size, self._by_group)
        self._rows = make()

    def _allocate_cache(self, spec: RunnerSpec) -> tuple[KvBuffers, KvBuffers]:
        """Allocate the slots and pages that a model needs."""
        config = spec.config
        dtype = jnp.dtype(spec.dtype)
        heads = config.num_kv_heads
        sharding = self._cache_sharding(spec)
        num_pages = spec.groups * (spec.num_pages + 1)
        page_shape = (num_pages, heads, spec.page_size, config.head_dim)
        slots: KvBuffers = ()
        pages: KvBuffers = ()
        if not spec.use_pages:
            capacity = buffers.slot_capacity(
                spec.max_model_len, spec.shapes.q_block, spec.shapes.kv_tile
            )
            slot_shape = (spec.num_rows, heads, capacity, config.head_dim)
            slots = buffers.allocate(config.num_layers, slot_shape, dtype, sharding)
        if spec.use_pages or spec.keep_store:
            pages = buffers.allocate(config.num_layers, page_shape, dtype, sharding)
        return slots, pages

    def _cache_sharding(self, spec: RunnerSpec) -> NamedSharding:
        """Say how rows or pages of a cache, and heads, lie on devices."""
        group = DATA_AXIS if spec.groups > 1 else None
        heads = kv_axis(self._mesh, spec.config.num_kv_heads)
        return NamedSharding(self._mesh, PartitionSpec(group, heads))

    # Programs ---------------------------------------------------------------------------------

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program, so that no later step compiles anything.

        Safe beside running steps: until a shape is ready, steps use a larger one that is.

        Args:
            on_progress: Called with (programs done, programs in all).
        """
        self.programs.warm_up(self._all_programs(), on_progress)

    def warm_up_essentials(self) -> None:
        """Compile the step shapes that every mix of requests fits into: two, or three with drafts.

        From then on `warm_up` may go on in the background; meanwhile steps run in the smallest
        shape that is ready.
        """
        shapes = self.spec.shapes
        rows = self.spec.rows_per_group
        self._step_program(shapes.shape(rows=rows, prefill=0))
        if shapes.num_draft:
            self._step_program(shapes.shape(rows=rows, prefill=0, drafts=shapes.max_draft))
        largest = shapes.prefill_buckets[-1]
        self._step_program(shapes.shape(rows=rows, prefill=largest))
        self.programs.takes_larger = True

    def _all_programs(self) -> list[Callable[[], object]]:
        steps = self.spec.shapes.all_shapes()
        draws = dict.fromkeys(shape.draw for shape in steps)
        todo: list[Callable[[], object]] = [
            *(functools.partial(self._draw_program, draw) for draw in draws),
            *(functools.partial(self._step_program, shape) for shape in steps),
        ]
        if self.slots and self.pages:
            todo[:0] = [self._save_program, self._load_program]
        todo += [self._row_program, self._move_row_program, self._prompt_logprob_program]
        todo += [self._pool_program]
        if self.spec.lora is not None:
            todo += [self._adapter_program]
        if self.spec.sparse is not None:
            todo += [self._cluster_program]
        if self.experts is not None:
            todo += self.experts.warm(self._param_specs)
        return todo

    def choose_shape(
        self,
        *,
        rows: int,
        prefill: int,
        drafts: int = 0,
        shares: bool = False,
        is_sparse: bool = True,
    ) -> StepShape:
        """Return the smallest shape that holds a step, or a larger one that is compiled already.

        Args:
            rows: Decode rows.
            prefill: Prefill tokens.
            drafts: Draft tokens.
            shares: Whether prefixes are shared; what is ready is taken before what could share.
            is_sparse: Whether some row leaves something unread.
        """
        exact = self.spec.shapes.shape(
            rows=rows, prefill=prefill, drafts=drafts, shares=shares, is_sparse=is_sparse
        )
        if not self.programs.takes_larger or ("step", exact) in self.programs:
            return exact
        ready = [
            shape
            for shape in self.spec.shapes.all_shapes()
            if ("step", shape) in self.programs
            and shape.rows >= rows
            and shape.prefill >= prefill
            and shape.drafts >= drafts
            and bool(shape.prefill) == bool(prefill)
            and bool(shape.drafts) == bool(drafts)
            and shape.num_segments >= exact.num_segments
        ]

        def cost(shape: StepShape) -> tuple[int, int, bool]:
            return shape.num_tokens, shape.num_segments, shape.shares != shares

        return min(ready, key=cost, default=exact)

    def _step_program(self, shape: StepShape) -> Callable[..., Any]:
        self._draw_program(shape.draw)  # first: whoever finds the step's program finds this one too
        cache = self._page_specs if self.spec.use_pages else self._slot_specs
        fn = functools.partial(run_step, self._graph, self._tree, self.spec, shape, self._mesh)
        return self.programs.get(
            ("step", shape),
            fn,
            (1,),
            self._param_specs,
            cache,
            self._row_specs.last_token,
            self._spec((*self._lead, packed_size(shape))),
            self._adapter_specs,
            self._cluster_specs,
            jax.tree.map(describe, self._balance),
        )

    @property
    def _balance(self) -> Balance:
        return () if self.experts is None else (self.experts.table, self.experts.loads)

    @property
    def _lead(self) -> tuple[int, ...]:
        """First axis of what there is for each group; none where there is one group."""
        return (self.spec.groups,) if self.spec.groups > 1 else ()

    def _draw_program(self, draw: DrawShape) -> Callable[..., Any]:
        vocab, places = self.spec.config.vocab_size, self.spec.groups * draw.num_drawn
        fn = functools.partial(draw_tokens, self.spec.num_candidates, self.spec.logprobs_mode, draw)
        return self.programs.get(
            ("draw", draw),
            functools.partial(groups.draw_in_groups, self._mesh, fn) if self._lead else fn,
            (1,),
            self._spec((places, vocab), jnp.float32, self._by_group),
            self._row_specs,
            self._spec((*self._lead, packed_size(draw)), jnp.int32, self._by_group),
            self._spec((places, mask_words(vocab)), jnp.uint32),
        )

    def _row_program(self) -> Callable[..., Any]:
        vocab = self.spec.config.vocab_size
        return self.programs.get(
            "row",
            functools.partial(groups.set_row_in_group, self._mesh) if self._lead else set_row,
            (0,),
            self._row_specs,
            self._spec(()),
            self._spec((vocab,)),
            self._spec((vocab,), jnp.bool_),
            self._spec((vocab,), jnp.float32),
        )

    def _move_row_program(self) -> Callable[..., Any]:
        index = self._spec(())
        fn = self._moving(groups.move_row_in_group, move_row)
        return self.programs.get(
            "move_row", fn, (0, 1), self._slot_specs, self._row_specs, index, index, index
        )

    def _moving(
        self, in_group: Callable[..., Any], plain: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return what moves parts of caches, where each group has its own or where there is one."""
        if not self._lead:
            return plain
        return functools.partial(in_group, self._mesh, self._cache_sharding(self.spec).spec)

    def _save_program(self) -> Callable[..., Any]:
        return self.programs.get(
            "save",
            self._moving(
                functools.partial(groups.move_pages_in_group, buffers.save_pages, 1),
                buffers.save_pages,
            ),
            (0,),
            self._page_specs,
            self._slot_specs,
            *self._move_specs(),
        )

    def _load_program(self) -> Callable[..., Any]:
        return self.programs.get(
            "load",
            self._moving(
                functools.partial(groups.move_pages_in_group, buffers.load_pages, 0),
                buffers.load_pages,
            ),
            (0,),
            self._slot_specs,
            self._page_specs,
            *self._move_specs(),
        )

    def _move_specs(self) -> list[jax.ShapeDtypeStruct]:
        """Describe what `_batches` yields."""
        return [self._spec(()), *[self._spec((MAX_MOVES,))] * 3]

    def _prompt_logprob_program(self) -> Callable[..., Any]:
        hidden = self._hidden_spec
        fn = functools.partial(score_prompts, self._graph, self._tree, self.spec)
        return self.programs.get(
            "prompt_logprobs",
            fn,
            (),
            self._param_specs,
            hidden,
            self._spec(hidden.shape[:1]),
            self._spec(()),
            self._spec(()),
        )

    @property
    def _hidden_spec(self) -> jax.ShapeDtypeStruct:
        """Describe the hidden states of a step's prefill tokens."""
        size = self.spec.groups * self.spec.shapes.prefill_buckets[-1]
        shape = size, self.spec.config.hidden_size
        return self._spec(shape, jnp.dtype(self.spec.dtype), self._by_group)

    def _pool_program(self) -> Callable[..., Any]:
        chunks = [self._spec((self.spec.num_rows,))] * 2
        fn = functools.partial(groups.pool_in_groups, self._mesh) if self._lead else pool_chunks
        return self.programs.get("pool", fn, (), self._hidden_spec, *chunks)

    def _adapter_program(self) -> Callable[..., Any]:
        size = lora.layer_size(self.spec.config, self._lora_shape.rank)
        packed = self._spec((size,), jnp.dtype(self.spec.dtype))
        return self.programs.get(
            "adapter", lora.set_slot, (0,), self._adapter_specs[0], self._spec(()), packed
        )

    def _cluster_program(self) -> Callable[..., Any]:
        """Return what clusters a segment in one layer; all layers are alike."""
        spec = self._sparse_spec
        layer = spec.layers.index(True)
        cache = self._page_specs if self.spec.use_pages else self._slot_specs
        where = (spec.pages_per_segment,) if self.spec.use_pages else ()
        return self.programs.get(
            "cluster",
            functools.partial(cluster_layer, spec, self.spec.page_size),
            (0,),
            self._cluster_specs[layer],
            cache[layer],
            self._spec(where),
            self._spec(()),
            self._spec(()),
        )

    @property
    def _sparse_spec(self) -> SparseSpec:
        if self.spec.sparse is None:
            raise AssertionError("this engine reads everything")
        return self.spec.sparse

    @property
    def _lora_shape(self) -> LoraShape:
        if self.spec.lora is None:
            raise AssertionError("this engine has no slots for adapters")
        return self.spec.lora

    def _spec(
        self,
        shape: tuple[int, ...],
        dtype: Any = jnp.int32,  # noqa: ANN401
        sharding: NamedSharding | None = None,
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self._everywhere)

    # Work -------------------------------------------------------------------------------------

    def run(self, packed: PackedStep) -> StepResult:
        """Launch one step; returns at once, results follow when they are read."""
        step, draw = self.prepare(packed.shape)
        cache = self.pages if self.spec.use_pages else self.slots
        places = len(packed.parts) * packed.shape.num_drawn
        mask = self._no_mask(places) if packed.mask is None else packed.mask
        if self.spec.sparse and self.spec.sparse.measure_every and packed.shape.num_segments:
            self._num_steps += 1
            is_due = self._num_steps % self.spec.sparse.measure_every == 0
            packed.fields["is_measured"][...] = is_due
        logits, drawing, hidden, cache, reading, loads = step(
            self._params,
            cache,
            self._rows.last_token,
            packed.buffer,
            self._adapters,
            self._clusters,
            self._balance,
        )
        if self.experts is not None and loads is not None:
            self.experts.loads = loads
        sampled, self._rows = draw(logits, self._rows, drawing, mask)
        if self.spec.use_pages:
            self.pages = cache
        else:
            self.slots = cache
        return StepResult(sampled=sampled, hidden=hidden, reading=reading)

    def prepare(self, shape: StepShape) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the two programs of a step; describing them anew for every step takes long."""
        found = self._found.get(shape)
        if found is None:
            found = self._found[shape] = self._step_program(shape), self._draw_program(shape.draw)
        return found

    def _no_mask(self, rows: int) -> jax.Array:
        """Return what a step without constraints gets for a mask; lies on the device already."""
        mask = self._no_masks.get(rows)
        if mask is None:
            words = mask_words(self.spec.config.vocab_size)
            mask = self._no_masks[rows] = self._put(np.zeros((rows, words), np.uint32))
        return mask

    def set_adapter(self, slot: int, layers: Sequence[Mapping[str, Factors]]) -> None:
        """Put an adapter into a slot, layer by layer; steps launched before are not touched.

        Args:
            slot: Counted from 1, as steps count.
            layers: Factors of each layer's adapted projections.
        """
        spec, program = self.spec, self._adapter_program()
        dtype, rank = np.dtype(jnp.dtype(spec.dtype)), self._lora_shape.rank
        place = self._put(np.int32(slot - 1))
        buffers = list(self._adapters)
        for index, factors in enumerate(layers):
            packed = lora.pack_layer(factors, spec.config, rank=rank, dtype=dtype)
            buffers[index] = program(buffers[index], place, self._put(packed))
            self._adapters = tuple(buffers)

    def drop_adapters(self) -> None:
        """Free the slots of adapters until `restore_adapters`."""
        for leaf in jax.tree.leaves(self._adapters):
            if not leaf.is_deleted():
                leaf.delete()
        self._adapters = ()

    def restore_adapters(self) -> None:
        """Allocate empty slots for adapters, if there are to be any and they are not there."""
        spec = self.spec
        if spec.lora is not None and not self._adapters:
            self._adapters = lora.allocate(
                spec.config,
                spec.lora,
                jnp.dtype(spec.dtype),
                mesh=self._mesh,
                rules=LogicalAxisRules() if spec.sharding is None else spec.sharding.rules,
            )

    def set_row(
        self, row: int, counts: np.ndarray, prompt_seen: np.ndarray, bias: np.ndarray
    ) -> None:
        """Set what the sampler knows of a row; needed only for penalties and biases."""
        self._rows = self._row_program()(
            self._rows,
            self._put(np.int32(row)),
            self._put(counts.astype(np.int32)),
            self._put(prompt_seen.astype(np.bool_)),
            self._put(bias.astype(np.float32)),
        )

    def move_row(self, source: int, target: int, length: int) -> None:
        """Move a sequence to another row: its slot's first `length` tokens and sampler state."""
        self.slots, self._rows = self._move_row_program()(
            self.slots, self._rows, *(self._put(np.int32(i)) for i in (source, target, length))
        )

    def save_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy (row, block, page) parts of slots into the page store."""
        for count, columns in self._batches(moves):
            self.pages = self._save_program()(self.pages, self.slots, count, *columns)

    def load_pages(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages of the store into (row, block, page) parts of slots."""
        for count, columns in self._batches(moves):
            self.slots = self._load_program()(self.slots, self.pages, count, *columns)

    def cluster(self, row: int, pages: Sequence[int], number: int, entry: int) -> None:
        """Cluster one full segment of a sequence, layer by layer.

        Args:
            row: The sequence's row.
            pages: The segment's pages.
            number: Which segment of the sequence it is.
            entry: Where its clusters go.
        """
        program = self._cluster_program()
        cache, where = (self.pages, pages) if self.spec.use_pages else (self.slots, row)
        placed = [self._put(np.asarray(value, np.int32)) for value in (where, number, entry)]
        self._clusters = tuple(
            None if layer is None else program(layer, kv, *placed)
            for layer, kv in zip(self._clusters, cache, strict=True)
        )

    def prompt_logprobs(self, hidden: jax.Array, targets: np.ndarray) -> Sampled:
        """Score the token that follows each prefill token.

        Args:
            hidden: Hidden states of a step's prefill tokens.
            targets: The following token of each, -1 where there is none.
        """
        wanted = np.flatnonzero(targets >= 0)
        first, end = (wanted[0], wanted[-1] + 1) if len(wanted) else (0, 0)
        return self._prompt_logprob_program()(
            self._params, hidden, self._put(targets.astype(np.int32)), self._put(np.int32(first)),
            self._put(np.int32(end)),
        )  # fmt: skip

    def pool(self, hidden: jax.Array, start: np.ndarray, count: np.ndarray) -> Pooled:
        """Sum the hidden states of chunks of a step's prefill tokens.

        Args:
            hidden: Hidden states of the prefill tokens.
            start: Where each row's chunk begins among them.
            count: Its tokens; 0 for a row without one.

        Returns:
            Sums and last states per row, float32.
        """
        return self._pool_program()(hidden, self._put(start), self._put(count))

    def _batches(
        self, moves: Sequence[tuple[int, int, int]]
    ) -> Iterator[tuple[jax.Array, list[jax.Array]]]:
        for start in range(0, len(moves), MAX_MOVES):
            part = moves[start : start + MAX_MOVES]
            columns = np.zeros((3, MAX_MOVES), np.int32)
            columns[:, : len(part)] = np.asarray(part, np.int32).T
            yield self._put(np.int32(len(part))), [self._put(column) for column in columns]

    def expert_loads(self) -> np.ndarray:
        """Return how often each expert has been asked for, uint32 `[layers, experts]`; waits."""
        return np.asarray(self._slots_of_experts.loads)

    def place_experts(self, experts: np.ndarray) -> None:
        """Move experts between devices; steps launched before are not touched.

        Args:
            experts: `[layers, slots]`: the expert that each slot is to hold, in layers with any.
        """
        self._params = tuple(self._slots_of_experts.move(self._params, experts))

    @property
    def _slots_of_experts(self) -> ExpertSlots:
        if self.experts is None:
            raise AssertionError("experts of this engine stay where they are")
        return self.experts

    def _put(self, value: np.ndarray | np.generic) -> jax.Array:
        return put(value, self._everywhere)

    @property
    def params(self) -> nnx.State:
        """The weights being served.

        Raises:
            RequestError: While they are not on the device.
        """
        if not self._params:
            raise RequestError(
                "the weights are not on the device; wake_up() or update_params() brings them.",
                status=409,
            )
        return jax.tree.unflatten(self._tree, self._in_order(self._params))

    def _in_order(self, leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return weights as others see them; experts that lie in slots are copied."""
        return leaves if self.experts is None else tuple(self.experts.fold(leaves))

    @property
    def has_params(self) -> bool:
        """Whether the weights are on the device."""
        return bool(self._params)

    @property
    def param_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every weight by path, in the order of `set_params`."""
        return flatten_params(self.described_params)

    @property
    def described_params(self) -> nnx.State:
        """Shape, dtype and sharding of every weight in its place."""
        return jax.tree.unflatten(self._tree, self._outer_specs)

    def set_params(self, leaves: Sequence[jax.Array | None]) -> None:
        """Serve other weights from the next step on; nothing is compiled or copied.

        Args:
            leaves: One array per weight, in the order of `param_specs` and just as described
                there; None keeps what is served.
        """
        old = self._params or (None,) * len(leaves)
        chosen = [
            kept if new is None else self._spread_leaf(index, new)
            for index, (new, kept) in enumerate(zip(leaves, old, strict=True))
        ]
        if any(leaf is None for leaf in chosen):
            raise AssertionError("a partial update found no weights to keep")
        self._params = tuple(cast(list[jax.Array], chosen))

    def _spread_leaf(self, index: int, leaf: jax.Array) -> jax.Array:
        return leaf if self.experts is None else self.experts.spread_leaf(index, leaf)

    def release_params(self) -> tuple[jax.Array, ...]:
        """Let the weights go; who takes the result holds them, else nobody does."""
        leaves, self._params = self._params, ()
        return self._in_order(leaves)

    def drop_cache(self) -> None:
        """Free cache and row state until `restore_cache`; programs stay."""
        self._free()
        self.slots = self.pages = ()
        self._clusters = ()

    def restore_cache(self) -> None:
        """Allocate cache and row state anew, empty."""
        self._allocate()

    def cache_bytes(self) -> int:
        """Bytes of key-value cache on the device, its index included."""
        held = (self.slots, self.pages, self._clusters)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def reset(self) -> None:
        """Replace cache and row state by fresh ones, after a failed step left them undefined."""
        self._free()
        self._allocate()
        if self.experts is not None:
            self.experts.forget_loads()

    def explain(self, error: Exception) -> Exception:
        """Return why a step has failed, if more is known than its error says."""
        return error

    def _free(self) -> None:
        for leaf in jax.tree.leaves((self.slots, self.pages, self._clusters, self._rows)):
            if not leaf.is_deleted():
                leaf.delete()

    def close(self) -> None:
        """Free cache, row state and programs; the weights belong to the caller."""
        self.programs.stop()
        self._free()
        self.drop_adapters()
        self.programs.clear()
        self._found.clear()
        self.slots = self.pages = ()
        self._clusters = ()
        self._params = ()


@functools.lru_cache(maxsize=16)
def _rows_program(rows: int, vocab: int, sharding: jax.sharding.Sharding) -> Callable[[], RowState]:
    """Return what makes empty row state, once, so that allocating anew compiles nothing."""

    def make() -> RowState:
        return RowState(
            last_token=jnp.zeros((rows,), jnp.int32),
            counts=jnp.zeros((rows, vocab), jnp.int32),
            prompt_seen=jnp.zeros((rows, vocab), bool),
            bias=jnp.zeros((rows, vocab), jnp.float32),
        )

    return jax.jit(make, out_shardings=sharding)


def describe(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Return what a program needs to know of an array when it is compiled."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
