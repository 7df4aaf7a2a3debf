"""What the programs of a runner compute: steps, draws, moves of rows. Traced, never run as is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.attention.metadata import AttentionPlan, Backend
from jaxserve.cache import buffers
from jaxserve.cache.buffers import KvBuffers
from jaxserve.core.config import LogprobsMode
from jaxserve.engine.kernel_plans import fields_of
from jaxserve.engine.sampler import (
    Drafts,
    RowState,
    Sampled,
    SamplingInputs,
    accept,
    report,
    sample,
)
from jaxserve.engine.shapes import (
    FLAGS,
    FLOAT_FIELDS,
    INT_FIELDS,
    DrawShape,
    ShapeTable,
    StepShape,
    packed_size,
    unpack,
)
from jaxserve.engine.sparse import Clusters, Reading, SparseSpec, sparse_rows
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM
from jaxserve.models.lora import LoraBuffers, LoraShape, StepLora
from jaxserve.pallas_kernels.plan import Plan
from jaxserve.sharding.experts import SlotTable
from jaxserve.sharding.rules import ModelSharding

Balance = tuple[SlotTable, jax.Array] | tuple[()]
"""Where experts lie and how often each has been asked for; empty where they stay in their order."""

_PROMPT_LOGPROB_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSpec:
    """What is fixed for the life of a runner.

    Attributes:
        config: The model's shape.
        dtype: Precision of weights and activations.
        shapes: The step shapes.
        max_num_seqs: Most sequences running at once.
        num_pages: Pages of each group, the dummy page 0 not counted.
        page_size: Tokens per page.
        max_model_len: Most tokens per sequence.
        use_pages: Paged layout; otherwise dense slots.
        keep_store: With slots: whether a page store for prefixes exists.
        backend: Attention implementation.
        batch_invariant: Whether results may not depend on a row's neighbours.
        upcast: Whether attention multiplies in float32 whatever the dtype.
        logprobs_mode: What is reported.
        num_candidates: Most candidates reported per token.
        matmul_precision: Precision of matrix products; "highest" for float32.
        lora: Slots for low-rank adapters; None has none.
        sparse: Sparse attention; None reads everything.
        sharding: How the model lies on several devices; None on one.
    """

    config: ModelConfig
    dtype: str
    shapes: ShapeTable
    max_num_seqs: int
    num_pages: int
    page_size: int
    max_model_len: int
    use_pages: bool
    keep_store: bool
    backend: Backend
    upcast: bool
    batch_invariant: bool
    logprobs_mode: LogprobsMode
    num_candidates: int
    matmul_precision: str
    lora: LoraShape | None = None
    sparse: SparseSpec | None = None
    sharding: ModelSharding | None = None

    @property
    def groups(self) -> int:
        """Groups of devices that have rows and pages of their own."""
        return 1 if self.sharding is None else self.sharding.groups

    @property
    def rows_per_group(self) -> int:
        """Sequence rows of each group."""
        return -(-self.max_num_seqs // self.groups)

    @property
    def num_rows(self) -> int:
        """Sequence rows of all groups."""
        return self.groups * self.rows_per_group


def attention_plan(
    spec: RunnerSpec,
    shape: StepShape,
    part: dict[str, jax.Array],
    clusters: Clusters = (),
    slot_table: SlotTable | None = None,
) -> AttentionPlan:
    """Say what each token of a step sees.

    Args:
        spec: What is fixed.
        shape: The step's shape.
        part: Its packed buffer, taken apart.
        clusters: What sparse attention chooses among; empty reads everything.
        slot_table: Where experts lie, if they move.
    """
    kernels = spec.shapes.kernels
    return AttentionPlan(
        token_row=part["token_row"],
        token_position=part["token_position"],
        num_blocks=part["num_blocks"],
        block_start=part["block_start"],
        block_row=part["block_row"],
        block_position=part["block_position"],
        block_len=part["block_len"],
        block_context=part["block_context"],
        num_context_blocks=part["num_context_blocks"],
        page_table=part["page_table"] if spec.use_pages else None,
        kernel_plans=tuple(
            Plan(buffer=part[name], spec=one)
            for name, one in zip(fields_of(shape.plans), shape.plans, strict=True)
        ),
        extra={} if kernels is None else {n: jnp.asarray(x) for n, x in kernels.extra.items()},
        sparse=sparse_rows(spec.sparse, part, clusters) if shape.num_segments else None,
        slot_table=slot_table,
        rows=shape.rows,
        kv_tile=spec.shapes.kv_tile,
        q_block=shape.q_block,
        backend=spec.backend,
        upcast=spec.upcast,
        batch_invariant=spec.batch_invariant,
        sharding=spec.sharding,
    )


def run_step(
    graph: nnx.GraphDef[CausalLM],
    tree: Any,  # noqa: ANN401  jax exports no public type of a tree structure
    spec: RunnerSpec,
    shape: StepShape,
    mesh: jax.sharding.Mesh,
    params: tuple[jax.Array, ...],
    cache: KvBuffers,
    last_token: jax.Array,
    packed: jax.Array,
    adapters: tuple[LoraBuffers, ...],
    clusters: Clusters,
    balance: Balance,
) -> tuple[jax.Array, jax.Array, jax.Array, KvBuffers, Reading, jax.Array | None]:
    """Embed, run all layers, score what may be drawn. Donates `cache`.

    Where groups of devices have tokens of their own, `packed` has one part for each, and whatever
    is returned per token, row or page comes group by group.

    Returns:
        Logits of the places at which a token is drawn, the sampler's part of `packed`, hidden
        states of the prefill tokens, cache, what sparse attention counted, and how often experts
        have been asked for, if they move.
    """
    model = nnx.merge(graph, jax.tree.unflatten(tree, params))
    groups = spec.groups
    own = PartitionSpec() if spec.sharding is None else spec.sharding.by_group

    def fixed[T](arrays: T) -> T:
        return lax.with_sharding_constraint(arrays, NamedSharding(mesh, own))

    def by_group(array: jax.Array) -> jax.Array:
        """Give what follows each other group by group an axis for that."""
        return array.reshape(groups, -1, *array.shape[1:]) if groups > 1 else array

    def joined(array: jax.Array) -> jax.Array:
        return array.reshape(-1, *array.shape[2:]) if groups > 1 else array

    if groups > 1:
        packed = fixed(packed)
    part = unpack(packed, shape)
    last = by_group(last_token)[..., : shape.rows]
    token_ids = jnp.concatenate([last, part["draft_token"], part["prefill_token"]], axis=-1)
    plan = attention_plan(spec, shape, part, clusters, balance[0] if balance else None)
    positions = jnp.maximum(part["token_position"], 0)
    if groups > 1:
        token_ids = fixed(token_ids)
    hidden, new_cache = model(
        joined(token_ids), joined(positions), cache, plan, lora=_step_lora(spec, part, adapters)
    )
    hidden = by_group(hidden)
    places = jnp.maximum(part["sample_index"], 0)
    if shape.drafts:
        behind = jnp.broadcast_to(
            shape.rows + jnp.arange(shape.drafts), (*places.shape[:-1], shape.drafts)
        )
        places = jnp.concatenate([places, behind], axis=-1)
    drawn = jax.vmap(lambda own, at: own[at])(hidden, places) if groups > 1 else hidden[places]
    logits = model.logits(joined(drawn), plan)
    drawing = packed[..., : packed_size(shape.draw)]
    logits, drawing = fixed((logits, drawing))
    # Padded to one size, so that one program scores the prompts of all shapes.
    longest = spec.shapes.prefill_buckets[-1] if shape.prefill else 0
    prefill = hidden[..., shape.num_drawn :, :]
    short = max(0, longest - shape.prefill)
    prefill = jnp.pad(prefill, ((0, 0),) * (prefill.ndim - 2) + ((0, short), (0, 0)))
    prefill = fixed(joined(prefill))
    layers = cast(KvBuffers, new_cache)
    found = [layer[2:] for layer in layers if len(layer) > 2]
    cache = tuple(layer[:2] for layer in layers)
    if balance:  # no attention is sparse on several devices
        counts = jnp.stack([counts for (counts,) in found])
        everywhere = NamedSharding(mesh, PartitionSpec())
        loads = lax.with_sharding_constraint(balance[1] + counts, everywhere)
        return logits, drawing, prefill, cache, (), loads
    return logits, drawing, prefill, cache, tuple((one[0], one[1]) for one in found), None


def draw_tokens(
    num_candidates: int,
    mode: LogprobsMode,
    draw: DrawShape,
    logits: jax.Array,
    rows: RowState,
    packed: jax.Array,
    mask: jax.Array,
) -> tuple[Sampled, RowState]:
    """Draw the tokens of a step. Donates `rows`.

    A program of its own, since it is the same for steps that differ in their prefill only, and
    takes as long to compile as some layers of a model.
    """
    part = unpack(packed, draw)
    drafts: Drafts | None = None
    per_row = {name: part[name] for name in (*INT_FIELDS, *FLOAT_FIELDS, "seed")}
    if draw.drafts:
        drafts = Drafts(row=part["draft_row"], index=part["draft_index"], token=part["draft_token"])
        owner = jnp.concatenate([jnp.arange(draw.rows), drafts.row])
        per_row = {name: values[owner] for name, values in per_row.items()}
    inputs = SamplingInputs(
        mask=mask,
        **per_row,
        **{name: part[name] for name in (*FLAGS, "banned", "output_position")},
    )
    with jax.named_scope("sample"):
        sampled = sample(
            logits,
            inputs,
            rows,
            num_candidates=num_candidates,
            mode=mode,
            drafts=drafts,
        )
        return sampled, _take_tokens(rows, sampled.token, part["sample_index"] >= 0, drafts)


def _take_tokens(
    rows: RowState, token: jax.Array, is_drawn: jax.Array, drafts: Drafts | None
) -> RowState:
    """Make each row's latest token what has been drawn for it, and count what has been kept."""
    size = is_drawn.shape[0]
    drawn = token[:size]
    # Not `.at[:size].set`, at which XLA of JAX 0.11.2 crashes where groups have one row each.
    latest = jnp.where(is_drawn, drawn, rows.last_token[:size])
    last = jnp.concatenate([latest, rows.last_token[size:]])
    counts = rows.counts.at[jnp.arange(size), drawn].add(is_drawn.astype(jnp.int32))
    if drafts is not None:
        accepted, is_last = accept(token, drafts)
        behind = token[size:]
        nowhere = rows.last_token.shape[0]
        last = last.at[jnp.where(is_last, drafts.row, nowhere)].set(behind, mode="drop")
        counts = counts.at[drafts.row, behind].add(accepted.astype(jnp.int32))
    return RowState(last_token=last, counts=counts, prompt_seen=rows.prompt_seen, bias=rows.bias)


def _step_lora(
    spec: RunnerSpec, part: Mapping[str, jax.Array], adapters: tuple[LoraBuffers, ...]
) -> StepLora | None:
    if spec.lora is None:
        return None
    row, slots = part["token_row"], part["lora_slot"]
    slot = jnp.where(row >= 0, jnp.take_along_axis(slots, jnp.maximum(row, 0), axis=-1), 0)
    return StepLora(slot=slot.reshape(-1), layers=adapters, is_invariant=spec.batch_invariant)


def set_row(
    rows: RowState, row: jax.Array, counts: jax.Array, prompt_seen: jax.Array, bias: jax.Array
) -> RowState:
    """Set what is known of a row; one that there is not is left out. Donates `rows`."""
    return RowState(
        last_token=rows.last_token,
        counts=rows.counts.at[row].set(counts, mode="drop"),
        prompt_seen=rows.prompt_seen.at[row].set(prompt_seen, mode="drop"),
        bias=rows.bias.at[row].set(bias, mode="drop"),
    )


def move_row(
    slots: KvBuffers, rows: RowState, source: jax.Array, target: jax.Array, length: jax.Array
) -> tuple[KvBuffers, RowState]:
    """Move a row; to one that there is not nothing moves, if it has no length. Donates all."""
    moved = jax.tree.map(lambda x: x.at[target].set(x[source], mode="drop"), rows)
    return buffers.move_row(slots, source, target, length), moved


def score_prompts(
    graph: nnx.GraphDef[CausalLM],
    tree: Any,  # noqa: ANN401
    spec: RunnerSpec,
    params: tuple[jax.Array, ...],
    hidden: jax.Array,
    targets: jax.Array,
    first: jax.Array,
    end: jax.Array,
) -> Sampled:
    """Score given tokens in slices, so that the logits of a long prompt never exist at once."""
    model = nnx.merge(graph, jax.tree.unflatten(tree, params))
    num_tokens = hidden.shape[0]
    size = min(_PROMPT_LOGPROB_TOKENS, num_tokens)
    pad = -num_tokens % size
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    targets = jnp.pad(targets, (0, pad))
    yes = jnp.bool_(True)  # noqa: FBT003  a traced flag

    def score(i: jax.Array, scores: Sampled) -> Sampled:
        start = i * size
        part = report(
            model.logits(lax.dynamic_slice_in_dim(hidden, start, size)),
            jnp.maximum(lax.dynamic_slice_in_dim(targets, start, size), 0),
            yes,
            yes,
            num_candidates=spec.num_candidates,
            normalize=spec.logprobs_mode.endswith("logprobs"),
        )
        return jax.tree.map(
            lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, start, axis=0),
            scores,
            part,
        )

    rows = (num_tokens + pad,)
    empty = Sampled(
        token=jnp.zeros(rows, jnp.int32),
        logprob=jnp.zeros(rows, jnp.float32),
        rank=jnp.zeros(rows, jnp.int32),
        top_token=jnp.zeros((*rows, spec.num_candidates), jnp.int32),
        top_logprob=jnp.zeros((*rows, spec.num_candidates), jnp.float32),
    )
    scores = lax.fori_loop(first // size, (end + size - 1) // size, score, empty)
    if spec.sharding is None:
        return scores
    return lax.with_sharding_constraint(scores, NamedSharding(spec.sharding.mesh, PartitionSpec()))
