"""How a model pools, read from the files of sentence-transformers beside it."""

import json
from pathlib import Path

import pytest

from jaxserve.core.errors import CheckpointError, UnsupportedError
from jaxserve.models.pooling import PoolingConfig, read_pooling

STEPS = ("Transformer", "Pooling", "Normalize")


def write(folder: Path, *kinds: str, pooling: dict | None = None, **files: object) -> Path:
    """Write the files of a sentence-transformers model."""
    modules = [
        {
            "type": f"sentence_transformers.models.{kind}",
            "path": f"{number}_{kind}" if number else "",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    values = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_without_files_the_default_is_normalised(tmp_path: Path) -> None:
    for path in (None, tmp_path, tmp_path / "model.gguf"):
        assert read_pooling(path, default="cls") == PoolingConfig(pooling_type="cls")


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ],
)
def test_the_pooling_is_read(tmp_path: Path, pooling: dict, kind: str) -> None:
    found = read_pooling(write(tmp_path, *STEPS, pooling=pooling), default="mean")
    assert found == PoolingConfig(pooling_type=kind, normalize=True)


def test_what_is_not_said_is_not_done(tmp_path: Path) -> None:
    settings = {"max_seq_length": 99, "do_lower_case": True}
    folder = write(tmp_path, *STEPS[:2], sentence_bert_config=settings)
    found = read_pooling(folder, default="last")
    assert found == PoolingConfig(
        pooling_type="mean", normalize=False, max_length=99, lowercase=True
    )


def test_matryoshka_models_name_their_lengths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"matryoshka_dimensions": [8, 4]}')
    found = read_pooling(tmp_path, default="mean")
    assert (found.dimensions, found.is_matryoshka) == ((8, 4), True)


@pytest.mark.parametrize(
    "pooling",
    [
        {},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode": "sum"},
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, pooling: dict) -> None:
    with pytest.raises(UnsupportedError, match=r"found the pooling .*expected one of mean"):
        read_pooling(write(tmp_path, *STEPS, pooling=pooling), default="mean")


def test_other_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="found a module Dense, expected Transformer"):
        read_pooling(write(tmp_path, "Transformer", "Pooling", "Dense"), default="mean")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"type": "a.Pooling"}]', '[{"type": "P", "path": "../x"}]']
)
def test_a_damaged_list_of_steps_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a list of modules"):
        read_pooling(tmp_path, default="mean")
