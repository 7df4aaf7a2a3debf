"""What a step brings: where its tokens lie, and whether one of them ends its sequence."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from jaxserve.core.cost import StepLoad
from jaxserve.core.event import FinishReason
from jaxserve.engine.batcher import Item
from jaxserve.engine.pooled import Pooled
from jaxserve.engine.runner import StepResult
from jaxserve.engine.sampler import Sampled
from jaxserve.engine.sequence import SequenceState
from jaxserve.engine.shapes import StepShape


@dataclass(slots=True, kw_only=True, eq=False)
class Pending:
    """A step on the device.

    Attributes:
        items: Its work.
        result: What it will bring.
        wants_logprobs: Whether some row reports log-probabilities.
        wants_candidates: Whether some row reports those of other candidates.
        prompt_scores: Log-probabilities of prompt tokens.
        load: Its counts.
        shape: What it was padded to.
        planned: Clock time at which it was planned, in seconds.
        pooled: Pooled states, if some prompt is pooled.
    """

    items: list[Item]
    result: StepResult
    wants_logprobs: bool
    wants_candidates: bool
    load: StepLoad
    shape: StepShape
    planned: float
    prompt_scores: list[tuple[Item, Sampled]] = field(default_factory=list)
    pooled: Pooled | None = None

    @property
    def has_drafts(self) -> bool:
        """Whether it may bring some sequence more than one token."""
        return any(item.drafts for item in self.items)

    def places(self, item: Item, tokens: np.ndarray) -> list[int]:
        """List where an item's new tokens lie: its own, and one behind each accepted draft.

        Args:
            item: One of the step's.
            tokens: What was drawn in each place.
        """
        places = [item.place]
        for index, draft in enumerate(item.drafts):
            if tokens[places[-1]] != draft:
                break
            places.append(item.draft_place + index)
        return places


def judge(
    sequence: SequenceState, token: int, eos_ids: Collection[int]
) -> tuple[FinishReason | None, int | str | None, str]:
    """Tell whether a new token ends its sequence, and what text it brings.

    Args:
        sequence: Has taken the token in.
        token: The token.
        eos_ids: Tokens that end every constrained sequence.

    Returns:
        Why it ends, if it does; the stop string or token that ends it; the new text.
    """
    sampling, detokenizer = sequence.sampling, sequence.detokenizer
    is_stop = token in sequence.stop_ids and sequence.num_output > sampling.min_tokens
    # Where a grammar allows the end, it means it, whatever else the request says.
    is_stop |= sequence.grammar is not None and token in eos_ids
    text = ""
    if detokenizer is not None and (not is_stop or sampling.include_stop_str_in_output):
        text = detokenizer.push((token,))
        if detokenizer.matched_stop is not None:
            return FinishReason.STOP, detokenizer.matched_stop, text
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    if is_stop:
        reason = FinishReason.STOP
        stop_reason = token if token in sampling.stop_token_ids else None
    elif len(sequence.token_ids) >= sequence.max_total_len:
        reason = FinishReason.LENGTH
    if reason is not None and detokenizer is not None:
        text += detokenizer.finish()
        if detokenizer.matched_stop is not None:
            return FinishReason.STOP, detokenizer.matched_stop, text
    return reason, stop_reason, text
