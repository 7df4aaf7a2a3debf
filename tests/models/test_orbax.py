"""Orbax checkpoints, written by this package or by training code, onto any mesh."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxserve.core.errors import CheckpointError, ModelNotFoundError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.hf_config_writer import write_hf_config
from jaxserve.models.loading import hf_name, load_params
from jaxserve.models.orbax import OrbaxCheckpoint, save_orbax
from jaxserve.models.registry import abstract_model, abstract_params, path_name
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import LogicalAxisRules
from tests.tiny import tiny_module

MODULE = tiny_module()
STATE = nnx.split(MODULE)[1]
ARRAYS = {path_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(STATE)}


def describe(dtype: str = "float32", devices: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = abstract_model(MODULE.config, dtype=jnp.dtype(dtype))
    return abstract_params(state, mesh=make_mesh(devices), rules=LogicalAxisRules())


def put_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_hf_config(MODULE.config, dtype="float32")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody changes."""
    folder = tmp_path_factory.mktemp("orbax")
    put_config(folder)
    save_orbax(ARRAYS, folder)
    return folder


def assert_same(found: dict[str, jax.Array], dtype: str = "float32") -> None:
    assert list(found) == list(describe())
    for path, value in found.items():
        np.testing.assert_array_equal(value, ARRAYS[path].astype(dtype), strict=True)


def test_what_was_written_is_read(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert isinstance(checkpoint, OrbaxCheckpoint)
    assert checkpoint.path == saved
    assert checkpoint.config.hidden_size == MODULE.config.hidden_size
    assert_same(load_params(checkpoint, describe()))
    assert checkpoint.tensor_shapes().keys() == {hf_name(path) for path in ARRAYS}
    name = "model.layers.1.mlp.up_proj.weight"
    value = checkpoint.read(name)
    assert value.shape == checkpoint.tensor_shapes()[name]
    np.testing.assert_array_equal(value, ARRAYS["layers.1.mlp.up_proj.kernel"].T)
    checkpoint.close()


def test_it_is_read_straight_onto_the_mesh_and_into_the_type(saved: Path) -> None:
    described = describe("bfloat16", devices=2)
    found = load_params(open_checkpoint(saved, "orbax"), described)
    assert_same(found, "bfloat16")
    for path, value in found.items():
        assert value.sharding == described[path].sharding
    kernel = found["layers.0.mlp.up_proj.kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(32, 32)] * 2
    assert_same(load_params(open_checkpoint(saved), describe(), dtype="float16"), "float16")


def save_current_state(folder: Path) -> None:
    ocp.save(folder, STATE)


def save_former_state(folder: Path) -> None:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, STATE)
        checkpointer.wait_until_finished()


def save_flat(folder: Path) -> None:
    ocp.save(folder, ARRAYS)


def save_branch(folder: Path) -> None:
    optimizer = {"mu": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}
    ocp.save(folder, {"params": nnx.to_pure_dict(STATE), "opt_state": optimizer})


@pytest.mark.parametrize("beside", ["inside", "in the parent"])
@pytest.mark.parametrize("save", [save_current_state, save_former_state, save_flat, save_branch])
def test_what_training_code_saves_is_read(tmp_path: Path, save, beside: str) -> None:
    folder = tmp_path / "run" / "step"
    save(folder)
    put_config(folder if beside == "inside" else folder.parent)
    assert_same(load_params(open_checkpoint(folder), describe()))


def test_several_groups_give_the_same(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.models.orbax._GROUP_BYTES", 5000)
    checkpoint = open_checkpoint(saved)
    names = list(checkpoint.tensor_shapes())
    found = dict(checkpoint.tensors(names))
    assert list(found) == names
    for path, value in ARRAYS.items():
        expected = value.T if path.endswith(".kernel") else value
        np.testing.assert_array_equal(found[hf_name(path)], expected, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("norm.scale"), "Leaves missing: norm.scale"),
        (
            lambda a: a.update(extra=jnp.zeros(3)),
            "Leaves without a place in the model: extra",
        ),
        (
            lambda a: a.update({"norm.scale": jnp.ones(31)}),
            r"Leaves of a wrong shape: norm.scale \(31,\) instead of \(32,\)",
        ),
    ],
)
def test_leaves_that_do_not_fit_are_named(tmp_path: Path, change, message: str) -> None:
    arrays = dict(ARRAYS)
    change(arrays)
    put_config(tmp_path)
    save_orbax(arrays, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_params(open_checkpoint(tmp_path), describe())


def test_a_tree_of_something_else_is_refused(tmp_path: Path) -> None:
    put_config(tmp_path)
    ocp.save(tmp_path / "params", {"step": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="found no embedding"):
        open_checkpoint(tmp_path)


def test_a_lost_configuration_is_said(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved / "params", tmp_path / "a" / "params")
    with pytest.raises(ModelNotFoundError, match=r"found no config.json in it or beside it"):
        open_checkpoint(tmp_path / "a")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    put_config(tmp_path)
    with pytest.raises(ModelNotFoundError, match="found no Orbax checkpoint, expected a folder"):
        open_checkpoint(tmp_path, "orbax")


def test_an_unknown_tensor_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.wait'. Did you mean"):
        open_checkpoint(saved).read("model.norm.wait")


def biggest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


LOAD = """
import sys
from jaxserve.core.errors import CheckpointError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import load_params
from tests.models.test_orbax import describe
for folder in sys.argv[1:]:
    try:
        load_params(open_checkpoint(folder), describe())
    except CheckpointError as error:
        print(error)
"""


def test_damage_is_said(tmp_path: Path, saved: Path) -> None:
    """In a process of its own.

    Orbax leaves reads running beside the one that failed, and what becomes of them would be
    blamed on whichever test runs next.
    """
    folders = [tmp_path / damage for damage in ("cut", "gone", "_METADATA", "manifest.ocdbt")]
    for folder in folders:
        shutil.copytree(saved, folder)
        data = biggest_file(folder / "params")
        if folder.name == "cut":
            data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        elif folder.name == "gone":
            data.unlink()
        else:
            (folder / "params" / "state" / folder.name).write_bytes(b"{")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [line for line in done.stdout.splitlines() if "Orbax cannot read it whole" in line]
    assert len(said) == len(folders), done.stdout
    for folder, message in zip(folders, said, strict=True):
        assert str(folder) in message
        assert "download it again" in message


def test_safetensors_files_win_over_an_orbax_folder(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path)
    assert isinstance(open_checkpoint(tmp_path, "orbax"), OrbaxCheckpoint)
