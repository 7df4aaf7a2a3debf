"""Settings of Sphinx. Everything is built from this repository; nothing is fetched."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jaxserve

logging.getLogger("httpx").setLevel(logging.WARNING)  # the endpoint table asks many paths

project = "jaxserve"
author = "The jaxserve developers"
project_copyright = author
release = jaxserve.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.generated"]
exclude_patterns = ["__pycache__"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # what single backticks in docstrings mean
nb_merge_streams = True
nb_execution_mode = "off"  # `make notebooks` runs them, and fails if one fails

html_theme = "furo"
html_title = f"jaxserve {release}"
html_copy_source = False

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!jaxserve\b).*"),  # other packages are not described here
    (r"py:class", r"jaxserve\.\w+\..+"),  # inner types that signatures name
]
