"""Settings of sparse attention: one text, checked where it is read."""

import pytest

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.sparse import SparseConfig
from jaxserve.engine.sparse import tactic_config
from jaxserve.serve.flags import parse


def test_it_is_off_by_default():
    assert EngineConfig().sparse.sparse is None


def test_keys_and_values_are_read():
    made = SparseConfig.from_text(
        " p = 0.8,estimator=hyperbola, min_context=4096,tail=drop,failure_rate=0.1,segment=512,"
        "measure_every=100"
    )
    assert made == SparseConfig(
        p=0.8, estimator="hyperbola", min_context=4096, tail="drop", failure_rate=0.1, segment=512,
        measure_every=100,
    )  # fmt: skip


def test_the_flag_reaches_the_room():
    settings = parse(["--sparse-attention", "p=0.95,sinks=8,window=64"], {}).engine.sparse.sparse
    assert settings is not None
    room = tactic_config(settings)
    assert (room.p, room.sinks, room.window) == (0.95, 8, 64)
    assert room.clusters.segment_len == settings.segment
    assert room.estimator.name == "sampled"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key=value pairs such as p=0.9,min_context=4096, got ''"),
        ("0.9", "key=value pairs"),
        ("p=", "key=value pairs"),
        ("p=0.9,", "key=value pairs"),
        ("p=0.9,p=0.8", "names 'p' twice"),
        ("q=0.9", "no key 'q'"),
        ("min_contexts=4", "Did you mean 'min_context'"),
        ("p=0", "p must be above 0 and at most 1, got 0.0"),
        ("p=1.1", "p must be above 0 and at most 1, got 1.1"),
        ("p=nan", "p must be above 0 and at most 1, got nan"),
        ("p=much", "p must be a number, got 'much'"),
        ("p=0.9,window=0", "window must be at least 1, got 0"),
        ("p=0.9,window=1.5", "window must be a whole number, got '1.5'"),
        ("p=0.9,measure_every=-1", "measure_every must be at least 0"),
        ("p=0.9,estimator=sample", "estimator must be one of .*Did you mean 'sampled'"),
        ("p=0.9,tail=none", "tail must be one of mean, drop"),
        ("p=0.9,max_share=0", "max_share must be above 0"),
        ("p=0.9,failure_rate=0.6", "failure_rate must be above 0 and at most 0.5"),
        ("p=0.9,segment=1001", r"segment must be a multiple of cluster_size \(16\), got 1001"),
        ("p=0.9,sinks=1024", r"sinks must be fewer than segment \(1024\)"),
    ],
)
def test_what_cannot_be_is_refused_with_one_message(text, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings({"sparse_attention": text})


def test_only_a_text_is_taken():
    with pytest.raises(ConfigError, match=r"must be a text such as 'p=0.9,min_context=4096', got"):
        EngineConfig.from_settings({"sparse_attention": {"p": 0.9}})


@pytest.mark.parametrize("value", [True, None, [1]])
def test_values_of_another_kind_are_refused(value):
    with pytest.raises(ConfigError, match="p must be a number"):
        SparseConfig.from_mapping({"p": value})
