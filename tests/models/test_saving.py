"""Safetensors files as transformers lays them out, and folders that are whole or not there."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from jaxserve.core.errors import CapacityError, ConfigError
from jaxserve.models.folders import new_folder
from jaxserve.models.saving import save_safetensors


def read_back(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_one_file_has_no_index(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.ones(2, np.float16)}
    assert save_safetensors(tensors.items(), tmp_path) == 28
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for name, value in read_back(tmp_path).items():
        np.testing.assert_array_equal(value, tensors[name], strict=True)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9), most=st.integers(1, 12))
def test_files_hold_as_much_as_they_may(tmp_path_factory, sizes: list[int], most: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": np.full(size, i, np.float32) for i, size in enumerate(sizes)}
    total = save_safetensors(tensors.items(), folder, shard_bytes=4 * most)
    assert total == 4 * sum(sizes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    found = read_back(folder)
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, tensors[name], strict=True)
    if len(files) == 1:
        assert files == ["model.safetensors"]
        assert sum(sizes) <= most
        return
    count = len(files)
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    held: dict[str, list[int]] = {}
    for name, file in index["weight_map"].items():
        held.setdefault(file, []).append(tensors[name].size)
    assert sorted(held) == files
    for sizes_of_file in held.values():
        assert sum(sizes_of_file) <= most or len(sizes_of_file) == 1


def test_the_type_can_be_changed_on_the_way(tmp_path: Path) -> None:
    save_safetensors([("a", np.array([1.0, 2.5], np.float32))], tmp_path, dtype=ml_dtypes.bfloat16)
    (found,) = read_back(tmp_path).values()
    np.testing.assert_array_equal(found, np.array([1.0, 2.5], ml_dtypes.bfloat16), strict=True)


def test_a_file_must_hold_something(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard size must be at least one byte, got 0"):
        save_safetensors([("a", np.ones(1))], tmp_path, shard_bytes=0)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        (folder / "inner" / "file").chmod(0o600)
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["deep"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((target / "inner" / "file").stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    writing = new_folder(tmp_path / "target")
    (writing.__enter__() / "file").write_text("x")
    interrupt = KeyboardInterrupt()
    assert not writing.__exit__(KeyboardInterrupt, interrupt, None)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "target" / "file").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_not_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("x")
    else:
        target.write_text("x")
    with pytest.raises(ConfigError, match=r"target exists already; remove it, or choose"):
        new_folder(target).__enter__()
    assert target.exists()


def test_what_comes_to_exist_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "target"
    writing = new_folder(target)
    (writing.__enter__() / "file").write_text("x")
    target.mkdir()
    (target / "mine").write_text("y")
    with pytest.raises(ConfigError, match="came to exist while it was being written"):
        writing.__exit__(None, None, None)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_too_little_space_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"too little space .* are missing"):
        new_folder(tmp_path / "target", num_bytes=1 << 60).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write .*file/target \(File exists\)"):
        new_folder(tmp_path / "file" / "target").__enter__()


FULL = """
import resource, sys, numpy as np
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from jaxserve.core.errors import CapacityError
from jaxserve.models.folders import new_folder
from jaxserve.models.saving import save_safetensors
try:
    with new_folder(Path(sys.argv[1])) as folder:
        if sys.argv[2] == "library":
            save_safetensors([("a", np.ones(50_000, np.float32))], folder)
        else:
            (folder / "file").write_bytes(bytes(200_000))
except CapacityError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["library", "python"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, writer: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "target", writer],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the disk is full while writing" in run.stdout
    assert list(tmp_path.iterdir()) == []
