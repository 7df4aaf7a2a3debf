"""Compiles grammars on threads of its own, each grammar once, within a limit of time."""

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.core.errors import RequestError
from jaxserve.core.structured import StructuredOutputsParams
from jaxserve.grammar.matcher import Matcher, shown
from jaxserve.grammar.text import GrammarDefaults, grammar_text

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger(__name__)

MAX_KEPT = 256
"""Compiled grammars kept for further requests; the least recently used goes first. Those that a
request waits for or uses are kept besides."""
MAX_ROW_ITEMS = 4_000
"""Ways in which a grammar may go on at one place of a text: four per optional property of an object
that is still to come. So many take tens of milliseconds per mask, for which the batch waits."""
NUM_THREADS = 2
STACK_BYTES = 256 << 20
"""Stack of a thread that compiles; memory is taken only as far as it is used. The grammar engine
descends into rules and references with about 4 kB each, and a stack that is too small would end the
whole process."""
_POLL_S = 0.05
_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the grammar engine must know of a tokenizer.

    Attributes:
        tokens: Bytes of every token in the middle of a text, by id; empty for those without text.
        special_ids: Tokens that are not text.
        eos_ids: Tokens that end a sequence; at least one.
        encode: Turns text into ids.
    """

    tokens: Sequence[bytes]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]


class _Words:
    """A vocabulary in the form that the grammar engine reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = list(vocabulary.tokens)
        special = {i for i in vocabulary.special_ids if i < len(tokens)} | set(vocabulary.eos_ids)
        for token in special:
            tokens[token] = tokens[token] or f"<|token_{token}|>".encode()
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class PendingGrammar:
    """A grammar on its way.

    Attributes:
        future: The compiled grammar's first matcher, or what is wrong with it.
    """

    def __init__(self, limit_s: float, eos_ids: frozenset[int]) -> None:
        """Wait for a thread."""
        self.future: Future[llguidance.LLMatcher] = Future()
        self._limit_s = limit_s
        self._eos_ids = eos_ids
        self.started: float | None = None

    def poll(self) -> Matcher | None:
        """Return a fresh matcher; None while the grammar is still being compiled.

        Raises:
            RequestError: If it does not compile, or not in time.
        """
        if self.future.done():
            return Matcher(self.future.result().deep_copy(), self._eos_ids)
        if self.started is not None and time.monotonic() - self.started > self._limit_s:
            raise RequestError(
                f"the grammar was not compiled within {self._limit_s:g} s; send a simpler one.",
                param=_PARAM,
            )
        return None

    def wait(self) -> None:
        """Block until it is compiled.

        Raises:
            RequestError: If it does not compile, or not in time.
        """
        while self.poll() is None:
            try:
                self.future.exception(timeout=_POLL_S)
            except FutureTimeoutError:
                continue


class GrammarCompiler:
    """Compiles constraints for one vocabulary. Safe to use from several threads.

    Args:
        vocabulary: Makes the vocabulary when the first grammar comes.
        eos_ids: Tokens that end a sequence.
        defaults: What holds where a constraint says nothing.
        limit_s: Seconds that one grammar may take.
        on_compiled: Told the seconds that a grammar took, and whether it is good.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        eos_ids: Sequence[int],
        defaults: GrammarDefaults,
        limit_s: float,
        on_compiled: Callable[[float, bool], None],
    ) -> None:
        """Start no thread yet."""
        self._make_vocabulary = vocabulary
        self._eos_ids = frozenset(eos_ids)
        self._defaults = defaults
        self._limit_s = limit_s
        self._on_compiled = on_compiled
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, PendingGrammar] = OrderedDict()
        self._used: weakref.WeakValueDictionary[str, PendingGrammar] = weakref.WeakValueDictionary()
        self._pool: ThreadPoolExecutor | None = None
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> PendingGrammar:
        """Begin to compile a constraint, unless that has been done before.

        Args:
            params: The constraint.

        Raises:
            RequestError: If it is malformed.
        """
        text = grammar_text(params, self._defaults)
        with self._lock:
            pending = self._used.get(text)
            is_new = pending is None
            if pending is None:
                pending = self._used[text] = PendingGrammar(self._limit_s, self._eos_ids)
            self._kept[text] = pending
            self._kept.move_to_end(text)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            if is_new:
                self._start(text, pending)
        return pending

    def _start(self, text: str, pending: PendingGrammar) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="jaxserve-grammar")
        before = threading.stack_size(STACK_BYTES)  # of threads that are started from here on
        try:
            self._pool.submit(self._compile, text, pending)
        finally:
            threading.stack_size(before)

    def _compile(self, text: str, pending: PendingGrammar) -> None:
        start = pending.started = time.monotonic()
        matcher: llguidance.LLMatcher | None = None
        try:
            from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415  loaded when needed

            limits = LLParserLimits(verbose_errors=False, max_items_in_row=MAX_ROW_ITEMS)
            matcher = LLMatcher(self._words(pending), text, log_level=0, limits=limits)
            start = pending.started
            problem = matcher.get_error() if matcher.is_error() else ""
            if not problem:
                matcher.compute_bitmask()  # what the first mask prepares, every copy inherits
                problem = matcher.get_error() if matcher.is_error() else ""
        except BaseException as error:  # noqa: BLE001  a panic of the engine is none of Exception
            problem = f"{type(error).__name__}: {error}"
        self._on_compiled(time.monotonic() - start, not problem)
        if not problem and matcher is not None:
            pending.future.set_result(matcher)
            return
        pending.future.set_exception(
            RequestError(f"the grammar does not compile: {shown(problem)}", param=_PARAM)
        )

    def _words(self, pending: PendingGrammar) -> "llguidance.LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415

        with self._tokenizer_lock:
            if self._tokenizer is None:
                words = TokenizerWrapper(_Words(self._make_vocabulary()))
                self._tokenizer = LLTokenizer(words, eos_token=sorted(self._eos_ids))
        pending.started = time.monotonic()  # reading the vocabulary is nobody's fault
        return self._tokenizer

    def close(self) -> None:
        """Take nothing more; a grammar being compiled ends by itself."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._kept.clear()
