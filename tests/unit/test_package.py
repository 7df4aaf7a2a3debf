"""The package as a whole: what it exports, and what importing it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALONE = """
import sys, time
before = time.perf_counter()
import jaxserve
from jaxserve import EngineConfig, RequestError, SamplingParams
took = time.perf_counter() - before
heavy = {"jax", "jaxlib", "flax", "numpy", "fastapi", "tokenizers", "pydantic"} & set(sys.modules)
print(took, *sorted(heavy))
"""


def test_import_is_quick_and_touches_no_device():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, check=True
    )
    took, *heavy = run.stdout.split()
    assert heavy == []
    assert float(took) < 1.0


def test_every_public_name_can_be_had_and_is_documented():
    for name in jaxserve.__all__:
        value = getattr(jaxserve, name)
        assert value is getattr(jaxserve, name)
        if name != "__version__":
            assert value.__name__ == name
            assert value.__doc__


def test_public_names_are_listed_before_they_are_loaded():
    assert set(jaxserve.__all__) <= set(dir(jaxserve))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxserve' has no attribute 'LLVM'"):
        _ = jaxserve.LLVM


def test_the_command_is_installed_under_its_name():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["scripts"] == {"jaxserve": "jaxserve.cli.main:main"}


def test_the_package_says_that_it_is_typed():
    assert (Path(jaxserve.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-jax-0.11.2.txt"])
def test_pins_name_every_dependency_and_no_index(name):
    lines = (ROOT / name).read_text().splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    wanted = list(project["project"]["dependencies"])
    wanted += project["project"]["optional-dependencies"]["serve"]
    for group in ("test", "lint"):
        wanted += project["dependency-groups"][group]
    assert {entry.split(">")[0] for entry in wanted} <= pins
