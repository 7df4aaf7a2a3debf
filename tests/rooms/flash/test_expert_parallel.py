"""A tiny Qwen3-MoE whose experts are spread over eight devices, against the model on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks.rooms.flash import expert_parallel as model
from benchmarks.rooms.flash import served
from jaxserve.core.config import EngineConfig
from jaxserve.engine.parallel import check_model
from jaxserve.models.config import ModelConfig
from jaxserve.sharding.flash.transport import make_mesh

IDS = model.prompts(8, 1, 12, 1.2, 0)


def test_prompts_are_skewed_as_far_as_is_asked_for():
    even, skewed = (model.prompts(8, 4, 64, skew, 1) for skew in (0.0, 1.5))
    most = [np.bincount(ids.reshape(-1)).max() for ids in (even, skewed)]
    assert even.shape == skewed.shape == (32, 64)
    assert most[1] > 5 * most[0]


def test_ways_of_serving_are_settings_that_go_with_the_model():
    assert len(served.make_prompts()) == served.JOB["prompts"] <= served.SETTINGS["max_num_seqs"]
    for way in served.WAYS.values():
        config = EngineConfig.from_settings(served.SETTINGS | way)
        check_model(config.parallel, ModelConfig.from_hf(model.TINY))
        longest = served.JOB["length"] + served.JOB["max_tokens"]
        assert longest <= config.model.max_model_len


def test_rows_that_cross_are_counted():
    chosen = np.array([[0, 1, 8, 9], [8, 9, 10, 11], [0, 8, 16, 24], [24, 25, 26, 27]])
    # Tokens of servers 0 to 3; experts 0 to 7 lie on the first, and so on.
    assert model.wire_rows(chosen, 4, dedup=False, placed=None) == 2 + 0 + 3 + 0
    assert model.wire_rows(chosen, 4, dedup=True, placed=None) == 1 + 0 + 3 + 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eplb", "options"),
    [
        (False, {"backend": "dense", "dedup": False}),
        (True, {"backend": "ppermute", "dedup": True, "quantum": 8}),
    ],
)
def test_spread_experts_compute_the_same(eplb, options):
    graph, state = nnx.split(model.build())
    call = jax.jit(model.forward, static_argnums=0)
    wanted = np.asarray(call(graph, state, jnp.asarray(IDS)))
    chosen = model.choices(IDS)
    assert [one.shape for one in chosen] == [(IDS.size, model.TOP_K)] * 2
    mesh = make_mesh(2)
    placed = model.placements(chosen, 4, 2) if eplb else None
    graph, state = model.spread(mesh, placed, options)
    found = call(graph, state, jax.device_put(IDS, NamedSharding(mesh, model.OVER)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
