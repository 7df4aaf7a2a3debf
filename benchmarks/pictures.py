"""Pictures for the documentation, drawn from recorded results."""

import math
from typing import Any

from benchmarks.record import ROOT

IMAGES = ROOT / "docs" / "images"


def pyplot() -> Any:  # noqa: ANN401  a module
    """Return the module that draws.

    Raises:
        SystemExit: Without matplotlib.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("plots need matplotlib; install it: pip install matplotlib") from None
    return plt


def save(figure: Any, name: str, *, dpi: int = 90) -> None:  # noqa: ANN401  a figure
    """Write a figure below docs/images, the same bytes for the same figure.

    Args:
        figure: The figure.
        name: Of the file.
        dpi: Dots per inch.
    """
    IMAGES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=dpi, metadata={"Software": None})
    print(f"docs/images/{name}: {math.ceil((IMAGES / name).stat().st_size / 1000)} kB")
