"""`StepPlan` and states -> one packed buffer of a compiled shape. The only place with buckets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.core.request import SamplingParams
from jaxserve.engine.kernel_plans import Request, StepPlanner
from jaxserve.engine.sampler import MAX_BANNED
from jaxserve.engine.sequence import SequenceState
from jaxserve.engine.shapes import FLAGS, FLOAT_FIELDS, PackedStep, ShapeTable, StepShape

# What a request may ask for can exceed what a 32-bit field holds; beyond these nothing changes.
_LARGEST_FLOAT = 1e30
_LARGEST_INT = 2**31 - 1

_CONSTANT_FIELDS = (*FLOAT_FIELDS, "top_k", "seed")


@dataclass(slots=True, kw_only=True, eq=False)
class Item:
    """Work of one sequence in a step.

    Attributes:
        sequence: Whose work.
        row: Its row when the step was launched.
        start: Position of the first token.
        num_tokens: Tokens computed.
        is_sampled: Whether a new token is drawn.
        group: Group of devices on which its row is.
        local: Number of its row within the group.
        prefill_start: Where its chunk lies among the prefill tokens of its group; -1 for a decode.
        num_draft: Draft tokens for which it has pages.
        drafts: Draft tokens that are verified behind a decode.
        draft_start: Where these lie among the draft tokens of its group.
        place: Where its token is drawn, among the places of all groups; -1 before it is laid out.
        draft_place: Where the token behind its first draft is drawn.
        hidden_start: Where its chunk lies among the hidden states that a step returns.
    """

    sequence: SequenceState
    row: int
    start: int
    num_tokens: int
    is_sampled: bool
    group: int = 0
    local: int = -1
    prefill_start: int = -1
    num_draft: int = 0
    drafts: tuple[int, ...] = ()
    draft_start: int = -1
    place: int = -1
    draft_place: int = -1
    hidden_start: int = -1

    def settle(self, per_group: int) -> None:
        """Take note of the row that the sequence has now, in groups of so many."""
        self.row = self.sequence.row
        self.group, self.local = divmod(self.row, per_group)


class ShapeChooser(Protocol):
    """Picks a compiled shape."""

    def __call__(
        self,
        *,
        rows: int,
        prefill: int,
        drafts: int = 0,
        shares: bool = False,
        is_sparse: bool = True,
    ) -> StepShape:
        """Return a shape with at least so many rows, prefill tokens and draft tokens.

        One that `shares` reads shared prefixes once; it is a wish. One that `is_sparse` lets rows
        leave something unread; that is none.
        """
        ...


class RowTable:
    """Sampling parameters per sequence row, kept on the host so that a step only copies them.

    Args:
        max_rows: Rows of each group.
        groups: Groups of devices that have rows of their own.
    """

    def __init__(self, max_rows: int, groups: int = 1) -> None:
        """Start with neutral parameters everywhere."""
        self._per_group, all_rows = max_rows, groups * max_rows
        self._values: dict[str, np.ndarray] = {
            name: np.zeros(all_rows, np.float32) for name in FLOAT_FIELDS
        }
        self._values["top_p"][:] = 1.0
        self._values["repetition_penalty"][:] = 1.0
        self._values["top_k"] = np.zeros(all_rows, np.int32)
        self._values["seed"] = np.zeros((all_rows, 2), np.int32)
        self._flags = {name: np.zeros(all_rows, bool) for name in FLAGS}

    def set(self, row: int, sampling: SamplingParams, seed_words: tuple[int, int]) -> None:
        """Install the parameters of the sequence that now occupies `row`."""
        values, flags = self._values, self._flags
        for name in FLOAT_FIELDS:
            values[name][row] = min(getattr(sampling, name), _LARGEST_FLOAT)
        values["temperature"][row] = 0.0 if sampling.is_greedy else sampling.temperature
        values["top_k"][row] = min(max(0, sampling.top_k), _LARGEST_INT)
        values["seed"][row] = np.asarray(seed_words, np.uint32).view(np.int32)
        flags["any_random"][row] = not sampling.is_greedy
        flags["any_filter"][row] = not sampling.is_greedy and (
            sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        )
        flags["any_penalty"][row] = sampling.needs_penalties
        flags["any_bias"][row] = sampling.needs_bias or sampling.min_tokens > 0
        flags["any_logprobs"][row] = sampling.logprobs is not None
        flags["any_top_logprobs"][row] = bool(sampling.logprobs)

    def clear(self, row: int) -> None:
        """Forget what a freed row asked for."""
        for flag in self._flags.values():
            flag[row] = False

    def move(self, source: int, target: int) -> None:
        """Move a row's parameters."""
        for array in (*self._values.values(), *self._flags.values()):
            array[target] = array[source]
        self.clear(source)

    def fill(self, packed: PackedStep) -> None:
        """Copy the first rows of each group into a step."""
        rows = packed.shape.rows
        for group, fields in enumerate(packed.parts):
            first = group * self._per_group
            for name in _CONSTANT_FIELDS:
                fields[name][...] = self._values[name][first : first + rows]
        for name, flag in self._flags.items():
            if flag.reshape(-1, self._per_group)[:, :rows].any():
                packed.set_flag(name)  # any_mask: set with the mask itself


def build(
    items: Sequence[Item],
    table: RowTable,
    shapes: ShapeTable,
    choose: ShapeChooser | None = None,
    *,
    groups: int = 1,
) -> PackedStep:
    """Lay a step out in the smallest compiled shape that holds it, one for all groups.

    Args:
        items: The step's work; sets `prefill_start` of those that are prefills, `draft_start`, and
            places.
        table: Sampling parameters per row.
        shapes: The compiled shapes.
        choose: Picks a shape for so many rows and prefill tokens; the smallest by default.
        groups: Groups of devices that have rows of their own.
    """
    per_row = 2 if any(item.drafts for item in items) else 1
    parts = [
        _Part([item for item in items if item.group == group], shapes, per_row)
        for group in range(groups)
    ]
    planners = [part.planner for part in parts if part.planner is not None]
    shape = (choose or shapes.shape)(
        rows=max(part.rows for part in parts),
        prefill=max(sum(item.num_tokens for item in part.prefills) for part in parts),
        drafts=max(sum(len(item.drafts) for item in part.items) for part in parts),
        shares=any(planner.shared for planner in planners),
        is_sparse=not planners or any(planner.is_sparse for planner in planners),
    )
    packed = PackedStep(shape, groups)
    table.fill(packed)
    for group, part in enumerate(parts):
        part.fill(packed, group)
        for item in part.prefills:
            item.hidden_start = group * shapes.prefill_buckets[-1] + item.prefill_start
    return packed


class _Part:
    """What one group does in a step.

    Args:
        items: Its work.
        shapes: The compiled shapes.
        per_row: Requests of plans per row.
    """

    def __init__(self, items: Sequence[Item], shapes: ShapeTable, per_row: int) -> None:
        self.items = items
        self._per_row = per_row
        self.prefills = [item for item in items if not item.sequence.has_device_token]
        self.rows = 1 + max((item.local for item in items), default=0)
        self.planner = _planner(items, self.rows, shapes, per_row)

    def fill(self, packed: PackedStep, group: int) -> None:
        """Lay the work out."""
        shape, fields = packed.shape, packed.parts[group]
        fields["token_row"][...] = -1
        fields["sample_index"][...] = -1
        fields["banned"][...] = -1
        for item in self.items:
            row = item.local
            item.place = packed.place(group, row)
            if item.sequence.has_device_token:
                fields["token_row"][row] = row
                fields["token_position"][row] = item.start
                fields["sample_index"][row] = row if item.is_sampled else -1
            _fill_sampling(fields, item)
            if shape.has_lora:
                fields["lora_slot"][row] = item.sequence.lora_slot
            if shape.num_segments and item.sequence.has_device_token:
                segments = item.sequence.segments
                fields["attention_mass"][row] = item.sequence.attention_mass
                fields["num_segments"][row] = len(segments)
                fields["segment_entry"][row, : len(segments)] = segments
            if shape.pages_per_row:
                pages = item.sequence.pages
                fields["page_table"][row, : len(pages)] = pages
        offset = block = 0
        for item in self.items:
            if item.drafts:
                item.draft_start = offset
                item.draft_place = packed.place(group, shape.rows + offset)
                _fill_drafts(fields, shape, item, block)
                offset += len(item.drafts)
                block += 1
        for item in self.prefills:
            item.prefill_start = offset
            _fill_prefill(fields, shape, item)
            block = _fill_blocks(fields, shape, item, block)
            offset += item.num_tokens
        fields["num_blocks"][...] = block
        if self.planner is not None:
            first = self._first_tokens(shape)
            self.planner.fill(shape.plans, fields, first)

    def _first_tokens(self, shape: StepShape) -> np.ndarray:
        """Say at which packed token each request of the plan begins."""
        first = np.zeros(self._per_row * self.rows, np.int64)
        for item in self.items:
            is_decode, place = item.sequence.has_device_token, self._per_row * item.local
            first[place] = item.local if is_decode else shape.rows + item.prefill_start
            if item.drafts:
                first[place + 1] = shape.rows + item.draft_start
        return first


def _planner(
    items: Sequence[Item], rows: int, shapes: ShapeTable, per_row: int
) -> StepPlanner | None:
    """Begin the plan of a step; None where nothing needs one.

    Request i is sequence row i. In a step with drafts, which do not stand behind the decode that
    they follow and so are requests of their own, row i has the requests 2 i and 2 i + 1.
    """
    if shapes.kernels is None:
        return None
    requests: list[Request] = []
    for item in items:
        pages, start, place = item.sequence.pages, item.start, per_row * item.local
        is_decode = item.sequence.has_device_token
        is_sparse = shapes.num_segments > 0 and is_decode and item.sequence.is_sparse
        count = 1 if is_decode else item.num_tokens
        requests.append(Request(place, start, count, pages, is_sparse=is_sparse))
        if item.drafts:
            requests.append(Request(place + 1, start + 1, len(item.drafts), pages))
    return StepPlanner(shapes.kernels, per_row * rows, requests)


_Fields = Mapping[str, np.ndarray]
"""One group's part of a packed step."""


def _fill_sampling(fields: _Fields, item: Item) -> None:
    sequence = item.sequence
    _fill_place(fields, item.local, sequence, sequence.num_output + sequence.num_in_flight)


def _fill_place(fields: _Fields, place: int, sequence: SequenceState, position: int) -> None:
    """Say which output token is drawn in a place, and what it may not be."""
    fields["output_position"][place] = position
    if sequence.sampling.min_tokens > position:
        banned = sorted(sequence.stop_ids)[:MAX_BANNED]
        fields["banned"][place, : len(banned)] = banned


def _fill_drafts(fields: _Fields, shape: StepShape, item: Item, block: int) -> None:
    """Lay drafts out as a block of prefill tokens behind the decode that they follow."""
    sequence, count, offset = item.sequence, len(item.drafts), item.draft_start
    fields["draft_token"][offset : offset + count] = item.drafts
    fields["draft_row"][offset : offset + count] = item.local
    fields["draft_index"][offset : offset + count] = np.arange(1, count + 1)
    start, low = item.start + 1, shape.rows + offset
    fields["token_row"][low : low + count] = item.local
    fields["token_position"][low : low + count] = np.arange(start, start + count)
    fields["block_start"][block] = offset
    fields["block_row"][block] = item.local
    fields["block_position"][block] = start
    fields["block_len"][block] = count
    fields["block_context"][block] = start
    fields["num_context_blocks"][...] = block + 1
    for index in range(count):
        _fill_place(fields, low + index, sequence, sequence.num_output + index + 1)


def drop_drafts(packed: PackedStep, item: Item, count: int) -> None:
    """Let only the first drafts of an item count; the others are computed and come to nothing.

    Args:
        packed: The step.
        item: Some of its work.
        count: Drafts that may still be accepted.
    """
    low = item.draft_start + count
    packed.parts[item.group]["draft_index"][low : item.draft_start + len(item.drafts)] = 0
    item.drafts = item.drafts[:count]


def _fill_prefill(fields: _Fields, shape: StepShape, item: Item) -> None:
    start, end, offset = item.start, item.start + item.num_tokens, item.prefill_start
    fields["prefill_token"][offset : offset + item.num_tokens] = item.sequence.token_ids[start:end]
    low = shape.rows + offset
    fields["token_row"][low : low + item.num_tokens] = item.local
    fields["token_position"][low : low + item.num_tokens] = np.arange(start, end)
    if item.is_sampled:
        fields["sample_index"][item.local] = low + item.num_tokens - 1


def _fill_blocks(fields: _Fields, shape: StepShape, item: Item, block: int) -> int:
    for low in range(0, item.num_tokens, shape.q_block):
        fields["block_start"][block] = item.prefill_start + low
        fields["block_row"][block] = item.local
        fields["block_position"][block] = item.start + low
        fields["block_len"][block] = min(shape.q_block, item.num_tokens - low)
        fields["block_context"][block] = item.start
        block += 1
        if item.start:
            fields["num_context_blocks"][...] = block
    return block
