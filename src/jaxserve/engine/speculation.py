"""Drafting: what might come next, guessed cheaply, for the model to verify in one step.

A step that verifies drafts must be committed before the next one is planned: how many tokens it
brings decides where the sequence goes on. And a draft continues the latest token, so a sequence
whose latest token is still being drawn cannot have one. The engine therefore overlaps steps as
long as its scheduler wants no drafts, and takes turns with the device as soon as it does; then one
step brings several tokens, which is worth more than the host's share of a step. The scheduler is
asked while the device runs: a view offers drafts as if the token in flight were known.
"""

import abc
from collections.abc import Sequence

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.speculative import SpeculativeConfig
from jaxserve.engine.batcher import Item
from jaxserve.engine.draft_runner import DraftedRunner
from jaxserve.engine.drafts import FIRST_ACCEPTANCE, DraftState, NgramIndex
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.runner import Runner
from jaxserve.engine.sequence import SequenceState
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.config import ModelConfig

_FORGIVENESS = 0.01
"""By how much acceptance returns to the first guess with each token that nobody drafted."""


class Speculator(abc.ABC):
    """Drafts for the sequences of an engine, and remembers what became of it.

    Args:
        num_tokens: Most draft tokens per sequence and step.
        metrics: Counts drafts.
    """

    def __init__(self, *, num_tokens: int, metrics: EngineMetrics) -> None:
        """Start with no sequence."""
        self._num_tokens = num_tokens
        self._metrics = metrics

    def add(self, sequence: SequenceState) -> None:
        """Get ready to draft for a new sequence."""
        if sequence.request.pooling is None:
            sequence.drafting = self._begin()

    def _begin(self) -> DraftState:
        return DraftState()

    def read_prompt(self, sequence: SequenceState) -> None:
        """Take in the prompt as far as it has been computed, so that no step pays for all of it."""
        if sequence.drafting is not None and sequence.drafting.index is not None:
            length = min(sequence.num_computed, len(sequence.token_ids))
            sequence.drafting.index.extend(sequence.token_ids, length)

    def offer(self, sequence: SequenceState) -> int:
        """Count the draft tokens that a running sequence could have verified in its next step.

        If a token of it is in flight, it counts as if it were the one that is expected.
        """
        state = sequence.drafting
        if state is None or not sequence.has_device_token:
            return 0
        room = sequence.max_total_len - len(sequence.token_ids) - sequence.num_in_flight - 1
        if room <= 0:
            return 0
        return max(0, min(self._num_found(state, sequence), self._num_tokens, room))

    @abc.abstractmethod
    def _num_found(self, state: DraftState, sequence: SequenceState) -> int:
        """Count the tokens that there are to draft."""

    def fill(self, items: Sequence[Item]) -> None:
        """Set the drafts of a step's work: as many as have been granted, or fewer.

        Args:
            items: The step's work, rows and pages settled. Nothing of those that are granted drafts
                is in flight. Beside prefill nobody drafts.
        """
        granted = [item for item in items if item.num_draft]
        if not granted or not all(item.sequence.has_device_token for item in items):
            return
        for item, tokens in zip(granted, self._draft(granted), strict=True):
            item.drafts = _allowed(item.sequence, tokens)

    @abc.abstractmethod
    def _draft(self, items: Sequence[Item]) -> list[list[int]]:
        """Return draft tokens for each item, at most `num_draft`."""

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
        else:
            self._rest(state, sequence, tokens[0])

    @abc.abstractmethod
    def _rest(self, state: DraftState, sequence: SequenceState, token: int) -> None:
        """Learn from a token that came without drafts, so that who stopped may begin again."""

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


class NgramSpeculator(Speculator):
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
        super().__init__(num_tokens=num_tokens, metrics=metrics)
        self._shortest = shortest
        self._longest = longest

    def _begin(self) -> DraftState:
        return DraftState(NgramIndex(self._shortest, self._longest))

    def _num_found(self, state: DraftState, sequence: SequenceState) -> int:
        return len(self._propose(state, sequence)) - sequence.num_in_flight

    def _draft(self, items: Sequence[Item]) -> list[list[int]]:
        found: list[list[int]] = []
        for item in items:
            state = item.sequence.drafting
            tokens = [] if state is None else self._propose(state, item.sequence)
            found.append(tokens[: item.num_draft])
        return found

    def _propose(self, state: DraftState, sequence: SequenceState) -> list[int]:
        tokens = sequence.token_ids
        if state.proposal_len != len(tokens) and state.index is not None:
            state.index.extend(tokens)
            # One more than can be verified: the first may stand for a token in flight.
            state.proposal = state.index.propose(tokens, self._num_tokens + 1)
            state.proposal_len = len(tokens)
        return state.proposal

    def _rest(self, state: DraftState, sequence: SequenceState, token: int) -> None:
        """Compare what would have been drafted; that costs nothing."""
        if state.proposal and state.proposal_len == len(sequence.token_ids):
            is_hit = state.proposal[0] == token
            state.learn(hits=is_hit, misses=not is_hit)


class ModelSpeculator(Speculator):
    """Drafts with a second, smaller model.

    Args:
        num_tokens: Most draft tokens per sequence and step.
        runner: Runs both models.
        metrics: Counts drafts.
    """

    def __init__(self, *, num_tokens: int, runner: DraftedRunner, metrics: EngineMetrics) -> None:
        """Start with no sequence."""
        super().__init__(num_tokens=num_tokens, metrics=metrics)
        self._runner = runner

    def _num_found(self, state: DraftState, sequence: SequenceState) -> int:  # noqa: ARG002
        return self._num_tokens

    def _draft(self, items: Sequence[Item]) -> list[list[int]]:
        tokens = self._runner.draft(
            [item.row for item in items],
            [item.start for item in items],
            [item.sequence.pages for item in items],
            max(item.num_draft for item in items),
        )
        return [row[: item.num_draft].tolist() for row, item in zip(tokens, items, strict=True)]

    def _rest(self, state: DraftState, sequence: SequenceState, token: int) -> None:  # noqa: ARG002
        """Forget failure slowly: drafts that nobody computed teach nothing."""
        state.acceptance += _FORGIVENESS * (FIRST_ACCEPTANCE - state.acceptance)


def _allowed(sequence: SequenceState, tokens: list[int]) -> tuple[int, ...]:
    """Keep the drafts that a constrained sequence may say."""
    matcher = sequence.matcher
    if matcher is not None:
        matcher.follow(sequence.token_ids, sequence.prompt_len)
        tokens = tokens[: matcher.validate(tokens)]
    return tuple(tokens)


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
    count = speculation.num_speculative_tokens
    if count >= max_num_batched_tokens:
        raise ConfigError(
            f"num_speculative_tokens={count} does not fit into a step of "
            f"max_num_batched_tokens={max_num_batched_tokens}, which must hold one token more."
        )


def check_draft_model(draft: ModelConfig, model: ModelConfig, max_model_len: int) -> None:
    """Refuse a draft model that cannot draft for a model.

    Raises:
        ConfigError: If they do not speak the same tokens, or it cannot follow so far.
    """
    if draft.vocab_size != model.vocab_size:
        raise ConfigError(
            f"the draft model has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{model.vocab_size}; drafts need a model with the same vocabulary."
        )
    if draft.max_position < max_model_len:
        raise ConfigError(
            f"the draft model has {draft.max_position} positions, but max_model_len is "
            f"{max_model_len}; lower it, or take another draft model."
        )


def check_same_tokens(draft: Tokenizer | None, tokenizer: Tokenizer | None, size: int) -> None:
    """Refuse a draft model whose tokens say something else.

    Args:
        draft: The draft model's tokenizer, if it has one.
        tokenizer: The model's, if it has one.
        size: Tokens of the vocabulary.

    Raises:
        ConfigError: Names the first token that differs.
    """
    if draft is None or tokenizer is None:
        return
    for token in range(size):
        ours, theirs = tokenizer.token_bytes(token), draft.token_bytes(token)
        if ours != theirs:
            raise ConfigError(
                f"the draft model's token {token} is {theirs!r}, the model's is {ours!r}; drafts "
                "need a model with the same vocabulary."
            )


def make_speculator(
    config: SpeculativeConfig, runner: Runner, metrics: EngineMetrics
) -> Speculator:
    """Build what drafts for an engine.

    Args:
        config: Checked settings.
        runner: Holds the draft model, if there is one.
        metrics: Counts drafts.
    """
    if isinstance(runner, DraftedRunner):
        return ModelSpeculator(
            num_tokens=config.num_speculative_tokens, runner=runner, metrics=metrics
        )
    return NgramSpeculator(
        num_tokens=config.num_speculative_tokens,
        shortest=config.prompt_lookup_min,
        longest=config.prompt_lookup_max,
        metrics=metrics,
    )
