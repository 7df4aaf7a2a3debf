"""What users get back: `TokenEvent` inside, `RequestOutput` at the library's face."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxserve.core.errors import DeclinedError, EngineDeadError, RequestError
from jaxserve.core.lora import LoRARequest
from jaxserve.core.plan import Rejection

if TYPE_CHECKING:
    import numpy as np


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    DECLINED = "declined"


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one candidate token.

    Attributes:
        logprob: Natural logarithm of its probability.
        rank: 1 for the most likely token; None where it was not computed.
        decoded_token: Its text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = Mapping[int, Logprob]
"""Token id -> log-probability; the sampled (or prompt) token first, then the most likely ones."""


SloReading = Literal["ttft", "tpot", "tpot_gap", "tpot_mean", "e2e"]
"""An objective as it was judged; the target per token is read in three ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloOutcome:
    """Which objectives were kept; None where there was no such objective.

    An objective that was still open when a request was refused, aborted or failed counts as missed.

    Attributes:
        ttft: The first token came in time.
        tpot: Every token came before its deadline, tokens that came early making up for later ones.
        tpot_gap: No gap between two tokens was longer than the target.
        tpot_mean: The mean gap between the first and the last token was not longer.
        e2e: The end came in time.

    Source: the three readings of time per output token in SLOs-Serve (arXiv 2504.08784), PolyServe
        (arXiv 2507.17769) and the field's benchmarks.
    """

    ttft: bool | None = None
    tpot: bool | None = None
    tpot_gap: bool | None = None
    tpot_mean: bool | None = None
    e2e: bool | None = None

    @property
    def attained(self) -> bool:
        """Whether every objective was kept; the one per token as deadlines."""
        return False not in (self.ttft, self.tpot, self.e2e)

    def readings(self) -> dict[SloReading, bool]:
        """Return the objectives that were judged."""
        judged: dict[SloReading, bool | None] = {
            "ttft": self.ttft,
            "tpot": self.tpot,
            "tpot_gap": self.tpot_gap,
            "tpot_mean": self.tpot_mean,
            "e2e": self.e2e,
        }
        return {name: kept for name, kept in judged.items() if kept is not None}

    def both(self, other: "SloOutcome") -> "SloOutcome":
        """Return what was kept by two completions of one request alike."""
        mine, theirs = self.readings(), other.readings()
        return SloOutcome(**{name: mine[name] and theirs[name] for name in mine})


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecDecodeMetrics:
    """What speculative decoding did for one completion.

    Attributes:
        num_drafts: Steps that verified drafts.
        num_draft_tokens: Draft tokens verified.
        num_accepted_tokens: Those of them that became output.
        acceptance_histogram: How many of these steps accepted 0, 1, 2, ... tokens.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted; 0 without any."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Mean number of tokens that a step with drafts brought; 1 without any.

        >>> SpecDecodeMetrics().plus(3, 2).plus(3, 0).mean_acceptance_length
        2.0
        """
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def plus(self, num_draft_tokens: int, num_accepted: int) -> "SpecDecodeMetrics":
        """Return the figures after one more step.

        Args:
            num_draft_tokens: Tokens verified in it.
            num_accepted: Those accepted.
        """
        counts = [*self.acceptance_histogram, *[0] * (num_accepted + 1)]
        counts = counts[: max(len(self.acceptance_histogram), num_accepted + 1)]
        counts[num_accepted] += 1
        return SpecDecodeMetrics(
            num_drafts=self.num_drafts + 1,
            num_draft_tokens=self.num_draft_tokens + num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + num_accepted,
            acceptance_histogram=tuple(counts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times of one completion, in seconds of the engine's clock.

    Attributes:
        arrival_time: When the request reached the engine.
        first_scheduled_time: When its first token was computed; None before that.
        first_token_time: When its first output token was known.
        last_token_time: When its latest output token was known.
        finished_time: When it ended.
        num_preemptions: How often it lost its pages and was recomputed.
        slo: Which objectives it kept, once it has ended; None if it had none.
        spec_decode: What speculative decoding did for it; None where that is switched off.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    slo: SloOutcome | None = None
    spec_decode: SpecDecodeMetrics | None = None


@dataclass(slots=True)
class WeightSpan:
    """Output tokens that one version of the weights produced.

    Attributes:
        version: The version.
        start: Index of the first of them among the completion's output tokens.
        end: One more than the index of the last.
    """

    version: str
    start: int
    end: int


def extend_spans(spans: list[WeightSpan], version: str, count: int) -> None:
    """Add tokens to the spans of a completion.

    Args:
        spans: Its spans so far; extended in place.
        version: Version of the weights that produced the tokens.
        count: How many tokens; with 0 nothing happens.

    >>> spans = [WeightSpan("1", 0, 3)]
    >>> extend_spans(spans, "1", 1)
    >>> extend_spans(spans, "2", 2)
    >>> [(span.version, span.start, span.end) for span in spans]
    [('1', 0, 4), ('2', 4, 6)]
    """
    if not count:
        return
    if spans and spans[-1].version == version:
        spans[-1].end += count
        return
    low = spans[-1].end if spans else 0
    spans.append(WeightSpan(version, low, low + count))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """News of one completion: newly generated tokens, its end, or both.

    Attributes:
        request_id: The request that it belongs to.
        index: Which of the request's n completions.
        token_ids: Tokens since the previous event, in order.
        text: Text since the previous event; never half a code point, never part of a stop string.
        logprobs: One entry per token, if asked for.
        prompt_logprobs: One entry per prompt token (None for the first), once, if asked for.
        finish_reason: Set on the last event only.
        stop_reason: The stop string or stop token id that ended it; None for end-of-sequence.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        weight_version: Version of the weights that produced the tokens; empty without tokens.
        metrics: Times, on the last event.
        error: What went wrong, when `finish_reason` is ERROR.
        error_param: The field of the request that is to blame for it; None if the engine is.
        pooled: The pooled state of the prompt, float32, on the last event, if asked for.
        rejection: Why the scheduler declined the request, when `finish_reason` is DECLINED.
        retry_after_s: Seconds after which trying again makes sense, when it was declined.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    weight_version: str = ""
    metrics: RequestMetrics | None = None
    error: str | None = None
    error_param: str | None = None
    pooled: "np.ndarray | None" = None
    rejection: Rejection | None = None
    retry_after_s: float | None = None


def failure_of(event: TokenEvent) -> RequestError | DeclinedError | EngineDeadError | None:
    """Return the exception for an event that reports a failure; None for any other."""
    declined = event.rejection
    if declined is not None:
        return DeclinedError(
            f"the request was declined ({declined.reason}): {declined.detail}",
            reason=declined.reason,
            objective=declined.objective,
            retry_after_s=event.retry_after_s,
        )
    if event.finish_reason is not FinishReason.ERROR:
        return None
    message = event.error or "the engine failed at this request"
    if event.error_param is not None:
        return RequestError(message, param=event.error_param)
    return EngineDeadError(message)


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: Which of the n completions.
        text: Generated text.
        token_ids: Generated ids.
        cumulative_logprob: Sum of the tokens' log-probabilities, if asked for.
        logprobs: Per token, if asked for.
        finish_reason: `stop`, `length`, `abort` or `declined`; None while it runs.
        stop_reason: The stop string or id that ended it.
        weight_versions: Which version of the weights produced which tokens, in order.
        spec_decode_metrics: What speculative decoding did for it, once it has ended; None where
            that is switched off.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[WeightSpan] = field(default_factory=list[WeightSpan])
    spec_decode_metrics: SpecDecodeMetrics | None = None

    def finished(self) -> bool:
        """Tell whether this completion has ended."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt with its completions.

    Attributes:
        request_id: The request's id.
        prompt: Text of the prompt, if it was given as text.
        prompt_token_ids: Its ids.
        prompt_logprobs: Per prompt token, None for the first; if asked for.
        outputs: The completions, by index.
        finished: Whether all of them have ended.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        metrics: Times of the first completion.
        slo: Which objectives the completions that have ended kept, all of them alike; None if
            there were none.
        lora_request: The adapter that was added to the weights; None if there was none.
        rejection: Why the scheduler declined it, if it did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    slo: SloOutcome | None = None
    lora_request: LoRARequest | None = None
    rejection: Rejection | None = None

    def apply(self, event: TokenEvent) -> None:
        """Add the news of one event to this record."""
        out = self.outputs[event.index]
        out.text += event.text
        out.token_ids.extend(event.token_ids)
        extend_spans(out.weight_versions, event.weight_version, len(event.token_ids))
        if event.logprobs is not None:
            out.logprobs = [*(out.logprobs or []), *event.logprobs]
            total = sum(next(iter(lp.values())).logprob for lp in event.logprobs)
            out.cumulative_logprob = (out.cumulative_logprob or 0.0) + total
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = list(event.prompt_logprobs)
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.rejection = event.rejection or self.rejection
        if event.finish_reason is not None:
            out.finish_reason = event.finish_reason.value
            out.stop_reason = event.stop_reason
            self.finished = all(o.finished() for o in self.outputs)
            if event.index == 0:
                self.metrics = event.metrics
            if event.metrics is not None:
                out.spec_decode_metrics = event.metrics.spec_decode
            if event.metrics is not None and event.metrics.slo is not None:
                outcome = event.metrics.slo
                self.slo = outcome if self.slo is None else self.slo.both(outcome)
