"""WordPiece vocabularies: text of tokens, and texts cut to a length."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import RequestError
from jaxserve.engine.detokenizer import Detokenizer
from jaxserve.engine.tokenizer import Tokenizer
from tests.bert import BERT

FILE = BERT / "cross" / "tokenizer.json"
OURS, THEIRS = Tokenizer.from_path(FILE), tokenizers.Tokenizer.from_file(str(FILE))
IDS = st.lists(st.integers(0, OURS.vocab_size - 1), max_size=30)


@given(ids=IDS, skip=st.booleans())
def test_text_is_that_of_the_library(ids: list[int], skip: bool) -> None:
    expected = THEIRS.decode(ids, skip_special_tokens=skip)
    assert OURS.decode(ids, skip_special_tokens=skip) == expected


@given(ids=IDS, cut=st.integers(0, 30))
def test_pieces_make_the_whole(ids: list[int], cut: int) -> None:
    detokenizer = Detokenizer(OURS)
    text = detokenizer.push(tuple(ids[:cut])) + detokenizer.push(tuple(ids[cut:]))
    assert text + detokenizer.finish() == OURS.decode(ids)


def test_a_piece_after_a_prompt_continues_it() -> None:
    ids = OURS.encode("ab c", add_special_tokens=False)
    detokenizer = Detokenizer(OURS, prompt_ids=ids[:1])
    assert detokenizer.push(tuple(ids[1:])) == "b c"


@given(
    texts=st.lists(st.text("abc de,", max_size=30), min_size=1, max_size=4),
    limit=st.integers(3, 20),
    left=st.booleans(),
)
def test_texts_are_cut_and_keep_their_frame(texts: list[str], limit: int, left: bool) -> None:
    whole = OURS.encode_texts(texts)
    for (full, _), (ids, segments) in zip(
        whole, OURS.encode_texts(texts, max_tokens=limit, from_left=left), strict=True
    ):
        assert len(ids) == min(len(full), limit)
        assert (ids[0], ids[-1]) == (2, 3)
        inner = full[1:-1]
        keep = len(ids) - 2
        assert ids[1:-1] == (inner[len(inner) - keep :] if left else inner[:keep])
        assert not any(segments)


def test_of_a_pair_the_longer_text_is_cut() -> None:
    ((ids, segments),) = OURS.encode_texts(["abcdef"], ["gh"], max_tokens=8)
    assert OURS.decode(ids) == "abc gh"
    assert segments == [0] * 5 + [1] * 3
    ((ids, _),) = OURS.encode_texts(["abcdef"], ["ghijkl"], max_tokens=9)
    assert OURS.decode(ids) == "abc ghi"
    ((ids, _),) = OURS.encode_texts(["ab"], ["cd"], max_tokens=4, add_special_tokens=False)
    assert len(ids) == 4
    with pytest.raises(RequestError, match="leaves nothing of it beside 3 special tokens"):
        OURS.encode_texts(["ab"], ["cd"], max_tokens=4)


def test_tokens_have_bytes() -> None:
    a, continued = THEIRS.token_to_id("a"), THEIRS.token_to_id("##a")
    assert (OURS.token_bytes(a), OURS.token_bytes(continued)) == (b" a", b"a")
    assert OURS.token_bytes(10**6) == b""
