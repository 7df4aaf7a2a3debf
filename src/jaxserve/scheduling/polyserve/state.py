"""What is known of a fleet, as arrays: the form in which compiled policies read it.

A simulated fleet keeps these very arrays. For a real one `router.py` fills them in from its view.
Every decode on a server gets one token in each of its steps, so that what changes with a step is
kept once per server (`steps`), and slots hold only what differs.
"""

from typing import NamedTuple

import numpy as np

NOBODY = -1
NEVER = 1 << 60
"""A step that does not come."""

OFF, STARTING, POOLED, SERVING, DRAINING = range(5)
"""States of a server: not there, on its way, idle and warm, labelled, taking nobody any more."""
WHOLE, PREFILL, DECODE = range(3)
"""What a server does: both parts of a request, its prompt only, its further tokens only."""
IDLE, STEPPING, BETWEEN = range(3)
"""Phases of a server: without work, in a step, at the end of one."""


class RequestArrays(NamedTuple):
    """Requests; every array is `[requests]`, times in seconds of the clock.

    Attributes:
        arrival: When it arrived.
        prompt: Tokens of the prompt.
        output: Tokens that it will generate, which no policy reads.
        tier: Position of its tier; 0 is the tightest.
        due: When the first token is due.
        tpot: Seconds per further token.
        total: Tokens that must be computed before its next token can be drawn.
        computed: How many of them are.
        grant: How many more the step under way computes.
        emitted: Output tokens so far.
        holds: 1 if it has a seat and pages while its prompt is computed.
        ready: When its keys and values have come to the server that decodes it.
        following: The next in its queue, or `NOBODY`.
    """

    arrival: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    tier: np.ndarray
    due: np.ndarray
    tpot: np.ndarray
    total: np.ndarray
    computed: np.ndarray
    grant: np.ndarray
    emitted: np.ndarray
    holds: np.ndarray
    ready: np.ndarray
    following: np.ndarray


class ServerArrays(NamedTuple):
    """Servers; arrays are `[servers]` if nothing else is said.

    Attributes:
        state: `OFF` to `DRAINING`.
        stage: `WHOLE`, `PREFILL` or `DECODE`.
        label: Tier at whose pace it runs, or `NOBODY`.
        phase: `IDLE`, `STEPPING` or `BETWEEN`.
        end: When the step under way ends, or the last one ended.
        steps: Steps done; a step under way is not.
        decodes: Sequences that decode.
        context: Tokens that are in the cache for them.
        pending: Requests whose prompts are not computed.
        pending_tokens: Tokens that those have left, the step under way included.
        joining: Requests whose keys and values are on their way to it.
        joining_tokens: Tokens of those.
        kv: Tokens in the cache; prompts count whole from the time at which they are begun.
        load: What servers are ordered by; 1 is full.
        head: First request in the queue of prompts, or `NOBODY`.
        join_head: First request that is on its way, or `NOBODY`.
        slot_request: `[servers, seats]`: who decodes; the first `decodes` are in use.
        slot_context: `[servers, seats]`: tokens in the cache, less `steps`.
        slot_emitted: `[servers, seats]`: output tokens, less `steps`.
        slot_due: `[servers, seats]`: the token that step j ends with is due at this plus j times
            the seconds per token of the request's tier.
        slot_finish: `[servers, seats]`: step that ends with the last token.
        next_finish: The least of those.
        min_due: `[servers, tiers]`: the least `slot_due` of each tier; infinite without any.
    """

    state: np.ndarray
    stage: np.ndarray
    label: np.ndarray
    phase: np.ndarray
    end: np.ndarray
    steps: np.ndarray
    decodes: np.ndarray
    context: np.ndarray
    pending: np.ndarray
    pending_tokens: np.ndarray
    joining: np.ndarray
    joining_tokens: np.ndarray
    kv: np.ndarray
    load: np.ndarray
    head: np.ndarray
    join_head: np.ndarray
    slot_request: np.ndarray
    slot_context: np.ndarray
    slot_emitted: np.ndarray
    slot_due: np.ndarray
    slot_finish: np.ndarray
    next_finish: np.ndarray
    min_due: np.ndarray


class Rules(NamedTuple):
    """What a policy goes by, and the sizes of a server.

    Attributes:
        tau: `[tiers]`: seconds per token, ascending.
        outputs: `[tiers]`: mean output tokens, as far as they have been seen; written as they are.
        finished: `[tiers]`: how many requests that mean is over.
        prompts: `[tiers]`: mean tokens of prompts that have arrived; written as they do.
        arrived: `[tiers]`: how many requests that mean is over.
        interference: Share of the prompts that a batch will bring with it in the long run, which
            count when the pace of later tokens is checked.
        guard: Share of its pace that a server keeps when it hosts a looser tier's requests.
        max_step: Longest step in seconds that prompts are let fill, if nothing is due earlier.
        is_gap: 1 if no step may be longer than a resident's seconds per token, early or not.
        packs: 1 if the fullest server is asked first, 0 if the emptiest is.
        capacity: Tokens that the cache holds.
        seats: Most sequences on a server.
        max_tokens: Most tokens in one step.
        max_probes: Servers of a tier that are asked one by one before steps are taken wider.
        walk: Most steps that a prompt's prefill is followed through.
        transfer_base: Seconds to move a request's keys and values, besides
        transfer_token: seconds for each token.
        checks: Bit 1: the first token is checked, 2: the second, 4: the later ones.
    """

    tau: np.ndarray
    outputs: np.ndarray
    finished: np.ndarray
    prompts: np.ndarray
    arrived: np.ndarray
    interference: float
    guard: float
    max_step: float
    is_gap: int
    packs: int
    capacity: int
    seats: int
    max_tokens: int
    max_probes: int
    walk: int
    transfer_base: float
    transfer_token: float
    checks: int


def empty_requests(count: int) -> RequestArrays:
    """Return arrays for a number of requests that have not arrived."""

    def whole() -> np.ndarray:
        return np.zeros(count, np.int64)

    def real() -> np.ndarray:
        return np.zeros(count)

    return RequestArrays(
        arrival=real(), prompt=whole(), output=whole(), tier=whole(), due=real(), tpot=real(),
        total=whole(), computed=whole(), grant=whole(), emitted=whole(), holds=whole(),
        ready=real(), following=np.full(count, NOBODY),
    )  # fmt: skip


def empty_servers(count: int, seats: int, tiers: int) -> ServerArrays:
    """Return arrays for a number of servers that are idle, warm and without a label."""

    def whole(value: int = 0) -> np.ndarray:
        return np.full(count, value, np.int64)

    def slots() -> np.ndarray:
        return np.zeros((count, seats), np.int64)

    return ServerArrays(
        state=whole(POOLED), stage=whole(WHOLE), label=whole(NOBODY), phase=whole(IDLE),
        end=np.zeros(count), steps=whole(), decodes=whole(), context=whole(), pending=whole(),
        pending_tokens=whole(), joining=whole(), joining_tokens=whole(), kv=whole(),
        load=np.zeros(count), head=whole(NOBODY), join_head=whole(NOBODY), slot_request=slots(),
        slot_context=slots(), slot_emitted=slots(), slot_due=np.zeros((count, seats)),
        slot_finish=slots(), next_finish=whole(NEVER), min_due=np.full((count, tiers), np.inf),
    )  # fmt: skip
