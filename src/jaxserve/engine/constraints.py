"""Grammars of an engine's sequences: who still waits for one, and the masks of a step."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxserve.core.config import StructuredOptions
from jaxserve.core.errors import RequestError
from jaxserve.core.request import Request, SamplingParams
from jaxserve.engine.batcher import Item, drop_drafts
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.sequence import Phase, SequenceState
from jaxserve.engine.shapes import PackedStep, mask_words
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.grammar.compiler import GrammarCompiler, PendingGrammar, Vocabulary
from jaxserve.grammar.matcher import MaskWriter, Matcher, shown
from jaxserve.grammar.text import GrammarDefaults

Failure = tuple[SequenceState, Exception]
"""A sequence that cannot go on, and why: a `RequestError` if its request is to blame."""


class Constraints:
    """What the engine keeps about constrained sequences.

    Args:
        compiler: Compiles grammars; None refuses constraints.
        refusal: What to say then.
        vocab_size: Rows of the model's embedding.

    Attributes:
        compiler: As given.
        compiling: Sequences that wait for their grammar, by id. They hold nothing and no scheduler
            sees them.
    """

    def __init__(
        self, compiler: GrammarCompiler | None = None, *, refusal: str = "", vocab_size: int = 0
    ) -> None:
        """Start with no sequence."""
        self.compiler = compiler
        self.compiling: dict[int, SequenceState] = {}
        self._refusal = refusal
        self._words = mask_words(vocab_size)
        self._writer = MaskWriter()

    def begin(self, sampling: SamplingParams) -> PendingGrammar | None:
        """Begin to compile a request's grammar; None if it has none. From any thread.

        Raises:
            RequestError: If the constraint is malformed, or none can be served here.
        """
        if sampling.structured_outputs is None:
            return None
        if self.compiler is None:
            raise RequestError(self._refusal, param="structured_outputs")
        return self.compiler.compile(sampling.structured_outputs)

    def add(self, sequence: SequenceState) -> None:
        """Let a new sequence wait for its grammar, if it has one."""
        if sequence.grammar is not None:
            self.compiling[sequence.seq_id] = sequence

    def close(self) -> None:
        """Compile nothing more."""
        if self.compiler is not None:
            self.compiler.close()

    def settle(self) -> list[Failure]:
        """Give matchers to those whose grammar has been compiled; return those whose has not."""
        failures: list[Failure] = []
        for sequence in list(self.compiling.values()):
            if sequence.phase is Phase.FINISHED or sequence.grammar is None:
                del self.compiling[sequence.seq_id]
                continue
            try:
                sequence.matcher = sequence.grammar.poll()
                if sequence.matcher is not None:
                    check_resumed(sequence.request, sequence.matcher)
            except Exception as error:  # noqa: BLE001  whatever it is, others go on
                sequence.matcher = None
                failures.append((sequence, error))
                del self.compiling[sequence.seq_id]
            if sequence.matcher is not None:
                del self.compiling[sequence.seq_id]
        return failures

    def fill(
        self,
        packed: PackedStep,
        items: Sequence[Item],
        in_flight: Callable[[], Mapping[int, int]],
    ) -> list[Failure]:
        """Put the masks of constrained rows into a step.

        Args:
            packed: The step; gets `mask` if a row needs one.
            items: Its work.
            in_flight: Waits for the step before and tells the token that each sequence drew in
                it. Called only if a constrained row needs to know.

        Returns:
            Sequences that their grammar lets go no further; their rows are not masked.
        """
        rows = [i for i in items if i.is_sampled and i.sequence.matcher is not None]
        if not rows:
            return []
        drawn = in_flight() if any(i.sequence.num_in_flight for i in rows) else {}
        entries: list[tuple[Matcher, int]] = []
        for item in rows:
            matcher = item.sequence.matcher
            if matcher is None:
                raise AssertionError("rows have matchers")
            matcher.follow(item.sequence.token_ids, item.sequence.prompt_len)
            if item.sequence.num_in_flight and not (matcher.error or matcher.has_ended):
                matcher.take(drawn[item.sequence.seq_id])
            entries.append((matcher, item.place))
        count = len(packed.parts) * packed.shape.num_drawn
        masks = np.full((count, self._words), 0xFFFFFFFF, np.uint32)
        self._writer.write(entries, masks)
        packed.mask = masks
        packed.set_flag("any_mask")
        for item, (matcher, _) in zip(rows, entries, strict=True):
            _lift_ban(packed, item.place)
            if item.drafts:
                self._mask_drafts(packed, item, matcher, masks)
        return [
            (item.sequence, _cannot_go_on(matcher))
            for item, (matcher, _) in zip(rows, entries, strict=True)
            if matcher.error
        ]

    def _mask_drafts(
        self, packed: PackedStep, item: Item, matcher: Matcher, masks: np.ndarray
    ) -> None:
        """Write what may follow each draft token, and drop drafts behind which nothing is known.

        A grammar may fail behind a draft. The draft is then drawn as if nobody had drafted it, and
        whatever comes behind it is left to the next step, where the failure ends the request.
        """
        own = np.full((len(item.drafts) + 1, self._words), 0xFFFFFFFF, np.uint32)
        count = self._writer.write_drafts(matcher, item.drafts, own)
        if count < len(item.drafts):
            drop_drafts(packed, item, count)
        low = item.draft_place
        masks[low : low + count] = own[1 : count + 1]
        for place in range(low, low + count):
            _lift_ban(packed, place)


def check_resumed(request: Request, matcher: Matcher) -> None:
    """Follow the output that an interrupted run of a request has generated already.

    Args:
        request: What was asked for.
        matcher: Stands at the start of its grammar, and behind that output afterwards.

    Raises:
        RequestError: If the grammar does not allow the output.
    """
    tokens = request.output_token_ids
    if matcher.follow(tokens):
        return
    at = matcher.num_tokens - 1 if matcher.error else matcher.num_tokens
    raise RequestError(
        f"output_token_ids cannot have come from this request: its grammar does not allow token "
        f"{tokens[at]} at position {at}. Send the ids as they were generated, with the same "
        "constraint.",
        param="output_token_ids",
    )


def _cannot_go_on(matcher: Matcher) -> RequestError:
    return RequestError(
        f"the grammar cannot be followed beyond {matcher.num_tokens} output tokens: "
        f"{shown(matcher.error)}. Send a simpler one.",
        param="structured_outputs",
    )


def _lift_ban(packed: PackedStep, place: int) -> None:
    """Allow stop tokens before `min_tokens` where the grammar allows nothing else."""
    if packed.mask is None:
        return
    banned = packed.banned(place)
    ids = banned[banned >= 0].astype(np.int64)
    if not ids.size:
        return
    left = packed.mask[place].copy()
    np.bitwise_and.at(left, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    if not left.any():
        banned[...] = -1


def vocabulary_of(tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Sequence[int]) -> Vocabulary:
    """Describe a tokenizer to the grammar compiler.

    Args:
        tokenizer: From whatever kind of file.
        vocab_size: Rows of the model's embedding; ids beyond the tokenizer's have no text.
        eos_ids: Tokens that end a sequence.
    """
    tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
    return Vocabulary(
        tokens=tokens,
        special_ids=tokenizer.special_ids,
        eos_ids=tuple(eos_ids),
        encode=_Speller(tokenizer, tokens).spell,
    )


class _Speller:
    """Turns text into tokens that say exactly that text and nothing special.

    Where a grammar leaves no choice, the grammar engine asks how the text is usually cut. Some
    tokenizers put a space in front of every text, and all turn written-out special tokens into
    these; then the longest tokens that fit are taken.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._special = tokenizer.special_ids
        self._ids: dict[bytes, int] = {}

    def spell(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        wanted = text.encode()
        is_plain = not any(token in self._special or token >= len(self._tokens) for token in ids)
        if is_plain and b"".join(self._tokens[token] for token in ids) == wanted:
            return ids
        return self._longest(wanted)

    def _longest(self, text: bytes) -> list[int]:
        if not self._ids:
            pairs = enumerate(self._tokens)
            self._ids = {
                said: token for token, said in pairs if said and token not in self._special
            }
        most = max(map(len, self._ids))
        ids: list[int] = []
        at = 0
        while at < len(text):
            for size in range(min(most, len(text) - at), 0, -1):
                token = self._ids.get(text[at : at + size])
                if token is not None:
                    ids.append(token)
                    at += size
                    break
            else:
                return ids  # a vocabulary without this byte cannot say it
        return ids


def make_constraints(
    options: StructuredOptions,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    eos_ids: Sequence[int],
    metrics: EngineMetrics,
) -> Constraints:
    """Build what an engine needs for structured outputs, or what refuses them.

    Args:
        options: Settings.
        tokenizer: The model's, if it has one.
        vocab_size: Rows of the model's embedding.
        eos_ids: Tokens that end a sequence.
        metrics: Counts grammars.
    """
    ends = [token for token in eos_ids if token < vocab_size]
    if options.backend == "none":
        return Constraints(
            refusal="structured outputs are switched off by --structured-outputs-backend none."
        )
    if tokenizer is None:
        return Constraints(refusal="structured outputs need a tokenizer; this model has none.")
    if not ends:
        return Constraints(
            refusal="structured outputs need an end-of-sequence token; this model names none."
        )
    compiler = GrammarCompiler(
        lambda: vocabulary_of(tokenizer, vocab_size=vocab_size, eos_ids=ends),
        eos_ids=ends,
        defaults=GrammarDefaults(
            disable_any_whitespace=options.flag("disable_any_whitespace"),
            disable_additional_properties=options.flag("disable_additional_properties"),
        ),
        limit_s=options.grammar_compile_timeout,
        on_compiled=metrics.grammar_compiled,
    )
    return Constraints(compiler, vocab_size=vocab_size)
