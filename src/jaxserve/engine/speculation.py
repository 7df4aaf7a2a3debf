"""Drafting: what might come next, guessed on the host, for the model to verify in one step.

A step that verifies drafts must be committed before the next one is planned: how many tokens it
brings decides where the sequence goes on. And a draft continues the latest token, so a sequence
whose latest token is still being drawn cannot have one. The engine therefore overlaps steps as
long as its scheduler wants no drafts, and takes turns with the device as soon as it does; then one
step brings several tokens, which is worth more than the host's share of a step. The scheduler is
asked while the device runs: a view offers drafts as if the token in flight were known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.event import SpecDecodeMetrics
from jaxserve.core.speculative import SpeculativeConfig
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.sequence import SequenceState

MAX_CANDIDATES = 16
"""Earlier places of the same words that are compared, the latest first."""

FIRST_ACCEPTANCE = 0.7
"""Chance that a draft token is right, as long as nothing is known."""

_MEMORY = 0.1
"""Weight of the latest draft token in a request's acceptance."""


class NgramIndex:
    """Finds where the last words of a sequence stood before; grows with the sequence.

    Args:
        shortest: Fewest tokens that must agree.
        longest: Tokens after which no better agreement is looked for.

    One dictionary leads from every run of `shortest` tokens to its latest place, one list from
    each place to the one before; a lookup follows that list for a bounded number of places.

    Source: Saxena, Prompt Lookup Decoding; the chains are those of LZ77 compressors (deflate).
    """

    def __init__(self, shortest: int, longest: int) -> None:
        """Start empty."""
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = []

    def extend(self, tokens: Sequence[int], length: int | None = None) -> None:
        """Take in what a sequence has gained since the last call; it only ever grows.

        Args:
            tokens: The whole sequence.
            length: Take in only so many of them.
        """
        size, latest, earlier = self._shortest, self._latest, self._earlier
        for end in range(len(earlier), len(tokens) if length is None else length):
            if end + 1 < size:
                earlier.append(-1)
                continue
            words = tuple(tokens[end + 1 - size : end + 1])
            earlier.append(latest.get(words, -1))
            latest[words] = end

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Continue a sequence as it went on after the longest agreement, the latest of equals.

        Args:
            tokens: The whole sequence, as taken in by `extend`.
            count: Tokens wanted.

        Returns:
            As many tokens, or none. What repeats itself is continued over its own end.
        """
        if not tokens:
            return []
        end = len(tokens)
        best, best_size = -1, 0
        place = self._earlier[end - 1]
        for _ in range(MAX_CANDIDATES):
            if place < 0:
                break
            size = self._shortest
            limit = min(self._longest, place + 1)
            while size < limit and tokens[place - size] == tokens[end - 1 - size]:
                size += 1
            if size > best_size:
                best, best_size = place, size
                if size == self._longest:
                    break
            place = self._earlier[place]
        if best < 0:
            return []
        period = end - 1 - best
        return [tokens[best + 1 + i % period] for i in range(count)]


@dataclass(slots=True, eq=False)
class DraftState:
    """What is remembered about the drafts of one sequence.

    Attributes:
        index: Where its words stood before.
        acceptance: Chance that a draft token is right if all before it are: a mean that forgets.
        proposal: What came out of the latest lookup.
        proposal_len: Tokens that the sequence had then; -1 if there was none.
        totals: Its figures so far.
    """

    index: NgramIndex
    acceptance: float = FIRST_ACCEPTANCE
    proposal: list[int] = field(default_factory=list[int])
    proposal_len: int = -1
    totals: SpecDecodeMetrics = field(default_factory=SpecDecodeMetrics)

    def learn(self, *, hits: int, misses: int) -> None:
        """Take in how many draft tokens were right, and whether one was wrong."""
        for outcome in (*[1.0] * hits, *[0.0] * misses):
            self.acceptance += _MEMORY * (outcome - self.acceptance)


class Speculator:
    """Drafts by looking up what the sequence itself has said before.

    Args:
        num_tokens: Most draft tokens per sequence and step.
        shortest: Fewest tokens that must agree.
        longest: Tokens beyond which agreement does not count.
        metrics: Counts drafts.
    """

    def __init__(
        self, *, num_tokens: int, shortest: int, longest: int, metrics: EngineMetrics
    ) -> None:
        """Start with no sequence."""
        self._num_tokens = num_tokens
        self._shortest = shortest
        self._longest = longest
        self._metrics = metrics

    def add(self, sequence: SequenceState) -> None:
        """Get ready to draft for a new sequence."""
        if sequence.request.pooling is None:
            sequence.drafting = DraftState(NgramIndex(self._shortest, self._longest))

    def read_prompt(self, sequence: SequenceState) -> None:
        """Take in the prompt as far as it has been computed, so that no step pays for all of it."""
        if sequence.drafting is not None:
            length = min(sequence.num_computed, len(sequence.token_ids))
            sequence.drafting.index.extend(sequence.token_ids, length)

    def offer(self, sequence: SequenceState) -> int:
        """Count the draft tokens that a running sequence could have verified in its next step.

        If a token of it is in flight, it counts as if it were the one that is expected.
        """
        state = sequence.drafting
        if state is None or not sequence.has_device_token:
            return 0
        in_flight = sequence.num_in_flight
        room = sequence.max_total_len - len(sequence.token_ids) - in_flight - 1
        if room <= 0:
            return 0
        found = len(self._propose(state, sequence)) - in_flight
        return max(0, min(found, self._num_tokens, room))

    def draft(self, sequence: SequenceState, count: int) -> tuple[int, ...]:
        """Return up to `count` draft tokens; of a constrained sequence those that it may say."""
        state = sequence.drafting
        if state is None or sequence.num_in_flight:
            return ()
        tokens = self._propose(state, sequence)[:count]
        matcher = sequence.matcher
        if matcher is not None:
            matcher.follow(sequence.token_ids, sequence.prompt_len)
            tokens = tokens[: matcher.validate(tokens)]
        return tuple(tokens)

    def _propose(self, state: DraftState, sequence: SequenceState) -> list[int]:
        tokens = sequence.token_ids
        if state.proposal_len != len(tokens):
            state.index.extend(tokens)
            # One more than can be verified: the first may stand for a token in flight.
            state.proposal = state.index.propose(tokens, self._num_tokens + 1)
            state.proposal_len = len(tokens)
        return state.proposal

    def learn(self, sequence: SequenceState, drafts: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare drafts with what came; called before the sequence takes the tokens in.

        Args:
            sequence: Whose drafts.
            drafts: What was verified; empty where nothing was.
            tokens: What the step brought: a token for each accepted draft, and one more.
        """
        state = sequence.drafting
        if state is None:
            return
        if drafts:
            hits = len(tokens) - 1
            state.learn(hits=hits, misses=hits < len(drafts))
        elif state.proposal and state.proposal_len == len(sequence.token_ids):
            # Not verified, but known to be right or wrong: who stopped drafting may begin again.
            is_hit = state.proposal[0] == tokens[0]
            state.learn(hits=is_hit, misses=not is_hit)

    def count(self, sequence: SequenceState, num_draft_tokens: int, num_accepted: int) -> None:
        """Count the draft of one step.

        Args:
            sequence: Whose draft.
            num_draft_tokens: Tokens verified.
            num_accepted: Those of them that have become output.
        """
        if sequence.drafting is not None:
            sequence.drafting.totals = sequence.drafting.totals.plus(num_draft_tokens, num_accepted)
            self._metrics.drafted(num_draft_tokens, num_accepted)


def check_speculation(config: EngineConfig, max_num_batched_tokens: int) -> None:
    """Refuse speculation together with what it cannot work with.

    Raises:
        ConfigError: Names both settings.
    """
    speculation = config.speculative.speculation
    if speculation is None:
        return
    if config.runner.batch_invariant:
        raise ConfigError(
            "batch_invariant needs steps of one shape, which speculative_config cannot keep: the "
            "shape depends on who has drafts. Leave one of them out."
        )
    if config.pooling.runner == "pooling":
        raise ConfigError(
            "speculative_config drafts output tokens, but runner='pooling' generates none. Leave "
            "one of them out."
        )
    if speculation.method == "draft_model":
        raise ConfigError(
            "speculative_config: draft models are not built in yet; use method 'ngram'."
        )
    count = speculation.num_speculative_tokens
    if count >= max_num_batched_tokens:
        raise ConfigError(
            f"num_speculative_tokens={count} does not fit into a step of "
            f"max_num_batched_tokens={max_num_batched_tokens}, which must hold one token more."
        )


def make_speculator(config: SpeculativeConfig, metrics: EngineMetrics) -> Speculator:
    """Build what drafts for an engine.

    Args:
        config: Checked settings.
        metrics: Counts drafts.
    """
    return Speculator(
        num_tokens=config.num_speculative_tokens,
        shortest=config.prompt_lookup_min,
        longest=config.prompt_lookup_max,
        metrics=metrics,
    )
