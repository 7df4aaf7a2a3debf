"""Settings of the tier router and the scaler."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from jaxserve.core.errors import ConfigError

FleetPace = Literal["tpot", "tpot_gap"]
"""How the target per token is read: as deadlines that early tokens bank for, or for every gap."""


def check_tiers(tiers: tuple[float, ...]) -> None:
    """Check targets per token.

    Raises:
        ConfigError: If they are not numbers of seconds, each longer than the one before.
    """
    are_times = all(math.isfinite(tau) and tau > 0 for tau in tiers)
    if not (tiers and are_times and all(a < b for a, b in itertools.pairwise(tiers))):
        raise ConfigError(
            f"tiers must be seconds per token, above zero and ascending, got {tiers!r}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolyServeConfig:
    """How requests are placed and servers counted.

    Attributes:
        tiers: Seconds per token of the bins, ascending (the paper's TPOT tiers).
        pace: How the target per token is read.
        margin: Share by which predicted times are raised.
        guard: Share of its pace that a server keeps when it hosts a looser tier's requests.
        max_step_s: Longest step in seconds that prompts are let fill, if nothing is due earlier;
            whoever arrives waits for the step under way.
        interference: How much of the prompts that a batch brings with it in the long run counts
            when the later tokens are checked; 0 looks at decodes only, 1 keeps every server below
            what it can do in a steady state.
        check_first: Whether the first token is checked.
        check_second: Whether the second one is.
        check_later: Whether the others are, and the cache.
        promotes: Whether tighter tiers host looser ones' requests once those are full.
        packs: Whether the fullest server is asked first; otherwise the emptiest is.
        max_probes: Servers of a tier that are asked one by one before steps are taken wider.
        initial_output: Output tokens to reckon with before lengths have been seen.
        initial_prompt: The same of prompts.
        scales: Whether servers are let drain that their tiers can do without.
        check_s: Seconds between checks of the scaler.
        hold_checks: Checks in a row at which it must hold that a server can be spared.
        cooldown_s: Seconds between two such changes of one tier.
        down_load: Load that the remaining servers may have, as a share of what they can do.
        drain_share: Share of a tier's servers that may be let drain at once; at least one.
        reserve_share: Share of the fleet that is kept warm and idle where servers are started and
            turned off; at least one server.
        start_s: Seconds that a server takes to start.

    Raises:
        ConfigError: If a value is out of its range.
    """

    tiers: tuple[float, ...] = (0.02, 0.03, 0.05, 0.1)
    pace: FleetPace = "tpot"
    margin: float = 0.0
    guard: float = 0.95
    max_step_s: float = 0.1
    interference: float = 0.0
    check_first: bool = True
    check_second: bool = True
    check_later: bool = True
    promotes: bool = True
    packs: bool = True
    max_probes: int = 6
    initial_output: float = 200.0
    initial_prompt: float = 1000.0
    scales: bool = True
    check_s: float = 2.0
    hold_checks: int = 3
    cooldown_s: float = 10.0
    down_load: float = 0.9
    drain_share: float = 0.05
    reserve_share: float = 0.02
    start_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every value."""
        check_tiers(self.tiers)
        for name, low, high in (
            ("margin", 0.0, 1.0),
            ("guard", 0.1, 1.0),
            ("max_step_s", 1e-3, 10.0),
            ("interference", 0.0, 1.0),
            ("max_probes", 1, 1 << 20),
            ("initial_output", 1.0, 1 << 20),
            ("initial_prompt", 1.0, 1 << 20),
            ("check_s", 1e-3, 600.0),
            ("hold_checks", 1, 1000),
            ("cooldown_s", 0.0, 3600.0),
            ("down_load", 0.1, 1.0),
            ("drain_share", 0.0, 1.0),
            ("reserve_share", 0.0, 1.0),
            ("start_s", 0.0, 3600.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, got {value}.")
        if self.pace not in ("tpot", "tpot_gap"):
            raise ConfigError(f"pace must be tpot or tpot_gap, got {self.pace!r}.")
