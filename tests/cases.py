"""Which cases of a test `make test` runs; `make test-slow` runs the others."""

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


def _values(case: object) -> tuple[object, ...]:
    return case if isinstance(case, tuple) else (case,)
