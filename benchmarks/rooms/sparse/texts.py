"""Long texts to attend over: made from what is on every machine, or read from collections.

Without a folder they come from documentation, source code and licences that Python, NumPy, SciPy,
JAX and this repository bring along, so the benchmark needs nothing else. Such texts differ a little
from one version to the next; results carry a checksum of the tokens.
"""

import gzip
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks.record import ROOT
from jaxserve.engine.tokenizer import Tokenizer

_CHARACTERS_PER_TOKEN = 12
"""No tokenizer needs more of such texts."""
_GAP = "\n\n"
_LIBRARY = (
    "decimal", "argparse", "statistics", "difflib", "unittest.mock", "logging", "datetime",
    "tarfile", "doctest", "collections", "threading", "socket", "random", "email.message", "turtle",
    "subprocess", "pathlib", "string", "configparser", "ipaddress", "fractions", "optparse",
)  # fmt: skip
_SOURCES = ("argparse", "typing", "tarfile", "inspect", "zipfile")
_LICENSED = ("numpy", "scipy", "jaxlib", "jax", "flax", "pytest", "tqdm", "jaxtyping")


def _documented(names: Iterable[str]) -> Iterator[str]:
    """Yield the documentation of modules, their classes and functions, each text once."""
    seen: set[str] = set()
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:  # turtle needs Tk, which a machine may lack
            continue
        for thing in (module, *_public(module)):
            text = inspect.getdoc(thing) or ""
            if len(text) > 80 and text not in seen:
                seen.add(text)
                yield text


def _public(module: ModuleType) -> Iterator[object]:
    for name in sorted(vars(module)):
        thing = getattr(module, name)
        if name.startswith("_") or isinstance(thing, ModuleType) or not callable(thing):
            continue
        yield thing
        if inspect.isclass(thing):
            for part in sorted(vars(thing)):
                if not part.startswith("_") and callable(getattr(thing, part, None)):
                    yield getattr(thing, part)


def _reference() -> Iterator[str]:
    """Yield the chapters of Python's language reference that `help()` shows."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _pages() -> Iterator[str]:
    """Yield pages of this repository's documentation, those without figures of this benchmark."""
    folders = (ROOT / "docs" / name for name in ("concepts", "guides", "quickstart", "decisions"))
    for page in (ROOT / "ARCHITECTURE.md", *(x for y in folders for x in sorted(y.glob("*.md")))):
        yield page.read_text(encoding="utf-8")


def _licences() -> Iterator[str]:
    """Yield the licences of installed packages, each text once."""
    seen: set[str] = set()
    for name in _LICENSED:
        for file in importlib.metadata.files(name) or ():
            if "dist-info" not in str(file) or "LICENSE" not in file.name.upper():
                continue
            text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
            if text not in seen:
                seen.add(text)
                yield text


def _code() -> Iterator[str]:
    yield from (inspect.getsource(importlib.import_module(name)) for name in _SOURCES)


_OWN: Mapping[str, Callable[[], Iterator[str]]] = {
    "reference": _reference,
    "library": lambda: _documented(_LIBRARY),
    "numerics": lambda: _documented(("numpy", "scipy.signal", "scipy.optimize")),
    "code": _code,
    "pages": _pages,
    "licences": _licences,
}


def _lines(path: Path, text_of: Callable[[dict], str]) -> Iterator[str]:
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rt")
    with opened as file:
        yield from filter(None, (text_of(json.loads(line)) for line in file))


_COLLECTED: Mapping[str, tuple[str, Callable[[dict], str]]] = {
    "answers": (
        "requests/mt_bench_reference_gpt4.jsonl",
        lambda line: _GAP.join(line["choices"][0]["turns"]),
    ),
    "functions": (
        "requests/HumanEval.jsonl.gz",
        lambda line: line["prompt"] + line["canonical_solution"],
    ),
    "encyclopedia": (
        "rag/2wiki_passages.jsonl.xz",
        lambda line: f"{line['title']}\n{line['text']}",
    ),
    "articles": ("rag/xquad_en.jsonl.gz", lambda line: line.get("text", "")),
    "arithmetic": (
        "rl/gsm8k/test.jsonl",
        lambda line: f"{line['question']}\n{line['answer']}",
    ),
    "packages": ("rag/debdesc_passages.jsonl.xz", lambda line: line["text"]),
}


def _parts(folder: Path | None) -> Iterator[tuple[str, Iterator[str]]]:
    if folder is None:
        yield from ((name, parts()) for name, parts in _OWN.items())
    else:
        for name, (path, text_of) in _COLLECTED.items():
            yield name, _lines(folder / path, text_of)


def documents(
    tokenizer: Tokenizer,
    num_tokens: int,
    folder: Path | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Return the first tokens of six long texts, by name.

    Args:
        tokenizer: Makes the tokens.
        num_tokens: Tokens of each.
        folder: Collections of public texts; None makes texts from what is installed.
        names: Which of them; all if absent.

    Raises:
        FileNotFoundError: If the folder lacks a collection.
        ValueError: If a text is too short.
    """
    found = {}
    for name, parts in _parts(folder):
        if names is not None and name not in names:
            continue
        text = ""
        for part in parts:
            text += part + _GAP
            if len(text) >= _CHARACTERS_PER_TOKEN * num_tokens:
                break
        ids = tokenizer.encode(text[: _CHARACTERS_PER_TOKEN * num_tokens])[:num_tokens]
        if len(ids) < num_tokens:
            raise ValueError(
                f"the text {name!r} has {len(ids)} tokens, {num_tokens} were asked for; ask for "
                "fewer with --context."
            )
        found[name] = np.asarray(ids, np.int32)
    return found


def checksum(texts: Mapping[str, np.ndarray]) -> str:
    """Return what tells these tokens from others."""
    digest = hashlib.sha256()
    for name, ids in texts.items():
        digest.update(name.encode())
        digest.update(ids.tobytes())
    return digest.hexdigest()[:12]
