"""The invariance of the engine once more, on a GPU."""

import pytest

from tests.engine.test_invariance import (
    assert_as_expected,
    expected,
    module,
    run_all,
    test_a_prefix_from_the_cache_changes_nothing,
    test_batch_invariant_results_are_equal_bit_by_bit,
)
from tests.tiny import Bench

pytestmark = pytest.mark.gpu

__all__ = [
    "expected",
    "module",
    "test_a_prefix_from_the_cache_changes_nothing",
    "test_batch_invariant_results_are_equal_bit_by_bit",
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 16, "async_scheduling": False},
        {"kv_layout": "slots"},
        {"block_size": 2, "num_gpu_blocks_override": 170, "max_num_seqs": 8},
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()) or "defaults",
)
def test_requests_side_by_side_agree_with_the_dense_loop(module, expected, settings):
    for name, output in run_all(Bench(module, **settings)).items():
        assert_as_expected(output, expected[name])
