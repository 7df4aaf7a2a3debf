"""What each token of a WordPiece vocabulary says."""

from collections.abc import Iterable, Mapping, Sequence

_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What is tidied up in each token, the space before it included.

Source: the WordPiece decoder of the `tokenizers` library.
"""


class WordPieceText:
    """Text of a vocabulary of words, and of pieces that continue the word before.

    Args:
        tokens: Every token as the vocabulary spells it, by id.
        special_ids: Tokens left out of text when special tokens are skipped.
        prefix: What marks a piece that continues a word.
        cleanup: Whether spaces before punctuation are taken out.
    """

    def __init__(
        self,
        tokens: Mapping[int, str],
        special_ids: frozenset[int],
        *,
        prefix: str,
        cleanup: bool,
    ) -> None:
        """Translate the whole vocabulary once."""
        tidy = _CLEANUP if cleanup else ()
        self.first = {i: _replaced(token, tidy) for i, token in tokens.items()}
        self.later = {
            i: _replaced(
                token.removeprefix(prefix) if token.startswith(prefix) else f" {token}", tidy
            )
            for i, token in tokens.items()
        }
        self.special_ids = special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token in the middle of a text; empty for unknown ids."""
        return self.later.get(token_id, "").encode()

    def decoder(
        self, *, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> "WordPieceDecoder":
        """Start decoding a sequence that follows the ids in `context`."""
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        started = any(i in self.later and i not in hidden for i in context)
        return WordPieceDecoder(self, hidden, started=started)


class WordPieceDecoder:
    """Turns one sequence of ids into text, piece by piece.

    Args:
        text: The vocabulary.
        hidden: Ids without text.
        started: Whether the text has begun already.
    """

    def __init__(self, text: WordPieceText, hidden: frozenset[int], *, started: bool) -> None:
        """Start."""
        self._text = text
        self._hidden = hidden
        self._started = started

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids; return their text."""
        out: list[str] = []
        for token_id in ids:
            if token_id in self._hidden or token_id not in self._text.later:
                continue
            table = self._text.later if self._started else self._text.first
            out.append(table[token_id])
            self._started = True
        return "".join(out)

    def finish(self) -> str:
        """End the sequence; nothing is ever held back."""
        return ""


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
