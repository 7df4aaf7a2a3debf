"""What goes into a simulation and what comes out of it, request by request."""

from dataclasses import dataclass

import numpy as np

from jaxserve.core.event import SloOutcome
from jaxserve.core.plan import Rejection
from jaxserve.core.request import Slo

_PER_SECOND = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """A request whose future is known to the simulator, and not to the policies.

    Attributes:
        request_id: Unique; also its identity as a sequence.
        arrival: Clock time of arrival in seconds.
        prompt_len: Tokens of the prompt.
        output_len: Tokens that it will generate.
        max_output: Most output tokens that it asks for, which policies see; None is `output_len`.
        slo: Its objectives.
        name: Class of requests, for reports.
        cached_len: Prompt tokens that the prefix cache holds, fewer than the prompt has. Pages are
            counted as if nothing were shared.
        acceptance: Chance that a draft token is right if all before it are.
    """

    request_id: int
    arrival: float
    prompt_len: int
    output_len: int
    max_output: int | None = None
    slo: Slo | None = None
    name: str = ""
    cached_len: int = 0
    acceptance: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request.

    Attributes:
        request: The request.
        replica: Where it was served.
        first_token: Clock time of the first token in seconds; None if it was refused.
        finished: Clock time of the end.
        outcome: Which objectives were kept.
        preemptions: How often it lost its pages.
        rejection: Why it was refused, if it was.
        token_times: Clock times of all tokens, where they are kept.
    """

    request: SimRequest
    replica: int
    first_token: float | None
    finished: float
    outcome: SloOutcome
    preemptions: int = 0
    rejection: Rejection | None = None
    token_times: tuple[float, ...] = ()

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token; infinite without one."""
        return np.inf if self.first_token is None else self.first_token - self.request.arrival

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 if there is none."""
        if self.first_token is None or self.request.output_len < 2:
            return 0.0
        return (self.finished - self.first_token) / (self.request.output_len - 1)

    @property
    def e2e(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished - self.request.arrival


def judge(slo: Slo, arrival: float, token_times: list[float], finished: float) -> SloOutcome:
    """Judge a whole completion by the times of its tokens.

    The same judgement, to the last bit, as the engine's tracker makes token by token.

    Args:
        slo: The objectives.
        arrival: Clock time of arrival in seconds.
        token_times: Clock times of the tokens; empty for a request that was refused.
        finished: Clock time of the end.
    """
    if not token_times:
        return SloOutcome(
            ttft=None if slo.ttft_ms is None else False,
            tpot=None if slo.tpot_ms is None else False,
            tpot_gap=None if slo.tpot_ms is None else False,
            tpot_mean=None if slo.tpot_ms is None else False,
            e2e=None if slo.e2e_ms is None else False,
        )
    first, last, count = token_times[0], token_times[-1], len(token_times)
    e2e = None if slo.e2e_ms is None else finished - arrival <= slo.e2e_ms / _PER_SECOND
    ttft = None if slo.ttft_ms is None else first - arrival <= slo.ttft_ms / _PER_SECOND
    if slo.tpot_ms is None:
        return SloOutcome(ttft=ttft, e2e=e2e)
    tpot = slo.tpot_ms / _PER_SECOND
    start = first if slo.ttft_ms is None else arrival + slo.ttft_ms / _PER_SECOND
    times = np.array(token_times)
    return SloOutcome(
        ttft=ttft,
        tpot=bool((times[1:] <= start + np.arange(1, count) * tpot).all()),
        tpot_gap=bool((times[1:] - times[:-1] <= tpot).all()),
        tpot_mean=last - first <= tpot * (count - 1),
        e2e=e2e,
    )
