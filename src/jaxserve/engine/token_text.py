"""What each token says: tables from token ids to text, and decoders that work piece by piece.

A text grows token by token, and a character may take several of them. The decoders here take ids
as they come and return what can no longer change; they keep the first bytes of a character until
its last ones arrive, or the sequence ends. However the ids are cut, the pieces make the same text.
"""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.core.errors import UnsupportedError
from jaxserve.engine.wordpiece_text import WordPieceText

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDecoder(Protocol):
    """Turns one sequence of ids into text, piece by piece."""

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that has become certain."""
        ...

    def finish(self) -> str:
        """End the sequence; return the rest of its text."""
        ...


class TokenText(Protocol):
    """The text of every token of one vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token in the middle of a text; empty for unknown ids."""
        ...

    def decoder(self, *, skip_special_tokens: bool, context: Sequence[int] = ()) -> TextDecoder:
        """Start decoding a sequence that follows the ids in `context`."""
        ...


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return the printable stand-ins that byte-level vocabularies use, each with its byte.

    Source: GPT-2's vocabulary. Printable Latin-1 characters stand for themselves; the other bytes,
    in order, are written with the characters from U+0100 on.

    >>> byte_alphabet()["Ġ"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes that a byte-level token stands for.

    A token with a character outside the alphabet (some added tokens) stands for its own UTF-8.

    >>> byte_level_bytes("Ġhi")
    b' hi'
    """
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode()


def make_token_text(
    tokens: Mapping[int, str], special_ids: frozenset[int], decoder: Mapping[str, Any] | None
) -> TokenText:
    """Choose the decoding that a tokenizer's `decoder` section describes.

    Args:
        tokens: Every token as the vocabulary spells it, by id.
        special_ids: Tokens left out of text when special tokens are skipped.
        decoder: The `decoder` section of a tokenizer.json; None where it has none.

    Returns:
        The text of the vocabulary.

    Raises:
        UnsupportedError: For a decoder that cannot be followed piece by piece.
    """
    steps = _flatten(decoder)
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return ByteLevelText(tokens, special_ids)
    if names == ["WordPiece"]:
        prefix, cleanup = steps[0]["prefix"], steps[0]["cleanup"]
        return WordPieceText(tokens, special_ids, prefix=prefix, cleanup=cleanup)
    return PieceText(tokens, special_ids, _read_rules(steps))


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


class ByteLevelText:
    """Text of a byte-level vocabulary, where every token is a string of bytes.

    Args:
        tokens: Every token as the vocabulary spells it, by id.
        special_ids: Tokens left out of text when special tokens are skipped.
    """

    def __init__(self, tokens: Mapping[int, str], special_ids: frozenset[int]) -> None:
        """Translate the whole vocabulary once, so that decoding is a table look-up."""
        size = 1 + max(tokens, default=-1)
        self._all = [b""] * size
        for token_id, token in tokens.items():
            self._all[token_id] = byte_level_bytes(token)
        self._visible = list(self._all)
        for token_id in special_ids:
            self._visible[token_id] = b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for unknown ids."""
        return self._all[token_id] if 0 <= token_id < len(self._all) else b""

    def decoder(
        self,
        *,
        skip_special_tokens: bool,
        context: Sequence[int] = (),  # noqa: ARG002  a byte means the same everywhere
    ) -> TextDecoder:
        """Start decoding a sequence; what precedes it makes no difference."""
        return _ByteLevelDecoder(self._visible if skip_special_tokens else self._all)


class _ByteLevelDecoder:
    """Looks the bytes up and decodes them as UTF-8, U+FFFD for each maximal invalid part."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decode: Callable[[bytes, bool], str] = codecs.getincrementaldecoder("utf-8")(
            "replace"
        ).decode

    def feed(self, ids: Iterable[int]) -> str:
        table = self._table
        ids = tuple(ids)
        try:
            data = b"".join([table[token_id] for token_id in ids])
        except IndexError:  # a padding row of the embedding, which stands for no text
            size = len(table)
            data = b"".join([table[token_id] for token_id in ids if token_id < size])
        return self._decode(data, False)  # noqa: FBT003  the codec's own signature

    def finish(self) -> str:
        return self._decode(b"", True)  # noqa: FBT003


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRules:
    """How pieces of text are put together, for vocabularies in the manner of SentencePiece.

    Attributes:
        replace: Replacements within each token, in order.
        byte_fallback: Whether `<0xE2>` stands for a byte.
        strip_char: Character that is dropped at the beginning of the text.
        strip_count: Most such characters to drop.
        mark: Character that stands for a space, and for nothing within the first token.
        separator: What goes between two tokens.
    """

    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_char: str = " "
    strip_count: int = 0
    mark: str | None = None
    separator: str = ""


def _read_rules(steps: Sequence[Mapping[str, Any]]) -> PieceRules:
    """Translate the steps of a tokenizer.json decoder.

    Source: the decoders of the `tokenizers` library.
    """
    replace: list[tuple[str, str]] = []
    byte_fallback = fused = False
    for place, step in enumerate(steps):
        kind, last = step["type"], place == len(steps) - 1
        pattern: Mapping[str, str] = step.get("pattern", {})
        if kind == "Replace" and "String" in pattern and not byte_fallback and not fused:
            replace.append((pattern["String"], step["content"]))
        elif kind == "ByteFallback" and not byte_fallback and not fused:
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and last and not step.get("stop"):
            return PieceRules(
                replace=tuple(replace),
                byte_fallback=byte_fallback,
                strip_char=step["content"],
                strip_count=step["start"],
            )
        elif kind == "Metaspace" and len(steps) == 1:
            never = step.get("prepend_scheme", "always") == "never"
            char = step["replacement"]
            return PieceRules(replace=((char, " "),)) if never else PieceRules(mark=char)
        else:
            found = " > ".join(step["type"] for step in steps)
            raise UnsupportedError(
                f"the tokenizer's decoder is {found}, which cannot be streamed. Expected "
                "ByteLevel, WordPiece, Metaspace, or Replace > ByteFallback > Fuse > Strip (parts "
                "may be missing). Use a tokenizer.json with one of these."
            )
    separator = "" if steps else " "
    return PieceRules(replace=tuple(replace), byte_fallback=byte_fallback, separator=separator)


class PieceText:
    """Text of a vocabulary whose tokens are pieces of text, some of them single bytes.

    Args:
        tokens: Every token as the vocabulary spells it, by id.
        special_ids: Tokens left out of text when special tokens are skipped.
        rules: How pieces are put together.
    """

    def __init__(
        self, tokens: Mapping[int, str], special_ids: frozenset[int], rules: PieceRules
    ) -> None:
        """Translate the whole vocabulary once."""
        self.rules = rules
        self._special_ids = special_ids
        self._raw = dict(tokens)
        self._pieces: dict[int, str | int] = {
            token_id: self._piece(token) for token_id, token in tokens.items()
        }
        self._visible = {
            token_id: piece
            for token_id, piece in self._pieces.items()
            if token_id not in special_ids
        }

    def _piece(self, token: str) -> str | int:
        for old, new in self.rules.replace:
            token = token.replace(old, new)
        if self.rules.mark is not None:
            token = token.replace(self.rules.mark, " ")
        if self.rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token

    def first_piece(self, token_id: int) -> str | int:
        """Return a known token's piece at the beginning of a text."""
        mark = self.rules.mark
        return self._pieces[token_id] if mark is None else self._raw[token_id].replace(mark, "")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token in the middle of a text; empty for unknown ids."""
        piece = self._pieces.get(token_id, "")
        return bytes([piece]) if isinstance(piece, int) else piece.encode()

    def decoder(self, *, skip_special_tokens: bool, context: Sequence[int] = ()) -> TextDecoder:
        """Start decoding a sequence that follows the ids in `context`.

        A context that has text of its own means that the sequence does not begin a text, so that
        its first space is kept.
        """
        pieces = self._visible if skip_special_tokens else self._pieces
        return _PieceDecoder(self, pieces, started=any(token_id in pieces for token_id in context))


class _PieceDecoder:
    """Joins pieces; a run of byte tokens is decoded as UTF-8, U+FFFD for each invalid byte.

    Source: the decoder of SentencePiece, with which such vocabularies are made.
    Differs: the `tokenizers` library turns every byte of a run into U+FFFD if one of them is
    invalid, so that a limit on tokens that falls within an emoji destroys those before it, and
    nothing of a run can be shown until it ends.
    """

    __slots__ = ("_pieces", "_run", "_started", "_strip", "_text")

    def __init__(self, text: PieceText, pieces: Mapping[int, str | int], *, started: bool) -> None:
        self._text = text
        self._pieces = pieces
        self._run = bytearray()
        self._started = started
        self._strip = 0 if started else text.rules.strip_count

    def feed(self, ids: Iterable[int]) -> str:
        out: list[str] = []
        for token_id in ids:
            piece = self._pieces.get(token_id)
            if piece is None:
                continue
            if not self._started:
                piece = self._text.first_piece(token_id)
                self._started = True
            elif self._text.rules.separator:
                out.append(self._text.rules.separator)
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if self._run:
                out.append(self._take_run(final=True))
            out.append(piece)
        if self._run:
            out.append(self._take_run(final=False))
        return self._strip_start("".join(out)) if out else ""

    def finish(self) -> str:
        return self._strip_start(self._take_run(final=True))

    def _take_run(self, *, final: bool) -> str:
        """Decode the bytes at hand; keep the beginning of a character unless the run is over."""
        run, out = self._run, ""
        while run:
            try:
                out += run.decode()
                run.clear()
            except UnicodeDecodeError as error:
                out += run[: error.start].decode()
                del run[: error.start]
                if not final and error.reason == "unexpected end of data":
                    break
                out += _REPLACEMENT
                del run[:1]
        return out

    def _strip_start(self, text: str) -> str:
        char = self._text.rules.strip_char
        while self._strip and text:
            if text[0] != char:
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text
