"""Writes `notebooks/*.ipynb`, without outputs, from their sources `notebooks/*.py`.

The notebooks are kept in the repository for those who open them on Colab or in Jupyter. The same
source always gives the same bytes, so that a test can tell whether they are in step.
"""

import sys
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def render(source: Path) -> str:
    """Return the notebook that belongs to a source, as JSON."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # jupytext would draw new ones every time
        cell.metadata = {}
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Write every notebook that is not in step with its source."""
    for source in sorted(FOLDER.glob("*.py")):
        target, text = source.with_suffix(".ipynb"), render(source)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
            sys.stdout.write(f"written: {target.name}\n")


if __name__ == "__main__":
    main()
