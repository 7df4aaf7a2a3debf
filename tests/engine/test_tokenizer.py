"""Text to ids and back, from every kind of source, as outside tokenizers do it."""

import functools
import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
from jaxserve.engine.gguf_tokenizer import _WORD_RULES, describe_gguf_tokenizer
from jaxserve.engine.token_text import byte_alphabet
from jaxserve.engine.tokenizer import Detokenizer, Tokenizer

ORACLES = Path(__file__).parent.parent / "oracles"


def golden(name: str) -> dict:
    """Read a golden file."""
    return json.loads((ORACLES / "golden" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> Tokenizer:
    """Return the tokenizer of the default model."""
    return Tokenizer.from_path(default_model)


# The default model


@pytest.mark.weights
def test_the_default_model_has_the_ids_of_outside_tokenizers(smollm2: Tokenizer):
    for text, ids in golden("tokenizer_smollm2.json")["texts"]:
        assert smollm2.encode(text) == ids, text


@pytest.mark.weights
def test_the_default_model_has_the_texts_of_outside_tokenizers(smollm2: Tokenizer):
    for ids, text, plain in golden("tokenizer_smollm2.json")["sequences"]:
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert smollm2.decode(ids) == plain


@pytest.mark.weights
def test_the_default_model_has_the_chats_of_outside_tokenizers(smollm2: Tokenizer):
    for messages, text, ids in golden("tokenizer_smollm2.json")["chats"]:
        assert smollm2.render_chat(messages) == text
        assert smollm2.encode_chat(messages) == ids


@pytest.mark.weights
def test_the_default_model_describes_itself(smollm2: Tokenizer):
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == (2,)
    assert (smollm2.bos_token_id, smollm2.add_bos) == (1, False)
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.has_chat_template
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.token_text(504) == "The"
    assert [smollm2.token_text(i) for i in smollm2.encode("The capital of")][1:] == [
        " capital",
        " of",
    ]


@pytest.mark.weights
def test_the_golden_prompts_of_the_default_model(smollm2: Tokenizer, shared_data: Path):
    path = shared_data / "requests" / "golden_smollm2.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        if case["kind"] == "raw":
            prompt = smollm2.encode(case["prompt"])
        else:
            assert smollm2.render_chat(case["prompt"]) == case["rendered"]
            prompt = smollm2.encode_chat(case["prompt"])
        assert prompt == case["prompt_ids"]
        ids, end = case["greedy_ids"], case["eos_position"]
        assert smollm2.decode(ids, skip_special_tokens=False) == case["greedy_text"]
        assert smollm2.decode(ids[:end]) == case["greedy_text_skip_special"]
        detokenizer = Detokenizer(smollm2, prompt_ids=prompt)
        pieces = [detokenizer.push([token_id]) for token_id in ids[:end]]
        assert "".join(pieces) + detokenizer.finish() == case["greedy_text_skip_special"]


@pytest.mark.weights
@given(text=st.text(max_size=60))
def test_text_survives_as_far_as_the_vocabulary_has_its_bytes(smollm2: Tokenizer, text: str):
    ids = smollm2.encode(text)
    known = {smollm2.token_bytes(token_id) for token_id in range(300)}
    lost = [byte for byte in text.encode() if bytes([byte]) not in known]
    if not lost:
        assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(smollm2.token_bytes, ids)) == bytes(
        byte for byte in text.encode() if byte not in lost
    )


@pytest.mark.live_oracle
@pytest.mark.weights
def test_fresh_random_texts_have_the_ids_of_transformers(
    smollm2: Tokenizer, default_model: Path, oracle_python: Path, tmp_path: Path
):
    rng = random.Random()
    blocks = [(0x01, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x5FF), (0x2000, 0x33FF),
              (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]  # fmt: skip
    pieces = ["<|im_end|>", "<|im_start|>", "  ", "\n\n", " the", "'ll", "12 345", "🙂"]
    texts = [
        "".join(
            rng.choice(pieces) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(blocks)))
            for _ in range(rng.randint(0, 60))
        )
        for _ in range(2000)
    ]
    texts_file, out = tmp_path / "texts.json", tmp_path / "ids.json"
    texts_file.write_text(json.dumps(texts), encoding="utf-8")
    script = ORACLES / "make_tokenizer.py"
    subprocess.run(
        [oracle_python, script, "--model", default_model, "--compare", texts_file, out], check=True
    )
    wrong = [
        text
        for text, ids in zip(texts, json.loads(out.read_text()), strict=True)
        if smollm2.encode(text) != ids
    ]
    assert not wrong


# SentencePiece vocabularies in GGUF files


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Return the small vocabulary that sentencepiece trained."""
    return Tokenizer.from_gguf(golden("tokenizer_sentencepiece.json")["metadata"])


def test_a_scored_vocabulary_has_the_ids_and_texts_of_sentencepiece(sentencepiece: Tokenizer):
    cases = golden("tokenizer_sentencepiece.json")
    for text, ids in cases["texts"]:
        assert sentencepiece.encode(text, add_special_tokens=False) == ids, text
        assert sentencepiece.decode(ids) == text
    for ids, text in cases["sequences"]:
        assert sentencepiece.decode(ids) == text


def test_special_tokens_in_text_give_the_ids_of_llama_cpp(sentencepiece: Tokenizer):
    for text, ids in golden("tokenizer_sentencepiece.json")["mixed"]:
        assert sentencepiece.encode(text, add_special_tokens=False) == ids, text


def test_a_scored_vocabulary_adds_bos_unless_the_file_says_otherwise(sentencepiece: Tokenizer):
    assert (sentencepiece.bos_token_id, sentencepiece.add_bos) == (1, True)
    assert sentencepiece.encode("")[:1] == [1]
    assert sentencepiece.encode("x", add_special_tokens=False)[0] != 1
    metadata = golden("tokenizer_sentencepiece.json")["metadata"]
    without = {
        **metadata,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf(without)
    assert not tokenizer.add_bos
    ids = tokenizer.encode("the")
    assert ids == [*tokenizer.encode("the", add_special_tokens=False), 2]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_numbers_of_a_file_may_be_arrays(sentencepiece: Tokenizer):
    metadata = dict(golden("tokenizer_sentencepiece.json")["metadata"])
    for key, dtype in (("scores", np.float32), ("token_type", np.int32)):
        name = f"tokenizer.ggml.{key}"
        metadata[name] = np.array(metadata[name], dtype)
    text = "The argument of the function, naïve 🙂"
    assert Tokenizer.from_gguf(metadata).encode(text) == sentencepiece.encode(text)


# Byte-level vocabularies in GGUF files


def byte_level_metadata(pre: str | None, merges: str = "", **extra: object) -> dict[str, object]:
    """Return a byte-level vocabulary: bytes, the results of some merges, and special tokens."""
    pairs = [tuple(pair.split("+")) for pair in merges.split()]
    tokens = [*byte_alphabet(), *dict.fromkeys("".join(pair) for pair in pairs)]
    types = [1] * len(tokens)
    names = ["<s>", "<|im_end|>", "<|end|>", "<tool>", "[PAD1]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens + names,
        "tokenizer.ggml.token_type": [*types, 3, 3, 3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def words(pre: str | None, text: str) -> list[str]:
    """Return the words into which a rule splits a text."""
    backend = Tokenizer.from_gguf(byte_level_metadata(pre))._backend
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    alphabet = byte_alphabet()
    return [bytes(alphabet[char] for char in piece).decode() for piece, _ in pieces]


SENTENCE = "I'LL pay  $1234.5 naïveté\n\n x/\ny  "


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "I|'|LL| pay| | $|1234|.|5| naïveté|\n\n| x|/|\n|y|  "),
        ("smollm", "I|'|LL| pay| | $|1|2|3|4|.|5| naïveté|\n\n| x|/|\n|y|  "),
        ("llama-bpe", "I|'LL| pay| | $|123|4|.|5| naïveté|\n\n| x|/\n|y|  "),
        ("qwen2", "I|'LL| pay| | $|1|2|3|4|.|5| naïveté|\n\n| x|/\n|y|  "),
        ("gpt-4o", "I'LL| pay| | $|123|4|.|5| naïveté|\n\n| x|/\n|y|  "),
        ("tekken", "I|'LL| pay| | $|1|2|3|4|.|5| naïveté|\n\n| x|/\n|y|  "),
    ],
)
def test_each_rule_splits_words_its_own_way(pre: str, expected: str):
    assert words(pre, SENTENCE) == expected.split("|")


def test_files_without_a_rule_get_the_default_one():
    assert words(None, SENTENCE) == words("default", SENTENCE) == words("gpt-2", SENTENCE)


@pytest.mark.parametrize("pre", _WORD_RULES)
@given(text=st.text(max_size=30))
def test_every_rule_keeps_every_byte(pre: str, text: str):
    tokenizer = made(pre)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not _WORD_RULES[pre].compose:
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


@functools.cache
def made(pre: str) -> Tokenizer:
    """Return a byte-level tokenizer, built once."""
    return Tokenizer.from_gguf(byte_level_metadata(pre))


def test_qwen_composes_characters():
    tokenizer = made("qwen2")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


def test_llama_takes_a_word_that_is_a_token_as_it_is():
    metadata = byte_level_metadata("llama-bpe", "a+b c+d ab+cd")
    metadata["tokenizer.ggml.merges"] = ["a b", "c d"]
    plain = {**metadata, "tokenizer.ggml.pre": "gpt-2"}
    texts = {
        name: [tokenizer.token_text(i) for i in tokenizer.encode("abcd", add_special_tokens=False)]
        for name, tokenizer in (
            ("llama", Tokenizer.from_gguf(metadata)),
            ("plain", Tokenizer.from_gguf(plain)),
        )
    }
    assert texts == {"llama": ["abcd"], "plain": ["ab", "cd"]}


def test_merges_apply_in_their_order():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("gpt-2", "b+c a+b"))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abc")] == ["a", "bc"]


def test_kinds_of_tokens():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("gpt-2"))
    ids = tokenizer.encode("<s>a<tool>[PAD1]<|im_end|>")
    assert [tokenizer.token_text(i) for i in ids] == [
        "<s>", "a", "<tool>", *"[PAD1]", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "a<tool>[PAD1]"
    assert tokenizer.special_ids == {256, 257, 258}
    assert tokenizer.vocab_size == 260  # the padding behind it has no text
    assert tokenizer.decode([260]) == ""


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, (257, 258)),  # <|end|> ends a turn as well, by its name
        ({"eot_token_id": 256}, (257, 256, 258)),
        ({"eom_token_id": 256, "eos_token_id": 258}, (258, 256, 257)),
        ({"eos_token_id": 0xFFFFFFFF}, (257, 258)),
    ],
)
def test_every_token_that_ends_a_turn_is_known(extra: dict, expected: tuple[int, ...]):
    assert Tokenizer.from_gguf(byte_level_metadata("gpt-2", **extra)).eos_token_ids == expected


def test_a_separator_within_an_answer_does_not_end_it():
    metadata = byte_level_metadata("gpt-4o")
    metadata["tokenizer.ggml.tokens"].append("<|return|>")
    metadata["tokenizer.ggml.token_type"].append(3)
    metadata["tokenizer.ggml.eos_token_id"] = 261
    assert Tokenizer.from_gguf(metadata).eos_token_ids == (261, 257)


@pytest.mark.parametrize(
    ("pre", "extra", "added"),
    [
        ("gpt-2", {}, False),
        ("llama-bpe", {}, True),
        ("gpt-2", {"add_bos_token": True}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_bos_is_added_as_the_file_or_its_kind_says(pre: str, extra: dict, added: bool):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre, **extra))
    assert tokenizer.add_bos is added
    assert (tokenizer.encode("a")[0] == 256) is added
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 256


def test_templates_and_their_variables_come_from_the_file():
    metadata = byte_level_metadata("gpt-2") | {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.render_chat(messages) == "<s>|<|im_end|>|a"
    assert tokenizer.encode_chat(messages) == tokenizer.encode("<s>|<|im_end|>|a")
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "tools"
    assert not Tokenizer.from_gguf(byte_level_metadata("gpt-2")).has_chat_template


def test_chats_never_get_a_second_bos():
    metadata = byte_level_metadata("llama-bpe") | {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode_chat([{"role": "user", "content": ""}]) == [256]


def changed(**changes: object) -> dict[str, object]:
    """Return a vocabulary with some keys changed, or left out where the value is None."""
    metadata = byte_level_metadata("gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize(
    ("metadata", "error", "text"),
    [
        (changed(pre="gpt2-x"), UnsupportedError, "pre is 'gpt2-x', expected one of codeshell"),
        (changed(pre="lama-bpe"), UnsupportedError, "Did you mean 'llama-bpe'"),
        (changed(model="t5"), UnsupportedError, "model is 't5', expected 'gpt2'"),
        (changed(model=None), UnsupportedError, "model is None"),
        (changed(tokens=None), CheckpointError, "tokens is None, expected a list"),
        (changed(tokens="abc"), CheckpointError, "tokens is 'abc', expected a list"),
        (changed(merges=None), CheckpointError, "merges is None"),
        (changed(merges=["a b"]), CheckpointError, "has 'a b', expected two tokens whose join"),
        (changed(merges=["ab"]), CheckpointError, "has 'ab'"),
        (changed(token_type=[1, 2]), CheckpointError, "has 2 entries, .* each of the 261 tokens"),
        (changed(eos_token_id=999), CheckpointError, "is 999, expected an id below 261"),
        (changed(bos_token_id="x"), CheckpointError, "bos_token_id is 'x'"),
        (
            changed(bos_token_id=None, add_bos_token=True),
            CheckpointError,
            "add_bos_token is set, but the file names no such token",
        ),
        (changed(tokens=["a"] * 261), CheckpointError, "token 'a' has two ids, 0 and 1"),
        (changed(model="llama"), CheckpointError, "scores is missing"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_contradicts_itself_is_refused(
    metadata: dict, error: type[Exception], text: str
):
    if "scores" in text:
        del metadata["tokenizer.ggml.merges"]
    with pytest.raises(error, match=text) as caught:
        describe_gguf_tokenizer(metadata, where="file.gguf")
    assert str(caught.value).startswith("file.gguf: ")


# Directories with a tokenizer.json


def backend() -> tokenizers.Tokenizer:
    """Return a small byte-level tokenizer."""
    vocab = {char: i for i, char in enumerate(sorted(byte_alphabet()))}
    vocab |= {"<s>": 256, "</s>": 257, "<pad>": 258, "<a:b>": 259}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def save(folder: Path, made: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    """Write a tokenizer.json and files beside it; `_json` and `_jinja` end their names."""
    (made or backend()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def test_a_directory_a_file_and_a_lone_gguf_file_are_sources(tmp_path: Path):
    save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.from_path(path)
        assert tokenizer.decode(tokenizer.encode("a 🙂")) == "a 🙂"
        assert tokenizer.eos_token_ids == ()
        assert tokenizer.bos_token_id is None
        assert not tokenizer.has_chat_template


@pytest.mark.weights
def test_a_directory_with_one_gguf_file_is_that_file(default_model: Path, tmp_path: Path):
    (tmp_path / "model.gguf").symlink_to(default_model)
    assert Tokenizer.from_path(tmp_path).vocab_size == 49152
    (tmp_path / "other.gguf").symlink_to(default_model)
    with pytest.raises(ConfigError, match=r"several GGUF files \(model.gguf, other.gguf\)"):
        Tokenizer.from_path(tmp_path)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path):
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    tokenizer = Tokenizer.from_path(save(tmp_path, made))
    assert len(tokenizer.encode("a" * 20)) == 20
    assert len(tokenizer.encode("a")) == 1


def test_tokens_of_the_configuration_become_special(tmp_path: Path):
    folder = save(
        tmp_path,
        special_tokens_map_json={"pad_token": "<pad>", "eos_token": "ignored"},
        tokenizer_config_json={
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "sep_token": "<unheard-of>",
            "additional_special_tokens": ["<a:b>"],
            "chat_template": "{{ bos_token }}{{ pad_token }}{{ additional_special_tokens[0] }}",
        },
    )
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.special_ids == {256, 257, 258, 259}
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_token_ids == (257,)
    ids = tokenizer.encode("<s>a</s><a:b>")
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", "a", "</s>", "<a:b>"]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.render_chat([{"role": "user", "content": ""}]) == "<s><pad><a:b>"


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [258, 257, 0]}, {}, (257, 258, 0)),
        ({"eos_token_id": 258}, {"eos_token_id": 3}, (257, 258)),
        ({}, {"eos_token_id": 3}, (257, 3)),
        ({"eos_token_id": None}, {}, (257,)),
    ],
)
def test_ends_are_collected_from_all_files(
    tmp_path: Path, generation: dict, model: dict, expected: tuple[int, ...]
):
    folder = save(
        tmp_path,
        tokenizer_config_json={"eos_token": "</s>", "bos_token": None},
        generation_config_json=generation,
        config_json={"bos_token_id": 5, **model},
    )
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.bos_token_id is None  # said outright
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_path(folder).bos_token_id == 5


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        ({"add_bos_token": True}, [259, 65]),
        ({"add_bos_token": False}, [65]),
        ({"add_bos_token": True, "add_eos_token": True}, [259, 65, 257]),
        ({"add_bos_token": None}, [65]),
    ],
)
def test_bos_and_eos_are_added_as_the_configuration_says(
    tmp_path: Path, in_file: bool, flags: dict, expected: list[int] | None
):
    made = backend()
    a = made.token_to_id("a")
    if in_file:
        processor = tokenizers.processors.TemplateProcessing(
            single="BOS $A", pair="BOS $A $B", special_tokens=[("BOS", 259)]
        )
        made.post_processor = processor
    config = {"bos_token": "<a:b>", "eos_token": "</s>", **flags}
    tokenizer = Tokenizer.from_path(save(tmp_path, made, tokenizer_config_json=config))
    wanted = [259, 65] if in_file else [65]
    wanted = wanted if expected is None else expected
    assert tokenizer.encode("a") == [a if token_id == 65 else token_id for token_id in wanted]
    assert tokenizer.encode("a", add_special_tokens=False) == [a]
    assert tokenizer.add_bos is (wanted[0] == 259)


def test_chat_templates_are_found_wherever_models_keep_them(tmp_path: Path):
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    save(tmp_path, chat_template_json={"chat_template": "json"})
    assert Tokenizer.from_path(tmp_path).render_chat(messages) == "json"
    save(tmp_path, tokenizer_config_json={"chat_template": named})
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.render_chat(messages) == "list"
    assert tokenizer.render_chat(messages, tools=[{}]) == "tools"
    save(tmp_path, chat_template_jinja="file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.render_chat(messages) == "file"
    assert tokenizer.render_chat(messages, chat_template="rag") == "rag"


def test_a_template_of_the_users_replaces_the_models(tmp_path: Path):
    messages = [{"role": "user", "content": "x"}]
    save(tmp_path, chat_template_jinja="model", mine_jinja="mine", bad_jinja="{% if %}")
    mine = str(tmp_path / "mine.jinja")
    assert Tokenizer.from_path(tmp_path, chat_template=mine).render_chat(messages) == "mine"
    text = "{{ messages[0].content }}"
    assert Tokenizer.from_path(tmp_path, chat_template=text).render_chat(messages) == "x"
    with pytest.raises(ConfigError, match=r"is 'no/such\.jinja', expected an existing file"):
        Tokenizer.from_path(tmp_path, chat_template="no/such.jinja")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        Tokenizer.from_path(tmp_path, chat_template=str(tmp_path / "bad.jinja"))


def test_a_broken_template_of_the_model_spoils_chats_only(tmp_path: Path):
    tokenizer = Tokenizer.from_path(save(tmp_path, chat_template_jinja="{% if %}"))
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(RequestError, match="not valid Jinja"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("files", "error", "text"),
    [
        ({}, ModelNotFoundError, "holds no tokenizer, expected a tokenizer.json"),
        ({"tokenizer.model": b""}, UnsupportedError, "holds tokenizer.model, expected"),
        ({"vocab.json": b"{}"}, UnsupportedError, "save_pretrained"),
        ({"tokenizer.json": b"{}"}, CheckpointError, "not a tokenizer that the tokenizers library"),
        ({"tokenizer.json": b"{"}, CheckpointError, "Download it again"),
        ({"tokenizer.json": b"\xff\xfe"}, CheckpointError, "expected UTF-8 text"),
        ({"tokenizer.json": None, "config.json": b"{"}, CheckpointError, "config.json: not valid"),
        ({"tokenizer.json": None, "config.json": b"[]"}, CheckpointError, "a JSON object, found"),
        ({"m.gguf": b"GGUFx"}, CheckpointError, "m.gguf"),
    ],
)
def test_sources_that_cannot_be_read_are_named(
    tmp_path: Path, files: dict, error: type[Exception], text: str
):
    for name, content in files.items():
        if content is None:
            save(tmp_path)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=text):
        Tokenizer.from_path(tmp_path)


def test_a_path_that_leads_nowhere_is_not_found(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"gone does not exist, expected a directory"):
        Tokenizer.from_path(tmp_path / "gone")


# Bad input


def test_half_a_surrogate_pair_is_refused():
    tokenizer = Tokenizer(backend())
    with pytest.raises(RequestError, match="half of a surrogate pair") as caught:
        tokenizer.encode("a\ud83d")
    assert caught.value.status == 400


def test_negative_ids_are_refused():
    with pytest.raises(RequestError, match="token ids must be at least 0, got -1"):
        Tokenizer(backend()).decode([5, -1])


def test_single_tokens_have_bytes_and_text():
    tokenizer = Tokenizer(backend())
    first, second = tokenizer.encode("é")
    assert tokenizer.token_bytes(first) + tokenizer.token_bytes(second) == "é".encode()
    assert tokenizer.token_text(first) == "\ufffd"
    assert (tokenizer.token_text(10**6), tokenizer.token_bytes(10**6)) == ("", b"")
