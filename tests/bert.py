"""The tiny BERT checkpoints, and an encoder that a test may hold up."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "oracles" / "golden"
BERT = GOLDEN / "bert"


def golden(name: str) -> dict[str, np.ndarray]:
    """Return what transformers computed from a tiny checkpoint."""
    with np.load(BERT / name / "golden.npz") as data:
        return dict(data)


def rows(case: dict[str, np.ndarray]) -> list[list[int]]:
    """Return the token ids of each text without padding."""
    pairs = zip(case["tokens"], case["lengths"], strict=True)
    return [tokens[:length].tolist() for tokens, length in pairs]


def pooled(case: dict[str, np.ndarray], how: str, *, normalize: bool = True) -> np.ndarray:
    """Pool golden states in float64, the obvious way."""
    vectors: list[Any] = []
    for states, length in zip(case["hidden"].astype(np.float64), case["lengths"], strict=True):
        own = states[:length]
        ways = {"mean": own.mean(0), "max": own.max(0), "cls": own[0], "last": own[-1]}
        vectors.append(ways[how])
    made = np.asarray(vectors)
    return made / np.linalg.norm(made, axis=1, keepdims=True) if normalize else made


def copy_of(name: str, folder: Path) -> Path:
    """Copy a tiny checkpoint, so that a test may change it."""
    shutil.copytree(BERT / name, folder)
    return folder
