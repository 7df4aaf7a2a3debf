"""Lines for the person at the terminal, and the way out."""

import logging
import os
import sys
from typing import NoReturn


def say(message: str) -> None:
    """Print one line at once, above progress bars if there are any."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm  # noqa: PLC0415  only where somebody else has loaded it

        tqdm.write(message, file=sys.stderr)
    else:
        sys.stderr.write(message + "\n")
    sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """End the process at once, with everything printed.

    A thread that is compiling can neither be stopped nor survive the interpreter, which would make
    an orderly exit crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)
