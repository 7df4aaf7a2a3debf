"""Words for those who change a running engine from outside."""

from dataclasses import dataclass
from typing import Literal, get_args

PauseMode = Literal["abort", "wait", "keep"]
"""What a pause does with requests: end them, let them finish, or freeze them."""

SleepTag = Literal["weights", "kv_cache", "scheduling"]
SLEEP_TAGS: tuple[SleepTag, ...] = get_args(SleepTag)
"""What can be asleep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What an update of the weights did.

    Attributes:
        version: Version of the weights from now on.
        seconds: From the call to the swap, waiting for the running step included.
        num_shared: Arrays that are served where they are.
        num_moved: Arrays that were copied to other devices or out of host memory.
        num_cast: Arrays whose dtype was changed.
    """

    version: str
    seconds: float
    num_shared: int
    num_moved: int
    num_cast: int
