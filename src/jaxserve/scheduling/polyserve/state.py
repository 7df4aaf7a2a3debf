"""What is known of a fleet, as arrays: the form in which compiled policies read it.

A simulated fleet keeps these very arrays. For a real one `router.py` fills them in from its view.
Every decode on a server gets one token in each of its steps, so that what changes with a step is
kept once per server (`steps`), and slots hold only what differs.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxserve.core.compiled import is_compiled

NOBODY = -1
NEVER = 1 << 60
"""A step that does not come."""

OFF, STARTING, POOLED, SERVING, DRAINING = range(5)
"""States of a server: not there, on its way, idle and warm, labelled, taking nobody any more."""
WHOLE, PREFILL, DECODE = range(3)
"""What a server does: both parts of a request, its prompt only, its further tokens only."""
IDLE, STEPPING, BETWEEN = range(3)
"""Phases of a server: without work, in a step, at the end of one."""


class Columns:
    """Records as one array per field: what loops that are not compiled read many times faster.

    Args:
        dtype: The fields.
        shape: Of each array.
    """

    def __init__(self, dtype: np.dtype, shape: int | tuple[int, ...]) -> None:
        """Fill with zeros."""
        self._names: tuple[str, ...] = dtype.names or ()
        for name in self._names:
            setattr(self, name, np.zeros(shape, dtype[name]))

    def __getitem__(self, name: str) -> np.ndarray:
        return getattr(self, name)

    def __setitem__(self, name: str, values: object) -> None:
        getattr(self, name)[:] = values

    def __len__(self) -> int:
        return len(getattr(self, self._names[0]))

    @property
    def size(self) -> int:
        """How many records there are."""
        return getattr(self, self._names[0]).size


type Records = Any
"""Records with named fields, of which each is an array: a `np.recarray`, or `Columns`."""


def records(dtype: np.dtype, shape: int | tuple[int, ...]) -> Records:
    """Return records filled with zeros, in the form that is read fastest here."""
    return np.zeros(shape, dtype).view(np.recarray) if is_compiled else Columns(dtype, shape)


REQUEST = np.dtype(
    [
        ("arrival", "f8"), ("due", "f8"), ("tpot", "f8"), ("ready", "f8"), ("prompt", "i8"),
        ("output", "i8"), ("tier", "i8"), ("total", "i8"), ("computed", "i8"), ("grant", "i8"),
        ("emitted", "i8"), ("holds", "i8"), ("following", "i8"),
    ]
)  # fmt: skip
"""A request; times in seconds of the clock.

* `arrival`: when it arrived; `due`: when its first token is due; `tpot`: seconds per further token.
* `ready`: when its keys and values have come to the server that decodes it.
* `prompt`: tokens of the prompt; `output`: tokens that it will generate, which no policy reads.
* `tier`: position of its tier; 0 is the tightest.
* `total`: tokens that must be computed before its next token can be drawn; `computed`: how many of
  them are; `grant`: how many more the step under way computes.
* `emitted`: output tokens so far.
* `holds`: 1 if it has a seat and pages while its prompt is computed.
* `following`: the next in its queue, or `NOBODY`.
"""

SERVER = np.dtype(
    [
        ("state", "i8"), ("stage", "i8"), ("label", "i8"), ("phase", "i8"), ("end", "f8"),
        ("steps", "i8"), ("decodes", "i8"), ("context", "i8"), ("pending", "i8"),
        ("pending_tokens", "i8"), ("joining", "i8"), ("joining_tokens", "i8"), ("kv", "i8"),
        ("load", "f8"), ("head", "i8"), ("join_head", "i8"), ("next_finish", "i8"),
        ("place", "i8"), ("row", "i8"), ("known", "i8"), ("known_kv", "i8"),
    ]
)  # fmt: skip
"""A server.

* `state`: `OFF` to `DRAINING`; `stage`: `WHOLE`, `PREFILL` or `DECODE`.
* `label`: tier at whose pace it runs, or `NOBODY`.
* `phase`: `IDLE`, `STEPPING` or `BETWEEN`; `end`: when the step under way ends, or the last ended.
* `steps`: steps done; a step under way is not.
* `decodes`: sequences that decode; `context`: tokens that are in the cache for them.
* `pending`: requests whose prompts are not computed; `pending_tokens`: what those have left, the
  step under way included; `head`: the first of their queue, or `NOBODY`.
* `joining`: requests whose keys and values are on their way to it; `joining_tokens`: their tokens;
  `join_head`: the first of them, or `NOBODY`.
* `kv`: tokens in the cache; prompts count whole from the time at which they are begun.
* `load`: what servers are ordered by; 1 is full.
* `next_finish`: the step that ends with somebody's last token, which no policy reads.
* `known`: `context` as of its latest event, and `known_kv`: `kv`; steps of decodes are no events.
* `place`: where it stands in its row of the gradient; `row`: which row, or `NOBODY`.
"""

BINS = 16
"""Spans of time into which the residents of a server fall by when they will leave."""

SLOT = np.dtype(
    [
        ("request", "i8"), ("context", "i8"), ("emitted", "i8"), ("due", "f8"), ("finish", "i8"),
        ("tier", "i8"), ("tpot", "f8"),
    ]
)  # fmt: skip
"""A seat; the first `decodes` of a server are in use.

* `request`: who decodes there.
* `context`: tokens in the cache, less `steps`; `emitted`: output tokens, less `steps`.
* `due`: the token that step j ends with is due at this plus j times the seconds of its tier.
* `finish`: step that ends with the last token.
* `tier`, `tpot`: the request's; millions of requests lie too far apart to be asked themselves.
"""

MEANS = np.dtype(
    [("tau", "f8"), ("output", "f8"), ("finished", "i8"), ("prompt", "f8"), ("arrived", "i8")]
)
"""A tier.

* `tau`: seconds per token.
* `output`: mean output tokens, as far as they have been seen; `finished`: of how many requests.
* `prompt`: mean tokens of prompts that have arrived; `arrived`: of how many.
"""


class Servers(NamedTuple):
    """Servers and who is on them.

    Attributes:
        one: `[servers]` of `SERVER`.
        slots: `[servers, seats]` of `SLOT`.
        min_due: `[servers, tiers]`: the least `due` of the slots of a tier; infinite without any.
        bins: `[2, BINS + 1]`, int64: what a check notes down, anew each time; an array of its own
            would take longer to make than to use.
        dues: `[tiers]`, likewise.
        ahead: `[tiers]`, int64, likewise.
    """

    one: Records
    slots: Records
    min_due: np.ndarray
    bins: np.ndarray
    dues: np.ndarray
    ahead: np.ndarray


class Rules(NamedTuple):
    """What a policy goes by, and the sizes of a server.

    Attributes:
        means: `[tiers]` of `MEANS`; what has been seen is written as it is.
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

    means: Records
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


def empty_requests(count: int) -> Records:
    """Return a number of requests that have not arrived."""
    found = records(REQUEST, count)
    found.following[:] = NOBODY
    return found


def empty_servers(count: int, seats: int, tiers: int) -> Servers:
    """Return a number of servers that are idle, warm and without a label."""
    one = records(SERVER, count)
    one.state[:], one.stage[:], one.phase[:] = POOLED, WHOLE, IDLE
    for name in ("label", "head", "join_head", "place", "row"):
        one[name] = NOBODY
    one.next_finish[:] = NEVER
    slots = records(SLOT, (count, seats))
    return Servers(
        one, slots, np.full((count, tiers), np.inf), np.zeros((2, BINS + 1), np.int64),
        np.zeros(tiers), np.zeros(tiers, np.int64),
    )  # fmt: skip
