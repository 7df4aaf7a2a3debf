"""Text to token ids and back, for every kind of model directory and file.

The work is done by the `tokenizers` library; this is the one module that imports it. A tokenizer
comes from a tokenizer.json with the files that lie beside it, or from the metadata of a GGUF file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.core.config import ContentFormat
from jaxserve.core.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
from jaxserve.engine.chat_template import DEFAULT_NAME, ChatTemplate
from jaxserve.engine.detokenizer import Detokenizer as Detokenizer
from jaxserve.engine.gguf_tokenizer import (
    TokenizerParts,
    describe_gguf_tokenizer,
    template_processing,
)
from jaxserve.engine.token_text import TokenText, make_token_text
from jaxserve.models.gguf import read_metadata

_TOKENIZER_FILE = "tokenizer.json"
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text to ids, ids to text, and conversations to prompts.

    Safe to use from several threads.

    Args:
        backend: A tokenizer of the `tokenizers` library. Its truncation and padding are switched
            off.
        eos_token_ids: Tokens that end a generation; the model's main one first.
        bos_token_id: Token that begins a text, if the model has one.
        special_tokens: Named special tokens as templates see them, such as `bos_token`.
        chat_templates: Chat templates by name.

    Attributes:
        eos_token_ids: Tokens that end a generation.
        bos_token_id: Token that begins a text, if the model has one.
        special_tokens: Named special tokens as templates see them.
        special_ids: Tokens that are left out of text by default.
        add_bos: Whether `encode` puts BOS in front of a text.
        vocab_size: One more than the largest id. A model's embedding may have more rows.
        token_table: The text of every token.
        chat_template: The model's chat templates.

    Raises:
        UnsupportedError: If the backend's decoder cannot be streamed.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        special_tokens: Mapping[str, object] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Take over the backend and learn what each of its tokens says."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        tokens = {i: token for token, i in backend.get_vocab().items()}
        tokens |= {i: token.content for i, token in added.items()}
        self.vocab_size: int = 1 + max(tokens, default=-1)
        self.token_table: TokenText = make_token_text(
            tokens, self.special_ids, _section(backend.decoder)
        )
        around: list[int] = backend.encode("").ids
        self.add_bos = bos_token_id is not None and around[:1] == [bos_token_id]
        self.special_tokens: dict[str, object] = dict(special_tokens or {})
        self.chat_template = ChatTemplate(chat_templates or {}, variables=self.special_tokens)

    @classmethod
    def from_path(cls, path: Path, *, chat_template: str | None = None) -> "Tokenizer":
        """Load the tokenizer of a model.

        Args:
            path: A directory with a tokenizer.json, such a file itself, or a GGUF file. A
                directory may also hold one GGUF file instead.
            chat_template: A template to use instead of the model's: a file, or the text itself.

        Returns:
            The tokenizer.

        Raises:
            ModelNotFoundError: If the path, or a tokenizer in it, does not exist.
            CheckpointError: If a file is damaged.
            UnsupportedError: If the tokenizer is of a kind that is not known.
            ConfigError: If `chat_template` is neither a file nor a valid template.
        """
        source = _find_source(path)
        if _is_gguf(source):
            metadata = read_metadata(source)
            return cls.from_gguf(metadata, where=str(source), chat_template=chat_template)
        backend = _build(_read_text(source), source)
        return cls._from_parts(backend, _read_directory(source.parent, backend), chat_template)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        *,
        where: str = "GGUF metadata",
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes.

        Args:
            metadata: The file's metadata, as `read_metadata` returns it.
            where: Name of the file, for error messages.
            chat_template: A template to use instead of the model's: a file, or the text itself.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: If the vocabulary is missing or contradicts itself.
            UnsupportedError: If it is of a kind that is not known.
            ConfigError: If `chat_template` is neither a file nor a valid template.
        """
        parts = describe_gguf_tokenizer(metadata, where=where)
        return cls._from_parts(_build(json.dumps(parts.description), where), parts, chat_template)

    @classmethod
    def _from_parts(
        cls, backend: tokenizers.Tokenizer, parts: TokenizerParts, chat_template: str | None
    ) -> "Tokenizer":
        templates = parts.chat_templates
        if chat_template is not None:
            templates = {DEFAULT_NAME: _template_text(chat_template)}
        made = cls(
            backend,
            eos_token_ids=parts.eos_token_ids,
            bos_token_id=parts.bos_token_id,
            special_tokens=parts.special_tokens,
            chat_templates=templates,
        )
        if chat_template is not None:
            made.chat_template.check()
        return made

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered without bringing a template."""
        return bool(self.chat_template.templates)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json that makes the same ids and texts."""
        return self._backend.to_str(pretty=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids. Special tokens written out in the text become those tokens.

        Args:
            text: Any text.
            add_special_tokens: Add what the model expects around a text, such as BOS.

        Returns:
            The ids.

        Raises:
            RequestError: If the text is not valid Unicode.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise _not_unicode() from error

    def encode_texts(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] | None = None,
        *,
        max_tokens: int | None = None,
        from_left: bool = False,
        add_special_tokens: bool = True,
    ) -> list[tuple[list[int], list[int]]]:
        """Turn texts, or pairs of them, into ids, on several threads.

        Args:
            texts: The texts.
            seconds: The second text of each pair.
            max_tokens: Longer texts are cut, special tokens counted and kept; of a pair the longer
                text is cut. None cuts nothing.
            from_left: Whether the end of a text is kept instead of its beginning.
            add_special_tokens: Add what the model expects around a text.

        Returns:
            Per text, ids and the segment (0 or 1) of each.

        Raises:
            RequestError: If a text is not valid Unicode, or nothing would be left of it.
        """
        pairs = (
            [(text,) for text in texts] if seconds is None else [*zip(texts, seconds, strict=True)]
        )
        inputs = list(texts) if seconds is None else pairs
        try:
            found = self._backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens)
            for index, encoding in enumerate(found):
                if max_tokens is not None and len(encoding.ids) > max_tokens:
                    found[index] = self._cut(
                        pairs[index], max_tokens, from_left=from_left, special=add_special_tokens
                    )
        except TypeError as error:
            raise _not_unicode() from error
        return [(encoding.ids, encoding.type_ids) for encoding in found]

    def _cut(
        self, texts: tuple[str, ...], max_tokens: int, *, from_left: bool, special: bool
    ) -> tokenizers.Encoding:
        """Encode one text, or a pair, cut to a length."""
        backend = self._backend
        parts = [backend.encode(text, add_special_tokens=False) for text in texts]
        around = backend.num_special_tokens_to_add(len(parts) == 2) if special else 0
        keep = [len(part.ids) for part in parts]
        if max_tokens - around < len(parts):
            raise RequestError(
                f"cutting a text to {max_tokens} tokens leaves nothing of it beside {around} "
                "special tokens; allow more.",
                param="truncate_prompt_tokens",
            )
        while (excess := sum(keep) - (max_tokens - around)) > 0:
            longest = keep.index(max(keep))
            other = keep[1 - longest] if len(keep) == 2 else 0
            keep[longest] -= min(excess, max(1, keep[longest] - other))
        for part, count in zip(parts, keep, strict=True):
            part.truncate(count, direction="left" if from_left else "right")
        return backend.post_process(*parts, add_special_tokens=special)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: The ids. Those that the tokenizer does not know have no text.
            skip_special_tokens: Leave special tokens out.

        Returns:
            The text, equal to what a `Detokenizer` gives for these ids.

        Raises:
            RequestError: If an id is negative.
        """
        if min(ids, default=0) < 0:
            raise RequestError(f"token ids must be at least 0, got {min(ids)}.")
        decoder = self.token_table.decoder(skip_special_tokens=skip_special_tokens)
        return decoder.feed(ids) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds in the middle of a text; none for unknown ids."""
        return self.token_table.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Return one token as text, special or not; U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        content_format: ContentFormat = "auto",
    ) -> str:
        """Write a conversation as one prompt; see `ChatTemplate.render`.

        Args:
            messages: Messages with `role` and `content`.
            add_generation_prompt: End with what introduces the assistant's next message.
            continue_final_message: End within the last message instead.
            tools: Function schemas that the model may call; described in the system message where
                the template knows none.
            chat_template: Name of a template of this model, or the text of another one.
            kwargs: Further variables for the template.
            content_format: As a string, as parts, or as the template takes it.

        Returns:
            The prompt, special tokens included.

        Raises:
            RequestError: If the messages are malformed, there is no template, or it fails.
        """
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            kwargs=kwargs,
            content_format=content_format,
            describe_tools=True,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        content_format: ContentFormat = "auto",
    ) -> list[int]:
        """Render a conversation and turn it into ids; nothing but the template adds BOS.

        Args:
            messages: As for `render_chat`.
            add_generation_prompt: As for `render_chat`.
            continue_final_message: As for `render_chat`.
            tools: As for `render_chat`.
            chat_template: As for `render_chat`.
            kwargs: As for `render_chat`.
            content_format: As for `render_chat`.

        Returns:
            The ids of the prompt.

        Raises:
            RequestError: If the messages are malformed, there is no template, or it fails.
        """
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            kwargs=kwargs,
            content_format=content_format,
        )
        return self.encode(text, add_special_tokens=False)


def _not_unicode() -> RequestError:
    return RequestError(
        "the text contains half of a surrogate pair, expected valid Unicode; send characters "
        "beyond U+FFFF whole."
    )


def _section(part: Any) -> dict[str, Any] | None:  # noqa: ANN401  the library leaves it open
    """Return one part of a tokenizer as its section of a tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _find_source(path: Path) -> Path:
    """Return the tokenizer.json or GGUF file that a path leads to."""
    if not path.exists():
        raise ModelNotFoundError(
            f"{path} does not exist, expected a directory with a {_TOKENIZER_FILE} or a GGUF file."
        )
    if not path.is_dir():
        return path
    if (path / _TOKENIZER_FILE).is_file():
        return path / _TOKENIZER_FILE
    match sorted(path.glob("*.gguf")):
        case [source]:
            return source
        case []:
            pass
        case several:
            names = ", ".join(source.name for source in several)
            raise ConfigError(f"{path} holds several GGUF files ({names}); name one of them.")
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"):
        if (path / name).exists():
            raise UnsupportedError(
                f"{path} holds {name}, expected {_TOKENIZER_FILE}. Make one with the transformers "
                "library: AutoTokenizer.from_pretrained(path).save_pretrained(path)."
            )
    raise ModelNotFoundError(f"{path} holds no tokenizer, expected a {_TOKENIZER_FILE}.")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _build(description: str, where: Path | str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{where}: not a tokenizer that the tokenizers library {tokenizers.__version__} can "
            f"read: {error}. Download it again, or update the library."
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected UTF-8 text, found other bytes. Download it again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _read_directory(directory: Path, backend: tokenizers.Tokenizer) -> TokenizerParts:
    """Read what lies beside a tokenizer.json, and bring the backend into line with it."""
    settings = _read_json(directory / "special_tokens_map.json")
    settings |= _read_json(directory / "tokenizer_config.json")
    model = _read_json(directory / "config.json") | _read_json(directory / "generation_config.json")
    special = _special_tokens(settings)
    _mark_special(backend, special)
    bos = _id_of(backend, special.get("bos_token"))
    if bos is None and "bos_token" not in settings:
        bos = next(iter(_id_list(model.get("bos_token_id"))), None)
    eos = _id_of(backend, special.get("eos_token"))
    ends = [] if eos is None else [eos]
    _set_affixes(backend, settings, bos, eos)
    return TokenizerParts(
        description={},
        eos_token_ids=tuple(dict.fromkeys([*ends, *_id_list(model.get("eos_token_id"))])),
        bos_token_id=bos,
        special_tokens=special,
        chat_templates=_directory_templates(directory, settings),
    )


def _content(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, object]:
    named: dict[str, Any] = {name: settings.get(name) for name in _NAMED_TOKENS}
    extra = settings.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    special: dict[str, object] = {
        name: text for name, token in named.items() if (text := _content(token)) is not None
    }
    more = settings.get("additional_special_tokens") or (extra if isinstance(extra, list) else [])
    special["additional_special_tokens"] = [
        text for token in more if (text := _content(token)) is not None
    ]
    return special


def _mark_special(backend: tokenizers.Tokenizer, special: Mapping[str, Any]) -> None:
    """Make tokens special that only the configuration calls so. The vocabulary never grows."""
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    more = special["additional_special_tokens"]
    names = [*(text for text in special.values() if isinstance(text, str)), *more]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(name, special=True, normalized=False)
            for name in dict.fromkeys(names)
            if name not in known and backend.token_to_id(name) is not None
        ]
    )


def _id_of(backend: tokenizers.Tokenizer, token: object) -> int | None:
    return backend.token_to_id(token) if isinstance(token, str) else None


def _id_list(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]


def _set_affixes(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], bos: int | None, eos: int | None
) -> None:
    """Add BOS and EOS as the configuration says, where tokenizer.json does otherwise."""
    around: list[int] = backend.encode("").ids
    has_bos = bos is not None and around[:1] == [bos]
    has_eos = eos is not None and around[has_bos:][-1:] == [eos]
    add_bos = settings.get("add_bos_token", has_bos) is True and bos is not None
    add_eos = settings.get("add_eos_token", has_eos) is True and eos is not None
    if (add_bos, add_eos) == (has_bos, has_eos):
        return

    section = template_processing(
        before=_named(backend, bos if add_bos else None),
        after=_named(backend, eos if add_eos else None),
    )
    if section is None:
        backend.post_processor = None
        return
    processor = tokenizers.processors.TemplateProcessing()
    # The way a pickle is read; the constructor cannot take tokens with a colon in them.
    processor.__setstate__(json.dumps(section).encode())
    backend.post_processor = processor


def _named(backend: tokenizers.Tokenizer, token_id: int | None) -> list[tuple[str, int]]:
    token = None if token_id is None else backend.id_to_token(token_id)
    return [] if token is None or token_id is None else [(token, token_id)]


def _directory_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Collect the chat templates of a model directory by name; files win over settings."""
    found = _template_dict(_read_json(directory / "chat_template.json").get("chat_template"))
    found |= _template_dict(settings.get("chat_template"))
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _read_text(file)
    if (directory / "chat_template.jinja").is_file():
        found[DEFAULT_NAME] = _read_text(directory / "chat_template.jinja")
    return found


def _template_dict(value: object) -> dict[str, str]:
    """Read one template, a dictionary of them, or a list of objects with name and template."""
    if isinstance(value, str):
        return {DEFAULT_NAME: value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        return {}
    return {str(name): text for name, text in value.items() if isinstance(text, str)}


def _template_text(value: str) -> str:
    """Return a template that is given as a file or as itself."""
    if any(char in value for char in "{}\n"):
        return value
    path = Path(value)
    if not path.is_file():
        raise ConfigError(
            f"chat_template is {value!r}, expected an existing file or the text of a template."
        )
    return _read_text(path)
