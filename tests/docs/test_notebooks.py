"""The notebooks in the repository are those that their sources give, without outputs."""

import json
import re
from pathlib import Path

import pytest

from docs.notebook_pages import choose_notebook, without_badge
from scripts import pair_notebooks

SOURCES = sorted(pair_notebooks.FOLDER.glob("*.py"))


def by_stem(path):
    return path.stem


@pytest.mark.parametrize("source", SOURCES, ids=by_stem)
def test_notebook_is_in_step_with_its_source(source):
    stored = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert stored == pair_notebooks.render(source), "run `make notebooks` or `make docs`"


@pytest.mark.parametrize("source", SOURCES, ids=by_stem)
def test_notebook_has_no_outputs_and_checks_something(source):
    cells = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("assert" in "".join(cell["source"]) for cell in code) >= 4


@pytest.mark.parametrize("source", SOURCES, ids=by_stem)
def test_notebook_begins_with_what_a_reader_must_know(source):
    cells = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    head, install = ("".join(cell["source"]) for cell in cells[:2])
    assert head.startswith("# ")
    assert "colab-badge.svg" in head
    assert all(f"**{word}**" in head for word in ("You will see", "It needs", "It takes"))
    assert 'find_spec("jaxserve") is None' in install
    assert re.search(r"^    %pip install --quiet jaxserve", install, re.MULTILINE)


def test_every_notebook_has_a_source():
    stems = {path.stem for path in pair_notebooks.FOLDER.glob("*.ipynb")}
    assert stems == {path.stem for path in SOURCES}


def write(path: Path, source: str, outputs: int) -> Path:
    cell = {
        "cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "source": source,
        "outputs": [{"name": "stdout", "output_type": "stream", "text": "1"}] * outputs,
    }  # fmt: skip
    text = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    path.write_text(text, encoding="utf-8")
    return path


def test_pages_show_outputs_only_of_the_source_as_it_is(tmp_path):
    source = write(tmp_path / "source.ipynb", "print(1)", 0)
    same = write(tmp_path / "same.ipynb", "print(1)", 1)
    old = write(tmp_path / "old.ipynb", "print(2)", 1)
    assert choose_notebook(source, same) == same
    assert choose_notebook(source, old) == source
    assert choose_notebook(source, tmp_path / "missing.ipynb") == source


def test_pages_load_no_badge_from_outside():
    head = "[![Open in Colab](https://host/badge.svg)](https://host/) and [a link](https://x)"
    assert without_badge(head) == "[Open in Colab](https://host/) and [a link](https://x)"
