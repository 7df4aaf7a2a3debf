"""What a request must satisfy to be taken in, and the sequences that it becomes."""

from collections.abc import Sequence

import numpy as np

from jaxserve.cache.pages import salt_hash
from jaxserve.core.errors import RequestError
from jaxserve.core.request import Request, SamplingParams
from jaxserve.engine.adapters import check_adapter
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.pooled import check_pooling
from jaxserve.engine.sampler import MAX_BANNED
from jaxserve.engine.sequence import SequenceState
from jaxserve.engine.slo import SloTracker
from jaxserve.engine.tokenizer import Detokenizer, Tokenizer
from jaxserve.engine.traced import RunnerSpec
from jaxserve.grammar.compiler import PendingGrammar

_MAX_SALT = 128


class Intake:
    """Checks requests, on any thread, and turns them into sequences, on the engine's.

    Args:
        spec: What the engine can run.
        tokenizer: For text and stop strings; None serves token ids only.
        eos_token_ids: Tokens that end a completion.
        max_logprobs: Most candidates a request may ask for; -1 is no limit.
        seed: Seeds the streams of requests without a seed.
        constraints: Begins to compile their grammars.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        max_logprobs: int,
        seed: int,
        constraints: Constraints,
    ) -> None:
        """Keep the limits."""
        self._constraints = constraints
        self._vocab = spec.config.vocab_size
        self._max_loras = 0 if spec.lora is None else spec.lora.slots
        self._max_len = min(spec.max_model_len, spec.num_pages * spec.page_size)
        self._sparse = spec.sparse
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._max_logprobs = max_logprobs
        self._rng = np.random.default_rng(seed)
        self._next_id = 0

    def check(self, request: Request) -> None:
        """Refuse what can never be served.

        Raises:
            RequestError: With the name of the field to blame.
        """
        self._check_prompt(request)
        self._check_output(request)
        self._check_tokens(request.sampling)
        self._check_logprobs(request.sampling)
        self._check_mass(request.sampling)
        if len(request.cache_salt) > _MAX_SALT:
            raise RequestError(
                f"cache_salt must have at most {_MAX_SALT} characters, got "
                f"{len(request.cache_salt)}.",
                param="cache_salt",
            )
        if self._tokenizer is None and request.sampling.stop:
            raise RequestError("stop strings need a tokenizer.", param="stop")
        check_adapter(request, self._max_loras)
        self._constraints.begin(request.sampling)

    def _check_prompt(self, request: Request) -> None:
        token_ids = request.prompt_token_ids
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token.", param="prompt")
        if request.pooling is not None:
            check_pooling(request, self._max_len)
        elif len(token_ids) >= self._max_len:
            raise RequestError(
                f"this engine's maximum context length is {self._max_len} tokens, but the prompt "
                f"has {len(token_ids)}, which leaves no room for an output token. Shorten the "
                "prompt.",
                param="prompt",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self._vocab:
            raise RequestError(
                f"token ids must be in [0, {self._vocab}), got {low if low < 0 else high}.",
                param="prompt",
            )

    def _check_output(self, request: Request) -> None:
        """Check output that an interrupted run of the request has generated already."""
        token_ids = request.output_token_ids
        if not token_ids:
            return
        if request.sampling.n != 1:
            raise RequestError(
                "output_token_ids belong to one completion, so n must be 1, got "
                f"{request.sampling.n}; resume completion i of a seeded request with seed + i.",
                param="output_token_ids",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self._vocab:
            raise RequestError(
                f"output_token_ids must be in [0, {self._vocab}), got {low if low < 0 else high}.",
                param="output_token_ids",
            )
        room = self._max_len - len(request.prompt_token_ids)
        if request.sampling.max_tokens is not None:
            room = min(room, request.sampling.max_tokens)
        if len(token_ids) > room:
            raise RequestError(
                f"output_token_ids holds {len(token_ids)} tokens, but the prompt and max_tokens "
                f"allow a completion of at most {room}, those already generated included.",
                param="output_token_ids",
            )

    def _check_tokens(self, sampling: SamplingParams) -> None:
        named = {
            "logit_bias": sampling.logit_bias or (),
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, ids in named.items():
            bad = [i for i in ids if not 0 <= i < self._vocab]
            if bad:
                raise RequestError(
                    f"{name} must hold ids in [0, {self._vocab}), got {bad[0]}.", param=name
                )
        num_stops = len(sampling.stop_token_ids) + len(self._eos)
        if sampling.min_tokens and num_stops > MAX_BANNED:
            raise RequestError(
                f"min_tokens works with at most {MAX_BANNED} stop tokens, got {num_stops}.",
                param="stop_token_ids",
            )
        stops = self._stop_ids(sampling)
        if sampling.min_tokens and stops.issuperset(sampling.allowed_token_ids or (-1,)):
            raise RequestError(
                "allowed_token_ids holds stop tokens only, which "
                f"min_tokens={sampling.min_tokens} forbids at first; allow another token.",
                param="allowed_token_ids",
            )

    def _check_logprobs(self, sampling: SamplingParams) -> None:
        limit = self._max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(sampling, name)
            if wanted is not None and limit >= 0 and not 0 <= wanted <= limit:
                raise RequestError(
                    f"{name} must be at most {limit}, got {wanted}; start with a larger "
                    "--max-logprobs.",
                    param=name,
                )

    def _check_mass(self, sampling: SamplingParams) -> None:
        mass = sampling.attention_mass
        if mass is not None and mass < 1 and self._sparse is None:
            raise RequestError(
                f"attention_mass={mass} needs an engine with sparse attention, which is off: "
                "nothing says which tokens hold the mass. Start it with --sparse-attention p=0.9, "
                "or leave attention_mass out.",
                param="attention_mass",
            )

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        stops = frozenset(sampling.stop_token_ids)
        return stops if sampling.ignore_eos else stops | self._eos

    def make_sequences(self, request: Request) -> list[SequenceState]:
        """Make one sequence per completion that a checked request asks for."""
        grammar = self._constraints.begin(request.sampling)
        count = request.sampling.n
        return [self._make_sequence(request, index, grammar) for index in range(count)]

    def _make_sequence(
        self, request: Request, index: int, grammar: PendingGrammar | None
    ) -> SequenceState:
        sampling = request.sampling
        prompt_len = len(request.prompt_token_ids)
        limit = self._max_len
        if sampling.max_tokens is not None:
            limit = min(limit, prompt_len + sampling.max_tokens)
        if request.pooling is not None:
            limit = prompt_len + 1  # ends with its prompt
        if sampling.seed is None:
            seed = int(self._rng.integers(0, 2**63))
        else:
            seed = (sampling.seed + index) % 2**64
        self._next_id += 1
        return SequenceState(
            seq_id=self._next_id,
            request=request,
            index=index,
            sampling=sampling,
            max_total_len=limit,
            stop_ids=self._stop_ids(sampling),
            detokenizer=self._detokenizer(request),
            prompt_len=prompt_len,
            seed_words=(seed >> 32, seed & 0xFFFFFFFF),
            root_hash=salt_hash(request.cache_salt),
            grammar=grammar,
            token_ids=list(request.prompt_token_ids),
            slo=None if request.slo is None else SloTracker(request.slo, request.arrival),
            declared_slo=request.slo,
            attention_mass=self._mass(request),
        )

    def _mass(self, request: Request) -> float:
        """Return the share of the attention mass that its decodes read."""
        if self._sparse is None or request.pooling is not None:
            return 1.0
        wanted = request.sampling.attention_mass
        return self._sparse.config.p if wanted is None else wanted

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        sampling = request.sampling
        if self._tokenizer is None or not sampling.detokenize:
            return None
        return Detokenizer(
            self._tokenizer,
            prompt_ids=request.prompt_token_ids,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )
