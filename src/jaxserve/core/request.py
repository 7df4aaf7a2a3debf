"""What a caller asks for: `SamplingParams`, `Slo` and `Request`."""

import dataclasses
import math
import re
import typing
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

from jaxserve.core.errors import RequestError, did_you_mean
from jaxserve.core.lora import Adapter
from jaxserve.core.pooling import PoolingType
from jaxserve.core.structured import StructuredOutputsParams

RequestId = NewType("RequestId", str)

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding."""
MAX_N = 16384
MAX_STOP_STRINGS = 4
DEFAULT_MAX_LOGPROBS = 20


def new_request_id() -> RequestId:
    """Return a fresh random request id."""
    return RequestId(uuid.uuid4().hex)


def _check(ok: object, name: str, rule: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{name} must be {rule}, got {value!r}.", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    Names, defaults and rules are vLLM's, so that code and requests carry over.

    Attributes:
        n: Completions per prompt; completion i of a seeded request draws from seed + i.
        presence_penalty: Subtracted once from the logit of every generated token; [-2, 2].
        frequency_penalty: Subtracted per occurrence of a generated token; [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of every token in
            prompt or output; > 0, 1 is off.
        temperature: Divides the logits; [0, 2], below 1e-5 is greedy.
        top_p: Keep the smallest set of most likely tokens whose mass reaches this; (0, 1].
        top_k: Keep this many most likely tokens; 0 and -1 are off.
        min_p: Drop tokens less likely than this share of the most likely one; [0, 1].
        seed: Makes the random stream depend on (seed, output position) alone; None and -1 draw one.
        stop: Strings that end the completion; at most four.
        stop_token_ids: Tokens that end the completion.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after the model's end-of-sequence token.
        max_tokens: Most tokens to generate; None fills the context.
        min_tokens: No end-of-sequence or stop token before this many tokens.
        logprobs: Report the log-probability of each output token and of this many most likely
            ones; -1 is the whole vocabulary.
        prompt_logprobs: The same for each prompt token.
        detokenize: Turn ids into text; off saves host time.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Accepted for compatibility; special tokens carry no spaces.
        logit_bias: Token id -> value added to its logit, clamped to [-100, 100].
        allowed_token_ids: Only these tokens may be generated.
        structured_outputs: What the text must look like; the completion ends where it must.
        attention_mass: Share of the attention mass that decodes of a long context read; (0, 1], 1
            reads everything. None is what the engine is set to. Not of vLLM.

    Raises:
        RequestError: If a value is outside its range; names the field.

    Source: vLLM `SamplingParams` (names, defaults, limits).
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    attention_mass: float | None = None

    def __post_init__(self) -> None:
        """Check every range, and put the sequences into one form."""
        put = object.__setattr__
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        put(self, "stop_token_ids", tuple(dict.fromkeys(self.stop_token_ids or ())))
        if self.seed == -1:
            put(self, "seed", None)
        if self.logprobs is True:
            put(self, "logprobs", 1)
        if self.prompt_logprobs is True:
            put(self, "prompt_logprobs", 1)
        self._check_numbers()
        self._check_lengths()
        self._check_structure()
        if self.logit_bias is not None:
            put(
                self,
                "logit_bias",
                {int(k): min(100.0, max(-100.0, float(v))) for k, v in self.logit_bias.items()},
            )
        if self.allowed_token_ids is not None:
            _check(len(self.allowed_token_ids) > 0, "allowed_token_ids", "not empty", [])
            put(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if 0 < self.temperature < 0.01 and self.temperature >= GREEDY_BELOW:
            put(self, "temperature", 0.01)  # below this a softmax over float32 logits overflows

    def _check_numbers(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", f"an integer in 1..{MAX_N}", self.n)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_finite(value) and -2 <= value <= 2, name, "in [-2, 2]", value)
        _check(
            _is_finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "finite and greater than zero",
            self.repetition_penalty,
        )
        _check(
            _is_finite(self.temperature) and 0 <= self.temperature <= 2,
            "temperature",
            "in [0, 2]",
            self.temperature,
        )
        _check(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(
            _is_int(self.top_k) and self.top_k >= -1,
            "top_k",
            "0 or -1 (off), or an integer of at least 1",
            self.top_k,
        )
        _check(_is_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        if self.attention_mass is not None:
            ok = _is_finite(self.attention_mass) and 0 < self.attention_mass <= 1
            _check(ok, "attention_mass", "in (0, 1]", self.attention_mass)
        if self.seed is not None:
            ok = _is_int(self.seed) and -(2**63) <= self.seed < 2**63
            _check(ok, "seed", "a 64-bit integer", self.seed)
        if self.n > 1 and self.is_greedy:
            raise RequestError(
                f"n must be 1 with greedy sampling (temperature 0), got {self.n}; every completion "
                "would be the same.",
                param="n",
            )

    def _check_lengths(self) -> None:
        _check(all(s for s in self.stop), "stop", "made of non-empty strings", list(self.stop))
        _check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"at most {MAX_STOP_STRINGS} strings",
            len(self.stop),
        )
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True.", param="stop")
        for token in self.stop_token_ids:
            _check(_is_int(token) and token >= 0, "stop_token_ids", "made of token ids", token)
        if self.max_tokens is not None:
            ok = _is_int(self.max_tokens) and self.max_tokens >= 1
            _check(ok, "max_tokens", "an integer of at least 1", self.max_tokens)
        _check(
            _is_int(self.min_tokens) and self.min_tokens >= 0,
            "min_tokens",
            "an integer of at least 0",
            self.min_tokens,
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.",
                param="min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check(_is_int(value) and value >= -1, name, "-1 or at least 0", value)

    def _check_structure(self) -> None:
        structure = self.structured_outputs
        if structure is None:
            return
        if not isinstance(structure, StructuredOutputsParams):
            raise RequestError(
                "structured_outputs must be a StructuredOutputsParams, got "
                f"{type(structure).__name__}.",
                param="structured_outputs",
            )
        if self.allowed_token_ids is not None:
            raise RequestError(
                "structured_outputs and allowed_token_ids cannot be combined: together they may "
                "leave no token at all. Use one of them.",
                param="structured_outputs",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def needs_penalties(self) -> bool:
        """Whether token counts are needed to draw the next token."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    @property
    def needs_bias(self) -> bool:
        """Whether some logits are shifted or forbidden."""
        return bool(self.logit_bias) or self.allowed_token_ids is not None

    def replace(self, **changes: object) -> "SamplingParams":
        """Return a checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


OnDecline = Literal["best_effort", "reject", "asap"]
"""What becomes of a request whose objectives cannot be promised."""
OBJECTIVES = ("ttft_ms", "tpot_ms", "e2e_ms")
DEFAULT_TIER = "default"
_SHOWN = 40
"""Most characters of a refused name to repeat."""
_TIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service-level objectives of one request: how soon its tokens are wanted.

    Times are counted from the request's arrival at the engine. `tpot_ms` is read as token
    deadlines: token k (0 is the first) is due `k * tpot_ms` after the first one's deadline, or,
    without `ttft_ms`, after the first one itself; tokens that come early make up for later ones.

    Attributes:
        ttft_ms: Milliseconds to the first token.
        tpot_ms: Milliseconds per further token.
        e2e_ms: Milliseconds to the end of the whole request.
        tier: Class of requests under which it is counted; up to 32 letters, digits and `_.:-`.
        on_decline: What becomes of it when a scheduler finds that it cannot keep the objectives:
            `best_effort` (served with what is left over), `reject` (refused), `asap` (served as
            soon as possible all the same).

    Raises:
        RequestError: If there is no objective, or one is impossible or contradicts another; names
            the field.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    tier: str = DEFAULT_TIER
    on_decline: OnDecline = "best_effort"

    def __post_init__(self) -> None:
        """Check every value, and that they can be kept together."""
        for name in OBJECTIVES:
            value = getattr(self, name)
            if value is not None:
                ok = _is_finite(value) and value > 0
                _check(ok, f"slo.{name}", "a finite number of milliseconds above zero", value)
        if all(getattr(self, name) is None for name in OBJECTIVES):
            raise RequestError(
                f"slo must hold at least one of {', '.join(OBJECTIVES)}, got none.", param="slo"
            )
        if self.e2e_ms is not None and self.ttft_ms is not None and self.e2e_ms < self.ttft_ms:
            raise RequestError(
                f"slo.e2e_ms must be at least slo.ttft_ms={self.ttft_ms}, got {self.e2e_ms}; the "
                "end cannot come before the first token.",
                param="slo.e2e_ms",
            )
        is_name = isinstance(self.tier, str) and _TIER.fullmatch(self.tier)
        rule = "1 to 32 letters, digits and _.:-, beginning with a letter or digit"
        shown = self.tier[:_SHOWN] if isinstance(self.tier, str) else self.tier
        _check(is_name, "slo.tier", rule, shown)
        known = typing.get_args(OnDecline)
        if self.on_decline not in known:
            found = str(self.on_decline)[:_SHOWN]
            hint = did_you_mean(found, known)
            raise RequestError(
                f"slo.on_decline must be one of {', '.join(known)}, got {found!r}.{hint}",
                param="slo.on_decline",
            )

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> "Slo":
        """Build objectives from named values, such as those of a request's body.

        Args:
            fields: Values by name; None is the same as absent.

        Raises:
            RequestError: For an unknown name (the nearest known one is suggested) or a bad value.

        >>> Slo.from_mapping({"ttft_ms": 500, "tpot_ms": 50}).tier
        'default'
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                hint = did_you_mean(str(name)[:_SHOWN], known)
                raise RequestError(
                    f"slo must hold only {', '.join(known)}, got {str(name)[:_SHOWN]!r}.{hint}",
                    param="slo",
                )
        return cls(**{name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt on its way to becoming one or more completions.

    Attributes:
        request_id: Unique among unfinished requests.
        prompt_token_ids: The prompt; never empty.
        sampling: How to draw tokens.
        prompt: Text of the prompt, if it came as text.
        arrival: Clock time of arrival in seconds.
        priority: Lower is served first, under the `priority` policy; otherwise ignored.
        cache_salt: Requests share cached prefixes only with requests of the same salt.
        output_token_ids: Output that an interrupted run of the same request has generated already.
            The completion goes on behind it as if it had never been interrupted; events hold only
            what is new.
        pooling: What to make of the prompt's states ("mean" or "last") instead of a completion;
            None completes the prompt.
        slo: How soon its tokens are wanted; None leaves that open.
        adapter: Low-rank adapter to add to the weights; None uses them as they are.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    arrival: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    output_token_ids: tuple[int, ...] = ()
    pooling: PoolingType | None = None
    slo: Slo | None = None
    adapter: Adapter | None = None
