"""Whole experts on eight devices: every way of bringing results together, and experts that move."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.core.request import SamplingParams
from jaxserve.engine.experts import expert_sharding, nearest
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.parallel import check_model, mesh_of
from jaxserve.engine.weights import prepare_weights
from jaxserve.models.config import ModelConfig
from jaxserve.models.moe import Experts
from jaxserve.models.parts import ExpertsConfig
from jaxserve.models.registry import flatten_params
from jaxserve.models.spread import over_devices
from jaxserve.sharding.eplb import Layout, place
from jaxserve.sharding.experts import relocate
from jaxserve.sharding.flash.copies import slot_table
from jaxserve.sharding.mesh import engine_mesh
from jaxserve.sharding.rules import ExpertSharding, ModelSharding, expert_parallel_rules
from tests.cases import slow
from tests.tiny import Bench

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
MODEL, DENSE = "qwen3_moe_plain", "llama_gqa"
"""Eight experts, of which a token takes two, in two layers of three."""
SPREAD = {"data_parallel_size": 8, "enable_expert_parallel": True, "devices_per_server": 2}
REPEATED = {"enable_dp_attention": False}
EPLB = {"enable_eplb": True, "eplb_step_interval": 2}
SMALL = {
    "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 8, "block_size": 8,
    "num_gpu_blocks_override": 32, "load_format": "safetensors", "warmup": "lazy",
    "enable_prefix_caching": False,
}  # fmt: skip
PROMPTS = [[5, 9, 2, 17, 31, 8, 40, 41, 42, 43, 11, 12], [7, 7, 3]]
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, detokenize=False)
COMPUTED = sum(map(len, PROMPTS)) + len(PROMPTS) * 4
"""Tokens that pass through the model; the last one of each request does not."""


def bench(**changes: object) -> Bench:
    return Bench(str(GOLDEN / MODEL), **SMALL | changes)


def tokens(engine: Bench) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, [GREEDY] * 2)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return tokens(bench())


@pytest.mark.parametrize(
    "changes",
    [
        slow({"all_to_all_backend": "dense"}),
        {"all_to_all_backend": "dense", **REPEATED},
        slow({"all_to_all_backend": "rotation", **REPEATED}),
        slow({"all_to_all_backend": "flash", "all_to_all_dedup": False, **REPEATED}),
        slow({"all_to_all_backend": "allreduce", **REPEATED}),
        slow({"all_to_all_backend": "dense", "all_to_all_dedup": False}),
        {"all_to_all_backend": "rotation"},
        slow({"all_to_all_backend": "rotation", "all_to_all_dedup": False}),
        {"all_to_all_backend": "flash"},
        slow({"all_to_all_backend": "flash", "all_to_all_dedup": False}),
        slow({"all_to_all_backend": "flash", "devices_per_server": 4}),
        {
            "all_to_all_backend": "flash", "tensor_parallel_size": 2, "data_parallel_size": 4,
            "all_to_all_dedup": False, "kv_layout": "pages",
        },
    ],
)  # fmt: skip
def test_every_way_gives_the_tokens_of_one_device(alone, changes: dict[str, Any]) -> None:
    assert tokens(bench(**SPREAD | changes)) == alone


@pytest.mark.parametrize(
    "changes",
    [
        {"num_redundant_experts": 8, **REPEATED},
        slow({"num_redundant_experts": 8}),
        {"num_redundant_experts": 8, "all_to_all_backend": "flash"},
        slow({"all_to_all_backend": "rotation"}),
        slow(
            {
                "num_redundant_experts": 16, "all_to_all_backend": "flash",
                "all_to_all_dedup": False, "tensor_parallel_size": 2, "data_parallel_size": 4,
            }
        ),
    ],
)  # fmt: skip
def test_experts_move_and_tokens_stay(alone, changes: dict[str, Any]) -> None:
    made = bench(**SPREAD | EPLB | changes)
    runner, metrics = made.engine.runner, made.metrics
    before = flatten_params(runner.params)
    assert tokens(made) == alone
    num_compiled = metrics.num_compilations
    assert tokens(made) == alone
    assert metrics.num_compilations == num_compiled
    # Each of two runs has passed every token through two experts of each of two layers.
    loads = runner.expert_loads()
    assert loads.sum(axis=1).tolist() == [2 * 2 * COMPUTED] * 2
    if "num_redundant_experts" in changes:
        assert metrics.num_rebalances > 0
        assert metrics.num_moved_experts > 0
        assert metrics.imbalance[1] <= metrics.imbalance[0]
    page = metrics.render("m")
    assert 'jaxserve:expert_load_imbalance{engine="0",model_name="m",placement="after"}' in page
    # Others see the same weights in the same order wherever they lie.
    after = flatten_params(runner.params)
    assert list(before) == list(after)
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)


def test_weights_are_replaced_and_put_to_sleep_wherever_experts_lie(alone) -> None:
    made = bench(**SPREAD | EPLB | {"num_redundant_experts": 8})
    runner, lifecycle = made.engine.runner, Lifecycle(made.engine)

    def wait(future: Any) -> Any:
        made.engine.step()
        return future.result(timeout=0)

    assert tokens(made) == alone
    old = {path: np.asarray(value) for path, value in flatten_params(runner.params).items()}
    turned = {
        path: np.flip(value, axis=0).copy() if ".experts." in path else value
        for path, value in old.items()
    }
    wait(lifecycle.update(prepare_weights(turned, runner.param_specs)))
    assert tokens(made) != alone
    wait(lifecycle.sleep(1))
    assert not runner.has_params
    assert wait(lifecycle.wake_up())
    for path, value in flatten_params(runner.params).items():
        np.testing.assert_array_equal(value, turned[path], err_msg=path)
    part = {path: value for path, value in old.items() if ".experts." in path}
    wait(lifecycle.update(prepare_weights(part, runner.param_specs, partial=True)))
    assert tokens(made) == alone


# One layer ----------------------------------------------------------------------------------------

HIDDEN, EXPERTS, TOP_K = 8, 16, 3
SHAPE = ExpertsConfig(num_experts=EXPERTS, top_k=TOP_K, inner_size=4, has_bias=True)
SIZES = ModelConfig.from_hf(
    {
        "model_type": "qwen3_moe", "vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 4,
    }
)  # fmt: skip
LAYOUT = Layout(num_experts=EXPERTS, num_devices=8, num_slots=24, num_servers=4)


@functools.cache
def layer(count: int, backend: str | None, *, dedup: bool, placed: bool, groups: int = 1):
    """Compile a layer of experts for so many tokens; the same experts each time."""
    sharding = ModelSharding(
        mesh=engine_mesh(8 // max(groups, 4), max(groups, 4)),
        groups=groups,
        rules=expert_parallel_rules(),
        experts=ExpertSharding(
            servers=4, num_slots=24 if placed else EXPERTS, backend=backend, dedup=dedup
        ),
    )
    whole = Experts(SIZES, SHAPE, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(3))
    for part in (whole.gate_proj, whole.up_proj, whole.down_proj):
        part.bias[...] = jax.random.normal(jax.random.key(1), part.bias.shape)
    graph, state = nnx.split(whole)

    def run(state, x, expert, weight, source, table):
        taken = jax.tree.map(lambda leaf: leaf[source], state) if placed else state
        choice = jnp.where(expert < 0, EXPERTS, expert), weight
        return over_devices(nnx.merge(graph, taken), x, choice, sharding, table)

    return whole, functools.partial(jax.jit(run), state)


def routing(seed: int, kind: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random((count, EXPERTS))
    if kind == "one device":  # experts 4 and 5 lie on the third, and a third one beside it
        scores[:, 4:7] += 2
    expert = np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int32)
    if kind == "padding":
        expert[rng.random(count) < 0.6] = -1
    elif kind == "none":
        expert[:] = -1
    weight = rng.random((count, TOP_K)).astype(np.float32)
    return rng.standard_normal((count, HIDDEN)).astype(np.float32), expert, weight


WAYS = [
    (None, True, True, 1),
    ("dense", True, False, 1),
    ("dense", False, False, 1),
    ("rotation", True, True, 1),
    ("rotation", False, False, 1),
    ("ppermute", True, True, 1),
    ("ppermute", False, False, 1),
    (None, True, False, 4),
    (None, True, True, 8),
    ("dense", True, False, 8),
    ("rotation", False, False, 4),
    ("ppermute", True, True, 4),
]


@pytest.mark.parametrize(
    ("backend", "dedup", "placed", "groups"),
    [way if way in (WAYS[3], WAYS[6], WAYS[7], WAYS[11]) else slow(*way) for way in WAYS],
)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["any", "one device", "padding", "none"]))
@settings(max_examples=8)
def test_a_layer_adds_up_what_experts_make_and_nothing_overflows(
    backend: str | None, dedup: bool, placed: bool, groups: int, seed: int, kind: str
) -> None:
    """Against the experts one by one, also where all ask for those of one device."""
    count = 21 if groups == 1 else 5 * groups  # no multiple of the devices, or of a group's
    whole, run = layer(count, backend, dedup=dedup, placed=placed, groups=groups)
    x, expert, weight = routing(seed, kind, count)
    where = place(np.bincount(expert[expert >= 0], minlength=EXPERTS).astype(float), LAYOUT)
    found = run(x, expert, weight, where.expert, slot_table(where) if placed else None)
    wanted = np.zeros((count, HIDDEN))
    for t, k in np.argwhere(expert >= 0):
        one = whole._of_one(jnp.asarray(x[t][None]), jnp.int32(expert[t, k]))
        wanted[t] += weight[t, k] * np.asarray(one[0], np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5)
    assert (np.asarray(found)[(expert < 0).all(axis=1)] == 0).all()


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([(16, 16), (16, 24), (24, 16), (24, 24)]))
def test_slots_get_the_weights_of_their_experts(seed: int, counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    held, wanted = (
        np.concatenate([rng.permutation(16), rng.integers(0, 16, n - 16)]) for n in counts
    )
    mesh = engine_mesh(2, 4)
    axes = ("data", "tensor")
    over = NamedSharding(mesh, PartitionSpec(axes))
    leaf = jax.device_put(held[:, None].astype(np.float32) + np.zeros(3, np.float32), over)
    source = nearest(held, wanted, 8)
    moved = _mover(mesh, axes)(leaf, source)
    assert moved.sharding.is_equivalent_to(over, 2)
    np.testing.assert_array_equal(moved, wanted[:, None] + np.zeros(3))


@functools.cache
def _mover(mesh, axes):
    return jax.jit(functools.partial(relocate, mesh=mesh, axes=axes))


def test_what_stays_does_not_travel() -> None:
    held = np.arange(16)
    assert nearest(held, held, 8).tolist() == held.tolist()
    # A copy on the device itself is taken before one of the next.
    assert nearest(np.array([0, 1, 1, 0]), np.array([1, 0, 1, 1]), 2).tolist() == [1, 0, 2, 2]


# What is refused ----------------------------------------------------------------------------------


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"all_to_all_backend": "flash"}, "all_to_all_backend=flash: experts must lie on several"),
        ({"enable_eplb": True}, "enable_eplb: experts must lie on several devices"),
        ({"devices_per_server": 2}, "devices_per_server=2: experts must lie on several"),
        ({"num_redundant_experts": 8}, "num_redundant_experts=8 needs enable_eplb"),
        ({"all_to_all_backend": "flush"}, "must be one of auto, allreduce, dense, rotation, flash"),
        ({"eplb_step_interval": 0}, "eplb_step_interval must be at least 1, got 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelOptions(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (DENSE, {"all_to_all_backend": "flash"}, "needs a model with experts"),
        (
            MODEL,
            EPLB | {"num_redundant_experts": 12},
            r"num_redundant_experts=12 must be a multiple of the 8 devices, .* use 8 or 16\.",
        ),
        (MODEL, EPLB | {"num_redundant_experts": 64}, "72 slots are more than one of each"),
        (MODEL, {"devices_per_server": 3, "enable_eplb": True}, "=3 does not divide the 8 devices"),
        (
            MODEL,
            {"all_to_all_backend": "flash", "devices_per_server": None},
            "=flash sends between servers, and all devices here are of one; use allreduce, or",
        ),
        (
            MODEL,
            {"all_to_all_backend": "flash", "devices_per_server": 1},
            "devices for which XLA has a ragged all-to-all, and CPUs are none; use 'rotation'",
        ),
        (
            MODEL,
            {"data_parallel_size": 1, "all_to_all_backend": "dense", "devices_per_server": None},
            "share experts among devices, and there is one",
        ),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(name, changes, words: str) -> None:
    options = ParallelOptions(**SPREAD | changes)
    with pytest.raises(ConfigError, match=words):
        mesh_of(options, config_of(name))


class _Device:
    """Stands where a device of another host would."""

    platform = "gpu"

    def __init__(self, process_index: int, number: int) -> None:
        self.process_index, self.id = process_index, number


def test_servers_that_cross_hosts_are_refused(monkeypatch) -> None:
    devices = [_Device(host, host * 2 + i) for host in range(4) for i in range(2)]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    options = ParallelOptions(**SPREAD | {"devices_per_server": 4, "enable_eplb": True})
    check_model(options, config_of(MODEL))
    with pytest.raises(
        ConfigError, match=r"GPUs of a server must be on one host, got hosts \[0, 1"
    ):
        mesh_of(options, config_of(MODEL))
    fitting = ParallelOptions(**SPREAD | {"devices_per_server": None, "enable_eplb": True})
    found = expert_sharding(fitting, config_of(MODEL), mesh_of(fitting, config_of(MODEL)), groups=1)
    assert found is not None
    assert found.servers == 4


def test_tokens_are_sent_where_groups_have_their_own_and_links_are_slow() -> None:
    shape = config_of(MODEL)
    for changes, groups, wanted in (
        ({}, 8, "rotation"),
        ({}, 1, None),
        ({"devices_per_server": 8}, 8, None),
        ({"all_to_all_backend": "allreduce"}, 8, None),
        ({"all_to_all_backend": "flash"}, 1, "ppermute"),
    ):
        options = ParallelOptions(**SPREAD | changes)
        found = expert_sharding(options, shape, mesh_of(options, shape), groups=groups)
        assert (found and found.backend) == wanted


def test_invariance_and_balance_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="batch_invariant cannot be kept with enable_eplb"):
        EngineConfig.from_settings(SPREAD | EPLB | {"batch_invariant": True})
