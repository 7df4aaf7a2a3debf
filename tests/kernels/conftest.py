"""The GPU that kernels are compiled for."""

from pathlib import Path

import pytest

from jaxserve.pallas_kernels.testing import gpu_target


@pytest.fixture(scope="session")
def h200():
    """An H200 for the compiler only. Tests that use it carry the mark `aot`."""
    return gpu_target((Path(__file__).parent / "h200.txtpb").read_text())
