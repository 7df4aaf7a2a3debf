"""Streamed text equals whole text, and stop strings end it where they should."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.engine.detokenizer import StopMatcher
from jaxserve.engine.token_text import ByteLevelText, byte_alphabet, make_token_text
from jaxserve.engine.tokenizer import Detokenizer, Tokenizer

GOLDEN = Path(__file__).parent.parent / "oracles" / "golden"
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Return a tokenizer with one token per byte, some longer ones, and a special one."""
    tokens = [*byte_alphabet(), "Ġthe", "Ã©", "ðŁĺ", "<|end|>"]
    types = [1] * (len(tokens) - 1) + [3]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [],
        }
    )


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Return the small vocabulary that sentencepiece trained."""
    golden = json.loads((GOLDEN / "tokenizer_sentencepiece.json").read_text(encoding="utf-8"))
    return Tokenizer.from_gguf(golden["metadata"])


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> Tokenizer:
    """Return the tokenizer of the default model."""
    return Tokenizer.from_path(default_model)


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Push ids in parts, cut at given places, and finish."""
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, detokenizer.finish()]


CUTS = st.lists(st.integers(0, 1000), max_size=30)


@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_streamed_bytes_equal_the_librarys_own_decoding(
    byte_level: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
):
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 2), max_size=40))
    whole = byte_level._backend.decode(ids, skip_special_tokens=skip)
    assert byte_level.decode(ids, skip_special_tokens=skip) == whole
    detokenizer = Detokenizer(byte_level, skip_special_tokens=skip)
    assert "".join(stream(detokenizer, ids, cuts)) == whole


@pytest.mark.weights
@settings(max_examples=300)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_streamed_text_equals_the_librarys_own_decoding_in_the_real_vocabulary(
    smollm2: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
):
    token = st.integers(0, smollm2.vocab_size - 1) | st.integers(0, 400)
    ids = data.draw(st.lists(token, max_size=60))
    whole = smollm2._backend.decode(ids, skip_special_tokens=skip)
    detokenizer = Detokenizer(smollm2, skip_special_tokens=skip)
    assert "".join(stream(detokenizer, ids, cuts)) == whole


@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_streamed_pieces_equal_whole_text_whatever_the_cuts(
    sentencepiece: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
):
    token = st.integers(0, sentencepiece.vocab_size) | st.integers(5, 262)
    ids = data.draw(st.lists(token, max_size=40))
    whole = sentencepiece.decode(ids, skip_special_tokens=skip)
    detokenizer = Detokenizer(sentencepiece, skip_special_tokens=skip)
    assert "".join(stream(detokenizer, ids, cuts)) == whole


@given(data=st.data(), text=st.text(max_size=30))
def test_valid_text_is_never_cut_within_a_character(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, text: str
):
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    text = text.replace(REPLACEMENT, "").replace("\u2581", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(Detokenizer(tokenizer, skip_special_tokens=False), ids, list(range(len(ids))))
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == text


def test_a_character_is_shown_with_its_last_byte(byte_level: Tokenizer):
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("a🙂b")
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "", "🙂", "b"]
    assert detokenizer.finish() == ""


def test_a_broken_character_at_the_end_becomes_a_replacement_character(byte_level: Tokenizer):
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(byte_level.encode("é!")[:1]) == ""
    assert detokenizer.finish() == REPLACEMENT
    assert detokenizer.finish() == ""


def test_byte_tokens_before_a_broken_one_are_kept(sentencepiece: Tokenizer):
    ids = sentencepiece.encode("ⰀⰁ", add_special_tokens=False)
    tokens = [sentencepiece.token_bytes(i) for i in ids]
    assert tokens == [b" ", *(bytes([byte]) for byte in "ⰀⰁ".encode())]
    detokenizer = Detokenizer(sentencepiece)
    shown = [detokenizer.push([i]) for i in ids[:-1]]
    assert shown == ["", "", "", "Ⰰ", "", ""]
    assert detokenizer.finish() == REPLACEMENT * 2


def test_unknown_ids_have_no_text(byte_level: Tokenizer, sentencepiece: Tokenizer):
    for tokenizer in (byte_level, sentencepiece):
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push([10**6, tokenizer.vocab_size]) == ""
        assert tokenizer.decode([10**6]) == ""
        assert tokenizer.token_bytes(10**6) == b""
        assert tokenizer.token_bytes(-1) == b""
        assert detokenizer.num_tokens == 2


def test_the_first_space_of_a_text_goes_and_that_of_a_continuation_stays(
    sentencepiece: Tokenizer,
):
    ids = sentencepiece.encode("the", add_special_tokens=False)
    assert sentencepiece.decode(ids) == "the"
    bos = [sentencepiece.bos_token_id]
    for prompt, expected in (([], "the"), (bos, "the"), ([*bos, *ids], " the")):
        detokenizer = Detokenizer(sentencepiece, prompt_ids=prompt)
        assert detokenizer.push(ids) == expected
    shown = Detokenizer(sentencepiece, prompt_ids=bos, skip_special_tokens=False)
    assert shown.push(ids) == " the"


# Stop strings


def reference(text: str, stops: list[str]) -> tuple[int, str | None]:
    """Return where the first complete stop string ends, and which one it is."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return len(text), None


def longest_beginning(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=500)
@given(parts=st.lists(st.text("abc", max_size=4), max_size=10), stops=STOPS, include=st.booleans())
def test_stop_strings_match_as_if_text_came_by_characters(
    parts: list[str], stops: list[str], include: bool
):
    text = "".join(parts)
    end, match = reference(text, stops)
    matcher = StopMatcher(stops, include_stop=include)
    shown, seen = "", ""
    for part in parts:
        shown += matcher.push(part)
        seen += part
        if matcher.matched is None:  # nothing but what may begin a stop string is held back
            assert shown == seen[: len(seen) - longest_beginning(seen, stops)]
    assert matcher.matched == match
    shown += matcher.flush()
    cut = end if match is None or include else end - len(match)
    assert shown == text[:cut]


def test_a_stop_string_across_tokens_never_leaks(byte_level: Tokenizer):
    detokenizer = Detokenizer(byte_level, stop=["</s>"])
    ids = byte_level.encode("a<<//s></s>tail")
    shown = [detokenizer.push([i]) for i in ids]
    assert shown == ["a", "", "<", "", "<//", "s", ">", *[""] * 8]
    assert "".join(shown) == "a<<//s>"
    assert detokenizer.matched_stop == "</s>"
    assert detokenizer.num_tokens == len("a<<//s></s>")
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one\n\n")])
def test_text_ends_before_or_after_the_stop_string(byte_level: Tokenizer, include: bool, text: str):
    detokenizer = Detokenizer(byte_level, stop=["\n\n", "zz"], include_stop=include)
    assert detokenizer.push(byte_level.encode("one\n\ntwo zz")) + detokenizer.finish() == text
    assert detokenizer.matched_stop == "\n\n"
    assert detokenizer.num_tokens == 5
    assert detokenizer.push(byte_level.encode("more")) == ""


def test_what_might_have_been_a_stop_string_is_shown_at_the_end(byte_level: Tokenizer):
    detokenizer = Detokenizer(byte_level, stop=["END"])
    assert detokenizer.push(byte_level.encode("the EN")) == "the "
    assert detokenizer.finish() == "EN"
    assert detokenizer.matched_stop is None


def test_a_stop_string_may_end_with_the_last_broken_character(byte_level: Tokenizer):
    detokenizer = Detokenizer(byte_level, stop=[REPLACEMENT])
    assert detokenizer.push(byte_level.encode("aé")[:-1]) == "a"
    assert detokenizer.finish() == ""
    assert detokenizer.matched_stop == REPLACEMENT


def test_stop_strings_within_min_tokens_pass(byte_level: Tokenizer):
    ids = byte_level.encode("aXbXc")
    for min_tokens, text, count in ((0, "a", 2), (1, "a", 2), (2, "aXb", 4), (4, "aXbXc", 5)):
        detokenizer = Detokenizer(byte_level, stop=["X"], min_tokens=min_tokens)
        assert detokenizer.push(ids) + detokenizer.finish() == text
        assert detokenizer.num_tokens == count


def test_the_longest_of_the_stop_strings_that_end_together_counts():
    matcher = StopMatcher(["b", "ab", "c"])
    assert matcher.push("xxabc") == "xx"
    assert matcher.matched == "ab"


# Other decoders


def vocabulary(decoder: tokenizers.decoders.Decoder | None, tokens: list[str]) -> Tokenizer:
    """Return a tokenizer of whole words with a decoder."""
    words = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=tokens[0]))
    backend.decoder = decoder
    return Tokenizer(backend)


D = tokenizers.decoders
DECODERS = {
    "none": None,
    "metaspace": D.Metaspace(),
    "metaspace never": D.Metaspace(prepend_scheme="never"),
    "byte level in a sequence": D.Sequence([D.ByteLevel()]),
    "replace": D.Replace("▁", " "),
    "fuse": D.Sequence([D.Replace("▁", " "), D.Fuse()]),
    "strip two": D.Sequence([D.Replace("▁", " "), D.Fuse(), D.Strip(" ", 2, 0)]),
    "byte fallback": D.Sequence([D.Replace("▁", "_"), D.ByteFallback(), D.Fuse()]),
}
TOKENS = ["▁", "▁▁", "a", "▁b▁", "c▁", "<0x41>", "<0xC3>", "é", "Ġ", "<|x|>"]


@pytest.mark.parametrize("name", DECODERS)
@given(ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=8), cuts=CUTS)
def test_every_streamable_decoder_agrees_with_the_library(
    name: str, ids: list[int], cuts: list[int]
):
    tokenizer = vocabulary(DECODERS[name], TOKENS)
    pieces = stream(Detokenizer(tokenizer), ids, cuts)
    assert "".join(pieces) == tokenizer.decode(ids)
    if 6 not in ids or name != "byte fallback":  # invalid runs differ on purpose
        assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        D.CTC(),
        D.Sequence([D.Fuse(), D.Strip(" ", 0, 1)]),
        D.Sequence([D.Strip(" ", 1, 0)]),
        D.Replace(tokenizers.Regex("a+"), "b"),
        D.Sequence([D.ByteFallback(), D.ByteFallback()]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: tokenizers.decoders.Decoder):
    with pytest.raises(UnsupportedError, match=r"cannot be streamed\. Expected ByteLevel"):
        vocabulary(decoder, TOKENS)


def test_the_text_of_an_empty_vocabulary_is_empty():
    assert isinstance(make_token_text({}, frozenset(), {"type": "ByteLevel"}), ByteLevelText)
    assert make_token_text({}, frozenset(), None).token_bytes(0) == b""


def test_the_byte_alphabet_has_every_byte_once():
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert all(char.isprintable() and not char.isspace() for char in byte_alphabet())
