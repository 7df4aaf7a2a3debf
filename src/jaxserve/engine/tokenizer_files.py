"""The files of a tokenizer: copied from a directory, or written from a tokenizer in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

from jaxserve.engine.chat_template import DEFAULT_NAME
from jaxserve.engine.tokenizer import Tokenizer

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


def copy_tokenizer(source: Path, folder: Path) -> int:
    """Copy the files of a tokenizer, and the licence of its model.

    Args:
        source: A model directory.
        folder: Where they go.

    Returns:
        The number of files.
    """
    found = [file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()]
    for file in found:
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    return len(found)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_len: int | None = None) -> None:
    """Write a tokenizer as `tokenizer.json` and `tokenizer_config.json`, chat templates included.

    Args:
        tokenizer: The tokenizer.
        folder: Where they go.
        max_len: Most tokens that its model takes.
    """
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    settings: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; families' own classes would rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        **tokenizer.special_tokens,
    }
    if max_len is not None:
        settings["model_max_length"] = max_len
    templates = tokenizer.chat_template.templates
    if list(templates) == [DEFAULT_NAME]:
        settings["chat_template"] = templates[DEFAULT_NAME]
    elif templates:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
