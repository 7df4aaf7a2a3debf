"""Fits of links from times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash.calibration import Burst, fit_cost, fit_incast, fit_link

SIZES = (1e3, 1e5, 1e7, 1e9)


@given(latency=st.floats(0, 1e-3), rate=st.floats(1e6, 1e12))
@settings(max_examples=60, deadline=None)
def test_exact_times_are_fitted_exactly(latency, rate):
    found = fit_link([(size, latency + size / rate) for size in SIZES])
    assert found.rate == pytest.approx(rate, rel=1e-6)
    assert found.latency == pytest.approx(latency, rel=1e-5, abs=1e-6 * 1e3 / rate)


@given(seed=st.integers(0, 10**6), latency=st.sampled_from([0.0, 1e-6, 1e-4]))
@settings(max_examples=60, deadline=None)
def test_noisy_times_are_fitted_as_by_scipy(seed, latency):
    rng = np.random.default_rng(seed)
    times = np.array([latency + size / 1e10 for size in SIZES]) * rng.uniform(0.7, 1.4, len(SIZES))
    found = fit_link(list(zip(SIZES, times, strict=True)))
    columns = np.stack([np.ones(len(SIZES)), np.array(SIZES)], axis=1) / times[:, None]
    scale = np.array([1e-6, 1e-10])
    best, _ = nnls(columns * scale, np.ones(len(SIZES)))
    assert found.latency == pytest.approx(best[0] * scale[0], rel=1e-4, abs=1e-12)
    assert found.rate == pytest.approx(1 / (best[1] * scale[1]), rel=1e-4)


def test_one_disturbance_among_repetitions_does_not_count():
    good = [(size, 1e-5 + size / 1e9) for size in SIZES] * 3
    assert fit_link([*good, (1e9, 50.0), (1e3, 1.0)]) == pytest.approx(fit_link(good))


@given(incast=st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_incast_is_fitted(incast):
    bursts = [Burst(f, 3.0 * (1 + incast * np.log2(f)), 3.0) for f in (2, 3, 8)]
    assert fit_incast(bursts) == pytest.approx(incast, abs=1e-12)
    assert fit_incast([Burst(4, 1.0, 2.0)]) == 0.0  # faster at once than in turn


def test_a_whole_model():
    inside = [(size, 2e-6 + size / 4e11) for size in SIZES]
    across = [(size, 9e-6 + size / 5e10) for size in SIZES]
    found = fit_cost(4, inside, across, [Burst(4, 1.2, 1.0)])
    assert (found.gpus, found.incast) == (4, pytest.approx(0.1))
    assert found.up_rate == pytest.approx(4e11)
    assert found.out_latency == pytest.approx(9e-6, rel=1e-4)
    assert fit_cost(4, inside, across).incast == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least two sizes, got 0; measure a small and a large one"),
        ([(10, 1.0), (10, 2.0)], "at least two sizes, got 1"),
        ([(0, 1.0), (10, 2.0)], "above 0, got 0 bytes in 1.0 s; leave out what failed"),
        ([(5, float("nan")), (10, 2.0)], "finite and above 0"),
        ([(1e3, 2.0), (1e9, 1e-3)], "times must grow with sizes, got 2 s for 1000 bytes"),
    ],
)
def test_times_that_say_nothing_are_refused(samples, message):
    with pytest.raises(ConfigError, match=message):
        fit_link(samples)


def test_bursts_that_say_nothing_are_refused():
    with pytest.raises(ConfigError, match="at least one burst, got none; measure one of all"):
        fit_incast([])
    with pytest.raises(ConfigError, match="at least two senders and times above 0, got Burst"):
        fit_incast([Burst(1, 1.0, 1.0)])
    with pytest.raises(ConfigError, match="at least two senders and times above 0"):
        fit_incast([Burst(2, 1.0, 0.0)])
