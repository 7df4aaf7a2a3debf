"""Frozen snapshots that policies see. No policy ever sees a device array."""

from dataclasses import dataclass
from typing import Literal

from jaxserve.core.request import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """One unfinished sequence, as a scheduler sees it.

    Attributes:
        seq_id: Identity, unique in the engine.
        arrival: Clock time of arrival in seconds.
        priority: Lower first, under a priority policy.
        prompt_len: Tokens of the prompt.
        num_tokens: Prompt and generated tokens known or in flight.
        num_computed: Tokens whose keys and values are in the cache, in-flight work included.
        max_total_len: Most tokens the sequence can reach.
        num_pages: Pages it holds.
        is_running: Whether it holds a row of the batch; otherwise it waits.
        num_cached: Prompt tokens that the prefix cache can supply, while it waits.
        num_draft: Draft tokens that could be verified in the next step. If a token is in flight,
            those that could be if the step under way were waited for.
        draft_acceptance: Chance that a draft token is right if all before it are, by what became
            of the request's latest ones.
        is_decoding: Whether its latest token was drawn and waits on the device.
        slo: How soon its tokens are wanted; None leaves that open.
        first_token_time: Clock time in seconds at which its first output token was known.
        adapter: Key of its low-rank adapter; empty if it has none.
    """

    seq_id: int
    arrival: float
    priority: int
    prompt_len: int
    num_tokens: int
    num_computed: int
    max_total_len: int
    num_pages: int
    is_running: bool
    num_cached: int = 0
    num_draft: int = 0
    draft_acceptance: float = 1.0
    is_decoding: bool = False
    slo: Slo | None = None
    first_token_time: float | None = None
    adapter: str = ""

    @property
    def num_uncomputed(self) -> int:
        """Tokens that must be computed before the next one can be drawn; 1 while decoding."""
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One engine, as a scheduler sees it.

    Attributes:
        now: Clock time in seconds.
        running: Sequences that hold a row, in the order in which they were admitted.
        waiting: The others, in order of arrival (preempted ones keep theirs).
        num_free_pages: Pages that can be taken, evictable cached ones included.
        num_pages: All pages.
        page_size: Tokens per page.
        max_num_seqs: Most sequences running at once.
        max_num_batched_tokens: Most tokens in one step.
        adapters: Keys of the adapters that hold a slot on the device: those of running sequences,
            and pinned ones.
        max_loras: Slots for adapters.
        draft_sizes: Numbers of draft tokens that a step of these sequences can be padded to,
            ascending: it takes as long as if it had so many. Empty if nothing is padded.
    """

    now: float
    running: tuple[SequenceView, ...]
    waiting: tuple[SequenceView, ...]
    num_free_pages: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    adapters: frozenset[str] = frozenset()
    max_loras: int = 0
    draft_sizes: tuple[int, ...] = ()


ReplicaState = Literal["off", "starting", "pooled", "serving", "draining"]
"""Whether a replica is there: not at all, on its way, warm without a tier, at work, or finishing
what it has without taking more."""
ReplicaStage = Literal["whole", "prefill", "decode"]
"""What a replica does of a request: all of it, its prompt only, or its tokens after the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRole:
    """What a replica is for in its fleet.

    Attributes:
        state: Whether it is there and takes requests.
        tier: Seconds per token of the tier that it serves; None if it serves none, or whichever its
            requests are of.
        stage: What it does of a request.
    """

    state: ReplicaState = "serving"
    tier: float | None = None
    stage: ReplicaStage = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """Several engines, as a router sees them.

    Attributes:
        now: Clock time in seconds.
        replicas: Each as of the end of the step that it is at; its `now` is when that will be.
        roles: What each is for; empty in a fleet where all are alike.
        cached: Tokens of the prompt of the request to be placed that each replica's prefix cache is
            thought to hold; empty if nobody knows.
    """

    now: float
    replicas: tuple[ReplicaView, ...]
    roles: tuple[ReplicaRole, ...] = ()
    cached: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A replica of a fleet, as those who run it want to know.

    Attributes:
        index: Its number.
        state: `starting`, `pooled`, `serving`, `draining`, `off`, or `removed` once it has been
            given up.
        tier: Seconds per token of the tier that it serves; None for none.
        num_open: Completions that are with it.
        deaths: How often it has died.
        failure: Why it died last; None if it never has.
    """

    index: int
    state: str
    tier: float | None
    num_open: int
    deaths: int
    failure: str | None
