"""Lines for the person at the terminal."""

import sys


def say(message: str) -> None:
    """Print one line, at once."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
