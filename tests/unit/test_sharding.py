import jax
import pytest
from jax.sharding import PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import TENSOR_AXIS, LogicalAxisRules


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_mesh_takes_the_first_devices(size):
    mesh = make_mesh(size)
    assert mesh.axis_names == (TENSOR_AXIS,)
    assert mesh.devices.tolist() == jax.local_devices()[:size]


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=999 needs as many devices, found"):
        make_mesh(999)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("hidden", "q_heads"), PartitionSpec(None, TENSOR_AXIS)),
        (("mlp", "hidden"), PartitionSpec(TENSOR_AXIS, None)),
        (("vocab", "hidden"), PartitionSpec(TENSOR_AXIS, None)),
        ((None, "kv_heads", "head_dim"), PartitionSpec(None, TENSOR_AXIS, None)),
        ((), PartitionSpec()),
    ],
)
def test_names_of_axes_become_specs(axes, spec):
    assert LogicalAxisRules().spec(axes, (TENSOR_AXIS,)) == spec


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown logical axis 'head'; known: expert, head_dim"):
        LogicalAxisRules().spec(("head",))


def test_one_mesh_axis_carries_one_axis_of_an_array():
    with pytest.raises(ConfigError, match="use one mesh axis twice"):
        LogicalAxisRules().spec(("vocab", "mlp"))


def test_an_axis_that_cannot_be_split_evenly_is_replicated():
    rules, mesh = LogicalAxisRules(), make_mesh(4)
    split = rules.sharding(("hidden", "mlp"), (6, 8), mesh)
    assert split.spec == PartitionSpec(None, TENSOR_AXIS)
    whole = rules.sharding(("hidden", "mlp"), (6, 10), mesh)
    assert whole.spec == PartitionSpec(None, None)
    assert whole.is_fully_replicated


def test_a_mesh_without_the_axis_replicates():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert LogicalAxisRules().sharding(("mlp",), (8,), mesh).is_fully_replicated


def test_own_rules_take_the_place_of_the_defaults():
    rules = LogicalAxisRules(mesh_axis={"mlp": None, "hidden": "x"})
    assert rules.spec(("hidden", "mlp")) == PartitionSpec("x", None)
