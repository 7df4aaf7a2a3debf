"""The Mosaic attention kernels, compiled for Hopper: no spills, and shared memory that there is."""

import pytest

from benchmarks import list_builds
from benchmarks.kernel_builds import most_demanding, tuned, varied
from jaxserve.pallas_kernels.attention.mosaic_tile import SHARED_MEMORY_LIMIT
from jaxserve.pallas_kernels.testing import compile_for

pytestmark = pytest.mark.aot


QUICK = {build.name for build in most_demanding()}


def by_name(builds):
    return [
        pytest.param(build, id=build.name, marks=() if build.name in QUICK else pytest.mark.slow)
        for build in builds
    ]


@pytest.mark.parametrize("build", by_name(tuned()))
def test_every_tuning_configuration_compiles_without_spills(h200, build):
    (kernel,) = compile_for(h200, build.function, *build.arguments)
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert kernel.shared_memory <= min(build.limit, SHARED_MEMORY_LIMIT)


@pytest.mark.parametrize("build", by_name(varied()))
def test_groups_pages_dtypes_and_variants_compile_without_spills(h200, build):
    (kernel,) = compile_for(h200, build.function, *build.arguments)
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert kernel.shared_memory <= SHARED_MEMORY_LIMIT


QUICK_LISTS = (list_builds.build().name,)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(each, id=name, marks=() if name in QUICK_LISTS else pytest.mark.slow)
        for name, each in {build.name: build for build in list_builds.builds()}.items()
    ],
)
def test_lists_compile_without_spills(h200, build):
    (kernel,) = compile_for(h200, build.function, *build.arguments)
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack) == (0, 0, 0)
    assert kernel.shared_memory <= min(build.limit, SHARED_MEMORY_LIMIT)
    assert kernel.ctas_per_multiprocessor >= build.ctas


def test_the_quick_builds_are_among_all_of_them():
    assert {build.name for build in (*tuned(), *varied())} >= QUICK
