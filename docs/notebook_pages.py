"""Notebooks as pages of the site: with outputs where there are some, without outside pictures."""

import re
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent


def choose_notebook(source: Path, executed: Path) -> Path:
    """Prefer a notebook with outputs, if it was made from the source as it is now.

    Args:
        source: The notebook without outputs.
        executed: Where `make notebooks` leaves it with outputs.
    """
    if not executed.is_file():
        return source
    texts = [
        [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
        for path in (source, executed)
    ]
    return executed if texts[0] == texts[1] else source


def without_badge(notebook: str) -> str:
    """Turn the badge into a plain link, so that no page of the site loads a picture from outside.

    >>> without_badge("[![Open in Colab](https://host/badge.svg)](https://host/)")
    '[Open in Colab](https://host/)'
    """
    return re.sub(r"\[!\[([^]]*)\]\(https:[^)]*\)\]", r"[\1]", notebook)


def bring_notebooks(folder: Path) -> None:
    """Put the notebooks into a folder, with outputs where `make notebooks` has made them."""
    folder.mkdir(exist_ok=True)
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        chosen = choose_notebook(source, ROOT / "build" / "notebooks" / source.name)
        text = without_badge(chosen.read_text(encoding="utf-8"))
        target = folder / source.name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
