"""The small, fixed set of compiled step shapes, and the packed buffer that feeds them.

Everything that a step needs from the host travels in one int32 buffer: one transfer per step, and
the layout below is the only place that knows where what lies.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.engine.kernel_plans import KernelPlans, fields_of
from jaxserve.engine.sampler import MAX_BANNED
from jaxserve.pallas_kernels.plan import PlanSpec

_SMALLEST_PREFILL = 32

INT_FIELDS = ("top_k",)
FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_FLOATS = (*FLOAT_FIELDS, "attention_mass")
FLAGS = (
    "any_random",
    "any_filter",
    "any_penalty",
    "any_bias",
    "any_mask",
    "any_logprobs",
    "any_top_logprobs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawShape:
    """How many tokens a step draws: what the sampler is compiled for.

    Attributes:
        rows: Decode rows.
        drafts: Draft tokens behind them.
    """

    rows: int
    drafts: int = 0

    @property
    def num_drawn(self) -> int:
        """Places at which a token can be drawn: the rows, then the drafts."""
        return self.rows + self.drafts

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name every part of the packed buffer that the sampler reads with its shape, in order."""
        rows, drafts = self.rows, self.drafts
        fields: dict[str, tuple[int, ...]] = {
            "draft_token": (drafts,),
            "draft_row": (drafts,),
            "draft_index": (drafts,),
            "sample_index": (rows,),
            "seed": (rows, 2),
            "banned": (self.num_drawn, MAX_BANNED),
            "output_position": (self.num_drawn,),
        }
        fields.update(dict.fromkeys((*INT_FIELDS, *FLOAT_FIELDS), (rows,)))
        fields.update(dict.fromkeys(FLAGS, ()))
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """One compiled step.

    Attributes:
        rows: Decode rows; covers every occupied sequence row.
        prefill: Prefill tokens, padding included; 0 for a pure decode.
        q_block: Tokens per prefill block.
        pages_per_row: Width of the page table; 0 with dense slots.
        drafts: Draft tokens behind the decode rows, padding included. They attend as prefill
            tokens do, but each has a token drawn behind it.
        has_lora: Whether rows say which adapter they use.
        plans: Specs of the plans of paged kernels; with any, there is no page table besides.
        num_segments: Most segments of a sequence that have clusters; 0 where no row leaves anything
            unread.
    """

    rows: int
    prefill: int
    q_block: int
    pages_per_row: int
    drafts: int = 0
    has_lora: bool = False
    plans: tuple[PlanSpec, ...] = ()
    num_segments: int = 0

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return self.rows + self.drafts + self.prefill

    @property
    def num_drawn(self) -> int:
        """Places at which a token can be drawn: the rows, then the drafts."""
        return self.rows + self.drafts

    @property
    def num_blocks(self) -> int:
        """Most prefill blocks: full ones, and one shorter one per sequence."""
        size = self.drafts + self.prefill
        return 0 if not size else -(-size // self.q_block) + self.rows

    @property
    def shares(self) -> bool:
        """Whether prefixes that several rows hold are read once for all of them."""
        return any(spec.cascade_levels for spec in self.plans)

    @property
    def draw(self) -> DrawShape:
        """What the step draws."""
        return DrawShape(rows=self.rows, drafts=self.drafts)

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name every part of the packed buffer with its shape, in order; the sampler's first."""
        rows, blocks = self.rows, self.num_blocks
        fields: dict[str, tuple[int, ...]] = {
            **self.draw.fields(),
            **fields_of(self.plans),
            "prefill_token": (self.prefill,),
            "token_row": (self.num_tokens,),
            "token_position": (self.num_tokens,),
            "num_blocks": (),
            "block_start": (blocks,),
            "block_row": (blocks,),
            "block_position": (blocks,),
            "block_len": (blocks,),
            "block_context": (blocks,),
            "num_context_blocks": (),
            "page_table": (rows, self.pages_per_row),
        }
        if self.has_lora:
            fields["lora_slot"] = (rows,)
        if self.num_segments:
            fields["attention_mass"] = fields["num_segments"] = (rows,)
            fields["segment_entry"] = (rows, self.num_segments)
            fields["is_measured"] = ()
        return fields


@functools.lru_cache(maxsize=256)
def _offsets(
    shape: StepShape | DrawShape,
) -> tuple[dict[str, tuple[int, int, tuple[int, ...]]], int]:
    offsets: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    total = 0
    for name, dims in shape.fields().items():
        size = int(np.prod(dims, dtype=np.int64))
        offsets[name] = (total, total + size, dims)
        total += size
    return offsets, total


def mask_words(vocab_size: int) -> int:
    """Return the 32-bit words that hold one bit per token.

    >>> mask_words(33)
    2
    """
    return -(-vocab_size // 32)


class PackedStep:
    """Views into one host buffer, by field name; floats are views of the same bits.

    Args:
        shape: What each group's part is padded to.
        groups: Groups of devices that have tokens of their own.

    Attributes:
        buffer: `[groups, words]`, int32; `[words]` if there is one group.
        parts: Views into each group's part.
        mask: Tokens that may be drawn in each place, one bit per token, (groups * num_drawn, words)
            uint32; None where no row is constrained. Large, and in most steps absent, so not a part
            of the buffer.
    """

    def __init__(self, shape: StepShape, groups: int = 1) -> None:
        """Allocate a buffer of zeros."""
        offsets, total = _offsets(shape)
        self.shape = shape
        self.mask: np.ndarray | None = None
        whole = np.zeros((groups, total), np.int32)
        as_float = whole.view(np.float32)
        self.parts = [
            {
                name: (as_float if name in _FLOATS else whole)[group, low:high].reshape(dims)
                for name, (low, high, dims) in offsets.items()
            }
            for group in range(groups)
        ]
        self.buffer = whole if groups > 1 else whole[0]

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """Views into the first group's part; all groups have the same flags."""
        return self.parts[0]

    def place(self, group: int, local: int) -> int:
        """Return which of all places a token is drawn in, by its number in its group."""
        return group * self.shape.num_drawn + local

    def banned(self, place: int) -> np.ndarray:
        """Return the tokens, and -1 behind them, that may not be drawn in a place."""
        group, local = divmod(place, self.shape.num_drawn)
        return self.parts[group]["banned"][local]

    def set_flag(self, name: str) -> None:
        """Set a flag in all groups."""
        for part in self.parts:
            part[name][...] = True


def unpack(buffer: jax.Array, shape: StepShape | DrawShape) -> dict[str, jax.Array]:
    """Take the packed buffer, or the sampler's part of it, apart inside a compiled program.

    What has a first axis for groups gives arrays that have it.
    """
    if buffer.ndim > 1:
        return jax.vmap(lambda own: unpack(own, shape))(buffer)
    parts: dict[str, jax.Array] = {}
    for name, (low, high, dims) in _offsets(shape)[0].items():
        part = lax.slice(buffer, (low,), (high,)).reshape(dims)
        if name in _FLOATS:
            part = lax.bitcast_convert_type(part, jnp.float32)
        elif name in FLAGS:
            part = part != 0
        elif name == "seed":
            part = lax.bitcast_convert_type(part, jnp.uint32)
        parts[name] = part
    return parts


def packed_size(shape: StepShape | DrawShape) -> int:
    """Return the length of the packed buffer in 32-bit words."""
    return _offsets(shape)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeTable:
    """Every step shape of one engine.

    Attributes:
        row_buckets: Numbers of rows of pure decode steps, ascending.
        mixed_row_buckets: The fewer numbers of rows of steps with prefill.
        prefill_buckets: Numbers of prefill tokens, ascending.
        extents: Numbers of keys that attention is compiled for, ascending.
        q_block: Tokens per prefill block.
        pages_per_row: Width of the page table; 0 with dense slots.
        draft_row_buckets: Numbers of rows of steps with drafts.
        num_draft: Most draft tokens per sequence; 0 without speculation.
        max_draft: Most draft tokens per step.
        has_lora: Whether rows say which adapter they use.
        kernels: What the paged kernels plan with; None where there are none.
        num_segments: Most segments of a sequence that have clusters; 0 without sparse attention.
    """

    row_buckets: tuple[int, ...]
    mixed_row_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    q_block: int
    kv_tile: int
    pages_per_row: int
    draft_row_buckets: tuple[int, ...] = ()
    num_draft: int = 0
    max_draft: int = 0
    has_lora: bool = False
    kernels: KernelPlans | None = None
    num_segments: int = 0

    @classmethod
    def build(
        cls,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        use_pages: bool,
        q_block: int,
        kv_tile: int,
        batch_invariant: bool,
        min_rows: int = 1,
        num_draft: int = 0,
        has_lora: bool = False,
        kernels: KernelPlans | None = None,
        num_segments: int = 0,
    ) -> "ShapeTable":
        """Choose buckets: powers of two, ending at the limits themselves.

        Args:
            max_num_seqs: Most sequences running at once.
            max_num_batched_tokens: Most tokens per step.
            max_model_len: Most tokens per sequence.
            page_size: Tokens per page.
            use_pages: Whether attention goes through page tables.
            q_block: Tokens per prefill block.
            kv_tile: Keys per tile of attention; a multiple of the page size.
            batch_invariant: One shape for all decodes and one for all prefills.
            min_rows: Fewest decode rows; XLA's CPU library has no fast path for bfloat16 products
                of fewer than four rows.
            num_draft: Most draft tokens per sequence; 0 without speculation.
            has_lora: Whether rows say which adapter they use.
            kernels: What the paged kernels plan with; None where there are none.
            num_segments: Most segments of a sequence that have clusters.
        """
        rows = _powers(min(min_rows, max_num_seqs), max_num_seqs)
        prefill = _powers(min(_SMALLEST_PREFILL, max_num_batched_tokens), max_num_batched_tokens)
        # Few buckets: idle rows cost little beside a prefill, a compiled shape costs seconds.
        mixed = rows[::-4][::-1]
        if rows[0] not in mixed:
            mixed = (rows[0], *mixed)
        if batch_invariant:
            rows, mixed, prefill = rows[-1:], rows[-1:], prefill[-1:]
        return cls(
            row_buckets=rows,
            mixed_row_buckets=mixed,
            prefill_buckets=prefill,
            q_block=min(q_block, prefill[-1]),
            kv_tile=kv_tile,
            pages_per_row=-(-(max_model_len + q_block) // kv_tile) * (kv_tile // page_size)
            if use_pages and kernels is None
            else 0,
            # Drafts are rows of products too, so that one sequence with some is never a single row.
            draft_row_buckets=_powers(1, max_num_seqs) if num_draft else (),
            num_draft=num_draft,
            max_draft=min(num_draft * max_num_seqs, max_num_batched_tokens),
            has_lora=has_lora,
            kernels=kernels,
            num_segments=num_segments,
        )

    def draft_buckets(self, rows: int) -> tuple[int, ...]:
        """List the numbers of draft tokens that steps of so many rows are compiled for.

        Args:
            rows: One of `draft_row_buckets`.

        Returns:
            What suffices if all sequences draft as much as they may, a half and a quarter of them.
        """
        whole = min(rows * self.num_draft, self.max_draft)
        parts = {max(1, rows // part) * self.num_draft for part in (4, 2)}
        return tuple(sorted({whole, *(part for part in parts if part < whole)}))

    def draft_sizes(self, rows: int) -> tuple[int, ...]:
        """List what the draft tokens of so many rows are padded to; nothing if nobody drafts."""
        if not rows or not self.draft_row_buckets:
            return ()
        return self.draft_buckets(_ceil_to(rows, self.draft_row_buckets))

    def shape(
        self,
        *,
        rows: int,
        prefill: int,
        drafts: int = 0,
        shares: bool = False,
        is_sparse: bool = True,
    ) -> StepShape:
        """Return the smallest shape that holds so many rows and tokens; no shape has both kinds.

        Args:
            rows: Decode rows.
            prefill: Prefill tokens.
            drafts: Draft tokens.
            shares: Whether a decode reads shared prefixes once for all who share them. Kernels
                that can are slower where nothing is shared, so there are decodes of both kinds;
                steps with prefill or drafts always can.
            is_sparse: Whether a row of a decode leaves something unread. Kernels choose what is
                read even if no row asks, so there are decodes of both kinds here too; without
                kernels, a step finds out by itself.
        """
        if drafts:
            if prefill:
                raise AssertionError("a step with drafts has no prefill")
            rows = _ceil_to(rows, self.draft_row_buckets)
            return StepShape(
                rows=rows,
                prefill=0,
                q_block=self.num_draft,
                pages_per_row=self.pages_per_row,
                drafts=(drafts := _ceil_to(drafts, self.draft_buckets(rows))),
                has_lora=self.has_lora,
                plans=self._plans(rows, rows + drafts, has_drafts=True, shares=True),
                num_segments=self.num_segments,
            )
        buckets = self.mixed_row_buckets if prefill else self.row_buckets
        tokens = _ceil_to(prefill, self.prefill_buckets) if prefill else 0
        rows = _ceil_to(rows, buckets)
        is_sparse = is_sparse or self.kernels is None or bool(tokens)
        return StepShape(
            rows=rows,
            prefill=tokens,
            q_block=min(self.q_block, tokens) if tokens else self.q_block,
            pages_per_row=self.pages_per_row,
            has_lora=self.has_lora,
            plans=self._plans(
                rows,
                rows + tokens,
                has_drafts=False,
                shares=shares or bool(tokens),
                is_sparse=is_sparse,
            ),
            num_segments=self.num_segments if is_sparse else 0,
        )

    def _plans(
        self, rows: int, tokens: int, *, has_drafts: bool, shares: bool, is_sparse: bool = True
    ) -> tuple[PlanSpec, ...]:
        if self.kernels is None:
            return ()
        return self.kernels.specs(
            rows=rows, tokens=tokens, has_drafts=has_drafts, shares=shares, is_sparse=is_sparse
        )

    def all_shapes(self) -> list[StepShape]:
        """List every shape, those that the first request needs first."""
        decodes = dict.fromkeys(
            self.shape(rows=r, prefill=0, shares=shares, is_sparse=is_sparse)
            for r in self.row_buckets
            for shares in (False, True)
            for is_sparse in (False, True)
        )
        mixed = [
            self.shape(rows=r, prefill=p)
            for p in self.prefill_buckets
            for r in self.mixed_row_buckets
        ]
        drafted = [
            self.shape(rows=r, prefill=0, drafts=d)
            for r in self.draft_row_buckets
            for d in self.draft_buckets(r)
        ]
        return sorted([*decodes, *mixed, *drafted], key=lambda s: (s.rows, s.prefill, s.drafts))

    def row_bucket(self, rows: int) -> int:
        """Return the number of rows that a pure decode with `rows` rows runs with."""
        return _ceil_to(rows, self.row_buckets)


def _powers(low: int, high: int) -> tuple[int, ...]:
    powers: list[int] = []
    value = low
    while value < high:
        powers.append(value)
        value *= 2
    return (*powers, high)


def _ceil_to(value: int, buckets: Iterable[int]) -> int:
    for bucket in buckets:
        if value <= bucket:
            return bucket
    raise AssertionError(f"{value} exceeds every bucket of {tuple(buckets)}")
