"""Synthetic tasks over long contexts, in the manner of RULER: their answers are known.

Filler is made of sentences from a small grammar; what is asked about is put between them at random
places. A prompt ends in the beginning of the answer, for models that do not follow
instructions well.

Source: RULER, arXiv 2404.06654 (kinds of tasks, and the score: the share of expected answers that
the output contains).
Differs: words, sentences and sizes are ours; contexts are shorter.
"""

import dataclasses
import itertools
import string
from collections.abc import Callable, Sequence

import numpy as np

_NAMES = (
    "Amelia", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hassan", "Ingrid", "Jonas",
    "Keiko", "Lucas", "Miriam", "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Stefan", "Tamara",
    "Ulrich", "Vera", "Walter", "Yusuf",
)  # fmt: skip
_ADJECTIVES = (
    "old", "quiet", "green", "heavy", "narrow", "bright", "broken", "wooden", "distant", "gentle",
    "hungry", "cold", "famous", "lonely", "clever", "rusty",
)  # fmt: skip
_NOUNS = (
    "river", "bridge", "farmer", "teacher", "window", "garden", "engine", "market", "sailor",
    "mountain", "library", "cat", "violin", "kitchen", "letter", "train", "forest", "harbor",
    "painter", "clock", "village", "horse", "tower", "meadow", "doctor", "candle", "island", "road",
    "baker", "stone",
)  # fmt: skip
_VERBS = (
    "watches", "follows", "remembers", "crosses", "repairs", "visits", "describes", "ignores",
    "admires", "finds", "leaves", "protects",
)  # fmt: skip
_PLACES = (
    "in the morning", "behind the hill", "after the storm", "near the coast", "every winter",
    "without a word", "before dawn", "across the valley", "for many years", "during the feast",
)  # fmt: skip
_COMMON = (
    "apple", "anchor", "basket", "blanket", "bottle", "bucket", "button", "camera", "carpet",
    "castle", "chair", "cherry", "circle", "coffee", "copper", "cotton", "desert", "dinner",
    "dragon", "eagle", "feather", "finger", "flower", "guitar", "hammer", "honey", "jacket",
    "jungle", "ladder", "lemon", "magnet", "marble", "mirror", "monkey", "needle", "orange",
    "oyster", "pencil", "pepper", "pillow", "planet", "pocket", "potato", "rabbit", "ribbon",
    "rocket", "saddle", "salmon", "shadow", "silver", "spider", "sugar", "table", "temple",
    "thunder", "ticket", "tiger", "tomato", "tunnel", "turtle", "valley", "velvet", "walnut",
    "whale", "wheel", "whistle", "winter", "zebra",
)  # fmt: skip
_LARGEST = 4096
"""Units of filler that a prompt may have at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One task.

    Attributes:
        task: Its kind.
        context: The text to search.
        question: What is asked, with the beginning of the answer.
        answers: What the output must contain.
        needle: The part of the context that holds the answer, if it is one place.
        max_tokens: Tokens that an answer may take.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    needle: str = ""
    max_tokens: int = 24

    @property
    def prompt(self) -> str:
        """All that the model is given."""
        return self.context + self.question

    def score(self, output: str) -> float:
        """Return the share of answers that an output contains."""
        found = output.lower()
        return sum(answer.lower() in found for answer in self.answers) / len(self.answers)


Count = Callable[[str], int]
"""Counts the tokens of a text."""
Maker = Callable[[np.random.Generator, int, Count], Sample]
"""Makes a task whose prompt has at most so many tokens."""


def _pick(rng: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    return [words[i] for i in rng.choice(len(words), count, replace=False)]


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Make filler."""
    columns = [
        [words[i] for i in rng.integers(len(words), size=count)]
        for words in (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS, _PLACES)
    ]
    return [
        f"The {old} {cat} {sees} the {new} {dog} {there}."
        for old, cat, sees, new, dog, there in zip(*columns, strict=True)
    ]


def _scatter(
    rng: np.random.Generator, filler: Sequence[str], facts: Sequence[str], *, in_order: bool = False
) -> str:
    """Put facts between sentences, each at a random depth."""
    depths = rng.random(len(facts))
    if in_order:
        depths = np.sort(depths)
    parts: list[tuple[float, str]] = [(i / len(filler), text) for i, text in enumerate(filler)]
    parts += zip(depths.tolist(), facts, strict=True)
    return " ".join(text for _, text in sorted(parts, key=lambda part: part[0]))


def _fit(make: Callable[[int], Sample], tokens: int, count: Count) -> Sample:
    """Return the largest task that is short enough, by bisection over units of filler."""
    few, many = 1, min(_LARGEST, max(2, tokens))
    if count(make(few).prompt) > tokens:
        raise ValueError(f"the task {make(few).task!r} takes more than {tokens} tokens.")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if count(make(middle).prompt) <= tokens else (few, middle)
    return make(few)


def _needles(
    rng: np.random.Generator, tokens: int, count: Count, task: str, keys: int, values: int
) -> Sample:
    """Hide locker codes; ask for those of one person."""
    names = _pick(rng, _NAMES, keys)
    codes = {name: [_number(rng) for _ in range(values)] for name in names}
    facts = [f"The locker code of {name} is {code}." for name in names for code in codes[name]]
    filler = _sentences(rng, _LARGEST)
    seed = int(rng.integers(1 << 30))
    asked = names[0]
    plural = values > 1
    question = (
        f"\n\nQuestion: What {'are all the locker codes' if plural else 'is the locker code'} of "
        f"{asked}?\nAnswer: The locker {'codes' if plural else 'code'} of {asked} "
        f"{'are' if plural else 'is'}"
    )

    def make(units: int) -> Sample:
        text = _scatter(np.random.default_rng(seed), filler[:units], facts)
        return Sample(
            task=task,
            context=f"Locker codes are hidden in this text. Remember them.\n\n{text}",
            question=question,
            answers=tuple(codes[asked]),
            needle="" if plural else facts[0],
            max_tokens=16 * values,
        )

    return _fit(make, tokens, count)


def single_needle(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """One code among filler."""
    return _needles(rng, tokens, count, "single needle", 1, 1)


def multi_key(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """Eight codes of eight people, of which one is wanted."""
    return _needles(rng, tokens, count, "multi-key needle", 8, 1)


def multi_value(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """Three codes of one person, all of them wanted, beside those of another one."""
    return _needles(rng, tokens, count, "multi-value needle", 2, 3)


def variable_tracking(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """Two chains of assignments; which variables have the value of the first?"""
    letters = rng.integers(len(string.ascii_uppercase), size=(6, 4))
    names = ["".join(string.ascii_uppercase[i] for i in row) for row in letters]
    values = [_number(rng), _number(rng)]
    facts: list[str] = []
    for chain, value in zip((names[:3], names[3:]), values, strict=True):
        facts.append(f"VAR {chain[0]} = {value}.")
        facts += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
    filler = _sentences(rng, _LARGEST)
    seed = int(rng.integers(1 << 30))
    example = "VAR QQQA = 11111. VAR QQQB = VAR QQQA. VAR QQQC = VAR QQQB."
    asked = "Question: Which variables have the value {}?\nAnswer: The variables are"

    def make(units: int) -> Sample:
        text = _scatter(np.random.default_rng(seed), filler[:units], facts, in_order=True)
        return Sample(
            task="variable tracking",
            context=(
                f"Follow the assignments.\n\n{example}\n{asked.format(11111)} QQQA, QQQB, QQQC.\n\n"
                f"{text}"
            ),
            question=f"\n{asked.format(values[0])}",
            answers=tuple(names[:3]),
            max_tokens=32,
        )

    return _fit(make, tokens, count)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def common_words(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """A list in which three words come far more often than the others."""
    words = _pick(rng, _COMMON, len(_COMMON))
    often, rare, example = words[:3], words[3:-6], words[-6:]
    seed = int(rng.integers(1 << 30))
    asked = "Question: Which three words are the most common in the list?\nAnswer: They are"
    shown = np.random.default_rng(seed).permutation([*(example[:3] * 4), *example[3:]]).tolist()

    def make(units: int) -> Sample:
        order = np.random.default_rng(seed)
        listed = list(often) * units + [rare[i % len(rare)] for i in range(units * 3)]
        text = _numbered(order.permutation(listed).tolist())
        return Sample(
            task="common words",
            context=(
                f"List: {_numbered(shown)}\n{asked} {', '.join(example[:3])}.\n\nList: {text}"
            ),
            question=f"\n{asked}",
            answers=tuple(often),
        )

    return _fit(make, tokens, count)


def frequent_words(rng: np.random.Generator, tokens: int, count: Count) -> Sample:
    """A coded text of made-up words whose numbers fall like 1 / rank squared."""
    syllables = ("bo", "du", "fi", "ko", "la", "me", "nu", "po", "ri", "sa", "te", "vo", "wi", "zu")
    made = {
        "".join(syllables[i] for i in row) for row in rng.integers(len(syllables), size=(200, 3))
    }
    words = rng.permutation(sorted(made)).tolist()
    share = 1 / np.arange(1, len(words) + 1) ** 2
    draws = rng.choice(len(words), size=_LARGEST, p=share / share.sum())

    def make(units: int) -> Sample:
        drawn = draws[:units]
        top = np.argsort(-np.bincount(drawn, minlength=len(words)), kind="stable")[:3]
        return Sample(
            task="frequent words",
            context=f"Coded text: {' '.join(words[i] for i in drawn)}",
            question=(
                "\n\nQuestion: Which three words are the most frequent in the coded text?\n"
                "Answer: They are"
            ),
            answers=tuple(words[i] for i in top),
            max_tokens=32,
        )

    return _fit(make, tokens, count)


TASKS: dict[str, Maker] = {
    "single needle": single_needle,
    "multi-key needle": multi_key,
    "multi-value needle": multi_value,
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
}


def make_samples(names: Sequence[str], tokens: int, number: int, count: Count) -> list[Sample]:
    """Make so many samples of each kind; the same ones each time.

    Args:
        names: Kinds.
        tokens: Most tokens of a prompt.
        number: Samples of each kind.
        count: Counts the tokens of a text.
    """
    return [
        TASKS[name](np.random.default_rng([i, list(TASKS).index(name)]), tokens, count)
        for i in range(number)
        for name in names
    ]
