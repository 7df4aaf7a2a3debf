"""`SequenceState`: the one mutable record of the engine. Only the engine touches it."""

import enum
from array import array
from dataclasses import dataclass, field

import numpy as np

from jaxserve.cache.pages import PageHash
from jaxserve.core.event import FinishReason, TokenLogprobs
from jaxserve.core.request import Request, SamplingParams, Slo
from jaxserve.core.view import SequenceView
from jaxserve.engine.drafts import DraftState
from jaxserve.engine.slo import SloTracker
from jaxserve.engine.tokenizer import Detokenizer
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.grammar.matcher import Matcher


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceState:
    """One completion under way.

    Attributes:
        seq_id: Identity, unique in the engine.
        request: What was asked for.
        index: Which of the request's n completions.
        sampling: The request's parameters, with this completion's own seed.
        max_total_len: Most tokens it can reach.
        stop_ids: Tokens that end it.
        detokenizer: Turns ids into text; None if no text is wanted.
        prompt_len: Tokens of the prompt.
        seed_words: The seed as two 32-bit words.
        root_hash: Where its chain of prefix hashes begins.
        grammar: The grammar of its output, perhaps still being compiled; None if it is free.
        matcher: Where in that grammar it stands, once compiled. Kept through preemption; follows
            the output tokens, so it would find its place again from them alone.
        token_ids: Prompt and committed output tokens.
        num_computed: Tokens whose keys and values are in the cache or on their way.
        num_in_flight: Sampled tokens that the host has not read yet.
        row: Sequence row on the device; -1 while waiting.
        pages: Pages held, in order.
        hashes: Hashes of full pages, as far as computed.
        num_named: Leading pages that the prefix cache knows.
        is_stale: Whether its pages hold what earlier weights have computed; nobody may share them.
        num_cached: Prompt tokens found in the prefix cache at first admission.
        has_device_token: Whether its latest token is on the device, in its row; then it decodes.
        num_preemptions: How often it lost its pages.
        prompt_logprobs: Log-probabilities of prompt tokens, as far as computed.
        are_prompt_logprobs_sent: Whether they have been handed out.
        pooled: What has been gathered for a prompt that is pooled.
        slo: Judges its service-level objectives; None if it has none.
        drafting: What is remembered for drafting; None if nothing is ever drafted for it.
        declared_slo: Its objectives as policies see them; None if it has none.
        lora_slot: Where its adapter lies on the device while it runs; 0 is none.
        attention_mass: Share of the attention mass that its decodes read; 1 reads everything.
        segments: Entries of its first segments in the index of sparse attention.
    """

    seq_id: int
    request: Request
    index: int
    sampling: SamplingParams
    max_total_len: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer | None
    prompt_len: int
    seed_words: tuple[int, int]
    root_hash: PageHash
    grammar: PendingGrammar | None = None
    matcher: Matcher | None = None
    token_ids: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    num_in_flight: int = 0
    row: int = -1
    pages: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[PageHash] = field(default_factory=list)
    num_named: int = 0
    is_stale: bool = False
    num_cached: int = 0
    has_device_token: bool = False
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    are_prompt_logprobs_sent: bool = False
    pooled: np.ndarray | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finish_reason: FinishReason | None = None
    slo: SloTracker | None = None
    drafting: DraftState | None = None
    declared_slo: Slo | None = None
    lora_slot: int = 0
    attention_mass: float = 1.0
    segments: list[int] = field(default_factory=list)

    @property
    def adapter_key(self) -> str:
        """Digest of its adapter; empty if it has none."""
        adapter = self.request.adapter
        return "" if adapter is None else adapter.key

    @property
    def is_sparse(self) -> bool:
        """Whether its decodes leave something unread, by what the device is told of its share."""
        return bool(self.segments) and bool(np.float32(self.attention_mass) < 1)

    @property
    def num_tokens(self) -> int:
        """Tokens known or in flight, as far as they must ever be computed."""
        return min(len(self.token_ids) + self.num_in_flight, self.max_total_len - 1)

    @property
    def num_output(self) -> int:
        """Output tokens that the host has read."""
        return len(self.token_ids) - self.prompt_len

    @property
    def has_length_left(self) -> bool:
        """Whether a further token may be drawn beyond those in flight."""
        return len(self.token_ids) + self.num_in_flight < self.max_total_len

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still owed."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.index == 0
            and not self.are_prompt_logprobs_sent
        )

    def view(self, *, num_cached: int = 0, num_draft: int = 0) -> SequenceView:
        """Freeze what a scheduler may see."""
        return SequenceView(
            seq_id=self.seq_id,
            arrival=self.request.arrival,
            priority=self.request.priority,
            prompt_len=self.prompt_len,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            max_total_len=self.max_total_len,
            num_pages=len(self.pages),
            is_running=self.phase is Phase.RUNNING,
            num_cached=num_cached,
            num_draft=num_draft,
            draft_acceptance=1.0 if self.drafting is None else self.drafting.acceptance,
            is_decoding=self.has_device_token,
            slo=self.declared_slo,
            first_token_time=self.first_token_time,
            adapter=self.adapter_key,
        )
