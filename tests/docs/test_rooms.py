"""Every room has its parts: a README, a page, a notebook, a benchmark and tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ROOMS = {
    "tactic": ("src/jaxserve/attention/tactic", "03_sparse_attention"),
    "slos_serve": ("src/jaxserve/scheduling/slos_serve", "04_slo_scheduling"),
    "polyserve": ("src/jaxserve/scheduling/polyserve", "04_fleet_of_tiers"),
}
"""Rooms, where each lies, and its notebook."""


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_its_five_parts(name):
    folder, notebook = ROOMS[name]
    for path in (
        f"{folder}/README.md",
        f"{folder}/config.py",
        f"{folder}/reference.py",
        f"docs/systems/{name}.md",
        f"notebooks/{notebook}.py",
        f"benchmarks/rooms/{name}.py",
    ):
        assert (ROOT / path).is_file(), path
    assert list((ROOT / "tests" / "rooms" / name).glob("test_*.py"))
    assert f"systems/{name}" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
