"""The documents are true: what they name exists, what they show runs."""

import argparse
import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import jaxserve
from docs.tables import metrics_page
from jaxserve.cli.main import convert_parser
from jaxserve.cli.sim import sim_parser
from jaxserve.serve.flags import iter_flags

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "jaxserve"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]


def public_nodes(tree):
    """Yield the module and its public classes, functions and methods, with their names."""
    yield "the module", tree
    stack = [("", node) for node in tree.body]
    while stack:
        prefix, node = stack.pop()
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_"):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            stack += [(f"{prefix}{node.name}.", child) for child in node.body]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    missing = [name for name, node in public_nodes(tree) if not ast.get_docstring(node)]
    overloads = {
        name
        for name, node in public_nodes(tree)
        if any(
            ast.unparse(mark).endswith(("overload", ".setter"))
            for mark in getattr(node, "decorator_list", [])
        )
    }
    assert [name for name in missing if name not in overloads] == []


def modules_with_examples():
    """Return the dotted names of modules that hold a doctest."""
    names = []
    for path in SOURCES:
        if ">>> " in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def blocks(document, language):
    """Return the fenced blocks of one language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def make_targets():
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS + PAGES)
def test_make_targets_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= make_targets()


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    assert make_targets() == explained


@pytest.mark.parametrize("document", DOCUMENTS + PAGES)
def test_modules_that_documents_run_exist(document):
    for name in re.findall(r"python -m ([a-z_.]+)", (ROOT / document).read_text()):
        if name == "venv" or name == "pip":
            continue
        path = name.replace(".", "/")
        candidates = [
            base / f"{path}{end}"
            for base in (ROOT, ROOT / "src")
            for end in (".py", "/__main__.py")
        ]
        assert any(candidate.exists() for candidate in candidates), name


@pytest.mark.parametrize("document", ["README.md", "SECURITY.md", *PAGES])
def test_flags_and_variables_that_documents_name_exist(document):
    known = {name for flag in iter_flags() for name in flag.names}
    known |= {f"--no-{flag.option[2:]}" for flag in iter_flags() if flag.kind == "bool"}
    known |= {"--config", "--help"}
    parsers = [
        convert_parser(),
        *sim_parser(argparse.ArgumentParser())._actions[-1].choices.values(),
    ]
    known |= {name for one in parsers for action in one._actions for name in action.option_strings}
    variables = {flag.env for flag in iter_flags()}
    variables |= {"JAXSERVE_CACHE_DIR", "JAXSERVE_CONFIG", "JAXSERVE_MODEL", "JAXSERVE_"}
    text = (ROOT / document).read_text()
    named = re.findall(r"`(--[a-z-]+)[ `]", text)
    lines = re.findall(r"jaxserve(?:\.serve| serve) .*", text)
    named += re.findall(r" (--[a-z-]+)", " ".join(lines))
    assert set(named) <= known
    assert set(re.findall(r"JAXSERVE_[A-Z_]*", text)) <= variables


def test_metrics_that_pages_name_exist():
    known = set(re.findall(r"# HELP (\S+)", metrics_page()))
    for document in PAGES:
        named = set(re.findall(r"`(jaxserve:\w+)`", (ROOT / document).read_text()))
        assert named <= known, document


def test_python_in_the_readme_compiles_and_imports_public_names():
    shown = blocks("README.md", "python")
    assert shown
    for block in shown:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxserve":
                assert {alias.name for alias in node.names} <= set(jaxserve.__all__)


def test_paths_that_documents_name_exist():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for name in re.findall(
            r"`((?:src|tests|benchmarks|docs|notebooks|scripts|\.ci)/[A-Za-z0-9_./-]*)`", text
        ):
            assert (ROOT / name).exists(), f"{document} names {name}"
        for name in re.findall(r"\]\(([A-Za-z][A-Za-z0-9_./-]*)\)", text):
            assert (ROOT / name).exists(), f"{document} links to {name}"


def test_the_architecture_names_every_package_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    named = set(re.findall(r"^\| `([a-z_]+)/` \| \d", text, re.MULTILINE))
    assert named == packages


def test_the_changelog_knows_the_version():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {jaxserve.__version__}" in (ROOT / "CITATION.cff").read_text()
