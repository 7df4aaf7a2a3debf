"""The checks of `admission.py` in the slow and obvious way, for tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxserve.core.cost import CostModel, StepLoad

Verdict = Literal["takes", "first", "second"]
_EPS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A sequence on a server.

    Attributes:
        total: Tokens that must be computed before its next token can be drawn.
        computed: How many of them are in the cache.
        emitted: Output tokens so far.
        due: When its first token is due, in seconds.
        tau: Seconds per further token.
    """

    total: int
    computed: int
    emitted: int
    due: float
    tau: float

    @property
    def next_due(self) -> float:
        """When its next token is due."""
        return self.due + self.emitted * self.tau


def peak_tokens(held: Sequence[tuple[int, int]]) -> int:
    """Return the most tokens in the cache at once, step by step.

    Args:
        held: Tokens of each sequence now, and the steps until it leaves.
    """
    most, step = sum(tokens for tokens, _ in held), 0
    here = list(held)
    while here:
        step += 1
        most = max(most, sum(tokens + step for tokens, _ in here))
        here = [(tokens, left) for tokens, left in here if left > step]
    return most


def follow(
    cost: CostModel,
    decoding: Sequence[Member],
    prompts: Sequence[Member],
    *,
    now: float,
    max_step: float,
    max_tokens: int,
) -> Verdict:
    """Follow a server's steps until all of its prompts have had two tokens.

    Args:
        cost: Times of steps.
        decoding: Who decodes; `computed` is one less than `total`.
        prompts: Whose prompts are not computed, in order; the new request among them.
        now: When the next step begins, in seconds.
        max_step: Longest step that prompts are let fill.
        max_tokens: Most tokens in a step.

    Returns:
        Whether everybody keeps the objectives; or which token is late.
    """
    running, waiting, time = list(decoding), list(prompts), now
    while waiting:
        slack = min((one.next_due - time for one in running), default=float("inf"))
        context = sum(one.computed + 1 for one in running)
        load = StepLoad(decodes=len(running), context=context)
        granted: list[Member] = []
        for one in waiting:
            left = one.total - one.computed
            most = min(left, max_tokens - load.tokens)
            fitting = cost.prefill_within(min(slack, max_step), load, one.computed)
            got = max(0, min(most, fitting))
            if got == 0 and not running and not granted:
                got = min(most, 64)
            if got == 0:
                break
            load = load.with_chunk(got, one.computed)
            granted.append(replace(one, computed=one.computed + got))
            if got < left:
                break
        seconds = cost.step_time(load)
        if running and seconds > slack + _EPS:
            return "second"
        time += seconds
        running = [replace(o, computed=o.computed + 1, emitted=o.emitted + 1) for o in running]
        waiting = granted + waiting[len(granted) :]
        for one in [o for o in waiting if o.computed == o.total]:
            if time > one.due + _EPS:
                return "first"
            waiting.remove(one)
            running.append(replace(one, emitted=one.emitted + 1))
    context = sum(one.computed + 1 for one in running)
    end = time + cost.step_time(StepLoad(decodes=len(running), context=context))
    return "second" if any(end > one.next_due + _EPS for one in running) else "takes"
