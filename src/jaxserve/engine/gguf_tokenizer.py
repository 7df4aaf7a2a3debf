"""The tokenizer inside a GGUF file, described as a tokenizer.json.

A GGUF file names its vocabulary, merges or scores, and the rule that splits text into words, but
not the rule itself. This module knows the rules and writes everything down in the one form that the
`tokenizers` library reads, so that such a tokenizer is no different from any other afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.core.errors import CheckpointError, UnsupportedError, did_you_mean

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
)
_TEKKEN = (
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WordRule:
    """How text becomes words before merges apply, for byte-level vocabularies.

    Attributes:
        split: Regular expression of one word; None for GPT-2's own.
        digits: Whether every digit is a word.
        compose: Whether text is brought into Unicode's composed form (NFC) first.
        ignore_merges: Whether a word that is a token is taken as it is.
        add_bos: Whether prompts begin with BOS where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    compose: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_RULE = _WordRule()
_DIGITS_RULE = _WordRule(digits=True)
_LLAMA3_RULE = _WordRule(split=_LLAMA3, ignore_merges=True, add_bos=True)
_PLAIN_LLAMA3_RULE = _WordRule(split=_LLAMA3)
_QWEN2_RULE = _WordRule(split=_QWEN2, compose=True)
_PLAIN_QWEN2_RULE = _WordRule(split=_QWEN2)
_GPT4O_RULE = _WordRule(split=_GPT4O)

_WORD_RULES = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "mpt": _GPT2_RULE,
    "exaone4": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "lfm2": _LLAMA3_RULE,
    "dbrx": _PLAIN_LLAMA3_RULE,
    "smaug-bpe": _PLAIN_LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _PLAIN_QWEN2_RULE,
    "megrez": _PLAIN_QWEN2_RULE,
    "gpt-4o": _GPT4O_RULE,
    "llama4": _GPT4O_RULE,
    "tekken": _WordRule(split=_TEKKEN, ignore_merges=True, add_bos=True),
}
"""Rules by `tokenizer.ggml.pre`.

Source: the tokenizer.json files of these models, and the list of names in llama.cpp's
`llama-vocab.cpp`, which also says which of them add BOS and which ignore merges.
"""

# Names under which chat models know the end of a turn, where a file's eot id is missing.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """All that is needed to build a tokenizer.

    Attributes:
        description: The content of a tokenizer.json.
        eos_token_ids: Tokens that end a generation; the model's main one first.
        bos_token_id: Token that begins a text, if the model has one.
        special_tokens: Named special tokens as templates see them, such as `bos_token`.
        chat_templates: Chat templates by name.
    """

    description: Mapping[str, Any]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    special_tokens: Mapping[str, object] = field(default_factory=dict[str, object])
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])


def describe_gguf_tokenizer(metadata: Mapping[str, object], *, where: str) -> TokenizerParts:
    """Describe the tokenizer of a GGUF file.

    Args:
        metadata: The file's metadata.
        where: Name of the file, for error messages.

    Returns:
        What a tokenizer is built from.

    Raises:
        CheckpointError: If the vocabulary is missing or contradicts itself.
        UnsupportedError: If it is of an unknown kind.

    Source: key names and their meaning from the GGUF specification and llama.cpp's vocabulary code.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.metadata.get("model")
    if kind == "gpt2":
        return _describe_byte_level(vocabulary)
    if kind == "llama":
        return _describe_sentencepiece(vocabulary)
    raise UnsupportedError(
        f"{where}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE) or 'llama' "
        "(SentencePiece). Put a tokenizer.json beside the model and name its folder as tokenizer."
    )


class _Vocabulary:
    """The `tokenizer.ggml` keys of one file, checked."""

    def __init__(self, metadata: Mapping[str, object], where: str) -> None:
        self.where = where
        prefix = "tokenizer.ggml."
        self.metadata = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        self.chat_templates = _chat_templates(metadata)
        self.tokens: list[str] = list(self.array("tokens"))
        self.types = [int(kind) for kind in self.array("token_type", of_each_token=True)]
        self.types = self.types or [_NORMAL] * len(self.tokens)

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}. Convert or download the file again.")

    def array(self, key: str, *, of_each_token: bool = False) -> Sequence[Any]:
        value: Any = self.metadata.get(key, () if of_each_token else None)
        if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
            raise self.fail(f"tokenizer.ggml.{key} is {value!r}, expected a list")
        if of_each_token and 0 < len(value) != len(self.tokens):
            raise self.fail(
                f"tokenizer.ggml.{key} has {len(value)} entries, expected one for each of the "
                f"{len(self.tokens)} tokens"
            )
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self.metadata.get(key, default))

    def token_id(self, key: str, default: int | None = None) -> int | None:
        value: Any = self.metadata.get(key, default)
        if value is None or value == 0xFFFFFFFF:  # how some converters write "none"
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.fail(
                f"tokenizer.ggml.{key} is {value!r}, expected an id below {len(self.tokens)}"
            )
        return value

    def ids(self) -> dict[str, int]:
        """Return the id of every token that has a use."""
        ids: dict[str, int] = {}
        for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == _UNUSED or not token:
                continue
            if token in ids:
                raise self.fail(f"token {token!r} has two ids, {ids[token]} and {token_id}")
            ids[token] = token_id
        return ids

    def merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        for merge in self.array("merges"):
            left, _, right = str(merge).partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                raise self.fail(
                    f"tokenizer.ggml.merges has {merge!r}, expected two tokens whose join is a "
                    "token too"
                )
            pairs.append((left, right))
        return pairs

    def parts(self, description: Mapping[str, Any], *, add_bos: bool, **ids: int) -> TokenizerParts:
        """Add what every kind of vocabulary has: special tokens, BOS, EOS and templates."""
        named = {name: self.token_id(key, ids.get(name)) for name, key in _SPECIAL_KEYS.items()}
        bos, eos = named["bos_token"], named["eos_token"]
        before = self._required("add_bos_token", add_bos, bos)
        after = self._required("add_eos_token", False, eos)  # noqa: FBT003
        return TokenizerParts(
            description={
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": self._added_tokens(named["unk_token"]),
                **description,
                "post_processor": template_processing(
                    before=[(self.tokens[i], i) for i in before],
                    after=[(self.tokens[i], i) for i in after],
                ),
            },
            eos_token_ids=self._ends(eos),
            bos_token_id=bos,
            special_tokens={
                name: self.tokens[token_id]
                for name, token_id in named.items()
                if token_id is not None
            },
            chat_templates=self.chat_templates,
        )

    def _required(self, key: str, default: bool, token_id: int | None) -> list[int]:  # noqa: FBT001
        if not self.flag(key, default=default):
            return []
        if token_id is None:
            raise self.fail(f"tokenizer.ggml.{key} is set, but the file names no such token")
        return [token_id]

    def _added_tokens(self, unk: int | None) -> list[dict[str, Any]]:
        """List the tokens that are found in text before anything else is done to it."""
        return [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if token
            and (kind in (_CONTROL, _USER_DEFINED) or (kind == _UNKNOWN and token_id == unk))
        ]

    def _ends(self, eos: int | None) -> tuple[int, ...]:
        ends = [eos, self.token_id("eot_token_id"), self.token_id("eom_token_id")]
        control = {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == _CONTROL
        }
        names = [name for name in _END_OF_TURN if name in control]
        if "<|return|>" in control:  # there, <|end|> only separates the parts of one answer
            names = [name for name in names if name != "<|end|>"]
        ends += [control[name] for name in names]
        return tuple(dict.fromkeys(end for end in ends if end is not None))


def template_processing(
    *, before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]
) -> dict[str, Any] | None:
    """Describe a post-processor that puts special tokens around a text.

    Args:
        before: Tokens with their ids, in front of the text.
        after: Tokens with their ids, behind the text.

    Returns:
        A `post_processor` section, or None if there is nothing to add.
    """
    if not before and not after:
        return None

    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def around(name: str) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": 0}}
        return [*(special(t) for t, _ in before), text, *(special(t) for t, _ in after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in (*before, *after)
        },
    }


def _chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    prefix = f"{_TEMPLATE_KEY}."
    found = {"default": metadata.get(_TEMPLATE_KEY)}
    found |= {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def _describe_byte_level(vocabulary: _Vocabulary) -> TokenizerParts:
    name = vocabulary.metadata.get("pre", "default")
    rule = _WORD_RULES.get(str(name))
    if rule is None:
        known = sorted(_WORD_RULES)
        raise UnsupportedError(
            f"{vocabulary.where}: tokenizer.ggml.pre is {name!r}, expected one of "
            f"{', '.join(known)}.{did_you_mean(str(name), known)} Put a tokenizer.json beside the "
            "model and name its folder as tokenizer."
        )
    ids = vocabulary.ids()
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": rule.split is None,
    }
    words: list[dict[str, Any]] = []
    if rule.digits:
        words.append({"type": "Digits", "individual_digits": True})
    if rule.split is not None:
        words.append(
            {
                "type": "Split",
                "pattern": {"Regex": rule.split},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    description = {
        "normalizer": {"type": "NFC"} if rule.compose else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": ids,
            "merges": vocabulary.merges(ids),
        },
    }
    return vocabulary.parts(description, add_bos=rule.add_bos)


def _describe_sentencepiece(vocabulary: _Vocabulary) -> TokenizerParts:
    ids = vocabulary.ids()
    unk = vocabulary.token_id("unknown_token_id", 0)
    prefix = vocabulary.flag("add_space_prefix", default=True)
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    after: list[dict[str, Any]] = (
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    )
    description = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *before,
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *after,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unk is None else vocabulary.tokens[unk],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges_by_score(vocabulary, ids),
        },
    }
    return vocabulary.parts(description, add_bos=True, bos_token=1, eos_token=2, unk_token=0)


def _merges_by_score(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges that a scored vocabulary implies, best first.

    SentencePiece joins the two neighbours whose join is the token with the highest score. The same
    happens when every way to cut a token in two is a merge, in the order of the tokens' scores.
    """
    if "merges" in vocabulary.metadata:
        return vocabulary.merges(ids)
    scores = vocabulary.array("scores", of_each_token=True)
    if not len(scores):
        raise vocabulary.fail("tokenizer.ggml.scores is missing, expected a score for each token")
    normal = {token for token, token_id in ids.items() if vocabulary.types[token_id] == _NORMAL}
    ranked = sorted((-float(scores[ids[token]]), ids[token], token) for token in normal)
    return [
        (token[:cut], token[cut:])
        for _, _, token in ranked
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
