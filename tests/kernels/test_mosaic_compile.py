"""The Mosaic attention kernels, compiled for Hopper: no spills, and shared memory that there is."""

import pytest

from benchmarks.kernel_builds import tuned, varied
from jaxserve.pallas_kernels.attention.mosaic_tile import SHARED_MEMORY_LIMIT
from jaxserve.pallas_kernels.testing import compile_for

pytestmark = pytest.mark.aot


def by_name(builds, *, slow):
    return [
        pytest.param(build, id=build.name, marks=pytest.mark.slow if slow(build) else ())
        for build in builds
    ]


# Changed keys are rare, and compile what the others do and more.
@pytest.mark.parametrize("build", by_name(tuned(), slow=lambda b: b.variant.k_mod is not None))
def test_every_tuning_configuration_compiles_without_spills(h200, build):
    (kernel,) = compile_for(h200, build.function, *build.arguments)
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert kernel.shared_memory <= min(build.limit, SHARED_MEMORY_LIMIT)


@pytest.mark.parametrize("build", by_name(varied(), slow=lambda b: b.variant.packed_mask != "none"))
def test_groups_pages_dtypes_and_variants_compile_without_spills(h200, build):
    (kernel,) = compile_for(h200, build.function, *build.arguments)
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert kernel.shared_memory <= SHARED_MEMORY_LIMIT
