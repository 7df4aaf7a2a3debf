"""`jaxserve shard explain`: it says what JAX does, and refuses what does not divide."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxserve.cli.main import main
from jaxserve.cli.shard import read_config, rows_of
from jaxserve.core.errors import ConfigError
from jaxserve.models.registry import abstract_model, abstract_params, named_weights
from jaxserve.sharding.explain import NamedWeight, explain
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import EXPERT_AXIS, TENSOR_AXIS, LogicalAxisRules

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"


def weight(path: str, shape: tuple[int, ...], *axes: str | None) -> NamedWeight:
    return NamedWeight(path=path, shape=shape, axes=axes, itemsize=2)


EXPERTS = weight("layers.0.up", (6, 4, 8), "expert", "hidden", "mlp")
DENSE = weight("layers.0.down", (8, 4), "mlp", "hidden")
NORM = weight("norm", (4,), "hidden")


@pytest.mark.parametrize(
    ("name", "experts", "tensor"),
    [
        ("qwen3_moe_plain", 2, 2),
        ("gpt_oss_plain", 2, 4),
        ("deepseek_v3_plain", 4, 2),
        ("mixtral_plain", 4, 1),
        ("llama_gqa", 1, 2),
    ],
)
def test_it_says_what_jax_does(name: str, experts: int, tensor: int) -> None:
    """Shards of the very arrays, on eight devices."""
    _, state = abstract_model(read_config(str(GOLDEN / name)), dtype=jnp.dtype("bfloat16"))
    found = explain(named_weights(state), {EXPERT_AXIS: experts, TENSOR_AXIS: tensor})
    mesh = make_mesh(tensor, experts)
    expected = abstract_params(state, mesh=mesh, rules=LogicalAxisRules())
    assert {placement.weight.path for placement in found} == set(expected)
    for placement in found:
        spec = expected[placement.weight.path]
        shard = spec.sharding.shard_shape(spec.shape)
        assert placement.device_bytes == math.prod(shard) * spec.dtype.itemsize


def test_devices_along_both_axes_have_neighbours_in_one_layer() -> None:
    mesh = make_mesh(2, 4)
    assert mesh.axis_names == (EXPERT_AXIS, TENSOR_AXIS)
    assert mesh.devices.tolist() == [jax.local_devices()[i : i + 2] for i in (0, 2, 4, 6)]
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 x expert_parallel_size=3 needs"):
        make_mesh(3, 3)


def test_axes_of_one_device_split_nothing() -> None:
    found = explain([EXPERTS, NORM], {EXPERT_AXIS: 1, TENSOR_AXIS: 4})
    assert [placement.spec for placement in found] == [
        PartitionSpec(None, None, TENSOR_AXIS),
        PartitionSpec(None),
    ]
    assert [placement.device_bytes for placement in found] == [96, 8]


@pytest.mark.parametrize(
    ("weights", "sizes", "words"),
    [
        (
            [EXPERTS],
            {EXPERT_AXIS: 4},
            r"'expert' of 4 devices does not divide expert of layers\.0\.up \(6\); sizes that "
            r"divide all that lies on it: 1, 2, 3, 6\.",
        ),
        ([EXPERTS, DENSE], {TENSOR_AXIS: 3}, r"mlp of layers\.0\.up \(8\), mlp of layers\.0\.down"),
        ([DENSE] * 5, {TENSOR_AXIS: 5}, r"and 2 more; .*: 1, 2, 4, 8\."),
        ([DENSE], {EXPERT_AXIS: 2}, r"'expert' of 2 devices splits no weight .*; make it 1"),
        ([DENSE], {TENSOR_AXIS: 0}, r"must have at least 1 device, got 0"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(weights, sizes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(weights, sizes)


def test_layers_that_lie_alike_are_one_line() -> None:
    layers = [weight(f"layers.{i}.down", (8, 4), "mlp", "hidden") for i in (0, 1, 2, 4)]
    found = rows_of(explain([*layers, NORM], {TENSOR_AXIS: 2}))
    assert [(row.path, row.count) for row in found] == [
        ("layers.0-2.down", 3),
        ("layers.4.down", 1),
        ("norm", 1),
    ]


def test_people_and_programs_are_told_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["shard", "explain", str(GOLDEN / "qwen3_moe_plain" / "config.json")]
    assert main([*command, "--tp", "4", "--ep", "2", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen3_moe, ")
    assert lines[0].endswith("bfloat16, on 8 devices: expert 2, tensor 4")
    assert sum("(expert, -, tensor)" in line for line in lines) >= 2
    assert lines[-1].startswith("note: the cache is whole on each device")
    assert main([*command, "--tp", "4", "--ep", "2", "--dtype", "bfloat16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device_bytes"] == sum(entry["device_bytes"] for entry in said["weights"])
    assert said["bytes"] == sum(entry["bytes"] for entry in said["weights"])
    assert said["notes"] == lines[-len(said["notes"]) :]


def test_experts_on_all_devices_are_shown_as_served(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tp", "4", "--dp", "2", "--enable-expert-parallel"]
    assert main(["shard", "explain", str(GOLDEN / "qwen3_moe_plain"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("on 8 devices: data 2, tensor 2, copy 2")
    assert sum("(data+tensor+copy, -, -)" in line for line in lines) >= 2
    assert "its cache, lies on 2 devices" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ep", "5"], "does not divide expert of"),
        (["--tp", "0"], "at least 1 device, got 0"),
        (["--tp", "3"], "tensor_parallel_size=3 does not divide attention heads (4)"),
        (["--dp", "3", "--enable-expert-parallel"], "shares 8 experts among"),
        (["--ep", "2", "--dp", "2"], "leave it out, or leave out --dp"),
    ],
)
def test_the_command_fails_with_one_message(flags, words, capsys) -> None:
    assert main(["shard", "explain", str(GOLDEN / "qwen3_moe_plain"), *flags]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
