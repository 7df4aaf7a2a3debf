"""Impossible settings are refused, with a message that helps."""

import pytest

from jaxserve.attention.tactic.config import (
    ClusterConfig,
    EstimatorConfig,
    TacticConfig,
    check_choice,
    check_mass,
)
from jaxserve.core.errors import ConfigError


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, 90, float("nan")])
def test_a_share_of_the_mass_is_above_zero_and_at_most_one(p):
    with pytest.raises(ConfigError, match="above 0 and at most 1, got"):
        TacticConfig(p=p)
    with pytest.raises(ConfigError, match=r"0\.9 reads the tokens that hold nine tenths"):
        check_mass(p)


def test_all_of_the_mass_may_be_asked_for():
    assert TacticConfig(p=1.0).p == 1.0
    check_mass(1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"max_share": 0.0}, r"max_share must be in \(0, 1\], got 0.0"),
        ({"max_share": 1.5}, r"max_share must be in \(0, 1\], got 1.5"),
        ({"sinks": 8192}, r"sinks must be fewer than segment_len \(\d+\), got 8192"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TacticConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_size": 1}, "cluster_size must be at least 2, got 1"),
        ({"max_iterations": -1}, "max_iterations must be at least 0, got -1"),
        ({"segment_len": 100}, r"multiple of cluster_size \(16\), got 100; use 4096"),
    ],
)
def test_impossible_clusters(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"failure_rate": 0.0}, r"failure_rate must be in \(0, 0.5\], got 0.0"),
        ({"failure_rate": 0.6}, r"failure_rate must be in \(0, 0.5\], got 0.6"),
        ({"num_strata": 0}, "num_strata must be at least 1, got 0"),
        ({"samples_per_stratum": 1}, "samples_per_stratum must be at least 2, got 1"),
    ],
)
def test_impossible_estimators(settings, message):
    with pytest.raises(ConfigError, match=message):
        EstimatorConfig(**settings)


def test_unknown_choices_are_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="tail must be one of drop, mean, got 'guess'"):
        check_choice("tail", "guess", ("drop", "mean"))
    check_choice("tail", "mean", ("drop", "mean"))
