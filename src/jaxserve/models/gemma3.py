"""Gemma 3 (text): Gemma 2 with norms on queries and keys, and frequencies of its own where near."""

from jaxserve.models.gemma2 import Gemma2


class Gemma3(Gemma2):
    """Gemma 3 (text): Gemma 2 with norms on queries and keys, and two kinds of rotation.

    Five layers of six see a window and rotate by `local_rope_theta`; the sixth sees everything.
    """
