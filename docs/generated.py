"""The Sphinx extension of this site: tables made from the program, and the notebooks as pages."""

from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from docs.notebook_pages import bring_notebooks
from docs.tables import TABLES
from jaxserve.core.errors import did_you_mean

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class GeneratedTable(SphinxDirective):
    """`{generated} NAME`: one of the tables of `docs.tables`, written anew at every build."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the table and parse it as Markdown.

        Raises:
            DirectiveError: If there is no such table.
        """
        (name,) = self.arguments
        if name not in TABLES:
            raise self.error(f"there is no table {name!r}.{did_you_mean(name, TABLES)}")
        self.env.note_reread()
        return self.parse_text_to_nodes(TABLES[name]())


def _before_build(app: "Sphinx") -> None:
    bring_notebooks(Path(app.srcdir) / "notebooks")


def setup(app: "Sphinx") -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("generated", GeneratedTable)
    app.connect("builder-inited", _before_build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
