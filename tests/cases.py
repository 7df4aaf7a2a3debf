"""Which cases of a test `make test` runs; `make test-slow` runs the others."""

import os
from collections.abc import Iterable

import pytest


def slow(*case: object) -> object:
    """Mark one case of a parametrization as slow."""
    return pytest.param(*case, marks=pytest.mark.slow)


def quick(cases: Iterable[object], *wanted: object) -> list[object]:
    """Mark all cases as slow but some, where those cover the code that the others share."""
    found = list(cases)
    missing = [case for case in wanted if case not in found]
    if missing:
        raise ValueError(f"no such cases: {missing}")
    return [case if case in wanted else slow(*_values(case)) for case in found]


def examples(most: int, few: int) -> int:
    """Say how many examples hypothesis tries where each is dear: few, or most where THOROUGH=1."""
    return most if os.environ.get("THOROUGH") == "1" else few


def _values(case: object) -> tuple[object, ...]:
    return case if isinstance(case, tuple) else (case,)
