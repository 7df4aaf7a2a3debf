"""Triton kernels: half of the tests need its interpreter on, the other half need it off."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

try:
    from triton import knobs
except ImportError:
    knobs = None
else:
    knobs.cache.dir = str(ROOT / ".cache" / "triton")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if knobs is None:
        pytest.skip("needs Triton; make test-triton runs it")
    wants_interpreter = item.get_closest_marker("interpreted") is not None
    if wants_interpreter != (os.environ.get("TRITON_INTERPRET") == "1"):
        word = "on" if wants_interpreter else "off"
        pytest.skip(f"needs Triton's interpreter switched {word}; make test-triton runs it")
