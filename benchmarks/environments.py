"""Virtual environments of programs that jaxserve is tried with: one each, pinned, made once.

What an environment holds is written in `pins/NAME.in`, exact versions in `pins/NAME.txt`, which
`scripts/pin` resolves. Where the former begins with `# no-deps`, dependencies are left out. The
environments lie below `build/environments`, or below the folder that ENVIRONMENTS names, and are
made again when their pins change.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.record import ROOT

PINS = Path(__file__).resolve().parent / "pins"


class EnvironmentFailedError(RuntimeError):
    """An environment could not be made; the message is what the installer said."""


def names() -> list[str]:
    """Return the environments that are described."""
    return sorted(path.stem for path in PINS.glob("*.in"))


def python_of(name: str, *, folder: Path | None = None) -> Path:
    """Return the Python of an environment, which is made first if it is missing or outdated.

    Args:
        name: One of `names`.
        folder: Where environments lie; None: ENVIRONMENTS, else `build/environments`.

    Raises:
        EnvironmentFailedError: If it cannot be made.
    """
    pins = PINS / f"{name}.txt"
    place = folder or Path(os.environ.get("ENVIRONMENTS") or ROOT / "build" / "environments")
    home = place / name
    python, stamp = home / "bin" / "python", home / ".stamp"
    wanted = f"{sys.version_info[:2]} {hashlib.sha256(pins.read_bytes()).hexdigest()}"
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    uv = str(ROOT / "scripts" / "uv")
    _install([uv, "venv", "--quiet", "--python", sys.executable, str(home)], name)
    packages = ["--python", str(python), "--requirement", str(pins)]
    if (PINS / f"{name}.in").read_text().startswith("# no-deps"):
        packages.append("--no-deps")
    _install([uv, "pip", "install", "--quiet", "--compile-bytecode", *packages], name)
    stamp.write_text(wanted)
    return python


def _install(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise EnvironmentFailedError(f"the environment {name} cannot be made: {tail}")
